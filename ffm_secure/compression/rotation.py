"""A random rotation before rounding, undone after the sum: no coordinate is much larger than the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from defenses.random_source import RandomSource
from defenses.secagg.rotation import hadamard
from ffm_secure.compression.base import Compression, PublicState, Setting, public_source

Reals = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotated(Compression):
    """Send all numbers in a basis drawn once from the run's public seed."""

    kind: ClassVar[str] = "rotation"
    size: int
    length: int
    seed: int

    def compress(self, update: Tensor, state: PublicState) -> Tensor:
        """Rotate an update."""
        return rotate(update, self._source())

    def restore(self, opened: Tensor, state: PublicState) -> Tensor:
        """Rotate an opened sum back."""
        return rotate_back(opened, self._source())

    def words(self) -> str:
        """Say what is sent."""
        return "every number, in a basis drawn from the public seed"

    def _source(self) -> RandomSource:
        return public_source(self.seed, "rotation")


def build(setting: Setting) -> Rotated:
    """Return the rotation of a run."""
    return Rotated(size=setting.size, length=setting.size, seed=setting.seed)


def rotate(vector: Tensor, source: RandomSource) -> Tensor:
    """Rotate a vector of any length at random, without padding. Shapes: real [d]; result float64 [d].

    Random signs and a Walsh-Hadamard transform of the first 2^p numbers, then of the last 2^p, 2^p being the
    largest power of two that is not above d: the two overlap, so that every number is spread.

    Guarantee: linear and norm-preserving up to the rounding of float64.
    Source: Ailon and Chazelle 2006 (signs before a Hadamard transform).
    """
    values = vector.detach().cpu().double().numpy().copy()
    for window, signs in _passes(len(values), source):
        values[window] = hadamard(values[window] * signs)
    return torch.from_numpy(values)


def rotate_back(vector: Tensor, source: RandomSource) -> Tensor:
    """Undo `rotate` with the same source. Shapes: real [d]; result float64 [d]."""
    values = vector.detach().cpu().double().numpy().copy()
    for window, signs in reversed(_passes(len(values), source)):
        values[window] = hadamard(values[window]) * signs
    return torch.from_numpy(values)


def _passes(size: int, source: RandomSource) -> list[tuple[slice, Reals]]:
    width = 1 << (size.bit_length() - 1)
    windows = [slice(0, width), slice(size - width, size)]
    return [(window, _signs(width, source.derive(number))) for number, window in enumerate(windows)]


def _signs(count: int, source: RandomSource) -> Reals:
    content = np.frombuffer(source.random_bytes(-(-count // 8)), dtype=np.uint8)
    bits = np.unpackbits(content, count=count, bitorder="little")
    signs: Reals = 1.0 - 2.0 * bits.astype(np.float64)
    return signs
