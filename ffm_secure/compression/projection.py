"""A few coordinates of a shared random basis: sites send them, everybody rebuilds the update from a seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from defenses.random_source import RandomSource
from ffm_secure.compression.base import Compression, PublicState, Setting, places, public_source
from ffm_secure.compression.rotation import rotate, rotate_back


@dataclass(frozen=True, slots=True, kw_only=True)
class Projected(Compression):
    """Send the coordinates along `length` random orthonormal directions.

    With a fixed basis the model moves within one random subspace of that dimension, whatever the number of
    rounds; with a fresh one every round has directions of its own.

    Source: Li et al. 2018, arXiv:1804.08838 (one random subspace); Chen, Choquette-Choo, Kairouz, Suresh
    2022, arXiv:2203.03761 (random projections under secure sums and noise).
    """

    kind: ClassVar[str] = "projection"
    size: int
    length: int
    seed: int
    fresh: bool

    def compress(self, update: Tensor, state: PublicState) -> Tensor:
        """Return the coordinates of an update along the round's directions."""
        source = self._source(state)
        return rotate(update, source.derive("rotation"))[self._rows(source)]

    def restore(self, opened: Tensor, state: PublicState) -> Tensor:
        """Return the sum of the directions, each times its opened coordinate."""
        source = self._source(state)
        rotated = torch.zeros(self.size, dtype=torch.float64)
        rotated[self._rows(source)] = opened.double()
        return rotate_back(rotated, source.derive("rotation"))

    def words(self) -> str:
        """Say what is sent."""
        basis = "new in every round" if self.fresh else "the same in every round"
        return f"{self.length:,} of {self.size:,} coordinates of a random basis, {basis}"

    def _source(self, state: PublicState) -> RandomSource:
        return public_source(self.seed, "projection", state.round if self.fresh else 0)

    def _rows(self, source: RandomSource) -> Tensor:
        return places(self.length, among=self.size, source=source.derive("rows"))


def build(setting: Setting) -> Projected:
    """Return the projection of a run."""
    return Projected(
        size=setting.size,
        length=setting.length(),
        seed=setting.seed,
        fresh=setting.config.basis == "fresh",
    )
