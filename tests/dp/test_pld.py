"""The discrete loss distribution dominates the true one, in both directions, at every epsilon."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr

from defenses.dp.pairs import MixturePair, fixed_size_pair, gaussian_pair, poisson_pair
from defenses.dp.pld import LossGrid, LossTooLarge, discretise


def exact_delta(pair: MixturePair, epsilon: float, *, add: bool = False) -> float:
    """sup over tests of P - e^epsilon Q (or the other way round), from the output where the loss crosses."""
    if add:
        output = float(pair.output_of_loss(np.array([-epsilon]))[0])
        own = sum(w * ndtr((output + i) / pair.sigma) for i, w in enumerate(pair.down))
        other = sum(w * ndtr((output - i) / pair.sigma) for i, w in enumerate(pair.up))
    else:
        output = float(pair.output_of_loss(np.array([epsilon]))[0])
        own = sum(w * ndtr((i - output) / pair.sigma) for i, w in enumerate(pair.up))
        other = sum(w * ndtr((-i - output) / pair.sigma) for i, w in enumerate(pair.down))
    return float(own - math.exp(epsilon) * other)


def grid_delta(grid: LossGrid, epsilon: float, *, add: bool = False) -> float:
    losses = grid.indices * grid.spacing * (-1 if add else 1)
    masses = grid.backward if add else grid.forward
    infinity = grid.backward_infinity if add else grid.forward_infinity
    above = losses > epsilon
    return float((masses[above] * -np.expm1(epsilon - losses[above])).sum()) + infinity


PAIRS = [
    gaussian_pair(0.3),
    gaussian_pair(4.0),
    poisson_pair(0.01, 1.0),
    poisson_pair(1e-6, 0.5),
    poisson_pair(0.7, 0.4),
    poisson_pair(0.05, 1.0, 5),
    poisson_pair(0.05, 1.0, replace=True),
    poisson_pair(0.02, 0.6, 3, replace=True),
]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{len(pair.up)}-{len(pair.down)}-{pair.sigma:.2g}")
@pytest.mark.parametrize("add", [False, True])
def test_the_grid_lies_above_the_exact_curve_and_close_to_it(pair: MixturePair, add: bool) -> None:
    grid = discretise(pair, spacing=0.0005, growth=0.005, tail=1e-14)
    for epsilon in (-1.5, -0.1, -0.001, 0.0, 0.0011, 0.02, 0.3, 1.0, 2.7, 5.0):
        true, bound = exact_delta(pair, epsilon, add=add), grid_delta(grid, epsilon, add=add)
        assert bound >= true * (1 - 1e-12) - 1e-15
        assert bound <= true * (1 + 5e-3) + 2e-6 * (1 + math.exp(epsilon))


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{len(pair.up)}-{len(pair.down)}-{pair.sigma:.2g}")
def test_both_directions_are_one_pair(pair: MixturePair) -> None:
    grid = discretise(pair, spacing=0.01, growth=0.02, tail=1e-13)
    assert grid.forward.sum() + grid.forward_infinity == pytest.approx(1.0, abs=1e-12)
    assert grid.backward.sum() + grid.backward_infinity == pytest.approx(1.0, abs=1e-12)
    np.testing.assert_allclose(grid.backward, grid.forward * np.exp(-grid.indices * grid.spacing), rtol=1e-12)


@given(
    rate=st.floats(1e-7, 0.95),
    sigma=st.floats(0.25, 30.0),
    spacing=st.floats(1e-4, 0.3),
    epsilon=st.floats(-1, 4),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_domination_for_any_step_and_any_grid(
    rate: float, sigma: float, spacing: float, epsilon: float
) -> None:
    pair = poisson_pair(rate, sigma)
    grid = discretise(pair, spacing=spacing, growth=0.05, tail=1e-13)
    for add in (False, True):
        assert grid_delta(grid, epsilon, add=add) >= exact_delta(pair, epsilon, add=add) * (1 - 1e-10) - 1e-14


def test_fixed_size_is_symmetric_and_keeps_the_sampled_curve_above_zero() -> None:
    grid = discretise(fixed_size_pair(0.05, 2.0), spacing=0.002, growth=0.01, tail=1e-14)
    sampled = poisson_pair(0.05, 1.0)
    np.testing.assert_allclose(grid.forward, grid.backward[::-1], rtol=1e-12)
    assert grid.forward.sum() + grid.forward_infinity == pytest.approx(1.0, abs=1e-12)
    for epsilon in (0.0, 0.05, 0.5, 2.0):
        assert grid_delta(grid, epsilon) == pytest.approx(exact_delta(sampled, epsilon), rel=2e-3, abs=1e-9)
        assert grid_delta(grid, epsilon) >= exact_delta(sampled, epsilon) * (1 - 1e-10)


def test_several_records_are_worse_than_one_and_the_mixture_inverts() -> None:
    pair = poisson_pair(0.05, 0.8, 4, replace=True)
    losses = np.linspace(-6, 6, 101)
    np.testing.assert_allclose(pair.loss(pair.output_of_loss(losses)), losses, atol=1e-9)


def test_no_unit_vector_moves_are_worse_than_the_line() -> None:
    """Replace-one in two dimensions:
    any two moves of length at most one are dominated by opposite ones on a line.
    """
    rng = np.random.default_rng(3)
    rate, sigma, epsilon = 0.3, 1.0, 0.5
    line = exact_delta(poisson_pair(rate, sigma, replace=True), epsilon)
    points = rng.normal(scale=sigma, size=(400_000, 2))
    for angle in (0.0, 0.8, 1.6, 2.4, math.pi):
        moves = np.array([[1.0, 0.0], [math.cos(angle), math.sin(angle)]])
        ratios = [1 - rate + rate * np.exp((points @ move - 0.5) / sigma**2) for move in moves]
        plane = np.maximum(ratios[0] - math.exp(epsilon) * ratios[1], 0.0)
        assert plane.mean() <= line + 5 * plane.std() / math.sqrt(len(plane))


def test_losses_beyond_doubles_are_refused() -> None:
    with pytest.raises(LossTooLarge):
        discretise(gaussian_pair(40.0), spacing=0.1, growth=0.01, tail=1e-12)
