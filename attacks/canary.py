"""Canaries: known contributions put into a run by coin flips, and the lower bound on epsilon that their
traces prove.

A mechanism that claims (epsilon, delta) makes it hard to tell included canaries from left-out ones. When
they are told apart too well the claim is false, with a stated confidence: `lower_bound` turns scores into the
largest epsilon the data still reject. Compare with the ledger's upper bound; a lower bound above it is an
alarm.

Methods: "one_run" (Steinke et al., "Privacy Auditing with One (1) Training Run", 2023, theorem 5.2 and
appendix D), "one_run_fdp" (Mahloujifar et al., "Auditing f-Differential Privacy in One Run", 2024, algorithm
3, Gaussian family), "clopper_pearson" (one threshold, chosen on half of the canaries), "gaussian" (effect
size with its non- central t interval; assumes Gaussian scores).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri
from scipy.stats import beta, binom, nct, norm
from torch import Tensor

Method = Literal["one_run", "one_run_fdp", "clopper_pearson", "gaussian"]
Floats = NDArray[np.float64]

_LARGEST_EPSILON = 60.0
_GUESS_SHARES = (0.01, 0.03, 0.1, 0.3, 1.0)


ASSUMPTIONS: dict[Method, str] = {
    "one_run": "assumes nothing but fair coins",
    "one_run_fdp": "assumes nothing but fair coins and a trade-off no worse than a Gaussian one",
    "clopper_pearson": "assumes independent canaries",
    "gaussian": "assumes Gaussian scores of one variance",
}
# Of the bounds that are printed: a thousand audits of an honest mechanism should hold no alarm. The first has
# slack.
FREE_SIGNIFICANCE, GAUSSIAN_SIGNIFICANCE = 0.01, 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class LowerBound:
    """State that epsilon is at least this much, wrong with probability at most `significance`."""

    epsilon: float
    method: Method
    canaries: int
    significance: float
    delta: float = 0.0

    @property
    def assumes(self) -> str:
        """Say what the bound assumes."""
        return ASSUMPTIONS[self.method]


def lower_bound(
    scores_in: Sequence[float] | Floats,
    scores_out: Sequence[float] | Floats,
    delta: float,
    significance: float = 0.05,
    method: Method = "one_run_fdp",
) -> LowerBound:
    """Return a lower bound on epsilon from the scores of included and left-out canaries; higher scores mean
    "included".

    Guarantee: for one_run and one_run_fdp the bound exceeds the true epsilon with probability at most
    `significance`, if every canary was included by its own fair coin; thresholds are ranks fixed beforehand
    and pay for being several. Raises: ValueError for an unknown method, delta outside [0, 1), significance
    outside (0, 1), or fewer than 2 scores on a side.
    """
    members, others = np.asarray(scores_in, dtype=float), np.asarray(scores_out, dtype=float)
    _check(members, others, delta, significance, method)
    bounds: dict[str, Callable[[], float]] = {
        "one_run": lambda: _by_ranks(members, others, delta, significance, one_run_epsilon),
        "one_run_fdp": lambda: _by_ranks(members, others, delta, significance, fdp_epsilon),
        "clopper_pearson": lambda: _clopper_pearson(members, others, delta, significance),
        "gaussian": lambda: _gaussian(members, others, delta, significance),
    }
    return LowerBound(
        epsilon=max(0.0, bounds[method]()),
        method=method,
        canaries=len(members) + len(others),
        significance=significance,
        delta=delta,
    )


def bounds(
    scores_in: Sequence[float] | Floats, scores_out: Sequence[float] | Floats, delta: float, *, gaussian: bool
) -> tuple[LowerBound, ...]:
    """Return the lower bounds to print, the one of least assumptions first: f-DP in one run, and the Gaussian
    fit where valid.

    `gaussian` says that the mechanism adds Gaussian noise to a contribution that is there or not, without
    sampling.
    """
    free = lower_bound(scores_in, scores_out, delta, FREE_SIGNIFICANCE)
    if not gaussian:
        return (free,)
    return free, lower_bound(scores_in, scores_out, delta, GAUSSIAN_SIGNIFICANCE, "gaussian")


def _check(members: Floats, others: Floats, delta: float, significance: float, method: str) -> None:
    problems = []
    if method not in get_args(Method):
        problems.append(f"method is {method!r}, must be one of {get_args(Method)}")
    if not 0.0 <= delta < 1.0:
        problems.append(f"delta is {delta}, must lie in [0, 1)")
    if not 0.0 < significance < 1.0:
        problems.append(f"significance is {significance}, must lie in (0, 1)")
    if min(len(members), len(others)) < 2:
        problems.append(f"scores: {len(members)} in and {len(others)} out, both need at least 2")
    elif not (np.isfinite(members).all() and np.isfinite(others).all()):
        problems.append("scores must be finite")
    if problems:
        raise ValueError("; ".join(problems))


# --------------------------------------------------------------------------------------------- one-run audits


def one_run_p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Return the chance that an (epsilon, delta) mechanism lets an observer guess this well.

    Source: Steinke et al., theorem 5.2: beta + alpha 2 m delta, with beta the binomial tail and alpha the
    steepest mean of its terms.
    """
    rate = 1.0 / (1.0 + math.exp(-epsilon))
    tail = float(binom.sf(correct - 1, guesses, rate))
    if delta == 0.0 or correct == 0:
        return min(1.0, tail)
    steps = np.arange(1, correct + 1)
    slope = float((np.cumsum(binom.pmf(correct - steps, guesses, rate)) / steps).max())
    return min(1.0, tail + 2 * canaries * delta * max(0.0, slope))


