"""Noise with a memory: its law by the matrices, its price, and what a reopened stream goes on with."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from defenses.dp import BandedShares, MatrixFactorizationEvent, NoiseStream, matrix
from defenses.dp.accountant import epsilon, gaussian_epsilon
from defenses.errors import ParameterError
from defenses.random_source import RandomSource

STEPS = 9


def shares(separation: int = 3, dimension: int = 1, honest: int = 2, noise: float = 1.0) -> BandedShares:
    return BandedShares(
        noise_multiplier=noise,
        l2_sensitivity=1000.0,
        honest_survivors=honest,
        separation=separation,
        dimension=dimension,
    )


def encoder(separation: int, steps: int = STEPS) -> np.ndarray:
    column = matrix.square_root_coefficients(separation)
    return sum(np.eye(steps, k=-back) * value for back, value in enumerate(column))


@pytest.mark.parametrize("separation", [2, 3, 4])
def test_prefix_sums_of_what_honest_sites_add_have_the_variance_of_the_definition(separation: int) -> None:
    made = shares(separation, dimension=40_000)
    streams = [NoiseStream(made, RandomSource.seeded(site)) for site in range(made.honest_survivors)]
    opened = np.zeros((STEPS, made.dimension))
    for step in range(STEPS):
        for stream in streams:
            opened[step] += np.rint(stream.row(step + 1))
    decoder = np.tril(np.ones((STEPS, STEPS))) @ np.linalg.inv(encoder(separation))
    expected = np.linalg.norm(decoder, axis=1) * made.noise_multiplier * made.l2_sensitivity
    seen = np.cumsum(opened, axis=0).std(axis=1)
    np.testing.assert_allclose(seen, expected, rtol=0.02)
    independent = np.sqrt(np.arange(1, STEPS + 1)) * made.noise_multiplier * made.l2_sensitivity
    assert (seen[1:] < 0.95 * independent[1:]).all()  # noise without a memory would fail


def test_one_rounds_noise_is_as_wide_as_the_ring_leaves_room_for() -> None:
    made = shares(4, dimension=50_000, honest=1)
    stream = NoiseStream(made, RandomSource.seeded(1))
    late = [stream.row(step).std() for step in range(1, 30)][-1]
    assert late == pytest.approx(made.share_deviation, rel=0.02)
    assert late > 1.02 * made.fresh_deviation


def test_turns_compose_to_the_whole_run() -> None:
    made, turns, delta = shares(3, noise=4.0), 5, 1e-6
    turn = made.event("turn", clip_norm=1.0)
    assert isinstance(turn, MatrixFactorizationEvent)
    assert (turn.participations, turn.bands, turn.min_separation) == (1, 3, 3)
    mu = math.sqrt(turns) * float(np.linalg.norm(made.coefficients)) / made.noise_multiplier
    whole = matrix.event(
        coefficients=made.coefficients,
        noise_multiplier=4.0,
        steps=3 * turns,
        min_separation=3,
        clip_norm=1.0,
        release="run",
    )
    exact = gaussian_epsilon(mu, delta)
    assert epsilon([turn] * turns, delta).epsilon == pytest.approx(exact, rel=1e-9)
    assert epsilon([whole], delta).epsilon == pytest.approx(exact, rel=1e-9)


def spent(covariance: np.ndarray, change: np.ndarray) -> float:
    """Return the squared distance of two runs that differ by a change, under noise of this covariance."""
    return float(change @ np.linalg.solve(covariance, change))


def test_sites_that_begin_their_memory_at_different_times_protect_no_less() -> None:
    """The charge of every pattern of turns holds for any mixture of memories: the inverse is convex."""
    separation, honest = 3, 3
    column = matrix.square_root_coefficients(separation)
    whole = np.linalg.inv(encoder(separation))
    chance = np.random.default_rng(0)
    for _ in range(50):
        total = np.zeros((STEPS, STEPS))
        for _ in range(honest):
            start = int(chance.integers(0, STEPS))
            own = np.zeros((STEPS, STEPS))
            own[:start, :start] = whole[:start, :start]
            own[start:, start:] = whole[: STEPS - start, : STEPS - start]
            total += own @ own.T / honest
        for first in range(separation):
            turns = np.arange(first, STEPS, separation)
            for signs in itertools.product((-1.0, 1.0), repeat=len(turns)):
                change = np.zeros(STEPS)
                change[turns] = signs
                assert spent(total, change) <= len(turns) * float(column @ column) * (1 + 1e-9)
    near = np.zeros(STEPS)
    near[:2] = 1.0  # turns in neighbouring rounds overlap, and cost more than two turns are charged
    assert spent(whole @ whole.T, near) > 2 * float(column @ column)


def test_a_stream_that_is_opened_again_goes_on_where_it_was() -> None:
    made = shares(3, dimension=5)
    whole = NoiseStream(made, RandomSource.seeded(4))
    rows = [whole.row(step) for step in range(1, 8)]
    again = NoiseStream(made, RandomSource.seeded(4))
    np.testing.assert_array_equal(again.row(6), rows[5])
    np.testing.assert_array_equal(again.row(7), rows[6])
    np.testing.assert_array_equal(again.row(2), rows[1])
    assert not np.array_equal(NoiseStream(made, RandomSource.seeded(5)).row(6), rows[5])


def test_a_second_attempt_has_noise_of_its_own_that_no_later_round_takes_back() -> None:
    made = shares(3, dimension=5)
    stream, plain = (NoiseStream(made, RandomSource.seeded(4)) for _ in range(2))
    first = stream.row(1)
    attempts = [stream.row(2), stream.row(2, 1), stream.row(2, 2)]
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(attempts, 2))
    np.testing.assert_array_equal(first, plain.row(1))
    np.testing.assert_array_equal(stream.row(3), plain.row(3))


@pytest.mark.parametrize("wrong", [{"separation": 1}, {"honest": 0}, {"noise": -1.0}, {"noise": 1e-3}])
def test_what_cannot_hold_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ParameterError):
        shares(**wrong)
