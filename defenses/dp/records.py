"""Keyed digests of single records: how a ledger knows a row again, whatever file, order, split or format it
comes in.

A record is named by 64 bits: 52 of a keyed digest of its content, and the number of the copy where the same
content stands in several rows. Rows of equal content are different records, each with an account of its own,
but nobody can tell later which copy was which: `defenses.dp.blocks` lets all copies inherit the largest
history of any.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from defenses.errors import ParameterError

Keys = npt.NDArray[np.uint64]
Flags = npt.NDArray[np.bool_]

KEY_BYTES = 32
COPY_BITS = 12
LAST_COPY = (1 << COPY_BITS) - 1
_CONTENT = np.uint64(2**64 - 1 - LAST_COPY)
_PUBLIC = hashlib.sha256(b"ffm-secure rows that are no secret").digest()


class RecordKey:
    """Turn contents into digests only the holder of this key can make.

    Guarantee: whoever lacks the key cannot tell whether a guessed content is in a ledger (keyed BLAKE2b as a
    pseudorandom function, RFC 7693). Two different contents share a digest with probability 2^-52; then a new
    record is taken for a known one, which only makes it pay more. The key is never printed, logged or
    pickled.
    """

    __slots__ = ("_secret",)

    def __init__(self, secret: bytes) -> None:
        if len(secret) != KEY_BYTES:
            raise ParameterError(f"the key of a ledger must have {KEY_BYTES} bytes")
        self._secret = secret

    @classmethod
    def public(cls) -> RecordKey:
        """Return the key everybody has, for rows that are fictitious or public."""
        return cls(_PUBLIC)

    def contents(self, values: Iterable[bytes]) -> Keys:
        """Return one digest for each value, `[n]`; the low bits, which number copies, are zero."""
        return self._digests(values, b"record") & _CONTENT

    def lots(self, values: Iterable[bytes]) -> Keys:
        """Return a number below 2^64 for each value, `[n]`: a draw that falls the same in every run and
        order.
        """
        return self._digests(values, b"lot")

    def digest(self, value: bytes) -> str:
        """Return a keyed digest in words, 32 characters: nobody without the key can try a guess on it."""
        return hashlib.blake2b(value, key=self._secret, person=b"digest", digest_size=16).hexdigest()

    def check(self) -> str:
        """Return what tells whether a key is the one a ledger was opened with."""
        return hashlib.blake2b(b"", key=self._secret, person=b"check", digest_size=16).hexdigest()

    def _digests(self, values: Iterable[bytes], purpose: bytes) -> Keys:
        start = hashlib.blake2b(key=self._secret, person=purpose, digest_size=8)
        digests = bytearray()
        for value in values:
            state = start.copy()
            state.update(value)
            digests += state.digest()
        return np.frombuffer(bytes(digests), dtype="<u8").astype(np.uint64)

    def __repr__(self) -> str:
        return "RecordKey(secret)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("the key of a ledger is never pickled or copied")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Records:
    """Name rows: `keys[i]` is record i, uint64 `[n]`; `cells[i]` are further contents it is known by, uint64
    `[n, c]`, 0 for none.

    A row whose text column changes is still found by the cells it was not read by.
    """

    keys: Keys
    cells: Keys

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, rows: npt.NDArray[np.int64]) -> Records:
        """Return the names of some rows."""
        return Records(keys=self.keys[rows], cells=self.cells[rows])


def name_records(contents: Keys, cells: Sequence[Keys] = ()) -> Records:
    """Number the copies of equal contents and return the rows' names.

    Assumes: all rows of a data set are named together, before they are dealt out or held out.
    """
    if cells:
        others = np.stack(list(cells), axis=1)
    else:
        others = np.zeros((len(contents), 0), dtype=np.uint64)
    return Records(keys=number_copies(contents), cells=others)


def name_persons(contents: Keys, cells: Sequence[Keys] = ()) -> Records:
    """Return names where equal contents are one and the same person, whatever the number of rows."""
    if cells:
        others = np.stack(list(cells), axis=1)
    else:
        others = np.zeros((len(contents), 0), dtype=np.uint64)
    return Records(keys=contents & _CONTENT, cells=others)


def number_copies(contents: Keys) -> Keys:
    """Return the contents with the number of the copy in their low bits; copies beyond the last share its
    number.
    """
    order = np.argsort(contents, kind="stable")
    ordered = contents[order]
    first = np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(ordered)]
    starts = np.flatnonzero(first)
    copies = np.arange(len(ordered)) - np.repeat(starts, np.diff(np.append(starts, len(ordered))))
    keys = np.empty_like(contents)
    keys[order] = (ordered & _CONTENT) | np.minimum(copies, LAST_COPY).astype(np.uint64)
    return keys


def contents_of(keys: Keys) -> Keys:
    """Return the contents behind record names."""
    return keys & _CONTENT


def canonical_text(text: str) -> bytes:
    """Return a text as it is compared: compatibility forms, case, white space and invisible characters do not
    matter.

    >>> canonical_text(" The  same\\n row ") == canonical_text("the same row")
    True
    """
    if text.isascii():
        return " ".join(text.lower().split()).encode()
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    visible = "".join(letter for letter in folded if unicodedata.category(letter) != "Cf")
    return " ".join(visible.split()).encode("utf-8", "surrogatepass")


def person_content(value: object) -> bytes:
    """Return what a person is known by; the prefix keeps it apart from a text that says the same."""
    return b"person\x00" + canonical_text(str(value))


def canonical_pixels(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Return a picture `[height, width]` or `[height, width, 1 or 3]` as it is compared: grey equals grey in
    three channels.
    """
    height, width = pixels.shape[:2]
    coloured = np.broadcast_to(pixels.reshape(height, width, -1), (height, width, 3))
    return b"%d x %d " % (height, width) + np.ascontiguousarray(coloured).tobytes()
