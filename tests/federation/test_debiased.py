"""Adam with the known noise taken out of its second moment."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ffm_secure.aggregation.base import Aggregate, aggregate_of
from ffm_secure.config.run_file import Strategy as StrategyConfig
from ffm_secure.records import RoundSum
from ffm_secure.strategies.debiased import DebiasedAdam
from tests.federation.helpers import make


def rule(**changes: float) -> DebiasedAdam:
    """Return the strategy with its settings."""
    settings = {"learning_rate": 0.1, "momentum": 0.9, "beta2": 0.99, "tau": 1e-8, **changes}
    return DebiasedAdam(StrategyConfig(kind="adam_debiased", **settings))  # type: ignore[arg-type]


def steps(strategy: DebiasedAdam, changes: list[torch.Tensor], variance: float) -> torch.Tensor:
    """Return the vector after the means of some rounds."""
    state = strategy.start(torch.zeros(len(changes[0])))
    for change in changes:
        aggregate = Aggregate(groups=Aggregate.of_mean(change).groups, noise_variance=variance)
        state = strategy.step(state, aggregate)
    return state.vector


def test_without_noise_it_is_adam() -> None:
    """Equal to torch's own over ten steps."""
    torch.manual_seed(1)
    changes = [torch.randn(7, dtype=torch.float64) for _ in range(10)]
    weight = torch.nn.Parameter(torch.zeros(7, dtype=torch.float64))
    adam = torch.optim.Adam([weight], lr=0.1, betas=(0.9, 0.99), eps=0.0)
    for change in changes:
        weight.grad = -change
        adam.step()
    torch.testing.assert_close(steps(rule(), changes, 0.0).double(), weight.detach(), rtol=1e-5, atol=1e-6)


def test_known_noise_is_taken_out_of_the_second_moment() -> None:
    """With noise ten times the gradient, the step is that of the gradient alone; plain Adam's is a
    tenth of it.
    """
    generator = torch.Generator().manual_seed(3)
    gradient = torch.full((20_000,), 0.1, dtype=torch.float64)
    gradient[::2] = 0.2
    noise = 0.3
    changes = [
        gradient + noise * torch.randn(20_000, generator=generator, dtype=torch.float64) for _ in range(400)
    ]
    settings = {"momentum": 0.99, "beta2": 0.999, "tau": 0.03}
    debiased = steps(rule(**settings), changes, noise**2)
    plain = steps(rule(**settings), changes, 0.0)
    # Adam moves by the signs: both halves alike once the noise is out; with it the halves differ by their
    # size.
    ratio = float(debiased[::2].mean() / debiased[1::2].mean())
    with_noise = float(plain[::2].mean() / plain[1::2].mean())
    assert with_noise > 1.6
    assert ratio < 1.35
    assert float(debiased.mean()) > 1.5 * float(plain.mean())


def test_the_variance_of_the_mean_counts_every_survivor() -> None:
    """Of n shares of variance v over the divisor n: v / n, and with a public cohort as divisor less."""
    sums = [RoundSum(round=1, survivors=(0, 1, 2, 3), values=np.zeros(3), loss_sum=None, weight_sum=4.0)]
    open_run = make()
    assert aggregate_of(open_run, sums, site_noise_variance=2.0).noise_variance == pytest.approx(0.5)
    assert aggregate_of(open_run, sums).noise_variance == 0.0
