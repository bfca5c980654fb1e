"""What a compression is: a public linear map that makes an update shorter, and the way back for the opened
sum.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from defenses.random_source import RandomSource
from ffm_secure.config.tables import Compression as CompressionConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicState:
    """What every party of a round knows beside the run file: nothing private, nothing chosen at run time."""

    round: int
    moved: Tensor  # float32 [d], the broadcast model less the one the run began with; empty where unread


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a kind is built from."""

    config: CompressionConfig
    seed: int
    size: int  # numbers of an update before it is compressed

    def length(self) -> int:
        """Return how many numbers the declared share is, at least one."""
        return max(1, round(self.config.share * self.size))


class Compression:
    """Send `length` numbers instead of `size`. Here: all of them, as they are.

    `compress` is applied before any bound on a whole update, any noise added to it, any rounding, mask or
    encryption; `restore` to the opened sum alone.

    Guarantee (of every kind; `tests/compression` holds them to it): for one state, `compress` is linear and
    its rows are orthonormal, so it lengthens no vector: what is bounded in L2 before is bounded after;
    `restore` is its transpose, so `restore` after `compress` is an orthogonal projection and `compress` after
    `restore` is nothing. Both depend on public values alone.
    """

    kind: ClassVar[str] = "none"
    follows: ClassVar[bool] = False  # reads how far the model has moved
    size: int
    length: int

    def compress(self, update: Tensor, state: PublicState) -> Tensor:
        """Return what is sent of an update. Shapes: real [size]; result float64 [length]."""
        return update

    def restore(self, opened: Tensor, state: PublicState) -> Tensor:
        """Return what an opened sum stands for. Shapes: float64 [length]; result float64 [size]."""
        return opened

    @property
    def noise_share(self) -> float:
        """Return how much of the noise of one sent number stands in one number of the restored update, in
        variance, on average over all.
        """
        return self.length / self.size

    def words(self) -> str:
        """Say in a few words what is sent."""
        return "every number"

    def digest(self) -> str:
        """Return the hash of what shapes the map; sites and server compare it."""
        return hashlib.sha256(f"compression 1 {self.kind} {self!r}".encode()).hexdigest()


def public_source(seed: int, *labels: str | int) -> RandomSource:
    """Return the stream that all parties draw a public map from: it hides nothing, and no noise uses it."""
    return RandomSource.seeded(seed).derive("compression", *labels)


def places(count: int, *, among: int, source: RandomSource) -> Tensor:
    """Return `count` different places among so many, drawn uniformly, in rising order. Result int64 [count].

    Two equal 64-bit words, which no run will see, would favour the lower place.
    """
    words = torch.from_numpy(source.words(among).view("int64"))
    order = torch.argsort(words, stable=True)
    return order[:count].sort().values
