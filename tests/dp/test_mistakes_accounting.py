"""The accounting rows of docs/mistakes.md:
each mistake, what it would have cost, and that it cannot be made here.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from scipy.special import log_ndtr

from defenses.dp.accountant import Accountant, epsilon, gaussian_epsilon
from defenses.dp.calibration import surviving_noise_multiplier
from defenses.dp.events import GaussianEvent, NonPrivateEvent, TuningEvent, from_dict
from defenses.dp.ledger import Ledger
from defenses.dp.ledger_entries import Charge
from defenses.errors import BudgetExceeded, ParameterError

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


def shuffle_delta_at_least(sigma: float, steps: int, eps: float) -> float:
    """What an observer of one shuffled epoch gets from asking whether any batch sum is large.

    All other records pull one way and the record in question the other: its batch lies two bounds from the
    rest when it is present and one bound when it is zeroed out.
    Source: Chua et al., arXiv 2403.17673 (lower bound for shuffled batches, zero-out adjacency).
    """
    best = 0.0
    for tenth in range(-20, 200):
        cut = tenth / 10
        others = (steps - 1) * float(log_ndtr(cut))
        present = -math.expm1(others + float(log_ndtr(cut - 2 / sigma)))
        absent = -math.expm1(others + float(log_ndtr(cut - 1 / sigma)))
        best = max(best, present - math.exp(eps) * absent)
    return best


def test_row_1_shuffled_batches_cannot_be_called_poisson() -> None:
    with pytest.raises(ParameterError, match="sampling = 'shuffle'"):
        step(0.001, 0.6, 1000, sampling="shuffle")
    poisson = epsilon([step(0.001, 0.6, 1000)], 1e-6).epsilon
    assert poisson == pytest.approx(2.107, rel=2e-3)
    assert (
        shuffle_delta_at_least(0.6, 1000, poisson) > 1e-3
    )  # A thousand times the delta that would be claimed.
    # The honest event of one epoch over a fixed partition is one full participation.
    full = epsilon([step(1.0, 0.6, 1, sampling="full")], 1e-6).epsilon
    assert full == pytest.approx(8.8405, rel=1e-4)
    assert shuffle_delta_at_least(0.6, 1000, full) <= 1e-6


@pytest.mark.parametrize("sampling", ["truncated_poisson", "capped", "Poisson", ""])
def test_row_2_capped_batches_have_no_event(sampling: str) -> None:
    with pytest.raises(ParameterError, match="sampling"):
        step(0.032, 1.0, 1000, sampling=sampling)


@pytest.mark.parametrize("extra", [{"rand_on_empty": True}, {"max_batch_size": 32}, {"skip_empty": True}])
def test_rows_2_to_4_side_conditions_are_refused(extra: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match="unknown fields"):
        from_dict({**step(0.032, 1.0).to_dict(), **extra})


def test_row_10_rounds_are_composed_not_repeated_and_not_added(tmp_path: Path) -> None:
    rows = VECTORS["per_round"]
    one = step(rows["q"], rows["sigma"], rows["local_steps"])
    ledger = Ledger.open(tmp_path / "ledger.db")
    ledger.set_budget("o", "d", "record", 20.0, rows["delta"])
    ledger.reserve([Charge(owner="o", dataset="d", event=one, run="r", round=0, release="u")])
    single = ledger.epsilon("o", "d", "record", rows["delta"])
    charges = [
        Charge(owner="o", dataset="d", event=one, run="r", round=n, release="u") for n in range(1, 100)
    ]
    ledger.reserve(charges)
    total = ledger.epsilon("o", "d", "record", rows["delta"])
    assert single == pytest.approx(1.138, rel=1e-3)
    assert total == pytest.approx(11.024, rel=1e-3)
    assert single * 9 < total < single * 100 / 9


def test_row_11_client_and_batch_rates_are_never_multiplied() -> None:
    # 100 rounds of 20 local steps, clients drawn at 0.1, batches at 0.05: the invalid product of rates reads
    # 1.21.
    product = epsilon([step(0.1 * 0.05, 1.0, 2000)], 1e-5).epsilon
    assert product == pytest.approx(1.21, rel=2e-3)
    # A client charges the rounds it took part in, up to its cap (27 is passed with probability 1e-6).
    realised = epsilon([step(0.05, 1.0, 20, release=f"round {n}") for n in range(27)], 1e-5 - 1e-6).epsilon
    assert realised == pytest.approx(7.884, rel=1e-3)
    names = {field for field in step(0.1, 1.0).to_dict() if "rate" in field}
    assert names == {"sampling_rate"}


def test_row_12_choosing_the_best_run_is_an_event() -> None:
    base = step(0.01, 1.0, 1000)
    best = TuningEvent(
        base=(base,), distribution="truncated_negative_binomial", stopping=0.1, release="best of about ten"
    )
    assert epsilon([best], 1e-5).epsilon > 2 * epsilon([base], 1e-5).epsilon


def test_row_13_no_central_limit_shortcut() -> None:
    for rate, sigma, steps, delta, claimed in ((0.01, 1.0, 1000, 1e-5, 1.618), (0.5, 1.0, 1, 1e-5, 2.701)):
        limit = gaussian_epsilon(rate * math.sqrt(steps * math.expm1(1 / sigma**2)), delta)
        bound = epsilon([step(rate, sigma, steps)], delta)
        assert limit == pytest.approx(claimed, rel=2e-3)
        assert bound.epsilon > 1.1 * limit
        assert bound.accountant == "pld"


def test_row_13_every_segment_counts_in_any_order() -> None:
    segments = [step(0.05, 1.0, 50), step(0.01, 2.0, 10), step(0.001, 5.0, 5)]
    forth, back = epsilon(segments, 1e-5).epsilon, epsilon(segments[::-1], 1e-5).epsilon
    assert forth == pytest.approx(back, rel=1e-9)
    assert forth > epsilon(segments[-1:], 1e-5).epsilon * 5


def test_row_14_a_release_nobody_bounded_is_never_free(tmp_path: Path) -> None:
    accountant = Accountant()
    accountant.compose(step(0.01, 1.0))
    accountant.compose(NonPrivateEvent(reason="scaler fitted on private data"))
    assert accountant.epsilon(1e-5).epsilon == math.inf
    ledger = Ledger.open(tmp_path / "ledger.db")
    ledger.set_budget("o", "d", "record", 8.0, 1e-5)
    with pytest.raises(BudgetExceeded):
        ledger.reserve(
            [
                Charge(
                    owner="o",
                    dataset="d",
                    event=NonPrivateEvent(reason="metrics"),
                    run="r",
                    round=0,
                    release="loss",
                )
            ]
        )


def test_row_19_missing_shares_of_noise_are_missing() -> None:
    rows = VECTORS["dropout"]
    for row in rows["rows"]:
        share = rows["sigma"] / math.sqrt(100)
        sigma = surviving_noise_multiplier(
            local_multiplier=share, survivors=round(100 * (1 - row["dropout"]))
        )
        assert epsilon([step(rows["q"], sigma, rows["steps"])], rows["delta"]).epsilon == pytest.approx(
            row["eps"], rel=2e-3
        )


@pytest.mark.parametrize("batches", [49, 98, 103, 1147])
def test_row_20_rate_and_steps_are_two_exact_numbers(batches: int) -> None:
    rate = 1 / batches
    event = step(rate, 1.0, batches)
    assert from_dict(event.to_dict()) == event
    assert event.steps == batches
    assert event.sampling_rate == rate
    with pytest.raises(ParameterError, match="steps"):
        step(rate, 1.0, 1 / rate)
    assert epsilon([event], 1e-5).epsilon > epsilon([step(rate, 1.0, batches - 1)], 1e-5).epsilon
