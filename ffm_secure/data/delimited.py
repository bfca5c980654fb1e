"""Delimited tables: which bytes are which letters, which character parts the fields, and whether names come
first.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np

from ffm_secure.data.table import Column, Table, count_more, listed, require_bounded
from ffm_secure.errors import DataError

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}

_MARKS = (
    (b"\xff\xfe\0\0", "utf-32"),
    (b"\0\0\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_SAMPLE = 200  # records a separator and a header are judged by
_LONGEST_HEADER, _MOST_WORDS = 60, 6
LONGEST_FIELD = 2**24  # letters of one field; an open quote swallows the rest of its file
_NUMBER = re.compile(r"[-+]?\d+([.,]\d+)?([eE][-+]?\d+)?", re.ASCII)
_VALUE = re.compile(r"\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}\b.*|\S+@\S+[.]\S+|\w+://.*", re.ASCII)
_WHOLE = re.compile(r"0|-?[1-9]\d{0,17}", re.ASCII)  # 007 is a name: read as 7 it would be somebody else's
_SNIFFED = 2**16  # bytes by which the end of a line is known
_OTHER_SEPARATOR = re.compile(r"\W+", re.ASCII)
_KNOWN = frozenset(
    (
        *("text", "sentence", "note", "notes", "content", "document", "review", "body", "title", "abstract"),
        *("label", "labels", "target", "class", "category", "question", "answer", "prompt", "completion"),
        *("response", "instruction", "input", "output", "image", "images", "img", "file_name", "filename"),
        *("path", "id", "index", "owner", "hospital", "site", "patient", "name", "date"),
    )
)


def stated_encoding(path: Path) -> str:
    """Return the encoding that a byte order mark states, or an empty string."""
    with path.open("rb") as file:
        head = file.read(4)
    return next((name for mark, name in _MARKS if head.startswith(mark)), "")


def text_lines(path: Path, encoding: str = "") -> Iterator[tuple[int, str]]:
    """Yield numbered lines of a text file; without an `encoding`, a byte order mark decides, and UTF-8 where
    there is none.

    Raises:
      DataError: the bytes are not of that encoding; the first line is named, the others are counted.
    """
    chosen = encoding or stated_encoding(path) or "utf-8"
    if chosen in ("utf-8", "mixed"):
        _refuse_zeros(path)
    if chosen == "utf-8":
        yield from _utf8_lines(path)
        return
    if chosen == "mixed":
        yield from _mixed_lines(path)
        return
    try:
        with path.open(encoding=chosen, newline="") as file:
            for number, line in enumerate(file, start=1):
                yield number, _unmarked(line) if number == 1 else line
    except UnicodeError:
        raise DataError(f"{path}: is not {chosen} throughout; choose another task.encoding") from None


def _unmarked(line: str) -> str:
    """Take off a byte order mark, also one that was read as three letters of Windows-1252."""
    return line.removeprefix("\ufeff").removeprefix("ï»¿")


def _refuse_zeros(path: Path) -> None:
    """Refuse what was written in two or four bytes a letter without saying so; it would pass for UTF-8."""
    with path.open("rb") as file:
        head = file.read(_SNIFFED)
    if head.count(0) * 8 > len(head):
        raise DataError(
            f"{path}: every other byte is zero, as in UTF-16; name what it is with task.encoding "
            f"({guess_encoding(path)!r}), or save it as UTF-8"
        )


def _raw_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file; where no line feed is in sight, carriage returns end them as on old Macs."""
    with path.open("rb") as file:
        head = file.read(_SNIFFED)
        file.seek(0)
        if b"\n" in head or b"\r" not in head:
            yield from file
            return
        yield from file.read().splitlines(keepends=True)


