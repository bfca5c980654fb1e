"""Name the rows of a data set for ledgers: by what a row says, never by its label, its place or its file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice, zip_longest

from defenses.dp.records import (
    Keys,
    RecordKey,
    canonical_pixels,
    canonical_text,
    earlier_form,
    earlier_person,
    earlier_text,
    name_persons,
    name_records,
    person_content,
)
from ffm_secure.data.chat import unpack
from ffm_secure.data.dataset import Dataset, Examples
from ffm_secure.data.images import StoredPictures
from ffm_secure.foreign import Cells

TELLING_LENGTH = 24  # a cell as long as this says which row it is, if it stands in few rows
TELLING_ROWS = 16
_MOST_TURNS = 32  # of a chat that are known each by itself


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
    cells = [
        *_cells(examples, dataset, key),
        *_as_stored(examples.stored, key),
        *_earlier(examples, dataset, key),
    ]
    if person_column:
        people = examples.column(person_column)
        persons = key.contents(person_content(value) for value in people)
        cells += _digests(list(map(earlier_person, people)), key)
        return replace(examples, records=name_persons(persons, [contents, *cells]), contents=contents)
    return replace(examples, records=name_records(contents, cells), contents=contents)


def sayings(examples: Examples, dataset: Dataset, key: RecordKey, *, person_column: str = "") -> list[Keys]:
    """Return what rows say, in every way a run may read them: as this one does, each text column alone where
    its cells tell rows apart, and the person.

    Each is one digest a row, `[n]`, as a ledger knows records by; 0 for none. A blank row says nothing.
    """
    together = _contents(examples, dataset, key)
    together[together == key.contents([b""])] = 0
    alone = []
    for texts in _columns_of_text(examples, dataset).values():
        alone += _digests(_telling(list(map(canonical_text, texts))), key)
    if person_column and person_column in examples.columns:
        people = examples.column(person_column)
        alone.append(key.contents(person_content(value) for value in people))
        alone += _digests(list(map(earlier_person, people)), key)
    return [together, *alone, *_as_stored(examples.stored, key), *_earlier(examples, dataset, key)]


def row_contents(columns: Sequence[Sequence[str]]) -> list[bytes]:
    """Return what each row says in these text columns together."""
    return list(map(canonical_text, _joined(columns)))


def _joined(columns: Sequence[Sequence[str]]) -> list[str]:
    return list(map(" ".join, zip(*columns, strict=True)))


def _columns_of_text(examples: Examples, dataset: Dataset) -> dict[str, list[str]]:
    """Return the text of every column that holds any; of chats, every turn as a column of its own."""
    columns = {}
    for name, values in examples.columns.items():
        if not _is_text(values):
            continue
        if dataset.is_chat and name in dataset.text_columns:
            chats = _spoken(list(values))
            turns = zip_longest(*chats, fillvalue="")
            for number, words in enumerate(islice(turns, _MOST_TURNS)):
                columns[f"{name} {number}"] = list(words)
        else:
            columns[name] = list(values)
    return columns


def _spoken(packed: Sequence[str]) -> list[list[str]]:
    """Return what is said in each chat, without who says it: a prompt and its answer in two columns say the
    same.
    """
    spoken = []
    for chat in packed:
        spoken.append([words for _, words in unpack(chat)])
    return spoken


def _earlier(examples: Examples, dataset: Dataset, key: RecordKey) -> list[Keys]:
    """Return what rows say as ledgers compared it before, where that is something else: together, and every
    text cell alone that says which row it is.
    """
    digests = []
    if dataset.is_chat:
        packed = _joined([examples.column(name) for name in dataset.text_columns])
        digests += _digests(list(map(earlier_text, packed)), key)
    elif not dataset.image_column:
        together = _joined([examples.column(name) for name in dataset.text_columns])
        digests += _digests(list(map(earlier_form, together)), key)
    for texts in _columns_of_text(examples, dataset).values():
        digests += _digests(_telling(list(map(earlier_form, texts))), key)
    return digests


def _digests(texts: list[bytes], key: RecordKey) -> list[Keys]:
    """Return one digest a row, 0 for no text; no column where no row has any."""
    if not any(texts):
        return []
    contents = key.contents(texts)
    contents[[not text for text in texts]] = 0
    return [contents]


def _as_stored(pictures: StoredPictures | None, key: RecordKey) -> list[Keys]:
    """Return what pictures show in their own size, where all were brought to one, and what ledgers knew them
    by before cameras' notes and transparency were read.
    """
    if pictures is None:
        return []
    digests = []
    if pictures.resized:
        digests.append(key.contents(map(canonical_pixels, pictures)))
    earlier = []
    for row in range(len(pictures)):
        picture = pictures.as_read_before(row)
        earlier.append(b"" if picture is None else canonical_pixels(picture))
    return digests + _digests(earlier, key)


def _contents(examples: Examples, dataset: Dataset, key: RecordKey) -> Keys:
    if dataset.image_column:
        pictures = examples.column(dataset.image_column)
        return key.contents(canonical_pixels(pictures[row]) for row in range(len(examples)))
    columns: list[Sequence[str]] = [examples.column(name) for name in dataset.text_columns]
    if dataset.is_chat:
        columns = [list(map(" ".join, _spoken(chats))) for chats in columns]
    return key.contents(row_contents(columns))


def _cells(examples: Examples, dataset: Dataset, key: RecordKey) -> list[Keys]:
    read = set(dataset.text_columns)
    cells = []
    for name, values in _columns_of_text(examples, dataset).items():
        if read == {name}:
            continue
        texts = list(map(canonical_text, values))
        cells += _digests(texts if name in read else _telling(texts), key)
    return cells


def _is_text(values: Cells) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _telling(texts: list[bytes]) -> list[bytes]:
    """Blank the cells that are short or stand in many rows: they say nothing about which row this is."""
    counts = Counter(texts)
    return [text if len(text) >= TELLING_LENGTH and counts[text] <= TELLING_ROWS else b"" for text in texts]
