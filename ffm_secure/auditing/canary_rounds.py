"""Send canaries through a run's own mechanism, round after round:
what an auditor scores is the running sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from defenses.dp import RecordMechanism
from defenses.random_source import RandomSource
from ffm_secure.privacy.mechanism import ClientNoise


class Coins(Protocol):
    """Known directions, each included by its own coin."""

    @property
    def dimension(self) -> int: ...
    @property
    def included(self) -> Tensor: ...
    def direction(self, index: int) -> Tensor: ...
    def contribution(self, bound: Callable[[Tensor], Tensor] | None = None) -> Tensor: ...


def record_canaries(mechanism: RecordMechanism, coins: Coins, source: RandomSource) -> Iterator[Tensor]:
    """Yield the sum of all updates after each round."""
    included = coins.included.nonzero().flatten()
    vectors = []
    for index in included:
        vectors.append(coins.direction(int(index)))
    total = torch.zeros(coins.dimension)
    while True:
        for _ in range(mechanism.steps):
            clipped = torch.zeros(coins.dimension)
            for row in mechanism.sample(len(vectors), source):
                clipped += vectors[int(row)]
            total += mechanism.privatise({"canary": clipped}, source)["canary"]
        yield total


def client_canaries(mechanism: ClientNoise, coins: Coins, source: RandomSource) -> Iterator[Tensor]:
    """Yield the sum of all updates after each round."""
    grid = replace(mechanism, dimension=coins.dimension)
    total = torch.zeros(coins.dimension, dtype=torch.float64)
    signal = coins.contribution(grid.inner.clip)
    while True:
        noise = sum(
            grid.noisy_integers(torch.zeros(coins.dimension), source)
            for _ in range(grid.inner.honest_survivors)
        )
        total += signal.double() + torch.from_numpy(np.asarray(noise)) / grid.scale
        yield total
