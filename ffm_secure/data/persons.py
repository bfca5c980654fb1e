"""Persons with several rows: how many of them a run may read, and that one client has them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from defenses.dp.records import RecordKey, contents_of, person_content
from ffm_secure.config.run_file import Privacy
from ffm_secure.data.dataset import Dataset, Examples
from ffm_secure.errors import DataError

Indices = NDArray[np.int64]


def bounded_persons(dataset: Dataset, privacy: Privacy, key: RecordKey) -> Dataset:
    """Return a data set with at most as many rows of every person as the run file says, and a note of it.

    Raises:
      DataError: somebody has more, and the run file does not say that rows may be left out.
    """
    if not privacy.person_column:
        return dataset
    train, note = bounded(
        dataset.train,
        column=privacy.person_column,
        most=privacy.records_per_person,
        key=key,
        sample=privacy.over_bound == "sample",
    )
    return replace(dataset, train=train, notes=(*dataset.notes, *([note] if note else [])))


def bounded(
    examples: Examples, *, column: str, most: int, key: RecordKey, sample: bool
) -> tuple[Examples, str]:
    """Return the rows with at most `most` of every person, and a note of what was left out.

    Which rows of a person stay is drawn by the key from the rows themselves, so it is the same in every run.

    Raises:
      DataError: somebody has more, and the run file does not say that rows may be left out.
    """
    persons = _numbers(examples, column)
    counts = np.bincount(persons)
    over = int((counts > most).sum())
    if not over:
        return examples, ""
    if not sample:
        raise DataError(
            f"{examples.origin}: {over} person(s) in column {column!r} have more than "
            f"privacy.records_per_person = {most} rows; raise it, or say "
            "privacy.over_bound = 'sample' to leave rows out"
        )
    lots = _row_lots(examples, key)
    order = np.lexsort((lots, persons))
    ordered = persons[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    places = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
    chosen = np.sort(order[places < most])
    note = (
        f"{len(examples) - len(chosen):,} rows of {over:,} persons left out: at "
        f"most {most} of a person are read"
    )
    return examples.take(chosen), note


def reunited(examples: Examples, parts: Sequence[Indices], *, column: str) -> tuple[Indices, ...]:
    """Return the parts with every person whole: all rows go to the client that has most of them.

    A person in several clients would pay in each, which the noise of one client is not calibrated for.
    """
    persons = _numbers(examples, column)
    held = np.zeros((int(persons.max(initial=-1)) + 1, len(parts)), dtype=np.int64)
    for client, rows in enumerate(parts):
        np.add.at(held[:, client], persons[rows], 1)
    home = held.argmax(axis=1)
    dealt = np.sort(np.concatenate([np.asarray(rows, dtype=np.int64) for rows in parts]))
    owners = home[persons[dealt]]
    result = tuple(dealt[owners == client] for client in range(len(parts)))
    if any(len(rows) == 0 for rows in result):
        raise DataError(
            f"{examples.origin}: with every person whole, some client has no rows; take fewer clients, or "
            "a natural split by a column that persons do not cross"
        )
    return result


def _numbers(examples: Examples, column: str) -> Indices:
    """Number the persons of the rows by what their names say, whatever case or blanks."""
    names = []
    for value in examples.column(column):
        names.append(person_content(value))
    numbers: dict[bytes, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int64)


def _row_lots(examples: Examples, key: RecordKey) -> NDArray[np.uint64]:
    assert examples.contents is not None
    return key.lots(int(value).to_bytes(8, "little") for value in contents_of(examples.contents))
