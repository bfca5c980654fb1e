"""Calibration ends just inside the budget, with and without a past; the calculator reports every mistake."""

from __future__ import annotations

import math
from typing import Any

import pytest

from defenses.dp.accountant import epsilon, gaussian_epsilon
from defenses.dp.calculator import epsilon_report, sigma_report
from defenses.dp.calibration import local_noise_multiplier, noise_multiplier, surviving_noise_multiplier
from defenses.dp.events import GaussianEvent
from defenses.errors import BudgetExceeded, ParameterError


def step(sigma: float, rate: float, steps: int, **changes: Any) -> GaussianEvent:
    values: dict[str, Any] = {
        "unit": "record",
        "adjacency": "add_remove",
        "sampling": "poisson",
        "clip_norm": 1.0,
    }
    values |= {"sampling_rate": rate, "noise_multiplier": sigma, "steps": steps, "release": "test"}
    return GaussianEvent(**{**values, **changes})


CASES: list[tuple[float, float, float, int, dict[str, Any]]] = [
    (8.0, 1e-5, 0.01, 1000, {}),
    (1.0, 1e-5, 0.0152, 660, {}),
    (0.1, 1e-8, 0.001, 10_000, {}),
    (50.0, 1e-5, 0.05, 100, {}),
    (3.0, 1e-6, 1.0, 100, {"sampling": "full"}),
    (8.0, 1e-5, 0.01, 300, {"records_per_person": 4}),
    (4.0, 1e-5, 0.02, 300, {"adjacency": "replace_one"}),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_noise_is_enough_and_a_thousandth_less_is_not(
    case: tuple[float, float, float, int, dict[str, Any]],
) -> None:
    target, delta, rate, steps, options = case
    sigma = noise_multiplier(epsilon=target, delta=delta, sampling_rate=rate, steps=steps, **options)
    extra = {**options, "unit": "person"} if "records_per_person" in options else options
    assert epsilon([step(sigma, rate, steps, **extra)], delta).epsilon <= target * (1 + 1e-12)
    assert epsilon([step(sigma * (1 - 1e-3), rate, steps, **extra)], delta).epsilon > target


def test_the_past_is_paid_for() -> None:
    past = [step(1.0, 0.02, 500), step(2.0, 0.05, 100)]
    fresh = noise_multiplier(epsilon=8.0, delta=1e-5, sampling_rate=0.01, steps=1000)
    sigma = noise_multiplier(epsilon=8.0, delta=1e-5, sampling_rate=0.01, steps=1000, history=past)
    assert sigma > fresh
    assert epsilon([*past, step(sigma, 0.01, 1000)], 1e-5).epsilon <= 8.0 * (1 + 3e-4)
    with pytest.raises(BudgetExceeded, match="already holds"):
        noise_multiplier(epsilon=1.0, delta=1e-5, sampling_rate=0.01, steps=1, history=past)


def test_full_participation_has_a_closed_form() -> None:
    sigma = noise_multiplier(epsilon=2.0, delta=1e-6, sampling_rate=1.0, steps=25, sampling="full")
    assert gaussian_epsilon(5 / sigma, 1e-6) == pytest.approx(2.0, rel=1e-3)


def test_dropped_and_colluding_shares_do_not_count() -> None:
    local = local_noise_multiplier(central_multiplier=1.0, survivors=7, colluding=2)
    assert surviving_noise_multiplier(local_multiplier=local, survivors=7, colluding=2) == pytest.approx(1.0)
    assert surviving_noise_multiplier(local_multiplier=local, survivors=10) == pytest.approx(math.sqrt(2))
    for survivors, colluding in ((0, 0), (3, 3), (2, -1)):
        with pytest.raises(ParameterError):
            surviving_noise_multiplier(local_multiplier=1.0, survivors=survivors, colluding=colluding)


@pytest.mark.parametrize(
    "changes", [{"epsilon": 0.0}, {"epsilon": math.inf}, {"sampling_rate": 2.0}, {"steps": 0}]
)
def test_impossible_targets_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ParameterError):
        noise_multiplier(**{"epsilon": 1.0, "delta": 1e-5, "sampling_rate": 0.1, "steps": 10, **changes})


def test_calculator_forth_and_back() -> None:
    report = epsilon_report([(0.01, 1.0, 1000)], 1e-5)
    assert report["epsilon"] == pytest.approx(1.8282367, rel=1e-3)
    assert {"epsilon", "delta", "unit", "adjacency", "sampling", "accountant", "slack"} <= set(report)
    back = sigma_report(epsilon=report["epsilon"] * 1.0005, delta=1e-5, sampling_rate=0.01, steps=1000)
    assert back["sigma"] == pytest.approx(1.0, rel=2e-3)
    assert back["epsilon"] <= back["target_epsilon"]


def test_calculator_lists_every_problem_once() -> None:
    with pytest.raises(ParameterError) as caught:
        epsilon_report([(2.0, 1.0, 10), (0.1, -1.0, 0)], 0.0, sampling="shuffle", unit="house")
    text = str(caught.value)
    for part in (
        "delta = 0.0",
        "sampling = 'shuffle'",
        "unit = 'house'",
        "segment 1: sampling_rate",
        "segment 2: noise",
        "steps",
    ):
        assert text.count(part) >= 1, part
    assert text.count("unit = 'house'") == 1
    with pytest.raises(ParameterError, match="at least one"):
        epsilon_report([], 1e-5)
    with pytest.raises(ParameterError, match=r"(?s)epsilon.*steps"):
        sigma_report(epsilon=-1.0, delta=1e-5, sampling_rate=0.1, steps=0)
