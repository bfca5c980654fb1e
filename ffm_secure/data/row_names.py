"""Name the rows of a data set for ledgers: by what a row says, never by its label, its place or its file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from defenses.dp.records import (
    Keys,
    RecordKey,
    canonical_pixels,
    canonical_text,
    name_persons,
    name_records,
    person_content,
)
from ffm_secure.data.dataset import Dataset, Examples
from ffm_secure.foreign import Cells

TELLING_LENGTH = 24  # a cell as long as this says which row it is, if it stands in few rows
TELLING_ROWS = 16


def named(dataset: Dataset, key: RecordKey, *, person_column: str = "") -> Dataset:
    """Return a data set whose training rows bear the names a ledger knows them by.

    A row is known by its text or its pixels; the label does not count, because a label column and a kind of
    task are choices of the run. Every other text cell that says which row it is goes with it, so that a row
    is found again when another column is read. With a person column a person is one record, whatever the
    number of rows.
    """
    return replace(dataset, train=_named(dataset.train, dataset, key, person_column))


def _named(examples: Examples, dataset: Dataset, key: RecordKey, person_column: str) -> Examples:
    contents = _contents(examples, dataset, key)
    cells = _cells(examples, dataset, key)
    if person_column:
        persons = key.contents(person_content(value) for value in examples.column(person_column))
        return replace(examples, records=name_persons(persons, [contents, *cells]), contents=contents)
    return replace(examples, records=name_records(contents, cells), contents=contents)


def sayings(examples: Examples, dataset: Dataset, key: RecordKey, *, person_column: str = "") -> list[Keys]:
    """Return what rows say, in every way a run may read them: as this one does, each text column alone where
    its cells tell rows apart, and the person.

    Each is one digest a row, `[n]`, as a ledger knows records by; 0 for none.
    """
    alone = []
    for values in examples.columns.values():
        if _is_text(values):
            texts = _telling([canonical_text(value) for value in values])
            contents = key.contents(texts)
            contents[[not text for text in texts]] = 0
            alone.append(contents)
    if person_column and person_column in examples.columns:
        alone.append(key.contents(person_content(value) for value in examples.column(person_column)))
    return [_contents(examples, dataset, key), *alone]


def row_contents(columns: Sequence[Sequence[str]]) -> list[bytes]:
    """Return what each row says in these text columns together."""
    row_contents: list[bytes] = []
    for cells in zip(*columns, strict=True):
        row_contents.append(canonical_text(" ".join(cells)))
    return row_contents


def _contents(examples: Examples, dataset: Dataset, key: RecordKey) -> Keys:
    if dataset.image_column:
        pictures = examples.column(dataset.image_column)
        return key.contents(canonical_pixels(pictures[row]) for row in range(len(examples)))
    return key.contents(row_contents([examples.column(name) for name in dataset.text_columns]))


def _cells(examples: Examples, dataset: Dataset, key: RecordKey) -> list[Keys]:
    read = set(dataset.text_columns)
    cells = []
    for name, values in examples.columns.items():
        if not _is_text(values) or (read == {name}):
            continue
        texts = []
        for value in values:
            texts.append(canonical_text(value))
        if name not in read:
            texts = _telling(texts)
        contents = key.contents(texts)
        contents[[not text for text in texts]] = 0
        if contents.any():
            cells.append(contents)
    return cells


def _is_text(values: Cells) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _telling(texts: list[bytes]) -> list[bytes]:
    """Blank the cells that are short or stand in many rows: they say nothing about which row this is."""
    counts = Counter(texts)
    return [text if len(text) >= TELLING_LENGTH and counts[text] <= TELLING_ROWS else b"" for text in texts]
