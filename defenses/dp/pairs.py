"""Which one-dimensional pair of distributions dominates one step of a mechanism.

Why the pairs are enough. For fixed other records the released sum is Gaussian around a centre that depends
on which of the person's records joined. For a test function f with E f = s under the centre without the
person, the Neyman-Pearson lemma gives E f <= F(F^-1(s) + |u|) under a centre moved by u and E f >= F(F^-1(s)
- |v|) under one moved by v (F the normal distribution function). So P(f) - a Q(f) is largest, for every a >
0, when all moves lie on one line, P's to the right and Q's to the left, at their largest lengths: the
one-dimensional mixtures below. Joint convexity carries this over the random choice of the other records.

Source: Zhu, Dong, Wang, arXiv 2106.08567 (dominating pairs).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import gammaln

from defenses.dp.events import GaussianEvent, MatrixFactorizationEvent
from defenses.errors import ParameterError

Floats = npt.NDArray[np.floating[Any]]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class MixturePair:
    """P = sum_i up[i] N(i, sigma^2) against Q = sum_i down[i] N(-i, sigma^2), in units of the clip bound.

    `gap` is up[0] - down[0], kept apart because it is tiny and would be lost in the difference. A `symmetric`
    pair stands for sampling without replacement under replace-one: the curve of the pair for losses above
    zero and its mirror image below.
    """

    up: tuple[float, ...]
    down: tuple[float, ...]
    sigma: float
    gap: float
    symmetric: bool = False

    def loss(self, outputs: Floats) -> Floats:
        """Return log P(x) / Q(x); it never decreases in x."""
        up, down = self.log_ratios(outputs)
        return up - down

    def log_ratios(self, outputs: Floats) -> tuple[Floats, Floats]:
        """Return the log densities of P and of Q, both relative to N(0, sigma^2)."""
        return _log_density_ratio(self.up, outputs, self.sigma), _log_density_ratio(
            self.down, -outputs, self.sigma
        )

    def output_of_loss(self, losses: Floats) -> Floats:
        """Return the output x at which the loss is reached; -inf (or inf) where every loss is larger (or
        smaller).
        """
        if len(self.down) == 1 and len(self.up) == 2:
            if self.up[0] == 0.0:
                return self.sigma**2 * losses + 0.5
            with np.errstate(divide="ignore", invalid="ignore"):
                inside = (np.expm1(losses) - self.gap) / self.up[1]
                result = self.sigma**2 * np.log(np.maximum(inside, 0.0)) + 0.5
            return np.asarray(result, dtype=np.float64)
        return _invert(self, losses)


@dataclass(frozen=True, slots=True)
class Mechanism:
    """What an event composes: a merged Gaussian part and at most one sampled pair, repeated."""

    mu_squared: float
    pair: MixturePair | None
    steps: int


def mechanism_of(event: GaussianEvent | MatrixFactorizationEvent) -> Mechanism:
    """Return the dominating pair of an event; Gaussians without sampling become a share of one squared shift.

    Replace-one moves a sum twice as far as add-remove or zero-out; `records_per_person` records move it that
    many times.
    """
    reach = 2.0 if event.adjacency == "replace_one" else 1.0
    if isinstance(event, MatrixFactorizationEvent):
        return Mechanism((reach * event.sensitivity / event.noise_multiplier) ** 2, None, 0)
    sigma, rate, records = event.noise_multiplier, event.sampling_rate, event.records_per_person
    if event.sampling == "full" or rate == 1.0:
        return Mechanism(event.steps * (reach * records / sigma) ** 2, None, 0)
    if event.sampling == "poisson":
        pair = poisson_pair(rate, sigma, records, replace=event.adjacency == "replace_one")
    elif event.sampling == "fixed_size":
        pair = fixed_size_pair(rate, sigma)
    else:
        raise ParameterError(f"sampling = {event.sampling!r}: no accountant knows it")
    return Mechanism(0.0, pair, event.steps)


def gaussian_pair(mu: float) -> MixturePair:
    """Return the pair of one Gaussian release with sensitivity over standard deviation `mu`."""
    return MixturePair(up=(0.0, 1.0), down=(1.0,), sigma=1.0 / mu, gap=-1.0)


def poisson_pair(rate: float, sigma: float, records: int = 1, *, replace: bool = False) -> MixturePair:
    """Return the dominating pair of a Poisson-sampled Gaussian step for a person with `records` records.

    Source: Choquette-Choo et al., arXiv 2401.10294 (mixture of Gaussians), and the argument in this module's
    docstring.
    """
    weights = _binomial(rate, records)
    if replace:
        return MixturePair(up=weights, down=weights, sigma=sigma, gap=0.0)
    return MixturePair(up=weights, down=(1.0,), sigma=sigma, gap=math.expm1(records * math.log1p(-rate)))


def fixed_size_pair(rate: float, sigma: float) -> MixturePair:
    """Return the dominating pair of batches drawn without replacement, under replace-one (zero-out is a
    special case).

    A swap moves the sum by at most two clip bounds, hence the halved noise.

    Source: Zhu, Dong, Wang, arXiv 2106.08567, proposition 30.
    """
    return MixturePair(up=(1.0 - rate, rate), down=(1.0,), sigma=sigma / 2, gap=-rate, symmetric=True)


def _binomial(rate: float, count: int) -> tuple[float, ...]:
    if not 0 < rate < 1 or count < 1:
        raise ParameterError(f"rate = {rate}, records = {count}: need 0 < rate < 1 and at least one record")
    index = np.arange(count + 1)
    choose = gammaln(count + 1) - gammaln(index + 1) - gammaln(count - index + 1)
    weights = np.exp(choose + index * math.log(rate) + (count - index) * math.log1p(-rate))
    if count == 1:
        weights = np.array([1.0 - rate, rate])
    return tuple(float(weight) for weight in weights)


def _log_density_ratio(weights: tuple[float, ...], outputs: Floats, sigma: float) -> Floats:
    """Return log sum_i w_i exp((2 i x - i^2) / (2 sigma^2)), relative to the central component."""
    total = np.full(outputs.shape, -np.inf)
    for index, weight in enumerate(weights):
        if weight > 0:
            total = np.logaddexp(total, math.log(weight) + (2 * index * outputs - index**2) / (2 * sigma**2))
    return total


def _invert(pair: MixturePair, losses: Floats) -> Floats:
    """Solve loss(x) = losses by bisection on a bracket that surely holds every finite solution."""
    shift = len(pair.up) + len(pair.down)
    reach = (float(np.max(np.abs(losses))) + 50.0) * pair.sigma**2 + shift + 45.0 * pair.sigma
    table = np.linspace(-reach, reach, 4097)
    curve = np.maximum.accumulate(pair.loss(table))
    right = np.clip(np.searchsorted(curve, losses, side="left"), 1, len(table) - 1)
    low, high = table[right - 1], table[right]
    for _ in range(60):
        middle = 0.5 * (low + high)
        below = pair.loss(middle) < losses
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    result = np.where(losses <= curve[0], -np.inf, high)
    return np.asarray(np.where(losses > curve[-1], np.inf, result), dtype=np.float64)
