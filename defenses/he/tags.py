"""A homomorphic one-time tag: it tells whether an opened sum is the sum of exactly the named parties'
vectors.

Ciphertexts can be added by anyone, so the server could scale, replay, reorder or shift them and have the
holders open one party's vector as "the sum". Every vector x of party i therefore carries, inside the
encryption,

    tag_i = <r, x> + pad_i   modulo p, for each of three primes p just below 2^31,

with r fresh for every agreement and pad_i fresh for every agreement and party, both derived from a key the
server does not have. Tags add up like the vectors; the opened sum must satisfy tag = <r, sum> + sum of the
named pads.

The primes differ on purpose: a change of a coordinate by a multiple of p is invisible modulo p, and with wide
values it stays within the agreed range. Sums stay below 2^60, so no change is a multiple of two of the
primes.

Guarantee: a server without the key passes off anything but that sum with probability about 2^-93 per attempt
(2^-62 where sums exceed 2^30), and each attempt is final (the key refuses to work after a failure).
Assumes: no party shares the key with the server; whoever has the key can forge tags.
Source: one-time linear authenticators, after Agrawal and Boneh, Homomorphic MACs (ACNS 2009), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from defenses.he.packing import Integers
from defenses.random_source import RandomSource

_TAG_BITS: Final = 31
# 2^31 - c is prime for each of these; small c makes the reduction one multiplication.
_OFFSETS: Final = (1, 19, 61)
PRIMES: Final = tuple((1 << _TAG_BITS) - offset for offset in _OFFSETS)
REPETITIONS: Final = len(PRIMES)
_LOW: Final = (1 << _TAG_BITS) - 1
_BLOCK: Final = 1 << 16


def digit_bits(value_bound: int) -> int:
    """Return the widest tag digit whose magnitude respects the public bound on values."""
    return min((value_bound + 1).bit_length() - 1, _TAG_BITS)


def coordinates(value_bound: int) -> int:
    """Count the coordinates the tags add to a vector."""
    return REPETITIONS * -(-_TAG_BITS // digit_bits(value_bound))


class Tagger:
    """Compute and check the tags of one agreement; holds a secret."""

    __slots__ = ("_secret",)

    def __init__(self, secret: RandomSource) -> None:
        self._secret = secret

    def tag(self, values: Integers, party: bytes, value_bound: int) -> Integers:
        """Return the tag coordinates of one party's vector, each within [0, value_bound]."""
        numbers = (self._product(values) + self._pad(party)) % np.array(PRIMES)
        bits = digit_bits(value_bound)
        shifts = np.arange(0, _TAG_BITS, bits, dtype=np.int64)
        digits: Integers = (numbers[:, None] >> shifts) & ((1 << bits) - 1)
        return digits.reshape(-1)

    def verify(self, total: Integers, tags: Integers, parties: Sequence[bytes], value_bound: int) -> bool:
        """Say whether summed tag coordinates belong to the summed vector of exactly these parties."""
        digits = tags.reshape(REPETITIONS, -1)
        bits = digit_bits(value_bound)
        # Python integers: digit sums of hostile ciphertexts may have any size.
        received = []
        for row in digits:
            received.append(sum(int(digit) << bits * place for place, digit in enumerate(row)))
        expected = self._product(total)
        for party in parties:
            expected = expected + self._pad(party)
        return all((one - int(other)) % prime == 0 for one, other, prime in zip(received, expected, PRIMES))

    def _product(self, values: Integers) -> npt.NDArray[np.int64]:
        """Return <r, values> modulo each prime, with the vectors r expanded block by block."""
        stream = self._secret.derive("weights")
        totals = [0] * REPETITIONS
        words = np.empty((REPETITIONS, _BLOCK), dtype=np.uint32)
        weights = np.empty((REPETITIONS, _BLOCK), dtype=np.int64)
        for start in range(0, len(values), _BLOCK):
            block = values[start : start + _BLOCK]
            wide = max(-int(block.min()), int(block.max())) > _LOW
            stream.fill(words)
            np.right_shift(words, 1, out=weights, casting="unsafe")
            for index, (prime, offset) in enumerate(zip(PRIMES, _OFFSETS)):
                product = weights[index, : len(block)] * (block % prime if wide else block)
                # 2^31 = c modulo 2^31 - c; the arithmetic shift keeps this right for negative products.
                totals[index] += int(((product & _LOW) + offset * (product >> _TAG_BITS)).sum())
        return np.array([total % prime for total, prime in zip(totals, PRIMES)], dtype=np.int64)

    def _pad(self, party: bytes) -> npt.NDArray[np.int64]:
        stream = self._secret.derive("pad", party.hex())
        return np.array([stream.below(prime) for prime in PRIMES], dtype=np.int64)

    def __repr__(self) -> str:
        return "Tagger(<hidden>)"
