"""What a run file may have done to messy rows: each choice is written there, and looks at one row or one
owner at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ffm_secure.data.columns import Choices
from ffm_secure.data.labels import as_list, is_blank
from ffm_secure.data.table import Table
from ffm_secure.errors import DataError
from ffm_secure.registry import TASKS

CLEANERS = ("blank_rows", "repeated_rows", "label_spelling")


def kept_rows(
    table: Table, choices: Choices, *, text: Sequence[str], label: str | None
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Return the rows that stay after cleaning, int64 [n], and what was left out in words.

    Guarantee: whether a row stays depends on that row alone, or for repeats on rows of the same owner: one
    owner's rows never decide about another's, so cleaning moves no privacy unit across sites.
    """
    stays = np.ones(len(table), dtype=bool)
    notes = []
    if "blank_rows" in choices.clean:
        blank = _blank_rows(table, choices, text, label)
        stays &= ~blank
        notes += [f"left out {int(blank.sum()):,} rows with a blank text, label or owner"] * bool(blank.any())
    if "repeated_rows" in choices.clean:
        repeated = _repeated_rows(table, stays)
        stays &= ~repeated
        notes += [f"left out {int(repeated.sum()):,} rows that repeat another one whole"] * bool(
            repeated.any()
        )
    if not stays.any():
        raise DataError(f"{table.origin}: task.clean leaves no row of {len(table)}; look at its columns")
    return np.flatnonzero(stays), tuple(notes)


def _blank_rows(table: Table, choices: Choices, text: Sequence[str], label: str | None) -> NDArray[np.bool_]:
    blank = np.zeros(len(table), dtype=bool)
    for name in filter(None, (label, choices.owner)):
        blank |= [is_blank(value) for value in as_list(table.columns.get(name, [""] * len(table)))]
    if not text:
        return blank
    empty = np.array([[is_blank(value) for value in table.columns[name]] for name in text], dtype=bool)
    if TASKS.has(choices.kind, "answers"):  # the columns before the last are read as one text
        blank |= empty[:-1].all(axis=0) | empty[-1]
        return blank
    if TASKS.has(choices.kind, "language"):  # all columns are read as one text: one of them may be empty
        return blank | empty.all(axis=0)
    return blank | empty.any(axis=0)


def _repeated_rows(table: Table, stays: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Mark rows that equal an earlier one in every column, the owner's included."""
    columns = []
    for values in table.columns.values():
        columns.append(as_list(values))
    known: set[Any] = set()
    repeated = np.zeros(len(table), dtype=bool)
    for row in np.flatnonzero(stays):
        key = repr([values[row] for values in columns])
        repeated[row] = key in known
        known.add(key)
    return repeated