def _mixed_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Read each line as UTF-8 where it is, and as Windows-1252 where it is not: tables put together from two
    sources.
    """
    for number, raw in enumerate(_raw_lines(path), start=1):
        line = raw.decode("utf-8" if _is_utf8(raw) else "cp1252", errors="replace")
        yield number, _unmarked(line) if number == 1 else line


def _utf8_lines(path: Path) -> Iterator[tuple[int, str]]:
    lines = _raw_lines(path)
    for number, raw in enumerate(lines, start=1):
        try:
            yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            others = sum(not _is_utf8(line) for line in lines)
            raise DataError(
                f"{path}: {count_more(f'line {number} is not UTF-8', others + 1, 'lines')}; save the "
                f"file as UTF-8, or name what it is with task.encoding ({_likely(path)})"
            ) from None


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def guess_encoding(path: Path) -> str:
    """Return what a text file is most likely written in: empty for UTF-8 or a byte order mark."""
    require_bounded(path)
    if stated_encoding(path):
        return ""
    with path.open("rb") as file:
        head = file.read(4096)
        if head.count(0) * 8 > len(head):
            if head[1:2] == b"\0":
                return "utf-16-le"
            return "utf-16-be"
        file.seek(0)
        letters = []
        for line in file:
            if not line.isascii():
                letters.append(_is_utf8(line))
    if all(letters):
        return ""
    beyond_the_mark = letters[head.startswith(b"\xef\xbb\xbf") :]
    if any(beyond_the_mark):
        return "mixed"
    if not _is_western(path):
        raise DataError(
            f"{path}: is neither UTF-8 nor in a Western encoding; save it as UTF-8, or name what it is with "
            f"--encoding (task.encoding): {_likely(path)}"
        )
    return "cp1252"


def _is_western(path: Path) -> bool:
    """Tell whether the letters beyond ASCII stand alone or by twos, as accents do; other alphabets fill words
    with them.
    """
    with path.open("rb") as file:
        runs = re.findall(rb"[\x80-\xff]+", file.read(_SNIFFED))
    long = sum(len(run) for run in runs if len(run) > 3)
    return long * 4 <= sum(map(len, runs))


def _likely(path: Path) -> str:
    """Name the encodings that a file which is no UTF-8 may be in."""
    if _is_western(path):
        return "files from Windows are often 'cp1252', tables put together 'mixed'"
    return "Cyrillic is often 'cp1251', Greek 'cp1253', others 'shift_jis', 'gb18030', 'big5' or 'euc-kr'"


def read_csv(path: Path, encoding: str = "") -> Table:
    """Read a table with a header whose separator is seen from its first lines; whole numbers become int64."""
    return _read_delimited(path, ",", encoding)


def read_tsv(path: Path, encoding: str = "") -> Table:
    """Read tab-separated values with a header; quotes are ordinary characters."""
    return _read_delimited(path, "\t", encoding)


class Reader(Protocol):
    """What `csv.reader` returns; its own type has no public name."""

    @property
    def line_num(self) -> int:
        """Return the number of lines read."""

    def __iter__(self) -> Iterator[list[str]]: ...

    def __next__(self) -> list[str]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Dialect:
    """How the lines of one table are taken apart."""

    separator: str
    quoting: int
    skipped: int = 0  # lines before the header, as the one that Excel reads the separator from

    def records(self, lines: Iterator[str] | Sequence[str], *, strict: bool) -> Reader:
        """Take lines apart."""
        return csv.reader(
            lines,
            delimiter=self.separator,
            quoting=self.quoting,  # type: ignore[arg-type]
            strict=strict,
        )


def _read_delimited(path: Path, usual: str, encoding: str) -> Table:
    with _long_fields():
        dialect = _dialect(path, usual, encoding)
        header, rows, lines = _records(path, dialect, encoding)
    header, rows, empty = _without_empty_columns(header, rows)
    _check_header(path, header, rows)
    columns = {}
    for name, values in zip(header, zip(*rows), strict=False):
        columns[name] = _whole_numbers(list(values))
    notes = [f"{path.name}: fields are parted by {SEPARATORS[dialect.separator]}"] * (
        dialect.separator != usual
    )
    read_as = encoding or stated_encoding(path)
    shown = "UTF-8 where a line is, cp1252 where it is not"
    if read_as != "mixed":
        shown = read_as
    notes += [f"{path.name}: read as {shown}"] * bool(read_as)
    if empty:
        notes.append(f"{path.name}: left out {empty:,} column{'s' * (empty > 1)} without a name and a value")
    return Table(
        origin=str(path),
        columns=columns,
        numbers=lines,
        counted="line",
        notes=tuple(notes),
        folder=path.parent,
    )


@contextmanager
def _long_fields() -> Iterator[None]:
    """Let a field hold a whole document; the library's own bound is that of a page or two."""
    usual = csv.field_size_limit(LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(usual)


def _dialect(path: Path, usual: str, encoding: str) -> _Dialect:
    """Choose the separator that cuts the first records into equally many fields; the usual one wins where it
    does.
    """
    lines = []
    for _, line in islice(text_lines(path, encoding), _SAMPLE):
        lines.append(line)
    stated = None
    if lines:
        stated = re.fullmatch(r"sep=(.)\s*", lines[0])
    if stated and stated.group(1) in SEPARATORS:
        return _Dialect(separator=stated.group(1), quoting=csv.QUOTE_MINIMAL, skipped=1)
    widths = {separator: _widths(lines, separator, usual) for separator in (usual, *SEPARATORS)}
    even = [separator for separator, counts in widths.items() if counts and min(counts) == max(counts) > 1]
    several = [separator for separator, counts in widths.items() if counts and counts[0] > 1]
    if usual in even:
        separator = usual
    elif even:
        separator = max(even, key=lambda candidate: widths[candidate][0])
    else:
        separator = (several or [usual])[0]
    return _Dialect(separator=separator, quoting=_quoting(separator, usual))


def _quoting(separator: str, usual: str) -> int:
    if separator == usual == "\t":
        return csv.QUOTE_NONE
    return csv.QUOTE_MINIMAL


def _widths(lines: Sequence[str], separator: str, usual: str) -> list[int]:
    """Count the fields of the first records; the last one may be cut in two and does not count."""
    dialect = _Dialect(separator=separator, quoting=_quoting(separator, usual))
    try:
        widths = []
        for record in dialect.records(lines, strict=False):
            if record:
                widths.append(len(record))
    except csv.Error:
        return []
    if len(lines) == _SAMPLE:
        return widths[:-1]
    return widths


def _records(path: Path, dialect: _Dialect, encoding: str) -> tuple[list[str], list[list[str]], list[int]]:
    """Return the header, the rows, and the line each row begins at.

    Raises:
      DataError: quotes are broken, or rows are longer or shorter than the header.
    """
    lines = islice((line for _, line in text_lines(path, encoding)), dialect.skipped, None)
    reader = dialect.records(lines, strict=True)
    header: list[str] | None = None
    rows: list[list[str]] = []
    starts: list[int] = []
    ragged: list[str] = []
    widths: set[int] = set()
    beyond = False  # whether something stands in the last field of such a line
    start = 1 + dialect.skipped
    try:
        for record in reader:
            if header is None:
                if any(map(str.strip, record)):  # blank lines may stand before it
                    header = [name.strip() for name in record]
            elif record and len(record) != len(header):
                ragged.append(f"line {start} has {_fields(record)}, the header {len(header)}")
                widths.add(len(record))
                beyond |= bool(record[-1].strip())
            elif record:
                rows.append(record)
                starts.append(start)
            start = reader.line_num + 1 + dialect.skipped
    except csv.Error as error:
        raise DataError(
            f"{path}: line {start} is not valid ({error}); check its quotes: one inside a quoted field is "
            "written twice"
        ) from None
    if ragged:
        remedy = f"quote fields that hold {dialect.separator!r}"
        if not rows and widths == {len(header or []) + 1} and not beyond:
            remedy = (
                f"every line but the first ends with {dialect.separator!r}: take it off, or name that column"
            )
        elif not rows and len(header or []) == 1:
            remedy = "the first line seems to be a title: take it off, so that the column names come first"
        raise DataError(
            f"{path}: {count_more(ragged[0], len(ragged), 'such lines')}; fields are parted by "
            f"{SEPARATORS[dialect.separator]}: {remedy}"
        )
    return header or [], rows, starts


def _fields(record: Sequence[str]) -> str:
    return f"{len(record)} field{'s' * (len(record) != 1)}"


def _without_empty_columns(
    header: list[str], rows: list[list[str]]
) -> tuple[list[str], list[list[str]], int]:
    """Leave out columns that have neither a name nor a value, which spreadsheets write; count them."""
    empty = []
    for place, name in enumerate(header):
        if not name and not any(row[place].strip() for row in rows):
            empty.append(place)
    if not empty or len(empty) == len(header):
        return header, rows, 0
    places = [place for place in range(len(header)) if place not in empty]
    shorter = [[row[place] for place in places] for row in rows]
    return [header[place] for place in places], shorter, len(empty)


def _check_header(path: Path, header: list[str], rows: Sequence[Sequence[str]]) -> None:
    """Refuse a first line that is a row, without showing it;
    give the one unnamed column of an index a name.
    """
    reason = _row_not_header(header, rows[:_SAMPLE])
    if reason:
        raise DataError(
            f"{path}: has no header line ({reason}); put the names of its {len(header)} columns into a "
            "first line, for instance text and label"
        )
    if header.count("") == 1 and len(header) > 1:
        header[header.index("")] = "(unnamed)"
    twice = []
    for place, name in enumerate(header, start=1):
        if header.count(name) > 1:
            twice.append(place)
    if twice:  # no name is quoted: the line may be a row
        raise DataError(
            f"{path}: two columns of the header have the same name (columns {twice[0]} and {twice[1]}); "
            "rename one"
        )
    pieces = _OTHER_SEPARATOR.split("".join(header).casefold())
    if len(header) == 1 and len(pieces) > 1 and _KNOWN.issuperset(pieces):
        raise DataError(
            f"{path}: its only column is called {listed(header)}, so something else parts the fields; "
            f"use {', '.join(SEPARATORS.values())}"
        )


def _row_not_header(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Say why a first line cannot be one of column names; an empty string if it can. Nothing of the line is
    quoted.
    """
    if any(name.casefold() in _KNOWN for name in header) or list(header) == [
        str(i) for i in range(len(header))
    ]:
        return ""
    for position, name in enumerate(header):
        field = f"field {position + 1} of the first line"
        if _NUMBER.fullmatch(name):
            return f"{field} is a number"
        if _VALUE.fullmatch(name):
            return f"{field} is a date or an address"
        if any(map(str.isdigit, name)) and _shapes(rows, position) == {_shape(name)}:
            return f"{field} is written like those below it"
        if len(name) > _LONGEST_HEADER or len(name.split()) > _MOST_WORDS:
            return f"{field} is a sentence"
        if name and any(row[position].strip() == name for row in rows):
            return f"{field} comes again further down"
    return ""


def _shapes(rows: Sequence[Sequence[str]], position: int) -> set[str]:
    shapes = set()
    for row in rows:
        shapes.add(_shape(row[position].strip()))
    return shapes


def _shape(value: str) -> str:
    """Return how a value is written: every run of letters is an a, every run of digits a 9.

    >>> _shape("P-00123")
    'a-9'
    """
    return re.sub(r"\d+", "9", re.sub(r"[^\W\d_]+", "a", value))


def _whole_numbers(values: list[str]) -> Column:
    if all(_WHOLE.fullmatch(value) for value in values):
        return np.array([int(value) for value in values], dtype=np.int64)
    return values
