"""Several small integers in one 64-bit word, so that fewer mask bits are drawn, added, hashed and sent for
the same sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from defenses.errors import ParameterError, ProtocolError

Words = npt.NDArray[np.unsignedinteger[Any]]
_WORD_BITS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Lanes:
    """Write integers as words x_0 + 2^w x_1 + 2^2w x_2 + ... modulo 2^64; sums of words are words of the
    sums.

    Words are ring elements of a session with a 64-bit modulus like any others: masked uniformly, whatever
    they hold. The first values go to the first lanes of all words, the next ones to the second lanes, so that
    all work is on whole runs.

    bound: the largest magnitude any coordinate of the final sum can have (`largest_sum` proves it).
    Guarantee: a sum whose coordinates are within the bound is unpacked exactly; words that no such sum gives
    are refused, so that uncancelled masks pass only with probability 2^-(64 - count * (bits of the bound +
    1)) for every word.
    """

    bound: int

    def __post_init__(self) -> None:
        if not 1 <= self.bound < 1 << (_WORD_BITS - 1):
            raise ParameterError(f"bound = {self.bound}: must be from 1 to 2^63 - 1")

    @property
    def width(self) -> int:
        """Return the bits of a lane: enough for every coordinate of the sum, with its sign."""
        return self.bound.bit_length() + 1

    @property
    def count(self) -> int:
        """Return the lanes of a word."""
        return _WORD_BITS // self.width

    def words(self, length: int) -> int:
        """Return how many words carry so many values."""
        return -(-length // self.count)

    def run(self, values: npt.NDArray[Any], lane: int, part: slice) -> npt.NDArray[Any]:
        """Return the values that one lane of some consecutive words holds, as a view; the last lane may be
        shorter.
        """
        start = lane * self.words(len(values))
        end = min(start + self.words(len(values)), len(values))
        return values[min(start + part.start, end) : min(start + part.stop, end)]

    def pack(self, values: npt.NDArray[np.int64]) -> Words:
        """Return the words of signed integers.

        Shapes: values int64 [d]; result uint64 [words(d)].
        """
        words = np.zeros(self.words(len(values)), dtype=np.uint64)
        for lane in range(self.count):
            held = self.run(values, lane, slice(0, len(words)))
            words[: len(held)] += held.view(np.uint64) << np.uint64(lane * self.width)
        return words

    def unpack(self, words: Words, length: int) -> npt.NDArray[np.int64]:
        """Return the signed integers that summed words stand for.

        Raises: ProtocolError for another number of words than `length` values take, or for words of no sum
        within the bound.
        """
        if words.dtype != np.uint64 or words.shape != (self.words(length),):
            raise ProtocolError
        values, rest = np.empty(length, dtype=np.int64), words.view(np.int64)
        for lane in range(self.count):
            last = lane == self.count - 1
            # The top lane keeps the spare bits of its word, so that they are checked with it.
            spare = np.int64(0 if last else _WORD_BITS - self.width)
            held = (rest << spare) >> spare
            target = self.run(values, lane, slice(0, len(words)))
            target[:] = held[: len(target)]
            if np.any(held > self.bound) or np.any(held < -self.bound) or np.any(held[len(target) :]):
                raise ProtocolError
            rest = (rest - held) >> np.int64(0 if last else self.width)
        return values
