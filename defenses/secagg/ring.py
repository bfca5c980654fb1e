"""Real vectors as integers modulo 2^m: quantise without bias, prove the sum fits, pack to exactly m/8 bytes
each.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from defenses.errors import ParameterError, ProtocolError
from defenses.random_source import RandomSource
from defenses.secagg.lanes import Lanes
from defenses.secagg.masks import RingVector, Word, chunks, word_type

MODULUS_BITS = (16, 24, 32, 40, 48, 64)
HEADER = 2
"""Coordinates that `frame` puts in front of a payload: the constant 1, and the client's integer weight."""
_CHUNK = 1 << 13
"""Words per pass: a few buffers of this length fit in the second-level cache."""
_ROUND_CHUNK = 1 << 15
"""Reals per pass of rounding, whose ten passes cost less cache than calls."""

if sys.byteorder != "little":
    raise ImportError("ring vectors are packed by viewing little-endian memory; this machine is big-endian")


def _require_modulus(modulus_bits: int) -> None:
    if modulus_bits not in MODULUS_BITS:
        raise ParameterError(
            f"modulus_bits = {modulus_bits}: must be one of {', '.join(map(str, MODULUS_BITS))}"
        )


def largest_sum(value_bits: int, *, clients: int, max_weight: int = 1, noise_bound: int = 0) -> int:
    """Bound the magnitude of any coordinate of a sum, headers included.

    `noise_bound` bounds the integer noise that one client adds to one coordinate (a tail bound, if the noise
    has one).
    """
    if value_bits < 2 or clients < 1 or max_weight < 1 or noise_bound < 0:
        raise ParameterError(
            f"value_bits = {value_bits}, clients = {clients}, max_weight = {max_weight}, noise_bound = "
            f"{noise_bound}: must be at least 2, 1, 1 and 0"
        )
    return clients * (((1 << (value_bits - 1)) - 1) * max_weight + noise_bound)


def check_overflow(
    modulus_bits: int, *, value_bits: int, clients: int, max_weight: int = 1, noise_bound: int = 0
) -> None:
    """Refuse a modulus in which the sum of all clients could wrap around.

    Guarantee: when it returns, every sum of at most `clients` vectors decodes to the true integer sum.
    Raises: ParameterError naming the smallest modulus that fits.
    """
    _require_modulus(modulus_bits)
    bound = largest_sum(value_bits, clients=clients, max_weight=max_weight, noise_bound=noise_bound)
    if bound >= 1 << (modulus_bits - 1):
        raise ParameterError(
            f"modulus_bits = {modulus_bits}: a sum of {clients} clients can reach {bound}, beyond "
            f"{(1 << (modulus_bits - 1)) - 1}; use {_smallest(bound)} bits, fewer "
            "value bits or a smaller weight"
        )


def modulus_for(value_bits: int, clients: int, *, max_weight: int = 1, noise_bound: int = 0) -> int:
    """Return the smallest modulus, in bits, that no sum of `clients` vectors can overflow.

    Raises: ParameterError when not even 64 bits are enough.
    """
    return _smallest(largest_sum(value_bits, clients=clients, max_weight=max_weight, noise_bound=noise_bound))


