"""Rows that are in memory already: lists of dicts, columns, `datasets.Dataset`, data frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ffm_secure.data.files import VALIDATION_NAMES, arrow_table
from ffm_secure.data.json_files import columns_of, typed
from ffm_secure.data.table import Table
from ffm_secure.errors import DataError
from ffm_secure.foreign import LibraryObject

IN_MEMORY = "memory"  # what task.data says of rows that were given from Python
_ACCEPTED = (
    "give a list of dicts, a dict of columns, a datasets.Dataset, a data frame, or a "
    "dict with 'train' and 'validation'"
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Memory:
    """Hold a data set that was given from Python; it takes the place of a file name."""

    train: Table
    validation: Table | None = None
    name: str = IN_MEMORY

    def __repr__(self) -> str:
        return f"Memory(name={self.name!r}, rows={len(self.train)})"


def from_memory(data: LibraryObject, *, name: str = IN_MEMORY) -> Memory:
    """Turn what a Python user holds into a data set.

    A mapping (or `DatasetDict`) whose keys are parts gives its train and validation part.

    >>> len(from_memory([{"text": "a", "label": 0}, {"text": "b", "label": 1}]).train)
    2

    Raises:
      DataError: it is none of the accepted kinds, is empty, or its rows do not agree.
    """
    if isinstance(data, Mapping) and "train" in data and not _is_column(data["train"]):
        beside = next((data[key] for key in VALIDATION_NAMES if key in data), None)
        validation = None
        if beside is not None:
            validation = _table(beside, f"{name} (validation)")
        return Memory(train=_table(data["train"], f"{name} (train)"), validation=validation, name=name)
    return Memory(train=_table(data, name), name=name)


def _is_column(value: object) -> bool:
    """Tell a column called train from a part called train."""
    rows = isinstance(value, Sequence) and bool(value) and not isinstance(value[0], Mapping)
    return isinstance(value, np.ndarray) or rows


def _table(data: LibraryObject, origin: str) -> Table:
    if hasattr(data, "with_format") and hasattr(data, "features"):
        from ffm_secure.data.hub import as_arrow

        table = arrow_table(as_arrow(data), origin=origin)
    elif hasattr(data, "to_dict") and hasattr(data, "columns"):  # a data frame
        table = Table(origin=origin, columns=_columns(data.to_dict("list"), origin))
    elif isinstance(data, Mapping):
        table = Table(origin=origin, columns=_columns(data, origin))
    elif isinstance(data, Sequence) and not isinstance(data, str | bytes):
        rows = [dict(row) if isinstance(row, Mapping) else row for row in data]
        columns = columns_of(rows, name=lambda row: f"row {row}", origin=origin)
        table = Table(origin=origin, columns=columns)
    else:
        raise DataError(f"{origin}: is a {type(data).__name__}; {_ACCEPTED}")
    if len(table) == 0:
        raise DataError(f"{origin}: holds no rows; a data set needs at least one")
    return table


def _columns(columns: Mapping[Any, Any], origin: str) -> dict[str, Any]:
    values = {}
    for name, column in columns.items():
        values[str(name)] = column if isinstance(column, np.ndarray) else typed(list(column))
    lengths = {}
    for name, column in values.items():
        lengths[name] = len(column)
    if len(set(lengths.values())) > 1:
        raise DataError(
            f"{origin}: columns differ in length ({lengths}); every column needs one row per example"
        )
    return values
