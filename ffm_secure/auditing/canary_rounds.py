"""Send canaries through a run's own mechanism, round after round:
what an auditor scores is the running sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from defenses.dp import NoiseStream, RecordMechanism, poisson_sample
from defenses.random_source import RandomSource
from ffm_secure.privacy.mechanism import ClientNoise, SumNoise
from ffm_secure.privacy.query_noise import RecordAnswers


class Coins(Protocol):
    """Known directions, each included by its own coin."""

    @property
    def dimension(self) -> int: ...
    @property
    def included(self) -> Tensor: ...
    def direction(self, index: int) -> Tensor: ...
    def contribution(self, bound: Callable[[Tensor], Tensor] | None = None) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Stays:
    """Say when canaries of a stream's first stage pass into the reservoir, and at which rate it is drawn."""

    after: int  # rounds of their own stage
    sampling_rate: float


def _rate(own: float, stays: Stays | None, round: int) -> float:
    if stays is None or round < stays.after:
        return own
    return stays.sampling_rate


def record_canaries(
    mechanism: RecordMechanism, coins: Coins, source: RandomSource, stays: Stays | None = None
) -> Iterator[Tensor]:
    """Yield the sum of all updates after each round; with `stays`, canaries are replayed in later stages."""
    included = coins.included.nonzero().flatten()
    vectors = []
    for index in included:
        vectors.append(coins.direction(int(index)))
    total = torch.zeros(coins.dimension)
    for round in count():
        here = replace(mechanism, sampling_rate=_rate(mechanism.sampling_rate, stays, round))
        for _ in range(mechanism.steps):
            clipped = torch.zeros(coins.dimension)
            for row in here.sample(len(vectors), source):
                clipped += vectors[int(row)]
            total += here.privatise({"canary": clipped}, source)["canary"]
        yield total


def sum_canaries(
    mechanism: SumNoise, coins: Coins, source: RandomSource, stays: Stays | None = None
) -> Iterator[Tensor]:
    """Yield the sum of all opened sums after each round, in gradients over the expected batch.

    One site holds the canaries; the other honest survivors that are counted on add their shares and nothing
    else: what a server sees that knows every other record and every colluder's share.
    """
    included = coins.included.nonzero().flatten()
    vectors = [coins.direction(int(index)) for index in included]
    inner = replace(mechanism.inner, dimension=coins.dimension)
    zeros = np.zeros(coins.dimension)
    total = torch.zeros(coins.dimension, dtype=torch.float64)
    for round in count():
        rate = _rate(inner.sampling_rate, stays, round)
        gradients = torch.zeros(coins.dimension, dtype=torch.float64)
        for row in poisson_sample(len(vectors), rate=rate, source=source):
            gradients += vectors[int(row)].double()
        opened = inner.share(mechanism.update_of(gradients).numpy(), source)
        for _ in range(inner.honest_survivors - 1):
            opened = opened + inner.share(zeros, source)
        total = total - torch.from_numpy(opened) / (inner.scale * mechanism.learning_rate)
        yield total


def answer_canaries(answers: RecordAnswers, coins: Coins, source: RandomSource) -> Iterator[Tensor]:
    """Yield the sum of all opened answers to a query after each round: every canary is a record with
    a cell of its own.

    One site holds the canaries; the other honest survivors that are counted on add their shares and nothing
    else, as in `sum_canaries`.
    """
    included = coins.included.nonzero().flatten()
    directions = [coins.direction(int(index)).double() for index in included]
    rows = torch.stack(directions) if directions else torch.zeros(0, coins.dimension)
    inner = replace(answers.inner, dimension=coins.dimension, whole_numbers=False)
    bounded = inner.bounded(rows.numpy()).sum(axis=0)
    zeros = np.zeros(coins.dimension)
    total = torch.zeros(coins.dimension, dtype=torch.float64)
    while True:
        opened = inner.share(bounded, source)
        for _ in range(inner.honest_survivors - 1):
            opened = opened + inner.share(zeros, source)
        total = total + torch.from_numpy(opened) / inner.scale
        yield total


def _turn_canaries(mechanism: ClientNoise, coins: Coins, source: RandomSource) -> Iterator[Tensor]:
    """Yield the sum of all turns, each read with the whole memory of the noise: an attacker weighs the rounds
    in which a turn's own noise comes back.
    """
    shares = mechanism.correlated
    assert shares is not None
    column = shares.coefficients
    levels = coins.contribution(mechanism.inner.clip).double().numpy() * mechanism.scale
    total, turn = torch.zeros(coins.dimension, dtype=torch.float64), 0
    while True:
        turn += 1
        opened = np.zeros((shares.separation, coins.dimension))
        opened[0] = np.rint(levels)
        for site in range(shares.honest_survivors):
            stream = NoiseStream(shares, source.derive("turn", turn, site))
            for place in range(shares.separation):
                opened[place] += np.rint(stream.row(place + 1))
        weighed = np.zeros(coins.dimension)
        for place in range(shares.separation):
            encoded = column[place::-1] @ opened[: place + 1]
            weighed += column[place] * encoded
        total = total + torch.from_numpy(weighed / float(column @ column) / mechanism.scale)
        yield total


def client_canaries(mechanism: ClientNoise, coins: Coins, source: RandomSource) -> Iterator[Tensor]:
    """Yield the sum of all updates after each round; of noise with a memory, after each turn."""
    grid = replace(mechanism, dimension=coins.dimension)
    if grid.correlated is not None:
        yield from _turn_canaries(grid, coins, source)
    total = torch.zeros(coins.dimension, dtype=torch.float64)
    signal = coins.contribution(grid.inner.clip)
    while True:
        noise = sum(
            grid.noisy_integers(torch.zeros(coins.dimension), source)
            for _ in range(grid.inner.honest_survivors)
        )
        total += signal.double() + torch.from_numpy(np.asarray(noise)) / grid.scale
        yield total
