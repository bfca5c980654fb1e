"""Noise in the shape of an observation: what an attack makes of an update that holds nobody's data.

Noise that is denser, of higher rank or less rounded than the update would be told from it for that reason
alone, so it keeps the zeros, the rank, the length and the rounding of every tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attacks.observation import Observation

Places = Literal["as they are", "moved"]  # of what is zero

_SEEDS = 7_450_580_596_923
_RANK = 1e-5  # of the largest singular value, below which one is rounding
_SCATTERED = 0.01  # share of zeros within rows that are not zero, from which single entries were dropped


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Hold what noise keeps of a tensor: which rows move (rows,), which entries where single ones were
    dropped, and its rank.

    `rank` is None where it is as high as the moving rows allow; `coarse` is the type whose rounding its
    values bear.
    """

    rows: Tensor
    entries: Tensor | None
    rank: int | None
    norm: float
    coarse: torch.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """Draw noise in the shape of one observation."""

    observation: Observation
    shapes: Mapping[str, Shape]

    def draw(self, seed: int, places: Places = "as they are") -> Observation:
        """Return the observation with every tensor replaced by noise.

        Zeros stay where they are, for an attack whose certainty may come from where zeros lie, or move to
        other rows, the same ones in tensors of as many rows, for an attack that is scored and may be right
        for what the zeros give away.
        """
        # Far from the small seeds that simulated updates are made with: noise must not be the very noise it
        # is held against.
        generator, orders = torch.Generator().manual_seed(_SEEDS + seed), dict[int, Tensor]()
        tensors = {}
        for name, tensor in self.observation.tensors.items():
            shape, count = self.shapes[name], len(self.shapes[name].rows)
            if count not in orders:
                fixed = places == "as they are"
                orders[count] = torch.arange(count) if fixed else torch.randperm(count, generator=generator)
            tensors[name] = _like(tensor, shape, orders[count], generator)
        return self.observation.replace_tensors(tensors)


def study(observation: Observation) -> Noise:
    """Return the noise of an observation; every tensor is looked at once."""
    shapes = {}
    for name, tensor in observation.tensors.items():
        shapes[name] = _shape(tensor.detach())
    return Noise(observation=observation, shapes=shapes)


def coarseness(tensor: Tensor) -> torch.dtype:
    """Return the coarsest type that holds a tensor's values as they are: rounding that a cast left behind."""
    for kind in (torch.bfloat16, torch.float16):
        if torch.equal(tensor.to(kind).to(tensor.dtype), tensor):
            return kind
    return tensor.dtype


def inside_rows(tensor: Tensor) -> Tensor:
    """Return the rows of a tensor that are not all zero."""
    flat = _rows(tensor)
    return flat[(flat != 0).any(dim=1)]


def _shape(tensor: Tensor) -> Shape:
    flat = _rows(tensor)
    moving = flat != 0
    rows = moving.any(dim=1)
    inside = moving[rows]
    scattered = inside.numel() > 0 and float(inside.double().mean()) < 1 - _SCATTERED
    rank = None
    if not scattered and tensor.ndim == 2:
        rank = _rank(flat[rows].double())
    coarse = tensor.dtype
    if bool(rows.any()):
        coarse = coarseness(tensor)
    return Shape(
        rows=rows,
        entries=moving if scattered else None,
        rank=rank,
        norm=float(torch.linalg.vector_norm(flat.double())),
        coarse=coarse,
    )


def _rows(tensor: Tensor) -> Tensor:
    if tensor.ndim > 1:
        return tensor.reshape(len(tensor), -1)
    return tensor.reshape(-1, 1)


def _rank(block: Tensor) -> int | None:
    """Return the rank of a matrix where it is not full."""
    if min(block.shape, default=0) < 2 or not bool(torch.isfinite(block).all()):
        return None
    if block.shape[0] > block.shape[1]:
        small = block.T @ block
    else:
        small = block @ block.T
    values = torch.linalg.eigvalsh(small).clamp_min(0.0)
    count = int((values > float(values[-1]) * _RANK**2).sum())
    if count < len(values):
        return count
    return None


def _like(tensor: Tensor, shape: Shape, order: Tensor, generator: torch.Generator) -> Tensor:
    flat = _rows(tensor)
    if shape.rank is None:
        noise = torch.randn(flat.shape, generator=generator)
    else:
        left = torch.randn(len(flat), shape.rank, generator=generator)
        noise = left @ torch.randn(shape.rank, flat.shape[1], generator=generator)
    noise = noise * shape.rows[order][:, None]
    if shape.entries is not None:
        noise = noise * shape.entries[order]
    size = shape.norm / max(float(torch.linalg.vector_norm(noise.double())), 1e-30)
    return (noise * size).to(shape.coarse).to(tensor.dtype).reshape(tensor.shape)
