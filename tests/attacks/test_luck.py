"""Luck is what it says: a p-value under its null, exact tails, intervals that cover,
corrections that hold.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from attacks import luck


def test_a_rank_counts_itself_and_ties() -> None:
    assert luck.rank(1.0, [0.0] * 99) == 0.01
    assert luck.rank(1.0, [1.0] * 99) == 1.0
    assert luck.rank(0.5, [0.1, 0.5, 0.9]) == 0.75


def test_beyond_all_nulls_luck_goes_on_falling_and_inside_it_is_the_rank() -> None:
    rng = np.random.default_rng(0)
    nulls = rng.normal(size=99).tolist()
    values = [luck.beyond(max(nulls) + step, nulls, step=0.02) for step in (0.0, 1.0, 2.0, 4.0)]
    assert values == sorted(values, reverse=True)
    assert values[-1] < 1e-4
    assert luck.beyond(sorted(nulls)[50], nulls, step=0.02) == luck.rank(sorted(nulls)[50], nulls)
    assert luck.beyond(0.03, [0.0] * 99, step=0.02) > 0.001  # zeros alone do not make every step a certainty


def test_luck_beyond_noise_keeps_its_level() -> None:
    rng = np.random.default_rng(1)
    for draw in (rng.normal, rng.exponential):
        below = sum(
            luck.beyond(float(one[0]), one[1:].tolist(), step=0.02) <= 0.05 for one in draw(size=(2000, 100))
        )
        assert below <= 135  # 100 expected at most; more than 135 has chance 3e-4


def test_one_bad_draw_outvotes_no_exact_ones_and_one_lucky_draw_carries_nothing() -> None:
    assert luck.majority([1e-6] * 7 + [1.0]) < 1e-20
    assert luck.majority([1e-6] + [0.9] * 7) > 0.05
    assert luck.majority([0.5] * 8) == pytest.approx(2 * 0.5**8)
    assert luck.majority([0.3]) == 0.3
    with pytest.raises(ValueError, match="0 draws"):
        luck.majority([])


@pytest.mark.parametrize("draws", [2, 3, 4, 8, 12])
def test_the_luck_of_a_majority_keeps_its_level(draws: int) -> None:
    lucks = np.random.default_rng(draws).random((4000, draws))
    below = sum(luck.majority(row) <= 0.05 for row in lucks.tolist())
    assert below <= 250  # 200 expected at most; more than 250 has chance 2e-4


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_equals_its_definition(lucks: list[float]) -> None:
    corrected = luck.holm(lucks)
    ordered = sorted(range(len(lucks)), key=lambda index: lucks[index])
    worst = 0.0
    for place, index in enumerate(ordered):
        worst = max(worst, min(1.0, (len(lucks) - place) * lucks[index]))
        assert corrected[index] == pytest.approx(worst)
    assert all(one >= raw for one, raw in zip(corrected, lucks, strict=True))


def test_few_draws_have_no_interval_and_many_have_one_that_covers() -> None:
    assert luck.interval([1.0, 0.2, 0.3, 0.4]).low is None
    certain = luck.interval([1.0] * 8)
    assert certain.low == pytest.approx(0.005 ** (1 / 8))
    rng = np.random.default_rng(2)
    for count in (5, 8):
        for truth, values in (
            (0.9, (rng.random((2000, count)) < 0.9).astype(float)),
            (8 / 9, rng.beta(8, 1, (2000, count))),
            (0.5, rng.random((2000, count))),
        ):
            spreads = [luck.interval(row) for row in values.tolist()]
            missed = sum(not (one.low <= truth <= one.high) for one in spreads)
            assert missed <= 35  # of 2,000 at 99 %: 20 expected at most; more than 35 has chance 1e-3
        decibels = [luck.interval(row, bounded=False) for row in rng.normal(20, 5, (2000, count)).tolist()]
        assert sum(not (one.low <= 20 <= one.high) for one in decibels) <= 40


@given(st.integers(0, 12), st.lists(st.floats(0.001, 0.999), min_size=1, max_size=10))
def test_the_chance_of_so_many_hits_equals_its_definition(hits: int, chances: list[float]) -> None:
    counts = {0: 1.0}
    for chance in chances:
        following: dict[int, float] = {}
        for count, mass in counts.items():
            following[count] = following.get(count, 0.0) + mass * (1 - chance)
            following[count + 1] = following.get(count + 1, 0.0) + mass * chance
        counts = following
    tail = sum(mass for count, mass in counts.items() if count >= hits)
    assert luck.at_least(hits, np.array(chances)) == pytest.approx(tail, rel=1e-9, abs=1e-12)


def test_small_and_long_tails_are_right_or_above() -> None:
    assert luck.at_least(30, np.full(60, 1e-3)) == pytest.approx(float(binom.sf(29, 60, 1e-3)), rel=1e-9)
    bound, exact = luck.at_least(300, np.full(3000, 0.05)), float(binom.sf(299, 3000, 0.05))
    assert exact <= bound <= 1e4 * exact
    assert luck.at_least(5, np.full(3000, 0.05)) == 1.0


def test_labels_are_guessed_by_shares_and_by_other_names() -> None:
    assert luck.labels_luck([1, 0], [1, 0]) == 0.5
    assert luck.labels_luck([1, 0], [1, 0], [0.9, 0.1]) == 0.9
    # A client whose records all carry one of two labels is guessed every other time, however many records it
    # has.
    assert luck.labels_luck([16, 0], [16, 0]) == pytest.approx(0.5, abs=0.02)
    exact = luck.labels_luck([3, 5], [3, 5])
    assert exact == pytest.approx(0.5, abs=0.02)
    many = [4, 0, 2, 0, 0, 1, 0, 0, 9, 0]
    assert luck.labels_luck(many, many) < 1e-3
    assert luck.labels_luck([1.6] * 10, many) > 0.2
    assert math.isfinite(luck.labels_luck([0.0] * 10, many))
