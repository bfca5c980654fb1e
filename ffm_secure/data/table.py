"""One table as it was read: columns, how to point at a row, and what a reader had to decide on the way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ffm_secure.errors import DataError
from ffm_secure.record_codec import require_regular

MAX_BYTES = 16 * 2**30  # unpacked size of one table; more is a damaged header or a decompression bomb
Column = Any  # list of str, bytes, dict, list or None, or a numpy array with one row per example

_LONGEST_NAME = 40
_MOST_WORDS = 5
_MOST_LISTED = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Hold one file's columns as they were stored, and how to point at a row of it."""

    origin: str
    columns: dict[str, Column] = field(repr=False)  # rows never print
    numbers: Sequence[int] | None = None  # what the file calls each row, where that is not its position
    counted: str = "row"  # what the numbers count
    label_names: tuple[str, ...] | None = None
    owners: tuple[str, ...] = ()  # columns that name data owners, where that is known
    notes: tuple[str, ...] = ()  # what a reader had to decide, for the person who plans the run
    folder: Path | None = None  # where names of files in a column count from

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def place(self, row: int) -> str:
        """Name the file and the row as an editor or a data frame counts it."""
        return f"{self.origin}: {self.counted} {row if self.numbers is None else self.numbers[row]}"


def require_bounded(path: Path) -> None:
    """Refuse a file that could not be read whole; a pipe or a device is none.

    Raises:
      DataError: it is larger than any table.
      OSError: it is not there, or no regular file.
    """
    require_regular(path)
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise DataError(f"{path}: has {size} bytes, more than the bound of {MAX_BYTES}; split it")


def listed(names: Iterable[object]) -> str:
    """List column names for a message; what reads like a sentence may be a private row, and is not shown.

    >>> listed(["text", "the patient was seen for a cough on Monday"])
    "'text', (column 2)"
    """
    shown = []
    for position, name in enumerate(map(str, names), start=1):
        sentence = len(name) > _LONGEST_NAME or len(name.split()) > _MOST_WORDS
        shown.append(f"(column {position})" if sentence else repr(name))
    rest = len(shown) - _MOST_LISTED
    return ", ".join(shown[:_MOST_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def count_more(first: str, count: int, what: str) -> str:
    """Say how many more places have the problem of the first one.

    >>> count_more("line 3 is not UTF-8", 4, "lines")
    'line 3 is not UTF-8 (4 lines in all)'
    """
    if count <= 1:
        return first
    return f"{first} ({count:,} {what} in all)"
