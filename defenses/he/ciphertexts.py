"""Ciphertexts on the wire: bit-packed coefficients we check ourselves, so that no foreign parser sees hostile
bytes.

SEAL's stream of one ciphertext is a 16-byte header and, uncompressed, the fields below. We send only what a
receiver cannot know: the coefficients, at the width of their prime, and the seed of the uniform half. The
receiver checks every coefficient against its prime and writes a fresh, uncompressed SEAL stream around them.

    parms_id 32 | is_ntt 1 | polynomials 8 | degree 8 | primes 8 | scale 8 | correction 8 | array header 16 |
    count 8 | coefficients 8 each | seeded only: header 16, generator 1, seed 64

Source: SEAL 4, Ciphertext::save_members and DynArray::save_members.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from defenses.errors import ProtocolError

Coefficients = npt.NDArray[np.uint64]
SEED_BYTES: Final = 64
_FIELDS: Final = struct.Struct("<32s?QQQdQ16sQ")
_GENERATOR: Final = 1  # Blake2xb
_HEADER_BYTES: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """State everything about a ciphertext but its coefficients.

    `prefix` is SEAL's magic number and version.
    """

    prefix: bytes
    parms_id: bytes
    transformed: bool
    degree: int
    scale: float
    primes: tuple[int, ...]
    seeded: bool

    @property
    def polynomial_bytes(self) -> int:
        """Count the packed bytes of one polynomial."""
        return sum(prime.bit_length() for prime in self.primes) * self.degree // 8

    def header(self, size: int) -> bytes:
        """Write SEAL's header of an uncompressed object of `size` bytes, header included."""
        return self.prefix + struct.pack("<BHQ", 0, 0, size)


def to_wire(content: bytes, shape: Shape) -> bytes:
    """Pack the uncompressed content of our own SEAL stream: a seed and one polynomial, or two polynomials."""
    *_, count = _FIELDS.unpack_from(content)
    words = np.frombuffer(content, dtype="<u8", count=count, offset=_FIELDS.size)
    rows = words.reshape(-1, len(shape.primes), shape.degree)
    packed = b"".join(
        _pack(row, prime) for polynomial in rows for row, prime in zip(polynomial, shape.primes)
    )
    seed = content[-SEED_BYTES:] if len(rows) == 1 else b""
    return seed + packed


def from_wire(payload: bytes, shape: Shape) -> bytes:
    """Check a received ciphertext completely and write it as an uncompressed SEAL stream.

    Guarantee: exactly one payload for each ciphertext and seed.
    Raises:
        ProtocolError: a wrong size, a coefficient outside its prime, or a ciphertext that hides nothing.
    """
    seeded = shape.seeded and len(payload) == SEED_BYTES + shape.polynomial_bytes
    if not seeded and len(payload) != 2 * shape.polynomial_bytes:
        raise ProtocolError
    start = SEED_BYTES if seeded else 0
    rows = []
    for prime in shape.primes * (1 if seeded else 2):
        size = prime.bit_length() * shape.degree // 8
        rows.append(_unpack(payload[start : start + size], prime, shape.degree))
        start += size
    if not seeded and not any(row.any() for row in rows[len(shape.primes) :]):
        raise ProtocolError
    array = np.concatenate(rows).astype("<u8", copy=False).tobytes()
    fields = _FIELDS.pack(
        shape.parms_id, shape.transformed, 2, shape.degree, len(shape.primes), shape.scale, 1,
        shape.header(_HEADER_BYTES + 8 + len(array)), len(array) // 8,
    )  # fmt: skip
    if seeded:
        size = _HEADER_BYTES + 1 + SEED_BYTES
        array += shape.header(size) + bytes([_GENERATOR]) + payload[:SEED_BYTES]
    return shape.header(_HEADER_BYTES + len(fields) + len(array)) + fields + array


def _pack(row: Coefficients, prime: int) -> bytes:
    """Write the low bytes of each coefficient as they are, then the remaining high bits, eight to a byte."""
    whole, rest = divmod(prime.bit_length(), 8)
    octets = row.astype("<u8", copy=False).view(np.uint8).reshape(-1, 8)
    low = np.ascontiguousarray(octets[:, :whole]).tobytes()
    if not rest:
        return low
    bits = np.unpackbits(octets[:, whole : whole + 1], axis=1, bitorder="little")[:, :rest]
    return low + np.packbits(bits, bitorder="little").tobytes()


def _unpack(packed: bytes, prime: int, degree: int) -> Coefficients:
    whole, rest = divmod(prime.bit_length(), 8)
    octets = np.zeros((degree, 8), dtype=np.uint8)
    raw = np.frombuffer(packed, dtype=np.uint8)
    octets[:, :whole] = raw[: whole * degree].reshape(degree, whole)
    if rest:
        bits = np.unpackbits(raw[whole * degree :], bitorder="little").reshape(degree, rest)
        octets[:, whole] = np.packbits(bits, axis=1, bitorder="little")[:, 0]
    row: Coefficients = octets.view("<u8").reshape(-1).astype(np.uint64, copy=False)
    if int(row.max()) >= prime:
        raise ProtocolError
    return row
