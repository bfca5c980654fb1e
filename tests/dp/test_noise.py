"""Gaussian noise has the law it states, and its low bits say nothing about what it hides."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from defenses.dp.noise import add_gaussian, gaussian, grid_of
from defenses.errors import ParameterError
from defenses.random_source import RandomSource

COUNT = 400_000


@pytest.mark.parametrize("std", [1e-4, 1.0, 37.0])
def test_samples_pass_at_their_scale_and_fail_at_another(std: float) -> None:
    samples = gaussian(COUNT, std=std, source=RandomSource.seeded(1))
    assert stats.kstest(samples / std, "norm").pvalue > 1e-3
    assert stats.kstest(samples / (1.05 * std), "norm").pvalue < 1e-9
    assert stats.kstest(samples / std + 0.02, "norm").pvalue < 1e-9


def test_moments_tails_and_independence() -> None:
    z = gaussian(4_000_000, std=1.0, source=RandomSource.seeded(2))
    n = len(z)
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs((z**2).mean() - 1) < 5 * math.sqrt(2 / n)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)
    assert abs((z**6).mean() - 15) < 5 * math.sqrt(10170 / n)
    for beyond in (3.0, 4.0, 4.5):
        expected = 2 * stats.norm.sf(beyond) * n
        assert abs((np.abs(z) > beyond).sum() - expected) < 5 * math.sqrt(expected)
    # the two halves of a block share their radius: squares would correlate if the angle were not uniform
    for lag in (1, 2, 1 << 13):
        assert abs(np.corrcoef(z[:-lag], z[lag:])[0, 1]) < 5 / math.sqrt(n)
        assert abs(np.corrcoef(z[:-lag] ** 2, z[lag:] ** 2)[0, 1]) < 5 / math.sqrt(n)


class _Extreme(RandomSource):
    """A source whose words are all the same: drives the sampler to the ends of its range."""

    def __init__(self, word: int) -> None:
        super().__init__(bytes(32), private=False)
        self.word = word

    def fill(self, out: np.ndarray) -> None:
        out[...] = self.word


@pytest.mark.parametrize("word, radius", [(0, 9.42), (-1, 9.42), (2**63 - 1, 0.0), (-(2**63), 0.0)])
def test_every_word_gives_a_finite_sample_and_the_tail_reaches_nine(word: int, radius: float) -> None:
    z = gaussian(1 << 14, std=1.0, source=_Extreme(word))
    assert np.isfinite(z).all()
    # the first half holds cosines, the second sines, of one pair
    assert math.hypot(z[0], z[-1]) == pytest.approx(radius, abs=0.01)


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0, 123.456])
def test_released_values_lie_on_one_public_grid_whatever_was_hidden(value: float) -> None:
    std = 0.7
    released = add_gaussian(torch.full((5000,), value), std=std, source=RandomSource.seeded(3))
    assert released.dtype == torch.float32
    steps = released.double() / grid_of(std)
    assert torch.equal(steps, steps.round())
    assert grid_of(std) <= std * 2.0**-14 < 2 * grid_of(std)


def test_a_plain_float_sum_betrays_its_input_and_the_grid_does_not() -> None:
    """The attack: subtract the candidate and ask whether a float Gaussian can have made the rest."""
    noise = torch.from_numpy(gaussian(2000, std=1.0, source=RandomSource.seeded(4)))
    coarse = (
        noise * 2**10
    ).round() / 2**10  # a sampler with few distinct values, as every float sampler has some

    def fits(released: torch.Tensor, candidate: float) -> float:
        rest = (released - candidate) * 2**10
        return float((rest == rest.round()).double().mean())

    hidden, other = 0.0, 1 / 3
    assert fits(coarse + hidden, hidden) == 1.0
    assert fits(coarse + hidden, other) == 0.0
    hardened = {
        x: add_gaussian(torch.full((2000,), x), std=1.0, source=RandomSource.seeded(5))
        for x in (hidden, other)
    }
    grids = {x: float(((y.double() / grid_of(1.0)) % 1).abs().sum()) for x, y in hardened.items()}
    assert grids == {hidden: 0.0, other: 0.0}


@pytest.mark.parametrize("std", [0.01, 5.0])
def test_added_noise_has_the_stated_scale_around_any_value(std: float) -> None:
    values = torch.linspace(-3, 3, COUNT)
    released = add_gaussian(values.reshape(4, -1), std=std, source=RandomSource.seeded(6))
    assert released.shape == (4, COUNT // 4)
    rest = (released.reshape(-1).double() - values.double()).numpy() / std
    assert stats.kstest(rest, "norm").pvalue > 1e-3
    assert stats.kstest(rest / 1.05, "norm").pvalue < 1e-9


def test_the_source_alone_decides_the_noise() -> None:
    torch.manual_seed(0)
    first = gaussian(10, std=1.0, source=RandomSource.seeded(7))
    torch.manual_seed(1)
    np.random.seed(1)
    assert np.array_equal(first, gaussian(10, std=1.0, source=RandomSource.seeded(7)))
    source = RandomSource.system()
    assert not np.array_equal(gaussian(10, std=1.0, source=source), gaussian(10, std=1.0, source=source))


def test_zero_noise_changes_nothing() -> None:
    values = torch.randn(7)
    assert torch.equal(add_gaussian(values, std=0.0, source=RandomSource.seeded(0)), values)


@pytest.mark.parametrize("std", [-1.0, float("nan"), float("inf")])
def test_impossible_scales_are_refused(std: float) -> None:
    with pytest.raises(ParameterError, match="std"):
        gaussian(1, std=std, source=RandomSource.seeded(0))
