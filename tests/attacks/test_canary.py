"""Canary audits: published values, validity, power,
and six broken mechanisms that must be flagged while the honest one is not.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom

from attacks.canary import (
    Canaries,
    SequentialAudit,
    clopper_pearson,
    combine_rounds,
    fdp_epsilon,
    gaussian_epsilon,
    gaussian_separation,
    lower_bound,
    one_run_epsilon,
    one_run_p_value,
)
from attacks.metrics import auc, gaussian_auc

DELTA = 1e-5
METHODS = ("one_run", "one_run_fdp", "clopper_pearson", "gaussian")

# (canaries, guesses, correct, delta, one-run epsilon, f-DP epsilon), significance 0.05, made with the
# auditing module of google-deepmind/jax_privacy (snapshot 2026-08-20), one-sided.
PUBLISHED = [
    (1000, 100, 95, 1e-5, 2.165175787875041, 3.3233004900323633),
    (1000, 200, 180, 1e-5, 1.796285070718516, 2.9012429233094257),
    (1000, 1000, 800, 0.0, 1.254330356085515, None),
    (1000, 1000, 800, 1e-5, 1.2539840913064186, 2.3332435930207667),
    (100, 20, 20, 1e-5, 1.819596907485671, 3.2393925462725353),
    (10000, 500, 490, 1e-5, 3.3135489203503274, 4.617659878242442),
    (1000, 100, 50, 1e-5, 0.0, 0.0),
]


@pytest.mark.parametrize(("canaries", "guesses", "correct", "delta", "one_run", "fdp"), PUBLISHED)
def test_published_values(canaries, guesses, correct, delta, one_run, fdp):
    assert one_run_epsilon(canaries, guesses, correct, delta, 0.05) == pytest.approx(one_run, abs=2e-6)
    if fdp is not None:
        assert fdp_epsilon(canaries, guesses, correct, delta, 0.05) == pytest.approx(fdp, abs=2e-6)


def test_the_p_value_equals_its_definition_term_by_term():
    canaries, guesses, correct, epsilon, delta = 60, 12, 10, 1.0, 1e-3
    rate = math.exp(epsilon) / (1 + math.exp(epsilon))
    tail = sum(binom.pmf(k, guesses, rate) for k in range(correct, guesses + 1))
    slope = max(
        sum(binom.pmf(correct - j, guesses, rate) for j in range(1, i + 1)) / i for i in range(1, correct + 1)
    )
    assert one_run_p_value(canaries, guesses, correct, epsilon, delta) == pytest.approx(
        tail + 2 * canaries * delta * slope
    )


def test_clopper_pearson_inverts_the_binomial_tail():
    low, high = clopper_pearson(7, 20, 0.05)
    assert binom.sf(6, 20, low) == pytest.approx(0.05)
    assert binom.cdf(7, 20, high) == pytest.approx(0.05)
    assert clopper_pearson(0, 5, 0.05)[0] == 0.0
    assert clopper_pearson(5, 5, 0.05)[1] == 1.0


def test_gaussian_epsilon_solves_its_equation():
    from scipy.stats import norm

    for mu in (0.5, 1.0, 2.0):
        epsilon = gaussian_epsilon(mu, DELTA)
        reached = norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)
        assert reached == pytest.approx(DELTA, rel=1e-6)
    assert gaussian_epsilon(1.0, DELTA) == pytest.approx(4.377, abs=1e-3)


def ideal(mu: float, canaries: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    coins = generator.random(canaries) < 0.5
    scores = generator.normal(size=canaries) + mu * coins
    return scores[coins], scores[~coins]


@pytest.mark.parametrize("method", METHODS)
def test_bounds_rarely_exceed_the_truth(method):
    truth = gaussian_epsilon(0.5, DELTA)
    exceeded = sum(
        lower_bound(*ideal(0.5, 300, seed), DELTA, 0.05, method).epsilon > truth for seed in range(60)
    )
    assert exceeded <= (
        9 if method == "gaussian" else 4
    )  # 60 trials at 5 %: 3 expected, more than 9 has chance 5e-4


# Mean of three runs on ideal Gaussian canaries, m = 1000, by the same published module (method "gdp" for ours
# "gaussian").
@pytest.mark.parametrize(
    ("mu", "reference"), [(1.0, (1.343, 2.045, 0.992, 2.85)), (2.0, (2.765, 4.505, 2.726, 7.72))]
)
def test_power_is_no_worse_than_the_published_auditor(mu, reference):
    for method, published in zip(METHODS, reference, strict=True):
        mean = np.mean(
            [lower_bound(*ideal(mu, 1000, seed), DELTA, 0.05, method).epsilon for seed in range(4)]
        )
        assert mean > (0.75 if method == "clopper_pearson" else 0.95) * published, method
        assert mean < gaussian_epsilon(mu, DELTA)


def test_the_separation_is_a_lower_confidence_bound():
    below = sum(gaussian_separation(*ideal(1.0, 60, seed), 0.1) <= 1.0 for seed in range(100))
    assert 82 <= below <= 97


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"method .* delta .* significance .* at least 2"):
        lower_bound([1.0], [0.0, 1.0], 2.0, 0.0, "guess")


# ------------------------------------------------------------------------------ mechanisms, honest and broken

DIMENSION, CANARIES, CLIP, MULTIPLIER, RECORDS = 6_000, 400, 1.0, 1.0, 30


def clip(vector: torch.Tensor) -> torch.Tensor:
    return vector * min(1.0, CLIP / float(vector.norm()))


def release(canaries: Canaries, *, seed: int, broken: str = "") -> torch.Tensor:
    """Return what one step of DP-SGD on records and canaries releases, with one mistake put in."""
    generator = torch.Generator().manual_seed(seed)
    records = [torch.randn(DIMENSION, generator=generator) / DIMENSION**0.5 * 3 for _ in range(RECORDS)]
    noise = torch.randn(DIMENSION, generator=generator) * MULTIPLIER * CLIP
    every = records + [canaries.direction(index) for index in canaries.included.nonzero().flatten().tolist()]
    if broken == "no clip":
        return torch.stack([4 * vector for vector in every]).sum(0) + noise
    if broken == "wrong noise constant":
        return torch.stack([clip(vector) for vector in every]).sum(0) + noise / math.sqrt(RECORDS)
    if broken == "mean noise on a sum":
        return torch.stack([clip(vector) for vector in every]).sum(0) + noise / RECORDS
    if broken == "batch clip":  # one clip of the batch's mean, and noise as if each record were bounded
        mean = 4 * torch.stack(every).mean(0)
        return (clip(mean) + noise / len(every)) * len(every)
    if broken == "reused noise":
        with_data = torch.stack([clip(vector) for vector in every]).sum(0) + noise
        return (
            with_data - 0.9 * noise
        )  # the observer subtracts what an earlier round showed of the same noise
    if broken == "unprotected coordinates":
        noise = noise.clone()
        noise[DIMENSION // 2 :] = 0.0
        return torch.stack([clip(vector) for vector in every]).sum(0) + noise
    return torch.stack([clip(vector) for vector in every]).sum(0) + noise


CLAIM = gaussian_epsilon(1.0 / MULTIPLIER, DELTA)
"""What one honest step spends."""


def audit(broken: str, method: str = "gaussian") -> float:
    canaries = Canaries(count=CANARIES, dimension=DIMENSION, norm=CLIP, seed=11)
    update = release(canaries, seed=5, broken=broken)
    if broken == "unprotected coordinates":
        scores = torch.stack(
            [canaries.direction(i)[DIMENSION // 2 :] @ update[DIMENSION // 2 :] for i in range(CANARIES)]
        ).numpy()
        coins = canaries.included.numpy()
        return lower_bound(scores[coins], scores[~coins], DELTA, 0.01, method).epsilon
    return canaries.audit(update, DELTA, 0.01, method).epsilon


def test_the_honest_mechanism_passes():
    for method in METHODS:
        assert audit("", method) <= CLAIM
    assert audit("", "gaussian") > 0.1 * CLAIM, "an audit that finds nothing proves nothing"


BROKEN = (
    "no clip",
    "wrong noise constant",
    "mean noise on a sum",
    "batch clip",
    "reused noise",
    "unprotected coordinates",
)


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_mechanisms_are_flagged(broken):
    found = {method: audit(broken, method) for method in ("gaussian", "one_run_fdp")}
    assert found["gaussian"] > CLAIM, found


@pytest.mark.parametrize("multiplier", [0.5, 1.0, 2.0])
def test_canary_auc_meets_the_gaussian_prediction(multiplier):
    canaries = Canaries(count=2_000, dimension=40_000, norm=CLIP, seed=3, kind="dirac")
    noise = multiplier * torch.randn(40_000, generator=torch.Generator().manual_seed(1))
    scores, coins = canaries.scores(canaries.contribution(clip) + noise).numpy(), canaries.included.numpy()
    assert auc(scores[coins], scores[~coins]) == pytest.approx(
        gaussian_auc(multiplier), abs=0.035
    )  # about 3 deviations


def test_random_directions_add_little_cross_talk():
    canaries = Canaries(count=50, dimension=20_000, norm=CLIP, seed=2)
    scores, coins = canaries.scores(canaries.contribution()), canaries.included
    assert float((scores[coins] - 1).abs().max()) < 0.15
    assert float(scores[~coins].abs().max()) < 0.15
    assert 10 < int(coins.sum()) < 40
    assert torch.equal(
        canaries.direction(3), Canaries(count=50, dimension=20_000, norm=CLIP, seed=2).direction(3)
    )


def test_rounds_add_up():
    canaries = Canaries(count=600, dimension=5_000, norm=CLIP, seed=4, kind="dirac")
    generator = torch.Generator().manual_seed(0)
    rounds = [canaries.contribution() + 2 * torch.randn(5_000, generator=generator) for _ in range(4)]
    scores, coins = canaries.scores(combine_rounds(rounds, [2.0] * 4)).numpy(), canaries.included.numpy()
    assert auc(scores[coins], scores[~coins]) == pytest.approx(gaussian_auc(1.0), abs=0.06)


def test_canaries_are_checked():
    with pytest.raises(ValueError, match="count"):
        Canaries(count=10, dimension=5, norm=1.0, seed=0)
    with pytest.raises(ValueError, match="entries"):
        Canaries(count=2, dimension=5, norm=1.0, seed=0).scores(torch.zeros(4))


def bets(epsilon_claimed: float, epsilon_true: float, seed: int, steps: int) -> SequentialAudit:
    state = SequentialAudit(epsilon=epsilon_claimed, significance=0.01)
    rate = math.exp(epsilon_true) / (1 + math.exp(epsilon_true))
    for correct in np.random.default_rng(seed).random(steps) < rate:
        state = state.observe(bool(correct))
        if state.violated:
            break
    return state


def test_the_sequential_audit_rarely_accuses_an_honest_mechanism_and_soon_finds_a_broken_one():
    assert sum(bets(1.0, 1.0, seed, 600).violated for seed in range(100)) <= 4  # at most 1 % each
    broken = [bets(1.0, 4.0, seed, 600) for seed in range(20)]
    assert all(state.violated for state in broken)
    assert np.median([state.guesses for state in broken]) < 60
    assert SequentialAudit(epsilon=1.0).observe(None).evidence == 1.0


def test_the_sequential_audit_is_a_losing_bet_on_average():
    rate = math.exp(2.0) / (1 + math.exp(2.0))
    start = SequentialAudit(epsilon=2.0)
    mean = rate * start.observe(True).evidence + (1 - rate) * start.observe(False).evidence
    assert mean <= 1.0 + 1e-12