def one_run_epsilon(canaries: int, guesses: int, correct: int, delta: float, significance: float) -> float:
    """Return the largest epsilon that the guesses reject:
    the p-value there is still below the significance.
    """
    return _largest_rejected(
        lambda epsilon: one_run_p_value(canaries, guesses, correct, epsilon, delta) < significance
    )


@lru_cache(maxsize=4_096)  # there are few counts, and many audits meet the same ones
def fdp_epsilon(canaries: int, guesses: int, correct: int, delta: float, significance: float) -> float:
    """Return the epsilon at delta of the largest Gaussian trade-off curve that the guesses reject (0 at delta
    0).

    Source: Mahloujifar et al., algorithm 3, with abstentions.
    """
    if delta == 0.0:
        return 0.0
    rejected = _largest_rejected(lambda mu: _rejects_gaussian(mu, canaries, guesses, correct, significance))
    return gaussian_epsilon(rejected, delta)


def _rejects_gaussian(mu: float, canaries: int, guesses: int, correct: int, significance: float) -> bool:
    wrong_mass = significance / canaries * (guesses - correct)
    right_mass = significance / canaries * correct
    for index in range(correct - 1, -1, -1):
        grown = max(wrong_mass, float(ndtr(ndtri(right_mass) - mu)))
        right_mass += index / (guesses - index) * (grown - wrong_mass)
        wrong_mass = grown
        if right_mass >= 1.0:
            return True
    return right_mass + wrong_mass > guesses / canaries


def _largest_rejected(rejects: Callable[[float], bool]) -> float:
    if not rejects(1e-6):
        return 0.0
    low, high = 1e-6, 1.0
    while rejects(high) and high < _LARGEST_EPSILON:
        low, high = high, 2 * high
    for _ in range(30):
        middle = (low + high) / 2
        if rejects(middle):
            low, high = (middle, high)
        else:
            low, high = (low, middle)
    return low


def _by_ranks(
    members: Floats,
    others: Floats,
    delta: float,
    significance: float,
    bound: Callable[[int, int, int, float, float], float],
) -> float:
    """Guess the highest ranks "in" and the lowest "out", for shares fixed beforehand, and pay for trying
    several.
    """
    total = len(members) + len(others)
    truth = np.concatenate([np.ones(len(members), dtype=bool), np.zeros(len(others), dtype=bool)])
    order = np.argsort(-np.concatenate([members, others]), kind="stable")
    ranked = truth[order]
    best = 0.0
    for share in _GUESS_SHARES:
        half = max(1, int(share * total / 2))
        correct = int(ranked[:half].sum() + (~ranked[-half:]).sum())
        best = max(best, bound(total, 2 * half, correct, delta, significance / len(_GUESS_SHARES)))
    return best


# ---------------------------------------------------------------------------- counts and Gaussian effect size


def clopper_pearson(successes: int, trials: int, significance: float) -> tuple[float, float]:
    """Return the one-sided lower and the one-sided upper bound of a rate, each wrong with probability at most
    the significance.
    """
    low = 0.0
    if successes != 0:
        low = float(beta.ppf(significance, successes, trials - successes + 1))
    high = 1.0
    if successes != trials:
        high = float(beta.ppf(1 - significance, successes + 1, trials - successes))
    return low, high


