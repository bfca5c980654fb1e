"""Samplers draw what the accountant assumes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from defenses.dp.sampling import balanced_schedule, fixed_size_sample, participation_cap, poisson_sample
from defenses.errors import ParameterError
from defenses.random_source import RandomSource


@pytest.mark.parametrize("rate", [0.003, 0.2, 0.75])
def test_poisson_batch_sizes_are_binomial_and_not_at_another_rate(rate: float) -> None:
    source = RandomSource.seeded(1)
    sizes = np.array([len(poisson_sample(400, rate=rate, source=source)) for _ in range(4000)])
    assert abs(sizes.mean() - 400 * rate) < 5 * math.sqrt(400 * rate * (1 - rate) / 4000)
    assert (
        abs(sizes.mean() - 400 * rate * 1.05) > 5 * math.sqrt(400 * rate * (1 - rate) / 4000) or rate < 0.01
    )
    assert sizes.var() == pytest.approx(400 * rate * (1 - rate), rel=0.15)


def test_poisson_members_are_drawn_alike_and_independently() -> None:
    source = RandomSource.seeded(2)
    draws = np.zeros((5000, 20))
    for row in draws:
        row[poisson_sample(20, rate=0.3, source=source)] = 1
    counts = draws.sum(0)
    assert stats.chisquare(counts).pvalue > 1e-4
    assert np.abs(np.corrcoef(draws.T) - np.eye(20)).max() < 5 / math.sqrt(5000)


def test_poisson_rate_zero_and_one_are_exact() -> None:
    source = RandomSource.seeded(3)
    assert len(poisson_sample(1000, rate=0.0, source=source)) == 0
    assert np.array_equal(poisson_sample(70_000, rate=1.0, source=source), np.arange(70_000))
    assert len(poisson_sample(0, rate=0.5, source=source)) == 0


def test_poisson_covers_a_population_beyond_one_block() -> None:
    found = poisson_sample(200_000, rate=0.5, source=RandomSource.seeded(4))
    assert np.all(np.diff(found) > 0)
    assert len(found) == pytest.approx(100_000, abs=5 * math.sqrt(50_000))
    assert found.max() > 199_900


def test_fixed_size_subsets_are_uniform() -> None:
    source = RandomSource.seeded(5)
    seen: dict[tuple[int, ...], int] = {}
    for _ in range(6000):
        subset = tuple(fixed_size_sample(5, size=2, source=source).tolist())
        seen[subset] = seen.get(subset, 0) + 1
    assert len(seen) == 10
    assert stats.chisquare(list(seen.values())).pvalue > 1e-4
    assert len(fixed_size_sample(5, size=0, source=source)) == 0
    assert np.array_equal(fixed_size_sample(5, size=5, source=source), np.arange(5))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(clients=st.integers(1, 30), rounds=st.integers(0, 40), share=st.floats(0, 1), seed=st.integers(0, 9))
def test_no_client_exceeds_the_participation_cap(clients: int, rounds: int, share: float, seed: int) -> None:
    cohort = 1 + math.floor(share * (clients - 1))
    schedule = balanced_schedule(clients, rounds=rounds, cohort=cohort, source=RandomSource.seeded(seed))
    assert len(schedule) == rounds
    assert all(len(set(members.tolist())) == cohort for members in schedule)
    turns = np.bincount(np.concatenate([*schedule, np.empty(0, dtype=np.int64)]), minlength=clients)
    cap = participation_cap(clients, rounds=rounds, cohort=cohort)
    assert turns.max() <= cap
    assert turns.max() - turns.min() <= 1
    assert cap == math.ceil(rounds * cohort / clients)


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_impossible_rates_are_refused(rate: float) -> None:
    with pytest.raises(ParameterError, match="rate"):
        poisson_sample(5, rate=rate, source=RandomSource.seeded(0))


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ParameterError, match="size = 6"):
        fixed_size_sample(5, size=6, source=RandomSource.seeded(0))
    with pytest.raises(ParameterError, match="cohort = 6"):
        balanced_schedule(5, rounds=1, cohort=6, source=RandomSource.seeded(0))
