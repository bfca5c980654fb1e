"""Expand 32-byte seeds into masks and add them to ring vectors, chunk by chunk and in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from defenses.errors import ParameterError

RingVector = npt.NDArray[np.unsignedinteger[Any]]
Word = type[np.uint32] | type[np.uint64]
_Stream = tuple[Callable[[Any, Any], int], np.ufunc]

CHUNK_BYTES = 1 << 16
"""Small enough that zeros, keystream and accumulator of one chunk stay in the second-level cache together."""
_ZEROS = memoryview(bytes(CHUNK_BYTES))
_STREAMS_AT_ONCE = 512


def word_type(modulus_bits: int) -> Word:
    """Return the integer type that vectors modulo 2^modulus_bits are computed in."""
    return np.uint32 if modulus_bits <= 32 else np.uint64


@dataclass(frozen=True, slots=True)
class Mask:
    """Name one mask: a 32-byte seed, and whether it is added or subtracted."""

    seed: bytes = field(repr=False)
    negative: bool = False

    def __reduce__(self) -> NoReturn:
        raise TypeError("a mask seed is a secret and cannot be pickled")


def keystream(seed: bytes, count: int, word: Word) -> RingVector:
    """Return the first `count` mask words of a seed: AES-256 in counter mode from block zero, little-endian
    words.

    The slow, obvious definition; `add_masks` is the fast one.
    """
    stream = _open(seed)(bytes(count * np.dtype(word).itemsize))
    words: RingVector = np.frombuffer(stream, dtype=word)
    return words.copy()


def _open(seed: bytes) -> Callable[[bytes], bytes]:
    return Cipher(algorithms.AES256(seed), modes.CTR(bytes(16))).encryptor().update


class MaskStreams:
    """Run many masks side by side over consecutive chunks of a vector.

    Guarantee: after `add_to` was called on consecutive chunks that cover a vector, the vector has changed by
    the signed sum of the masks modulo the word. Every chunk but the last has `chunk_words` words.
    """

    __slots__ = ("_keystream", "_streams", "_view", "chunk_words")

    def __init__(self, masks: Sequence[Mask], word: Word) -> None:
        self.chunk_words = CHUNK_BYTES // np.dtype(word).itemsize
        self._keystream = np.empty(self.chunk_words, dtype=word)
        self._view = memoryview(self._keystream).cast("B")  # type: ignore[arg-type]
        self._streams: list[_Stream] = [
            (
                Cipher(algorithms.AES256(mask.seed), modes.CTR(bytes(16))).encryptor().update_into,
                np.subtract if mask.negative else np.add,
            )
            for mask in masks
        ]

    def add_to(self, chunk: RingVector) -> None:
        """Add the next words of every mask to a chunk, in place."""
        self._add(chunk, self._streams)

    def write(self, out: RingVector, chunk: RingVector) -> None:
        """Write a chunk plus the next words of every mask; there must be at least one mask. `chunk` is not
        changed.
        """
        (update_into, combine), *others = self._streams
        update_into(_ZEROS[: out.nbytes], memoryview(out).cast("B"))  # type: ignore[arg-type]
        combine(chunk, out, out=out)
        self._add(out, others)

    def _add(self, chunk: RingVector, streams: Sequence[_Stream]) -> None:
        words, view, zeros = self._keystream[: len(chunk)], self._view[: chunk.nbytes], _ZEROS[: chunk.nbytes]
        for update_into, combine in streams:
            update_into(zeros, view)
            combine(chunk, words, out=chunk)


def chunks(length: int, step: int) -> Iterator[slice]:
    """Cut range(length) into consecutive slices of `step`."""
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def add_masks(vector: RingVector, masks: Sequence[Mask]) -> None:
    """Add the signed sum of many masks to a ring vector, in place, touching memory once per 512 masks.

    Shapes: vector uint32 or uint64 [d], contiguous; d may be zero.
    """
    word = np.uint32 if vector.dtype == np.uint32 else np.uint64
    if vector.dtype != word or vector.ndim != 1 or not vector.flags.c_contiguous:
        raise ParameterError("masks are added to a contiguous one-dimensional array of uint32 or uint64")
    for first in range(0, len(masks), _STREAMS_AT_ONCE):
        streams = MaskStreams(masks[first : first + _STREAMS_AT_ONCE], word)
        for part in chunks(len(vector), streams.chunk_words):
            streams.add_to(vector[part])
