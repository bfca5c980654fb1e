"""A shared support: the numbers that opened sums have moved furthest, and some drawn anew every round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ffm_secure.compression.base import Compression, PublicState, Setting, places, public_source


@dataclass(frozen=True, slots=True, kw_only=True)
class Support(Compression):
    """Send the numbers at `length` places; the others are as if they had not changed.

    Which places follows from the broadcast model alone: how far opened sums have moved each number since the
    run began, with ties by place. So sites and server find the same ones without a message, nothing but
    opened sums is read, and a site that joins late or comes back needs no memory.
    """

    kind: ClassVar[str] = "support"
    follows: ClassVar[bool] = True
    size: int
    length: int
    by_lot: int  # of the places, how many are drawn anew every round
    seed: int

    def compress(self, update: Tensor, state: PublicState) -> Tensor:
        """Return an update's numbers on the round's support."""
        return update.detach().cpu().double()[self.places(state)]

    def restore(self, opened: Tensor, state: PublicState) -> Tensor:
        """Put opened numbers in their places, and 0 elsewhere."""
        whole = torch.zeros(self.size, dtype=torch.float64)
        whole[self.places(state)] = opened.double()
        return whole

    def places(self, state: PublicState) -> Tensor:
        """Return the round's support in rising order, int64 [length]."""
        moved = state.moved.detach().cpu().abs()
        most = min(self.length - self.by_lot, int(torch.count_nonzero(moved)))
        furthest = torch.argsort(moved, descending=True, stable=True)[:most]
        left = torch.ones(self.size, dtype=torch.bool)
        left[furthest] = False
        others = left.nonzero().flatten()
        source = public_source(self.seed, "support", state.round)
        by_lot = others[places(self.length - most, among=len(others), source=source)]
        return torch.cat((furthest, by_lot)).sort().values

    def words(self) -> str:
        """Say what is sent."""
        return (
            f"{self.length:,} of {self.size:,} numbers: those that opened sums moved furthest, and "
            f"{self.by_lot:,} by lot in every round"
        )


def build(setting: Setting) -> Support:
    """Return the support of a run."""
    length = setting.length()
    by_lot = min(length, max(1, round(setting.config.by_lot * length)))
    return Support(size=setting.size, length=length, by_lot=by_lot, seed=setting.seed)
