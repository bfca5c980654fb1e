"""Keyed digests of single records: how a ledger knows a row again, whatever file, order, split or format it
comes in.

A record is named by 64 bits: 52 of a keyed digest of its content, and the number of the copy where the same
content stands in several rows. Rows of equal content are different records, each with an account of its own,
but nobody can tell later which copy was which: `defenses.dp.blocks` lets all copies inherit the largest
history of any.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
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


_BLANKS = {0x2800: " "}  # what shows as a blank and is no white space to Unicode
_QUOTES = dict.fromkeys(map(ord, "\u2018\u2019\u201a\u201b\u2032\u2039\u203a\u0060\u00b4"), "'")
_DOUBLE_QUOTES = dict.fromkeys(map(ord, "\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb"), '"')
_LOOKS = {**_BLANKS, **_QUOTES, **_DOUBLE_QUOTES}
# Default_Ignorable_Code_Point of DerivedCoreProperties.txt (Unicode 16), beside those of category Cf, and
# code points that are no characters.
_UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u2065\u3164\ufe00-\ufe0f\uffa0\ufff0-\ufff8"
    "\U000e0000-\U000e0fff\ufdd0-\ufdef\ufffe\uffff]"
)
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")  # those that are no white space


def canonical_text(text: str) -> bytes:
    """Return a text as it is compared: compatibility forms, case, white space, invisible characters, kinds of
    quotes, dashes and digits do not matter, nor that UTF-8 was read as an encoding of Windows or Latin-1.

    >>> canonical_text(" The  same\\n row ") == canonical_text("the same row")
    True
    """
    if text.isascii():
        return " ".join(_CONTROLS.sub("", text.replace("`", "'")).lower().split()).encode()
    text = _CONTROLS.sub("", _UNSEEN.sub("", _decoded_rightly(text).translate(_LOOKS)))
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    visible = "".join(map(_plain, folded)).replace("i\u0307", "i")  # a capital I with a dot, in lower case
    return " ".join(visible.split()).encode("utf-8", "surrogatepass")


def _plain(letter: str) -> str:
    """Return a letter without what nobody sees: nothing for a format character, a digit for any digit."""
    if letter.isascii():
        return letter
    kind = unicodedata.category(letter)
    if kind == "Nd":
        return str(unicodedata.decimal(letter))
    return {"Cf": "", "Pd": "-"}.get(kind, letter)


def _decoded_rightly(text: str) -> str:
    """Return a text whose UTF-8 bytes were taken for another encoding as it was meant."""
    for encoding in ("cp1252", "latin-1"):
        try:
            return text.encode(encoding).decode()
        except UnicodeError:
            continue
    return text


def earlier_text(text: str) -> bytes:
    """Return a text as ledgers compared it before quotes, dashes and further invisible characters were left
    out: rows that were charged then are still known.
    """
    if text.isascii():
        return " ".join(text.lower().split()).encode()
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    visible = "".join(letter for letter in folded if unicodedata.category(letter) != "Cf")
    return " ".join(visible.split()).encode("utf-8", "surrogatepass")


def earlier_form(text: str) -> bytes:
    """Return `earlier_text` where it differs from `canonical_text`, else nothing."""
    earlier = earlier_text(text)
    return b"" if earlier == canonical_text(text) else earlier


def person_content(value: object) -> bytes:
    """Return what a person is known by; the prefix keeps it apart from a text that says the same.

    A number is the same in any way of writing it: 7, 7.0, 007 and 7e0 are one person.
    """
    return _PERSON + _plain_number(canonical_text(str(value)))


def earlier_person(value: object) -> bytes:
    """Return what ledgers knew a person by before numbers were read as such; nothing where it is the same."""
    earlier = _PERSON + earlier_text(str(value))
    return b"" if earlier == person_content(value) else earlier


_PERSON = b"person\x00"
_NUMBER = re.compile(rb"[+-]?[0-9]{1,100}(\.[0-9]{0,100})?(e[+-]?[0-9]{1,2})?")


def _plain_number(text: bytes) -> bytes:
    if _NUMBER.fullmatch(text) is None:
        return text
    with localcontext(prec=400):
        plain = Decimal(text.decode()).normalize()
    return b"0" if plain.is_zero() else format(plain, "f").encode()


def canonical_pixels(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Return a picture `[height, width]` or `[height, width, 1 or 3]` as it is compared: grey equals grey in
    three channels.
    """
    height, width = pixels.shape[:2]
    coloured = np.broadcast_to(pixels.reshape(height, width, -1), (height, width, 3))
    return b"%d x %d " % (height, width) + np.ascontiguousarray(coloured).tobytes()
