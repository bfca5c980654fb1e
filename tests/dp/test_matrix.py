"""Banded factorisation: the sensitivity by brute force, the noise by its matrix,
the gain over independent noise.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from defenses.dp import matrix
from defenses.dp.accountant import epsilon, gaussian_epsilon
from defenses.errors import ParameterError


def toeplitz(coefficients: np.ndarray, steps: int) -> np.ndarray:
    result = np.zeros((steps, steps))
    for offset, value in enumerate(coefficients[:steps]):
        result += value * np.eye(steps, k=-offset)
    return result


def test_square_root_squares_to_prefix_sums() -> None:
    root = toeplitz(matrix.square_root_coefficients(12), 12)
    np.testing.assert_allclose(root @ root, np.tril(np.ones((12, 12))), atol=1e-12)


@pytest.mark.parametrize("bands,separation,steps", [(1, 1, 5), (2, 2, 6), (3, 3, 8), (2, 4, 9)])
def test_sensitivity_covers_every_pattern_and_direction(bands: int, separation: int, steps: int) -> None:
    column = matrix.square_root_coefficients(bands)
    encoder = toeplitz(column, steps)
    cap = matrix.participation_cap(steps=steps, min_separation=separation)
    bound = matrix.sensitivity(column, participations=cap, min_separation=separation)
    worst = 0.0
    for size in range(1, cap + 1):
        for rounds in itertools.combinations(range(steps), size):
            if all(later - earlier >= separation for earlier, later in itertools.pairwise(rounds)):
                for signs in itertools.product((-1.0, 1.0), repeat=size):
                    worst = max(worst, float(np.linalg.norm(encoder[:, rounds] @ np.array(signs))))
    assert worst <= bound <= worst * math.sqrt(cap)
    if steps >= separation * (cap - 1) + bands:
        assert worst == pytest.approx(bound)


def test_overlapping_bands_are_refused() -> None:
    with pytest.raises(ParameterError, match="overlap"):
        matrix.sensitivity(matrix.square_root_coefficients(4), participations=2, min_separation=3)


def test_streamed_noise_is_the_inverse_times_fresh_noise() -> None:
    column, steps = matrix.square_root_coefficients(4), 9
    fresh = np.random.default_rng(0).normal(size=(steps, 3))
    noises: list[np.ndarray] = []
    for row in fresh:
        noises.append(matrix.correlate(column, row, noises[::-1][:3]))
    np.testing.assert_allclose(np.array(noises), np.linalg.solve(toeplitz(column, steps), fresh), atol=1e-12)


def test_error_is_that_of_the_matrices() -> None:
    column, steps = matrix.square_root_coefficients(5), 20
    decoder = np.tril(np.ones((steps, steps))) @ np.linalg.inv(toeplitz(column, steps))
    expected = np.linalg.norm(decoder) / math.sqrt(steps) * np.linalg.norm(column) * math.sqrt(4)
    assert matrix.root_mean_square_error(column, steps=steps, participations=4) == pytest.approx(expected)


def test_bands_beat_independent_noise() -> None:
    bands = matrix.best_bands(steps=200, min_separation=20)
    errors = [
        matrix.root_mean_square_error(matrix.square_root_coefficients(count), steps=200, participations=10)
        for count in (1, bands)
    ]
    assert errors[1] < 0.5 * errors[0]


def test_the_run_is_priced_as_one_gaussian() -> None:
    column = matrix.square_root_coefficients(4)
    event = matrix.event(
        coefficients=column, noise_multiplier=5.0, steps=20, min_separation=5, clip_norm=1.0, release="run"
    )
    assert (event.participations, event.bands) == (4, 4)
    mu = math.sqrt(4 * float(column @ column)) / 5.0
    assert epsilon([event], 1e-6).epsilon == pytest.approx(gaussian_epsilon(mu, 1e-6), rel=1e-9)
    one = matrix.event(
        coefficients=[1.0], noise_multiplier=5.0, steps=20, min_separation=1, clip_norm=1.0, release="run"
    )
    assert epsilon([one], 1e-6).epsilon == pytest.approx(gaussian_epsilon(math.sqrt(20) / 5, 1e-6), rel=1e-9)
