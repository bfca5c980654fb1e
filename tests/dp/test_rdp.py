"""Renyi curves: closed forms, another implementation, Skellam noise and the price of tuning."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from defenses.dp.accountant import epsilon
from defenses.dp.events import GaussianEvent, NonPrivateEvent, SkellamEvent, TuningEvent
from defenses.dp.pairs import poisson_pair
from defenses.dp.orders import ORDERS
from defenses.dp.rdp import event_log_moments, pair_log_moments, renyi_epsilon


def step(steps: int = 1, **changes: Any) -> GaussianEvent:
    values: dict[str, Any] = {
        "unit": "record",
        "adjacency": "add_remove",
        "sampling": "poisson",
        "clip_norm": 1.0,
    }
    values |= {"sampling_rate": 0.01, "noise_multiplier": 1.0, "steps": steps, "release": "test"}
    return GaussianEvent(**{**values, **changes})


def test_the_gaussian_curve_is_its_closed_form() -> None:
    forward, backward = event_log_moments(step(7, sampling="full", sampling_rate=1.0, noise_multiplier=3.0))
    np.testing.assert_allclose(forward, 7 * ORDERS * (1 + ORDERS) / 18, rtol=1e-12)
    np.testing.assert_array_equal(forward, backward)


@pytest.mark.parametrize("rate,sigma", [(0.01, 1.0), (0.2, 2.0), (0.5, 0.7)])
def test_sampled_moments_match_the_binomial_sum(rate: float, sigma: float) -> None:
    # E_Q[(P/Q)^a] = sum_k C(a, k) (1-q)^(a-k) q^k exp(k (k-1) / (2 sigma^2)) at integer a (Mironov et al.
    # 2019, eq. 6); the curve at ORDERS is compared by its convexity: chords between integers lie above,
    # tangents below.
    forward, _ = pair_log_moments(poisson_pair(rate, sigma))

    def exact(alpha: int) -> float:
        terms = [
            math.comb(alpha, k) * (1 - rate) ** (alpha - k) * rate**k * math.exp(k * (k - 1) / (2 * sigma**2))
            for k in range(alpha + 1)
        ]
        return math.log(math.fsum(terms))

    for index, order in enumerate(ORDERS):
        if 1 <= order < 20:
            below = int(order)
            share = order - below
            chord = (1 - share) * exact(below + 1) + share * exact(below + 2)
            left = exact(below + 1) + share * (exact(below + 1) - exact(below))
            assert left * (1 - 1e-9) <= forward[index] <= chord * (1 + 1e-9)


def test_agrees_with_another_implementation() -> None:
    accounting, rdp = pytest.importorskip("dp_accounting"), pytest.importorskip("dp_accounting.rdp")
    other = rdp.RdpAccountant()
    other.compose(
        accounting.SelfComposedDpEvent(
            accounting.PoissonSampledDpEvent(0.01, accounting.GaussianDpEvent(1.0)), 1000
        )
    )
    ours = max(renyi_epsilon(1000 * curve, 1e-5)[0] for curve in pair_log_moments(poisson_pair(0.01, 1.0)))
    assert ours == pytest.approx(other.get_epsilon(1e-5), rel=5e-3)


def test_renyi_lies_above_the_loss_distribution() -> None:
    for event in (
        step(1000),
        step(50, adjacency="replace_one"),
        step(200, adjacency="replace_one", sampling="fixed_size"),
    ):
        loose = max(renyi_epsilon(curve, 1e-6)[0] for curve in event_log_moments(event))
        assert epsilon([event], 1e-6).epsilon < loose


def skellam(variance: float, *, l1: float = 64.0, l2: float = 8.0, steps: int = 3) -> SkellamEvent:
    return SkellamEvent(
        unit="client",
        adjacency="zero_out",
        l1_sensitivity=l1,
        l2_sensitivity=l2,
        variance=variance,
        scale=8.0,
        steps=steps,
        release="sum",
    )


def test_skellam_bound_lies_above_the_exact_divergence_of_one_coordinate() -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    variance, shift = 400.0, 8
    values = np.arange(-500, 501)
    log_p = scipy_stats.skellam.logpmf(values - shift, variance / 2, variance / 2)
    log_q = scipy_stats.skellam.logpmf(values, variance / 2, variance / 2)
    used = np.isfinite(log_p) & np.isfinite(log_q)
    curve, _ = event_log_moments(skellam(variance, l1=shift, l2=shift, steps=1))
    for index, order in enumerate(ORDERS):
        if 0.5 < order < 12:
            exact = math.log(np.exp(log_p[used] + order * (log_p - log_q)[used]).sum())
            assert curve[index] >= exact
            if order >= 1:
                assert curve[index] <= exact * 1.35 + 0.01


@pytest.mark.parametrize(
    "distribution,stopping,shape,published",
    [
        ("truncated_negative_binomial", 0.1, 1.0, 4.103),
        ("poisson", 10.0, 1.0, 4.329),
        ("truncated_negative_binomial", 0.01, 1.0, 5.270),
    ],
)
def test_tuning_costs_what_the_theorems_say(
    distribution: Any, stopping: float, shape: float, published: float
) -> None:
    event = TuningEvent(
        base=(step(1000),), distribution=distribution, stopping=stopping, shape=shape, release="best"
    )
    bound = epsilon([event], 1e-5)
    assert bound.accountant == "rdp"
    assert published - 5e-4 <= bound.epsilon <= published * 1.006


def test_tuning_costs_more_than_one_run_and_less_than_ten() -> None:
    event = TuningEvent(base=(step(1000),), distribution="poisson", stopping=10.0, release="best")
    assert (
        epsilon([step(1000)], 1e-5).epsilon
        < epsilon([event], 1e-5).epsilon
        < epsilon([step(10_000)], 1e-5).epsilon
    )


def test_no_bound_has_no_curve() -> None:
    assert np.isinf(event_log_moments(NonPrivateEvent(reason="x"))[0]).all()
