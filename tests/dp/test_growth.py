"""A history that grows round by round costs what the same history costs when it is composed at once."""

from __future__ import annotations

import pytest

from defenses.dp import Accountant, GaussianEvent, epsilon


def event(rate: float, sigma: float, steps: int) -> GaussianEvent:
    return GaussianEvent(
        unit="record",
        adjacency="add_remove",
        sampling="poisson",
        sampling_rate=rate,
        noise_multiplier=sigma,
        steps=steps,
        clip_norm=1.0,
        release="update",
    )


@pytest.mark.parametrize(
    ("rate", "sigma", "steps"), [(8 / 359, 0.4472, 2), (0.01, 1.0, 10), (0.2, 0.9, 1), (0.002, 0.33, 4)]
)
def test_growing_is_as_tight_as_starting_anew(rate: float, sigma: float, steps: int) -> None:
    """Found in a run: after two rounds the grid was too small and the bound, though valid, jumped from 7 to 18."""
    grown = Accountant()
    for count in range(1, 9):
        foretold = grown.epsilon_with(event(rate, sigma, steps), 1e-5).epsilon
        grown.compose(event(rate, sigma, steps))
        fresh = epsilon([event(rate, sigma, steps)] * count, 1e-5).epsilon
        assert grown.epsilon(1e-5).epsilon == pytest.approx(fresh, rel=2e-3)
        assert foretold == pytest.approx(fresh, rel=2e-3)
