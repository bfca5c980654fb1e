"""The accountant against published vectors, closed forms,
an independent oracle and another implementation.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defenses.dp.accountant import Accountant, epsilon, gaussian_delta, gaussian_epsilon
from defenses.dp.events import GaussianEvent, MatrixFactorizationEvent, NonPrivateEvent, SkellamEvent
from defenses.errors import ParameterError
from tests.dp.contour import Step, delta_at

VECTORS = json.loads((Path(__file__).parent / "vectors" / "accounting.json").read_text())


def step(rate: float, sigma: float, steps: int = 1, **changes: Any) -> GaussianEvent:
    values: dict[str, Any] = {
        "unit": "record",
        "adjacency": "add_remove",
        "sampling": "poisson",
        "clip_norm": 1.0,
    }
    values |= {"sampling_rate": rate, "noise_multiplier": sigma, "steps": steps, "release": "test"}
    return GaussianEvent(**{**values, **changes})


@pytest.mark.parametrize("vector", VECTORS["vectors"], ids=lambda vector: vector["id"])
def test_reference_vectors_never_below_and_within_a_thousandth(vector: dict[str, Any]) -> None:
    bound = epsilon([step(s["q"], s["sigma"], s["steps"]) for s in vector["segments"]], vector["delta"])
    assert vector["eps"] - vector["abs_tol"] <= bound.epsilon <= vector["eps"] * 1.001
    assert bound.accountant in ("pld", "gaussian")


@pytest.mark.parametrize("row", VECTORS["gaussian"])
def test_one_gaussian_is_exact(row: dict[str, float]) -> None:
    assert epsilon([step(1.0, 1 / row["mu"])], row["delta"]).epsilon == pytest.approx(row["eps"], rel=1e-9)


@pytest.mark.parametrize("row", VECTORS["persons"], ids=lambda row: f"{row['q']}-{row['k']}")
def test_several_records_of_one_person(row: dict[str, Any]) -> None:
    event = step(row["q"], row["sigma"], row["steps"], unit="person", records_per_person=row["k"])
    # The reference is itself a pessimistic bound on a grid of 1e-3; it lies up to 6e-4 above the truth for
    # small k.
    assert epsilon([event], row["delta"]).epsilon == pytest.approx(row["eps"], rel=7e-4)


@pytest.mark.parametrize("row", VECTORS["replace_one"], ids=lambda row: str(row["q"]))
def test_replace_one_with_poisson_sampling(row: dict[str, Any]) -> None:
    event = step(row["q"], row["sigma"], row["steps"], adjacency="replace_one")
    # The reference is a pessimistic bound on a grid of 1e-3: up to 4e-3 above the truth for 14,062 steps.
    assert row["eps"] * (1 - 4e-3) <= epsilon([event], row["delta"]).epsilon <= row["eps"] * (1 + 1e-3)


@pytest.mark.parametrize("row", VECTORS["small_delta"], ids=lambda row: f"{row['q']}-{row['delta']}")
def test_small_deltas(row: dict[str, Any]) -> None:
    bound = epsilon([step(row["q"], row["sigma"], row["steps"])], row["delta"]).epsilon
    assert row["eps"] * (1 - 1e-5) - 1e-5 <= bound <= row["eps"] * 1.001


ORACLE = [
    # rate, sigma, steps, delta, order of the contour
    (0.01, 1.0, 1000, 1e-5, 4.0),
    (0.01, 1.0, 1000, 1e-12, 6.0),
    (0.05, 0.5, 2000, 1e-5, 0.4),
    (0.2, 2.0, 300, 1e-9, 4.0),
    (0.001, 2.0, 1_000_000, 1e-6, 4.0),
    (0.5, 5.0, 400, 1e-15, 3.0),
    (0.9, 3.0, 50, 1e-4, 1.0),
]


@pytest.mark.parametrize("case", ORACLE, ids=str)
def test_never_below_the_contour_integral(case: tuple[float, float, int, float, float]) -> None:
    rate, sigma, steps, delta, order = case
    _compare([(rate, sigma, steps)], delta, order)


def test_never_below_the_contour_integral_for_mixed_segments() -> None:
    _compare([(0.01, 0.9, 200), (0.05, 2.0, 100), (0.002, 0.7, 500)], 1e-8, 3.0)


def _compare(segments: list[tuple[float, float, int]], delta: float, order: float) -> None:
    """The true delta at our epsilon is at most the target, and above it a thousandth earlier."""
    bound = epsilon([step(*segment) for segment in segments], delta).epsilon
    true = [Step(*segment) for segment in segments]
    assert delta_at(true, bound, order, fineness=12.0, points=400) <= delta * (1 + 1e-9)
    assert delta_at(true, bound, order, fineness=12.0, points=400, add=True) <= delta * (1 + 1e-9)
    assert delta_at(true, bound * 0.999, order, fineness=12.0, points=400) > delta


def test_one_step_against_its_closed_form() -> None:
    # For one step delta = P(x > t) - e^eps Q(x > t) at the output t whose loss is eps.
    for rate, sigma, delta in ((0.5, 1.0, 1e-5), (0.01, 0.5, 1e-6), (0.3, 3.0, 1e-9), (0.001, 0.4, 1e-5)):
        bound = epsilon([step(rate, sigma)], delta).epsilon
        assert _one_step_delta(rate, sigma, bound) <= delta
        assert (
            _one_step_delta(rate, sigma, bound * 0.999) >= delta
            or _one_step_add(rate, sigma, bound * 0.999) >= delta
        )


def _tail(value: float) -> float:
    return 0.5 * math.erfc(value / math.sqrt(2))


def _one_step_delta(rate: float, sigma: float, eps: float) -> float:
    output = sigma**2 * math.log((math.expm1(eps) + rate) / rate) + 0.5
    own = (1 - rate) * _tail(output / sigma) + rate * _tail((output - 1) / sigma)
    return own - math.exp(eps) * _tail(output / sigma)


def _one_step_add(rate: float, sigma: float, eps: float) -> float:
    inside = (math.expm1(-eps) + rate) / rate
    if inside <= 0:
        return 0.0
    output = sigma**2 * math.log(inside) + 0.5
    other = (1 - rate) * _tail(-output / sigma) + rate * _tail(-(output - 1) / sigma)
    return _tail(-output / sigma) - math.exp(eps) * other


@pytest.mark.parametrize(
    "case", [(0.01, 1.0, 500, 1e-5), (0.1, 2.0, 100, 1e-6), (0.3, 1.5, 20, 1e-4)], ids=str
)
def test_agrees_with_an_independent_loss_distribution(case: tuple[float, float, int, float]) -> None:
    pld = pytest.importorskip("dp_accounting.pld.privacy_loss_distribution")
    rate, sigma, steps, delta = case
    one = pld.from_gaussian_mechanism(sigma, sampling_prob=rate, value_discretization_interval=1e-4)
    assert epsilon([step(rate, sigma, steps)], delta).epsilon == pytest.approx(
        one.self_compose(steps).get_epsilon_for_delta(delta), rel=1e-3
    )


def test_replace_one_agrees_with_an_independent_loss_distribution() -> None:
    accounting = pytest.importorskip("dp_accounting")
    pld = pytest.importorskip("dp_accounting.pld")
    other = pld.PLDAccountant(accounting.NeighboringRelation.REPLACE_ONE, value_discretization_interval=1e-3)
    sampled = accounting.PoissonSampledDpEvent(0.05, accounting.GaussianDpEvent(1.0))
    other.compose(accounting.SelfComposedDpEvent(sampled, 100))
    ours = epsilon([step(0.05, 1.0, 100, adjacency="replace_one")], 1e-5).epsilon
    assert ours == pytest.approx(other.get_epsilon(1e-5), rel=1e-3)


def test_fixed_size_batches_cost_between_poisson_at_half_noise_and_renyi() -> None:
    accounting = pytest.importorskip("dp_accounting")
    rdp = pytest.importorskip("dp_accounting.rdp")
    ours = epsilon([step(0.01, 2.0, 1000, adjacency="replace_one", sampling="fixed_size")], 1e-5).epsilon
    other = rdp.RdpAccountant(neighboring_relation=accounting.NeighboringRelation.REPLACE_ONE)
    sampled = accounting.SampledWithoutReplacementDpEvent(100_000, 1000, accounting.GaussianDpEvent(1.0))
    other.compose(accounting.SelfComposedDpEvent(sampled, 1000))
    assert epsilon([step(0.01, 1.0, 1000)], 1e-5).epsilon < ours < other.get_epsilon(1e-5)


def test_full_participations_merge_exactly() -> None:
    together = epsilon(
        [step(1.0, 10.0, 60, sampling="full"), step(1.0, 5.0, 10, unit="record")], 1e-6
    ).epsilon
    assert together == pytest.approx(gaussian_epsilon(math.sqrt(0.6 + 0.4), 1e-6), rel=1e-12)


def test_matrix_factorisation_is_one_gaussian() -> None:
    event = MatrixFactorizationEvent(
        unit="client",
        adjacency="replace_one",
        noise_multiplier=6.0,
        sensitivity=3.0,
        bands=2,
        min_separation=2,
        participations=3,
        steps=6,
        clip_norm=1.0,
        release="run",
    )
    assert epsilon([event], 1e-6).epsilon == pytest.approx(gaussian_epsilon(1.0, 1e-6), rel=1e-12)


def test_running_and_one_shot_agree_and_copies_are_independent() -> None:
    running, events = Accountant(), [step(0.01 + 0.001 * i, 1.0 + 0.02 * i, 3) for i in range(40)]
    for index, event in enumerate(events):
        projected = running.epsilon_with(event, 1e-6).epsilon
        running.compose(event)
        if index % 13 == 0:
            assert running.epsilon(1e-6).epsilon == pytest.approx(projected, rel=2e-4)
    once = epsilon(reversed(events), 1e-6).epsilon
    twin = running.copy()
    twin.compose(events[0], 5)
    assert running.epsilon(1e-6).epsilon == pytest.approx(once, rel=4e-4)
    assert twin.epsilon(1e-6).epsilon > once * 1.01


def test_delta_and_epsilon_invert_each_other() -> None:
    accountant = Accountant()
    accountant.compose(step(0.02, 1.1, 400))
    for delta in (1e-3, 1e-6, 1e-12):
        bound = accountant.epsilon(delta).epsilon
        assert accountant.delta(bound) == pytest.approx(delta, rel=0.02)
        assert accountant.delta(bound * 0.98) > delta


def test_edges() -> None:
    empty = Accountant()
    assert empty.epsilon(1e-5).epsilon == 0.0
    assert empty.delta(0.0) == 0.0
    empty.compose(NonPrivateEvent(reason="baseline"))
    assert empty.epsilon(1e-5).epsilon == math.inf
    assert empty.delta(100.0) == 1.0
    assert epsilon([step(1e-6, 5.0)], 0.1).epsilon == pytest.approx(0.0, abs=1e-12)
    for delta in (0.0, 1.0, -1e-5, float("nan")):
        with pytest.raises(ParameterError):
            empty.epsilon(delta)
    with pytest.raises(ParameterError):
        empty.compose(step(0.1, 1.0), 0)


def test_losses_beyond_doubles_fall_back_to_a_valid_bound() -> None:
    bound = epsilon([step(0.5, 0.02, 3)], 1e-5)
    assert bound.accountant == "rdp"
    assert 1250 < bound.epsilon < math.inf


def test_events_of_different_statements_are_refused() -> None:
    accountant = Accountant()
    accountant.compose(step(0.1, 1.0))
    for change in (
        {"unit": "client"},
        {"adjacency": "replace_one"},
        {"unit": "person", "records_per_person": 3},
    ):
        with pytest.raises(ParameterError, match="history"):
            accountant.compose(step(0.1, 1.0, **change))


def test_skellam_approaches_the_gaussian_from_above() -> None:
    def skellam(variance: float) -> float:
        event = SkellamEvent(
            unit="client",
            adjacency="zero_out",
            l1_sensitivity=math.sqrt(variance),
            l2_sensitivity=math.sqrt(variance) / 2,
            variance=variance,
            scale=1.0,
            steps=10,
            release="sum",
        )
        return epsilon([event], 1e-5).epsilon

    gaussian = gaussian_epsilon(math.sqrt(10) / 2, 1e-5)
    assert gaussian < skellam(1e10) < skellam(1e3) < skellam(1e2)
    assert skellam(1e10) < 1.12 * gaussian


@given(
    rate=st.floats(1e-4, 0.9),
    sigma=st.floats(0.4, 20.0),
    steps=st.integers(1, 3000),
    exponent=st.floats(-12, -2),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_more_of_anything_costs_more(rate: float, sigma: float, steps: int, exponent: float) -> None:
    delta = 10.0**exponent
    here = epsilon([step(rate, sigma, steps)], delta).epsilon
    slightly_less = here * (1 - 2e-3) - 1e-9
    assert epsilon([step(rate, sigma, steps + 50)], delta).epsilon >= slightly_less
    assert epsilon([step(min(1.0, rate * 1.2), sigma, steps)], delta).epsilon >= slightly_less
    assert epsilon([step(rate, sigma * 0.9, steps)], delta).epsilon >= slightly_less
    assert epsilon([step(rate, sigma, steps, adjacency="replace_one")], delta).epsilon >= slightly_less
    no_sampling = gaussian_epsilon(math.sqrt(steps) / sigma, delta)
    assert here <= no_sampling * (1 + 1e-3) + 1e-9
    assert gaussian_delta(math.sqrt(steps) / sigma, no_sampling) <= delta


def test_a_thousand_different_rounds_and_one_more() -> None:
    accountant = Accountant()
    for index in range(1000):
        accountant.compose(step(0.01 + 1e-5 * index, 1.0 + 5e-4 * index, 2))
    start = time.process_time()
    accountant.epsilon(1e-5)
    assert time.process_time() - start < 8.0  # 5 s on a quiet core; the margin is for slow test machines.
    times = []
    for index in range(5):
        start = time.process_time()
        accountant.epsilon_with(step(0.0123, 1.1 + index / 100, 3), 1e-5)
        times.append(time.process_time() - start)
    assert sorted(times)[2] < 0.06


@pytest.mark.parametrize("steps", [1, 2, 51])
@pytest.mark.parametrize("rate", [1e-4, 0.01, 0.5, 0.9])
def test_bounded_losses_at_tiny_delta_do_not_break_the_grid(rate: float, steps: int) -> None:
    # Adding a record loses at most -log(1 - rate) a step; the best Renyi order then runs away to infinity.
    bound = epsilon([step(rate, 0.5, steps)], 1e-12)
    assert bound.accountant == "pld"
    assert -steps * math.log1p(-rate) * 0.1 <= bound.epsilon < 400
