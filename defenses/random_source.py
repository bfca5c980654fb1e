"""Where every random bit comes from that privacy or secrecy depends on."""

from __future__ import annotations

import hashlib
import os
from typing import NoReturn

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

_CHUNK = 1 << 18
_ZEROS = bytes(_CHUNK)


class RandomSource:
    """Stream cryptographic random bytes from AES-256-CTR under a secret key.

    Use `system()` for everything real: the key comes from the operating system. `seeded()` replays the same
    stream and exists for tests; a release that used it is not private, and `private` says so.

    Guarantee: under a system key the stream is indistinguishable from uniform (AES as a pseudorandom
    permutation, at most 2^64 bytes a key); `derive` gives independent streams; the key is never printed,
    logged or pickled.
    """

    __slots__ = ("_key", "_process", "_stream", "private")

    def __init__(self, key: bytes, *, private: bool) -> None:
        if len(key) != 32:
            raise ValueError("the key of a random source must have 32 bytes")
        self._key = key
        self._process = os.getpid()
        self._stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        self.private = private

    def _refuse_fork(self) -> None:
        """Refuse to go on in a forked process: both copies would draw the same secrets."""
        if self.private and os.getpid() != self._process:
            raise RuntimeError("a random source must not cross a fork; open one in each process")

    @classmethod
    def system(cls) -> RandomSource:
        """Open a stream keyed by the operating system."""
        return cls(os.urandom(32), private=True)

    @classmethod
    def seeded(cls, seed: int) -> RandomSource:
        """Open a replayable stream for tests; whatever it protects is not private."""
        return cls(hashlib.sha256(b"ffm-secure seeded stream" + str(seed).encode()).digest(), private=False)

    def derive(self, *labels: str | int) -> RandomSource:
        """Open an independent stream bound to the labels; the same labels give the same stream, others
        another.
        """
        self._refuse_fork()
        message = b"".join(_encoded(label) for label in labels)
        return RandomSource(
            hashlib.blake2b(message, key=self._key, digest_size=32).digest(), private=self.private
        )

    def fill(self, out: npt.NDArray[np.generic]) -> None:
        """Overwrite a contiguous array with random bytes, in place."""
        self._refuse_fork()
        if not out.flags.c_contiguous:
            raise ValueError("only a contiguous array can be filled in place")
        view = out.reshape(-1).view(np.uint8).data
        for start in range(0, len(view), _CHUNK):
            part = view[start : start + _CHUNK]
            self._stream.update_into(_ZEROS[: len(part)], part)

    def random_bytes(self, count: int) -> bytes:
        """Return `count` random bytes."""
        self._refuse_fork()
        return self._stream.update(bytes(count))

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        """Return `count` uniform 64-bit words."""
        out = np.empty(count, dtype=np.uint64)
        self.fill(out)
        return out

    def uniform(self, count: int) -> npt.NDArray[np.float64]:
        """Return `count` float64 values uniform on the grid k / 2^53, 0 <= k < 2^53."""
        return (self.words(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def below(self, bound: int) -> int:
        """Return one integer uniform in [0, bound), by rejection."""
        if bound < 1:
            raise ValueError(f"bound = {bound}: must be at least 1")
        size = (bound - 1).bit_length()
        while True:
            value = int.from_bytes(self.random_bytes((size + 7) // 8), "little") & ((1 << size) - 1)
            if value < bound:
                return value

    def permutation(self, count: int) -> npt.NDArray[np.int64]:
        """Return a uniform permutation of range(count), by Fisher-Yates."""
        order = np.arange(count, dtype=np.int64)
        for last in range(count - 1, 0, -1):
            other = self.below(last + 1)
            order[last], order[other] = order[other], order[last]
        return order

    def __repr__(self) -> str:
        return f"RandomSource(<hidden>, private={self.private})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a random source holds a secret and cannot be pickled")


def _encoded(label: str | int) -> bytes:
    """Encode a label so that no two lists of labels become the same bytes: its kind, its length, itself."""
    text = str(label).encode()
    return (b"s" if isinstance(label, str) else b"i") + len(text).to_bytes(8, "big") + text
