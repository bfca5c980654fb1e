"""Noise in shares: what the opened sum holds is what is charged; every row moves it by at most the bound."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from defenses.dp import Accountant, NonPrivateEvent, SampledSkellamEvent, SumMechanism, smallest_multiplier
from defenses.errors import BudgetExceeded, ParameterError
from defenses.random_source import RandomSource

FINITE = st.floats(-1e6, 1e6, width=64)


def mechanism(**changes: object) -> SumMechanism:
    """Return a small mechanism, with changes."""
    base = SumMechanism(noise_multiplier=0.7, bound=1.0, scale=4095.0, dimension=400, honest_survivors=6)
    return replace(base, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("survivors", [6, 9, 20])
def test_the_opened_sum_holds_the_charged_noise_and_never_less(survivors: int) -> None:
    """With exactly the honest survivors the deviation is the charged one within 1 %;
    with more it is larger.
    """
    sums = mechanism(dimension=20_000)
    zeros = np.zeros(sums.dimension)
    source = RandomSource.seeded(5)
    opened = sum(sums.share(zeros, source.derive("site", site)) for site in range(survivors))
    deviation = float(np.std(opened)) / math.sqrt(survivors / sums.honest_survivors)
    event = sums.event("test")
    assert isinstance(event, SampledSkellamEvent)
    assert deviation == pytest.approx(math.sqrt(event.variance), rel=0.01)
    assert sums.share_variance * sums.honest_survivors >= event.variance


@given(
    others=arrays(np.float64, (3, 5), elements=FINITE),
    row=arrays(np.float64, (1, 5), elements=FINITE),
    seed=st.integers(0, 1000),
)
def test_one_row_moves_the_rounded_sum_by_at_most_the_stated_sensitivity(
    others: np.ndarray, row: np.ndarray, seed: int
) -> None:
    """With the same dither, with and without a row: L2 and L1 of the change are within what is charged."""
    sums = mechanism(dimension=5, noise_multiplier=0.0, scale=15.0)
    charged = replace(sums, noise_multiplier=1.0)
    with_row = sums.share_of_rows(np.concatenate([others, row]), RandomSource.seeded(seed))
    without = sums.share_of_rows(others, RandomSource.seeded(seed))
    change = (with_row - without).astype(np.float64)
    assert math.sqrt(float(change @ change)) <= charged.l2_sensitivity
    assert float(np.abs(change).sum()) <= charged.l1_sensitivity * (1 + 1e-12)


@given(total=arrays(np.float64, 5, elements=st.floats(-30, 30)), row=arrays(np.float64, 5, elements=FINITE))
def test_a_bounded_row_moves_a_given_sum_by_at_most_the_stated_sensitivity(
    total: np.ndarray, row: np.ndarray
) -> None:
    """The same for a sum that was added up elsewhere, cut coordinates included."""
    sums = mechanism(dimension=5, noise_multiplier=0.0, scale=15.0, largest=100)
    bounded = sums.bounded(row[None])[0]
    change = sums.share(total + bounded, RandomSource.seeded(3)) - sums.share(total, RandomSource.seeded(3))
    assert math.sqrt(float(change @ change)) <= sums.l2_sensitivity


def test_rounding_that_is_left_out_of_the_bound_is_exceeded() -> None:
    """The room for rounding is needed: some row moves the sum further than its own length in levels."""
    sums = mechanism(dimension=64, noise_multiplier=0.0, scale=10.0)
    row = np.full((1, 64), 1 / 8.0)
    source = RandomSource.seeded(1)
    furthest = 0.0
    for trial in range(200):
        dither = source.derive("trial", trial)
        change = sums.share_of_rows(row, dither)
        furthest = max(furthest, float(np.sqrt(np.square(change).sum())))
    assert furthest > sums.bound * sums.scale * 1.05
    assert furthest <= sums.l2_sensitivity


def test_rounding_is_unbiased() -> None:
    """The mean over many roundings is the sum itself."""
    sums = mechanism(dimension=3, noise_multiplier=0.0, scale=3.0)
    rows = np.array([[0.1, -0.2, 0.4], [0.3, 0.05, -0.6]])
    source = RandomSource.seeded(2)
    drawn = [sums.share_of_rows(rows, source.derive("trial", trial)) for trial in range(4000)]
    np.testing.assert_allclose(np.mean(drawn, axis=0), rows.sum(axis=0) * 3.0, atol=0.04)


def test_whole_numbers_pay_nothing_for_rounding_and_rows_beyond_the_bound_are_left_out() -> None:
    """Counts: one record is in one cell; a row with two cells, a half or a nan counts as nothing."""
    counts = mechanism(whole_numbers=True, scale=1.0, dimension=4)
    assert counts.l2_sensitivity == 1.0
    assert counts.l1_sensitivity == 1.0
    rows = np.array(
        [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [1, 1, 0, 0], [0, 0.5, 0, 0], [0, 0, np.nan, 0]]
    )
    silent = replace(counts, noise_multiplier=0.0)
    np.testing.assert_array_equal(silent.share_of_rows(rows, RandomSource.seeded(1)), [2, 0, 1, 0])


def test_votes_on_a_finer_grid_cost_the_same_as_on_the_coarse_one_in_the_limit() -> None:
    """A larger whole scale makes the noise finer; epsilon only falls with it."""
    coarse, fine = mechanism(whole_numbers=True, scale=1.0), mechanism(whole_numbers=True, scale=1000.0)
    spent = []
    for sums in (coarse, fine):
        accountant = Accountant()
        accountant.compose(sums.event("votes"))
        spent.append(accountant.epsilon(1e-5).epsilon)
    assert spent[1] < spent[0]


def test_rows_that_are_not_finite_or_too_long_are_bounded() -> None:
    """A row counts for its bound, one that is not finite for nothing."""
    sums = mechanism(dimension=2)
    rows = np.array([[3.0, 4.0], [np.inf, 0.0], [np.nan, 1.0], [1e200, 1e200], [0.3, 0.4]])
    bounded = sums.bounded(rows)
    np.testing.assert_allclose(bounded[0], [0.6, 0.8])
    assert not bounded[1].any()
    assert not bounded[2].any()
    assert (np.linalg.norm(bounded, axis=1) <= 1 + 1e-12).all()
    np.testing.assert_array_equal(bounded[4], rows[4])


def test_no_noise_is_no_guarantee() -> None:
    """A multiplier of zero is charged as infinite."""
    assert isinstance(mechanism(noise_multiplier=0.0).event("x"), NonPrivateEvent)


@pytest.mark.parametrize(
    "wrong",
    [
        {"bound": 0.0},
        {"scale": math.inf},
        {"dimension": 0},
        {"honest_survivors": 0},
        {"sampling_rate": 0.0},
        {"noise_multiplier": -1.0},
        {"unit": "client"},
        {"adjacency": "replace_one"},
        {"whole_numbers": True, "scale": 1.5},
        {"whole_numbers": True, "bound": 0.5},
        {"records_per_person": 3},
    ],
)
def test_impossible_mechanisms_are_refused(wrong: dict[str, object]) -> None:
    """Each with the name of what is wrong."""
    with pytest.raises(ParameterError):
        mechanism(**wrong)


def test_the_smallest_multiplier_keeps_the_budget_and_a_smaller_one_does_not() -> None:
    """Over several releases and on top of a history of another sum."""
    counts = mechanism(whole_numbers=True, scale=1.0, noise_multiplier=2.0).event("counts")

    def event_of(multiplier: float) -> SampledSkellamEvent:
        event = mechanism(noise_multiplier=multiplier, sampling_rate=0.1).event("learning")
        assert isinstance(event, SampledSkellamEvent)
        return event

    chosen = smallest_multiplier(event_of, epsilon=4.0, delta=1e-5, count=30, history=[counts])
    for multiplier, within in ((chosen, True), (chosen * 0.998, False)):
        accountant = Accountant()
        accountant.compose(counts)
        accountant.compose(event_of(multiplier), 30)
        assert (accountant.epsilon(1e-5).epsilon <= 4.0) == within
    with pytest.raises(BudgetExceeded):
        smallest_multiplier(event_of, epsilon=0.5, delta=1e-5, history=[counts])


def test_the_digest_names_everything_that_decides_epsilon() -> None:
    """Every field changes it."""
    base = mechanism()
    others = [
        mechanism(noise_multiplier=0.8),
        mechanism(bound=2.0),
        mechanism(honest_survivors=5),
        mechanism(sampling_rate=0.5),
        mechanism(scale=4096.0),
        mechanism(largest=9),
    ]
    digests = {base.digest(), *(other.digest() for other in others)}
    assert len(digests) == 7
