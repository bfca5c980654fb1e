"""Spread a vector evenly over its coordinates before quantising, by a randomised Hadamard rotation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from defenses.errors import ParameterError
from defenses.secagg.keys import KEY_BYTES
from defenses.secagg.masks import keystream

_LEVELS_AT_ONCE = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """Rotate vectors of one length by random signs followed by the Walsh-Hadamard transform.

    All clients of a round and whoever decodes the sum use the same public seed. A rotated vector of norm S
    has coordinates of about S / sqrt(length), so a much smaller coordinate bound serves.

    Guarantee: linear and norm-preserving; `inverse(forward(x))` is x, and so it is on sums.
    Assumes: nothing about secrecy: the seed is public.
    Source: Suresh et al., Distributed mean estimation with limited communication (2017), section 4.
    """

    seed: bytes
    length: int

    def __post_init__(self) -> None:
        if len(self.seed) != KEY_BYTES or self.length < 1:
            raise ParameterError(f"a rotation needs a seed of {KEY_BYTES} bytes and a length of at least 1")

    @property
    def padded(self) -> int:
        """Return the length of a rotated vector: the next power of two."""
        return 1 << (self.length - 1).bit_length()

    def _signs(self) -> npt.NDArray[np.float64]:
        words = keystream(self.seed, -(-self.length // 32), np.uint32)
        bits = np.unpackbits(words.view(np.uint8), count=self.length, bitorder="little")
        return 1.0 - 2.0 * bits.astype(np.float64)

    def forward(self, vector: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Rotate a vector. Shapes: real [length]; result float64 [padded]."""
        values = np.asarray(vector, dtype=np.float64)
        if values.shape != (self.length,):
            raise ParameterError(f"a vector of shape {values.shape}: this rotation takes ({self.length},)")
        padded = np.zeros(self.padded)
        np.multiply(values, self._signs(), out=padded[: self.length])
        return hadamard(padded)

    def inverse(self, rotated: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Rotate back. Shapes: float64 [padded]; result float64 [length]."""
        if rotated.shape != (self.padded,):
            raise ParameterError(f"a vector of shape {rotated.shape}: this rotation undoes ({self.padded},)")
        back: npt.NDArray[np.float64] = hadamard(rotated)[: self.length] * self._signs()
        return back


def hadamard(vector: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Apply the orthonormal Walsh-Hadamard transform to a vector whose length is a power of two.

    The butterflies are taken six levels at a time, as products with a 64 x 64 matrix.
    """
    length = len(vector)
    if length & (length - 1) or length == 0:
        raise ParameterError(f"length = {length}: must be a power of two")
    inner, result = 1, vector
    while inner < length:
        order = min(1 << _LEVELS_AT_ONCE, length // inner)
        result = np.matmul(_matrix(order), result.reshape(-1, order, inner))
        inner *= order
    transformed: npt.NDArray[np.float64] = result.reshape(length) / math.sqrt(length)
    return transformed


def _matrix(order: int) -> npt.NDArray[np.float64]:
    rows = np.arange(order)
    parity = np.bitwise_count(rows[:, None] & rows[None, :]) & 1
    signs: npt.NDArray[np.float64] = 1.0 - 2.0 * parity
    return signs