def rates_epsilon(
    true_positives: int, members: int, false_positives: int, others: int, delta: float, significance: float
) -> float:
    """Return log((TPR - delta) / FPR) with both rates at the bad end of their interval, or 0.

    Source: Jagielski et al., 2020.
    """
    low, _ = clopper_pearson(true_positives, members, significance / 2)
    _, high = clopper_pearson(false_positives, others, significance / 2)
    if low > delta and low - delta > high:
        return math.log((low - delta) / high)
    return 0.0


def _clopper_pearson(members: Floats, others: Floats, delta: float, significance: float) -> float:
    choose_in, choose_out, use_in, use_out = members[0::2], others[0::2], members[1::2], others[1::2]

    def epsilon(threshold: float, inside: Floats, outside: Floats, upward: bool) -> float:
        if upward:
            first, second = inside > threshold, outside > threshold
        else:
            first, second = outside <= threshold, inside <= threshold
        return rates_epsilon(
            int(first.sum()), len(first), int(second.sum()), len(second), delta, significance
        )

    grid = np.unique(np.quantile(np.concatenate([choose_in, choose_out]), np.linspace(0.01, 0.99, 33)))
    trials = [
        (epsilon(level, choose_in, choose_out, up), level, up) for level in grid for up in (True, False)
    ]
    _, level, up = max(trials)
    return epsilon(level, use_in, use_out, up)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return the epsilon at delta of the Gaussian trade-off curve with separation mu.

    Source: Balle and Wang, 2018, theorem 8.
    """
    if mu <= 0.0 or delta <= 0.0:
        if mu <= 0.0:
            return 0.0
        return math.inf

    def excess(epsilon: float) -> float:
        second = math.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu))
        return float(norm.cdf(mu / 2 - epsilon / mu)) - second - delta

    if excess(0.0) <= 0.0:
        return 0.0
    high = 1.0
    while excess(high) > 0.0:
        high *= 2
    return float(brentq(excess, 0.0, high, xtol=1e-12))


def gaussian_separation(members: Floats, others: Floats, significance: float) -> float:
    """Return a lower confidence bound on (mean in - mean out) / standard deviation.

    Assumes: both groups are Gaussian with one variance; then the t statistic is non-central t. Source:
    Cumming, 2001, equation 7.
    """
    freedom = len(members) + len(others) - 2
    pooled = ((len(members) - 1) * members.var(ddof=1) + (len(others) - 1) * others.var(ddof=1)) / freedom
    size = math.sqrt(len(members) * len(others) / (len(members) + len(others)))
    gap = float(members.mean() - others.mean())
    if pooled <= 0.0:
        if gap > 0.0:
            return math.inf
        return 0.0
    statistic = gap / math.sqrt(float(pooled)) * size
    if not nct.sf(statistic, freedom, 0.0) < significance:
        return 0.0
    if statistic > 30.0:
        # The non-central t is numerically out of reach there; its normal limit is close (Johnson and Welch,
        # 1940).
        return float(
            (statistic - norm.isf(significance) * math.sqrt(1 + statistic**2 / (2 * freedom))) / size
        )
    centre = brentq(lambda shift: float(nct.sf(statistic, freedom, shift)) - significance, 0.0, statistic)
    return float(centre) / size


def _gaussian(members: Floats, others: Floats, delta: float, significance: float) -> float:
    separation = gaussian_separation(members, others, significance)
    if math.isinf(separation):
        return math.inf
    return gaussian_epsilon(separation, delta)


# ---------------------------------------------------------------------------------------- anytime-valid audit


@dataclass(frozen=True, slots=True, kw_only=True)
class SequentialAudit:
    """Test a claimed (epsilon, delta) while canaries come in, with the right to stop at any time.

    Each canary is included by a fair coin; the auditor guesses "in", "out" or abstains. A right guess pays 1,
    a wrong one costs e^epsilon, each guess costs delta: an honest mechanism makes this a losing bet on
    average, so the wealth of a bettor starting at 1 exceeds 1 / significance with probability at most
    `significance`, ever (Ville, 1939). Several stakes are averaged.

    Guarantee: `violated` is wrong with probability at most `significance`, however often one looks.
    """

    epsilon: float
    delta: float = 0.0
    significance: float = 0.01
    wealth: tuple[float, ...] = (1.0,) * 6
    guesses: int = 0

    @property
    def evidence(self) -> float:
        """Return the mean wealth: the betting score against the claim."""
        return sum(self.wealth) / len(self.wealth)

    @property
    def violated(self) -> bool:
        """Say whether the claim is refuted."""
        return self.evidence >= 1.0 / self.significance

    def observe(self, correct: bool | None) -> SequentialAudit:
        """Return the audit after one more canary; None means the auditor abstained."""
        if correct is None:
            return self
        loss = math.exp(self.epsilon)
        payoff = (1.0 if correct else -loss) - self.delta
        stakes = (0.02, 0.1, 0.3, 0.6, 0.9, 0.99)
        wealth = tuple(
            max(0.0, held * (1.0 + stake * payoff / (loss + self.delta)))
            for held, stake in zip(self.wealth, stakes, strict=True)
        )
        return replace(self, wealth=wealth, guesses=self.guesses + 1)


# -------------------------------------------------------------------------------------- canaries for own runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Canaries:
    """Known update directions of one norm, each included by its own fair coin.

    "gaussian" canaries are random directions (nearly orthogonal when there are far fewer than dimensions);
    "dirac" ones are single coordinates. Directions are regenerated from the seed, so that nothing of size
    canaries x dimension is kept.
    """

    count: int
    dimension: int
    norm: float
    seed: int
    kind: Literal["gaussian", "dirac"] = "gaussian"

    def __post_init__(self) -> None:
        if self.count < 2 or self.dimension < self.count or self.norm <= 0:
            raise ValueError(
                f"canaries: need 2 <= count {self.count} <= dimension "
                f"{self.dimension} and norm {self.norm} > 0"
            )

    @property
    def included(self) -> Tensor:
        """Return the coins: shape (count,), boolean."""
        return torch.rand(self.count, generator=torch.Generator().manual_seed(self.seed)) < 0.5

    def direction(self, index: int) -> Tensor:
        """Return one canary: a vector (dimension,) of the stated norm."""
        if self.kind == "dirac":
            vector = torch.zeros(self.dimension)
            vector[self.coordinates[index]] = self.norm
            return vector
        generator = torch.Generator().manual_seed((self.seed + 1) * 1_000_003 + index)
        vector = torch.randn(self.dimension, generator=generator)
        return vector * (self.norm / float(torch.linalg.vector_norm(vector)))

    def contribution(self, bound: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return the sum of the included canaries, each passed through the mechanism's own `bound` (clip)
        when given.
        """
        total = torch.zeros(self.dimension)
        for index in self.included.nonzero().flatten().tolist():
            vector = self.direction(index)
            total += vector if bound is None else bound(vector)
        return total

    def scores(self, update: Tensor) -> Tensor:
        """Return <canary, update> / norm for every canary: shape (count,)."""
        flat = update.flatten().float()
        if len(flat) != self.dimension:
            raise ValueError(f"update has {len(flat)} entries, the canaries have {self.dimension}")
        if self.kind == "dirac":
            return flat[self.coordinates]
        return torch.stack([self.direction(index) @ flat / self.norm for index in range(self.count)])

    def audit(
        self, update: Tensor, delta: float, significance: float = 0.05, method: Method = "one_run_fdp"
    ) -> LowerBound:
        """Return the lower bound on epsilon that one observed (summed, whitened) update proves."""
        scores, coins = self.scores(update).double().numpy(), self.included.numpy()
        return lower_bound(scores[coins], scores[~coins], delta, significance, method)

    @property
    def coordinates(self) -> Tensor:
        """Return where the "dirac" canaries lie, one coordinate each: shape (count,)."""
        return torch.randperm(self.dimension, generator=torch.Generator().manual_seed(self.seed + 1))[
            : self.count
        ]


def combine_rounds(updates: Sequence[Tensor], noise: Sequence[float]) -> Tensor:
    """Return the best linear summary of several rounds' updates: each divided by its noise variance.

    For one canary set present in all rounds, equal noise and orthogonal canaries this is the likelihood-ratio
    statistic.
    """
    if len(updates) != len(noise) or not updates:
        raise ValueError(
            f"{len(updates)} updates and {len(noise)} noise levels: one level per update is needed"
        )
    weights = []
    for level in noise:
        weights.append(1.0 / max(level, 1e-12) ** 2)
    total = torch.stack([update * weight for update, weight in zip(updates, weights, strict=True)]).sum(0)
    return total / sum(weights)
