"""Labels: from what stands in a column to class numbers, and where the names of the classes come from."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ffm_secure.data.table import Table, count_more
from ffm_secure.errors import DataError
from ffm_secure.foreign import Cells, JsonValue

Indices = NDArray[np.int64]
NameSource = Literal["declared", "stored", "numbers", "column"]

MAX_LABELS = 65_536  # above it the label column is more likely an identifier


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """Hold the class numbers of both parts, the names, and who named them.

    `source`: the run file ("declared"), metadata or folders ("stored"), nobody ("numbers"), or the rows
      ("column").
    """

    parts: tuple[Indices, Indices] = field(repr=False)  # of private rows too
    names: tuple[str, ...]
    source: NameSource


def encode_labels(
    tables: tuple[Table, Table], name: str, *, declared: tuple[str, ...], loose: bool
) -> Labels:
    """Map labels to class numbers.

    Whole numbers stay as they are, text is numbered in sorted order of the union of both parts. Names that
    are `declared` decide alone; with `loose`, capital letters and blanks at either end make no difference to
    them.

    Raises:
      DataError: a label is missing, out of bounds or not declared; the first row is named, the others are
        counted.
    """
    if declared:
        labels = _declared(tables, name, declared, loose)
    else:
        labels = _seen(tables, name)
    if len(labels.names) > MAX_LABELS:
        raise DataError(
            f"{tables[0].origin}: column {name!r} has {len(labels.names)} classes, more "
            f"than the bound of {MAX_LABELS}"
        )
    return labels


def _seen(tables: tuple[Table, Table], name: str) -> Labels:
    if all(is_text(table.columns[name]) for table in tables):
        names = tuple(sorted({value for table in tables for value in table.columns[name]}))
        numbers = {}
        for number, value in enumerate(names):
            numbers[value] = number
        parts = []
        for table in tables:
            parts.append(np.array([numbers[value] for value in table.columns[name]], dtype=np.int64))
        return Labels(parts=(parts[0], parts[1]), names=names, source="column")
    whole = (_whole_labels(tables[0], name), _whole_labels(tables[1], name))
    count = 1 + max(int(values.max()) for values in whole)
    stored = tables[0].label_names
    if stored is not None and len(stored) >= count:
        return Labels(parts=whole, names=stored, source="stored")
    beside = _names_beside(tables[0], whole[0], column=name, count=count)
    if beside is not None:
        return Labels(parts=whole, names=beside, source="column")
    return Labels(parts=whole, names=tuple(map(str, range(count))), source="numbers")


def _declared(tables: tuple[Table, Table], name: str, names: tuple[str, ...], loose: bool) -> Labels:
    spelling: Callable[[object], str] = str
    if loose:
        spelling = plain
    numbers = {}
    for number, text in enumerate(names):
        numbers[spelling(text)] = number
    if len(numbers) < len(names):
        raise DataError("class_names: two of them are the same; name every class once")
    positions = any(not is_text(table.columns[name]) for table in tables) and not _all_named(
        tables, name, numbers
    )
    parts = []
    for table in tables:
        if positions:
            parts.append(_positions(table, name, len(names)))
        else:
            parts.append(_named(table, name, numbers, spelling is plain))
    return Labels(parts=(parts[0], parts[1]), names=names, source="declared")


def _all_named(tables: Sequence[Table], name: str, numbers: Mapping[str, int]) -> bool:
    for table in tables:
        for value in as_list(table.columns[name]):
            if written(value) not in numbers:
                return False
    return True


def written(value: object) -> str:
    """Return a label as a run file writes it: whole numbers that a table keeps as fractions without the dot.

    >>> written(1.0), written("1.0"), written(1)
    ('1', '1.0', '1')
    """
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _positions(table: Table, name: str, count: int) -> Indices:
    labels = _whole_labels(table, name)
    beyond = np.flatnonzero(labels >= count)
    if beyond.size:
        first = f"a label in column {name!r} is beyond the {count} classes of class_names"
        raise DataError(
            f"{table.place(int(beyond[0]))}: {count_more(first, int(beyond.size), 'rows')}; declare it"
        )
    return labels


def _named(table: Table, name: str, numbers: Mapping[str, int], loose: bool) -> Indices:
    values = as_list(table.columns[name])
    spelled = []
    for value in values:
        spelled.append(plain(written(value)) if loose else written(value))
    unknown = []
    for row, text in enumerate(spelled):
        if text not in numbers:
            unknown.append(row)
    if unknown:
        plainly = set()
        for text in numbers:
            plainly.add(plain(text))
        close = sum(plain(spelled[row]) in plainly for row in unknown)
        blank = sum(is_blank(values[row]) for row in unknown)
        first = count_more(f"the label in column {name!r} is not one of class_names", len(unknown), "rows")
        parts = [f"{blank:,} of them blank"] * bool(blank)
        parts += [f"{close:,} differ by capital letters or blanks alone"] * bool(close)
        detail = ""
        if parts:
            detail = f" ({', '.join(parts)})"
        raise DataError(
            f"{table.place(unknown[0])}: {first}{detail}; declare it, mend the rows, or let task.clean do it "
            "('label_spelling', 'blank_rows')"
        )
    return np.array([numbers[text] for text in spelled], dtype=np.int64)


def plain(value: object) -> str:
    """Return a label without what people type differently by accident: case, blanks at the ends or doubled,
    signs without width, and letters composed in another way.

    >>> plain("  Internal  Medicine ")
    'internal medicine'
    """
    return " ".join(visible(unicodedata.normalize("NFC", str(value))).split()).casefold()


def visible(text: str) -> str:
    """Return a text without the signs that have no width, such as a byte order mark or a zero-width blank."""
    if text.isascii():
        return text
    return "".join(letter for letter in text if unicodedata.category(letter) != "Cf")


def is_blank(value: object) -> bool:
    """Tell whether a cell holds nothing: no value, not a number, or blanks alone."""
    if value is None or (isinstance(value, float) and value != value):
        return True
    return isinstance(value, str) and not visible(value).strip()


def as_list(values: Cells) -> list[object]:
    """Return a column as plain Python values."""
    return list(values.tolist() if isinstance(values, np.ndarray) else values)


def is_text(values: Cells) -> bool:
    """Tell whether a column holds text throughout."""
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _whole_labels(table: Table, name: str) -> Indices:
    values = table.columns[name]
    if isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype.kind in "iub":
        numbers = values.astype(np.int64)
        bad = np.flatnonzero((numbers < 0) | (numbers >= MAX_LABELS))
        if bad.size:
            first = f"a label in column {name!r} is outside 0 to {MAX_LABELS - 1}"
            raise DataError(
                f"{table.place(int(bad[0]))}: {count_more(first, int(bad.size), 'rows')}; number the "
                "classes from 0, write them as text, or declare them with task.class_names"
            )
        return numbers
    if len(values) and all(isinstance(value, bool) for value in values):
        return np.array(values, dtype=np.int64)
    odd = [row for row, value in enumerate(values) if not _is_class_number(value)]
    answers = [row for row in odd if isinstance(values[row], bool)]
    if len(answers) < len(odd) and all(is_blank(values[row]) for row in set(odd) - set(answers)):
        odd = [row for row in odd if is_blank(values[row])]  # yes or no throughout, or nothing
    if odd:
        value = values[odd[0]]
        kind = "nothing"
        if value is not None:
            kind = f"a {type(value).__name__}"
        first = f"label ({kind}) in column {name!r} is neither a whole number from 0 nor text throughout"
        remedy = "fill or remove the row, or let task.clean leave out blank_rows"
        if not all(is_blank(values[row]) for row in odd):
            remedy = "write all labels as text, or all as whole numbers from 0"
        raise DataError(f"{table.place(odd[0])}: {count_more(first, len(odd), 'rows')}; {remedy}")
    return np.array([int(value) for value in values], dtype=np.int64)


def _is_class_number(value: JsonValue) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        return False
    if isinstance(value, np.floating):
        value = float(value)
    return bool(0 <= value < MAX_LABELS) and float(value).is_integer()  # numbers beyond any float come first


def _names_beside(table: Table, labels: Indices, *, column: str, count: int) -> tuple[str, ...] | None:
    """Use a column `<label>_name` where it names every class in exactly one way."""
    values = table.columns.get(f"{column}_name")
    if values is None or not is_text(values):
        return None
    pairs = set(zip(labels.tolist(), values, strict=True))
    names = dict(pairs)
    if len(pairs) == len(names) == count:
        return tuple(names[index] for index in range(count))
    return None