def _smallest(bound: int) -> int:
    for modulus_bits in MODULUS_BITS:
        if bound < 1 << (modulus_bits - 1):
            return modulus_bits
    raise ParameterError(
        f"a sum can reach {bound}, which no modulus up to 64 bits holds; use fewer bits or clients"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantizer:
    """Map reals in [-coordinate_bound, coordinate_bound] to 2^value_bits - 1 integer levels modulo
    2^modulus_bits.

    Signed integers are kept in two's complement, so a sum needs no offset and no survivor count to be
    decoded.

    Guarantee: with a random source, `encode` is unbiased inside the bound, and the sum of n encodings is off
    by at most sqrt(n) / 2 levels in standard deviation; without one it rounds to nearest. Beyond the bound it
    saturates.
    """

    value_bits: int
    coordinate_bound: float
    modulus_bits: int

    def __post_init__(self) -> None:
        _require_modulus(self.modulus_bits)
        if not 2 <= self.value_bits <= min(32, self.modulus_bits):
            raise ParameterError(
                f"value_bits = {self.value_bits}: must be from 2 to {min(32, self.modulus_bits)}, the "
                "smaller of 32 and modulus_bits"
            )
        if not (math.isfinite(self.coordinate_bound) and self.coordinate_bound > 0):
            raise ParameterError(f"coordinate_bound = {self.coordinate_bound}: must be positive and finite")

    @property
    def largest(self) -> int:
        """Return the integer that stands for +coordinate_bound."""
        return (1 << (self.value_bits - 1)) - 1

    @property
    def scale(self) -> float:
        """Return the number of integer levels per unit."""
        return self.largest / self.coordinate_bound

    def encode(self, vector: npt.ArrayLike, *, source: RandomSource | None, weight: int = 1) -> RingVector:
        """Quantise weight * vector into the ring, rounding at random with probability equal to the distance.

        The weight multiplies before rounding, so a weighted client is not rounded more coarsely. Source None
        rounds to nearest.

        Shapes: vector real [d]; result uint32 or uint64 [d], each below 2^modulus_bits.
        Raises: ParameterError for a vector that is not one-dimensional, not finite, or a weight out of range.
        """
        values = self._checked(vector, weight)
        encoded = np.empty(len(values), dtype=word_type(self.modulus_bits))
        rounder = _Rounder(source, scale=weight * self.scale, limit=weight * self.largest)
        for part in chunks(len(values), _ROUND_CHUNK):
            rounded = rounder.round(values[part])
            if encoded.dtype == np.uint32:
                encoded[part] = rounded.view(np.uint32)[::2]  # the low half of BITS is zero
            else:
                np.subtract(rounded, _Rounder.BITS, out=encoded[part])
        return _reduce(encoded, self.modulus_bits)

    def encode_lanes(
        self, vector: npt.ArrayLike, lanes: Lanes, *, source: RandomSource | None, weight: int = 1
    ) -> RingVector:
        """Quantise into lanes of 64-bit words, in fewer passes than `lanes.pack` after `encode`.

        Shapes: vector real [d]; result uint64 [lanes.words(d)].
        Raises: ParameterError as `encode`, and for lanes that do not hold even one client's value.
        """
        values = self._checked(vector, weight)
        if weight * self.largest > lanes.bound:
            raise ParameterError(
                f"lanes.bound = {lanes.bound}: too small for values up to {weight * self.largest}"
            )
        words = np.empty(lanes.words(len(values)), dtype=np.uint64)
        rounder = _Rounder(source, scale=weight * self.scale, limit=weight * self.largest)
        for part in chunks(len(words), _ROUND_CHUNK):
            target = words[part]
            for lane in range(lanes.count):
                rounded, shift = rounder.round(lanes.run(values, lane, part)), lane * lanes.width
                if (
                    lane == 0
                ):  # always full; what the others bring along in front of their integers is taken off here
                    np.subtract(rounded, np.uint64(_Rounder.excess(lanes)), out=target)
                    continue
                np.left_shift(rounded, np.uint64(shift), out=rounded)
                np.add(target[: len(rounded)], rounded, out=target[: len(rounded)])
                if len(rounded) < len(target):
                    target[len(rounded) :] += np.uint64((int(_Rounder.BITS) << shift) % 2**64)
        return words

    def _checked(self, vector: npt.ArrayLike, weight: int) -> npt.NDArray[np.floating[Any]]:
        values = np.asarray(vector)
        if values.ndim != 1 or values.dtype.kind != "f":
            raise ParameterError(
                f"a vector of {values.dtype} with {values.ndim} dimensions: must be floating and flat"
            )
        if weight < 0 or weight * self.largest >= 1 << 51:
            raise ParameterError(f"weight = {weight}: must be from 0 to {(1 << 51) // self.largest}")
        return values

    def decode_sum(self, ring_sum: RingVector) -> npt.NDArray[np.float64]:
        """Return the real sum that a ring vector stands for.

        Assumes: `check_overflow` passed for the number of clients that were summed.
        """
        decoded = np.empty(len(ring_sum), dtype=np.float64)
        # Shifted to the top of its word, a representative is signed; the shift is undone by the exact power
        # of two.
        shift = 8 * ring_sum.itemsize - self.modulus_bits
        signed_word = np.dtype(f"i{ring_sum.itemsize}")
        for part in chunks(len(ring_sum), _CHUNK):
            shifted = np.left_shift(ring_sum[part], ring_sum.dtype.type(shift)).view(signed_word)
            np.divide(shifted, self.scale * 2.0**shift, out=decoded[part])
        return decoded


class _Rounder:
    """Scale and round chunks of reals to integers, bounded and in few passes over a small buffer.

    A float64 plus 1.5 * 2^84 is the nearest multiple of 2^32, whose quotient stands in the low bits of the
    sum's own representation. Reals are scaled by 2^32 more than asked, so that a random signed 32-bit word is
    a random number in [-1/2, 1/2): added first, it rounds up with probability equal to the fraction, to
    within 2^-32.
    """

    _UNIT = 2.0**32
    _MAGIC = 1.5 * 2.0**52 * _UNIT
    BITS = np.float64(_MAGIC).view(np.uint64)
    """What an integer's own bits are added to in the result of `round`."""

    def __init__(self, source: RandomSource | None, *, scale: float, limit: int) -> None:
        self._source, self._scale = source, scale * self._UNIT
        self._scaled = np.empty(_ROUND_CHUNK, dtype=np.float64)
        self._random = np.empty(_ROUND_CHUNK, dtype=np.int32)
        # Arrays, because numpy compares two arrays three times as fast as an array and a number.
        self._upper = np.full(_ROUND_CHUNK, self._MAGIC + limit * self._UNIT)
        self._lower = np.full(_ROUND_CHUNK, self._MAGIC - limit * self._UNIT)

    @classmethod
    def excess(cls, lanes: Lanes) -> int:
        """Return what `BITS` in every lane of a word adds up to."""
        return sum(int(cls.BITS) << lane * lanes.width for lane in range(lanes.count)) % 2**64

    def round(self, values: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.uint64]:
        """Return a view of at most one chunk of rounded values, each as `BITS` plus two's complement."""
        count = len(values)
        scaled = self._scaled[:count]
        if count and not (
            math.isfinite(np.maximum.reduce(values)) and math.isfinite(np.minimum.reduce(values))
        ):
            raise ParameterError("the vector holds a value that is not finite; bound it before quantising")
        np.copyto(scaled, values)
        with np.errstate(over="ignore"):  # infinity is bounded like everything else
            np.multiply(scaled, self._scale, out=scaled)
        if self._source is not None:
            random = self._random[:count]
            self._source.fill(random)
            np.add(scaled, random, out=scaled)
        np.add(scaled, self._MAGIC, out=scaled)
        np.minimum(scaled, self._upper[:count], out=scaled)
        np.maximum(scaled, self._lower[:count], out=scaled)
        return scaled.view(np.uint64)


def signed(ring: RingVector, modulus_bits: int) -> npt.NDArray[np.int64]:
    """Return the representatives of ring elements in [-2^(m-1), 2^(m-1)) as int64."""
    shift = np.int64(64 - modulus_bits)
    wide = ring.astype(np.uint64).view(np.int64)
    return (wide << shift) >> shift


def from_signed(values: npt.NDArray[np.int64], modulus_bits: int) -> RingVector:
    """Return integers as ring elements; the inverse of `signed` inside its range."""
    return _reduce(values.astype(np.int64).view(np.uint64).astype(word_type(modulus_bits)), modulus_bits)


def _reduce(ring: RingVector, modulus_bits: int) -> RingVector:
    """Take a vector modulo 2^modulus_bits, in place."""
    if modulus_bits != 8 * ring.itemsize:
        np.bitwise_and(ring, ring.dtype.type((1 << modulus_bits) - 1), out=ring)
    return ring


def add_into(accumulator: RingVector, ring: RingVector) -> None:
    """Add a ring vector to an accumulator in place, modulo the word; reduce once at the end with `reduce`."""
    if accumulator.shape != ring.shape or accumulator.dtype != ring.dtype:
        raise ParameterError("only ring vectors of equal shape and type can be added")
    np.add(accumulator, ring, out=accumulator)


def reduce(ring: RingVector, modulus_bits: int) -> RingVector:
    """Take a vector modulo 2^modulus_bits, in place, and return it."""
    _require_modulus(modulus_bits)
    return _reduce(ring, modulus_bits)


def frame(payload: RingVector, *, weight: int = 1, modulus_bits: int) -> RingVector:
    """Put the count and weight coordinates in front of a payload, so that they travel masked too.

    Shapes: payload [d]; result [d + 2] with the constant 1 at 0 and the weight at 1.
    """
    if not 0 <= weight < 1 << (modulus_bits - 1):
        raise ParameterError(f"weight = {weight}: must fit in {modulus_bits - 1} bits")
    framed = np.empty(len(payload) + HEADER, dtype=word_type(modulus_bits))
    framed[0], framed[1], framed[HEADER:] = 1, weight, payload
    return framed


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedSum:
    """Hold a checked sum: the total weight and the payload as signed integers."""

    total_weight: int
    payload: RingVector


def unframe(
    ring_sum: RingVector,
    *,
    survivors: int,
    modulus_bits: int,
    max_weight: int = 1,
    value_bits: int | None = None,
    noise_bound: int = 0,
) -> OpenedSum:
    """Check the count and weight coordinates of an opened sum, and return its payload as a view.

    With `value_bits` the magnitude of every coordinate is checked too. A sum whose masks did not cancel fails
    the count check except with probability 2^-modulus_bits.

    Raises: ProtocolError when the count is not the number of survivors, the weight is below it or above
    survivors * max_weight, or a coordinate is larger than so many clients can make it.
    """
    head = signed(ring_sum[:HEADER], modulus_bits)
    if len(head) < HEADER or int(head[0]) != survivors:
        raise ProtocolError
    # Each survivor counts for 1 at least: a smaller weight would blow the mean up, or divide by nothing.
    if not survivors <= int(head[1]) <= survivors * max_weight:
        raise ProtocolError
    payload = ring_sum[HEADER:]
    if value_bits is not None:
        bound = largest_sum(value_bits, clients=survivors, max_weight=max_weight, noise_bound=noise_bound)
        for part in chunks(len(payload), _CHUNK):
            values = signed(payload[part], modulus_bits)
            if int(values.max()) > bound or int(values.min()) < -bound:
                raise ProtocolError
    return OpenedSum(total_weight=int(head[1]), payload=payload)


def packed_bytes(length: int, modulus_bits: int) -> int:
    """Return the size of a packed vector: exactly modulus_bits / 8 bytes a coordinate."""
    return length * modulus_bits // 8


def pack_into(out: memoryview | bytearray, ring: RingVector, modulus_bits: int) -> None:
    """Write the low modulus_bits of every element, little-endian, without gaps."""
    width, unit = modulus_bits // 8, _copy_unit(modulus_bits)
    source = ring.view(unit).reshape(len(ring), -1)
    target = np.frombuffer(out, dtype=unit).reshape(len(ring), width // np.dtype(unit).itemsize)
    if source.shape == target.shape:
        target[:] = source
        return
    for column in range(target.shape[1]):
        target[:, column] = source[:, column]


def _copy_unit(modulus_bits: int) -> type[np.unsignedinteger]:
    """Return the widest integer that divides both the packed element and the word it comes from."""
    for unit in (np.uint64, np.uint32, np.uint16):
        if modulus_bits % (8 * np.dtype(unit).itemsize) == 0:
            return unit
    return np.uint8


def pack(ring: RingVector, modulus_bits: int) -> bytes:
    """Pack a ring vector into exactly modulus_bits / 8 bytes a coordinate.

    >>> pack(np.array([1, 2**24 - 1], dtype=np.uint32), 24).hex()
    '010000ffffff'
    """
    _require_modulus(modulus_bits)
    if ring.dtype != word_type(modulus_bits) or ring.ndim != 1:
        raise ParameterError(
            f"a vector modulo 2^{modulus_bits} is a flat array of {word_type(modulus_bits).__name__}"
        )
    out = bytearray(packed_bytes(len(ring), modulus_bits))
    for part in chunks(len(ring), _CHUNK):
        pack_into(_window(out, part, modulus_bits), np.ascontiguousarray(ring[part]), modulus_bits)
    return bytes(out)


def _window(data: memoryview | bytearray | bytes, part: slice, modulus_bits: int) -> memoryview:
    return memoryview(data)[packed_bytes(part.start, modulus_bits) : packed_bytes(part.stop, modulus_bits)]


def unpack(data: bytes | memoryview, modulus_bits: int) -> RingVector:
    """Unpack what `pack` wrote.

    Raises: ProtocolError when the bytes are no whole number of coordinates.
    """
    _require_modulus(modulus_bits)
    if len(data) * 8 % modulus_bits:
        raise ProtocolError
    ring = np.zeros(len(data) * 8 // modulus_bits, dtype=word_type(modulus_bits))
    add_packed(ring, data, modulus_bits)
    return ring


def add_packed(accumulator: RingVector, data: bytes | memoryview, modulus_bits: int) -> None:
    """Add a packed vector to an accumulator in place, without unpacking it as a whole.

    Raises: ProtocolError when the packed vector has another length.
    """
    if len(data) != packed_bytes(len(accumulator), modulus_bits):
        raise ProtocolError
    word, unit = word_type(modulus_bits), _copy_unit(modulus_bits)
    wide = np.zeros(min(_CHUNK, len(accumulator)), dtype=word)
    for part in chunks(len(accumulator), _CHUNK):
        words = wide[: part.stop - part.start]
        _unpack_chunk(words, _window(data, part, modulus_bits), unit)
        np.add(accumulator[part], words, out=accumulator[part])


def _unpack_chunk(words: RingVector, data: memoryview, unit: type[np.unsignedinteger]) -> None:
    """Overwrite the low bytes of zero-initialised words; the high bytes are never touched and stay zero."""
    target = words.view(unit).reshape(len(words), -1)
    source = np.frombuffer(data, dtype=unit).reshape(len(words), -1)
    for column in range(source.shape[1]):
        target[:, column] = source[:, column]


__all__ = [
    "HEADER",
    "MODULUS_BITS",
    "OpenedSum",
    "Quantizer",
    "RingVector",
    "Word",
    "add_into",
    "add_packed",
    "check_overflow",
    "frame",
    "from_signed",
    "largest_sum",
    "modulus_for",
    "pack",
    "pack_into",
    "packed_bytes",
    "reduce",
    "signed",
    "unframe",
    "unpack",
    "word_type",
]
