"""Tables from JSON: one object a line, or one list of objects, or one object of columns."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np

from ffm_secure.data.delimited import text_lines
from ffm_secure.data.table import Column, Table, listed
from ffm_secure.errors import DataError
from ffm_secure.foreign import JsonValue

Row = dict[str, Any]


def read_jsonl(path: Path, encoding: str = "") -> Table:
    """Read one JSON object per line; all lines hold the same keys."""
    rows: list[Row] = []
    lines: list[int] = []
    for number, line in text_lines(path, encoding):
        if not line.strip():
            continue
        try:
            row = parse(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path}: line {number} is not JSON ({json_reason(error)}); repair or remove the "
                f"line{_hint(path, line)}"
            ) from None
        if not isinstance(row, dict):
            hint = ""
            if isinstance(row, list):
                hint = "; call a file that is one list train.json"
            raise DataError(
                f"{path}: line {number} is a {type(row).__name__}; every line must be a JSON object{hint}"
            )
        rows.append(row)
        lines.append(number)
    columns = columns_of(rows, name=lambda row: f"line {lines[row]}", origin=str(path))
    return Table(origin=str(path), columns=columns, numbers=lines, counted="line", folder=path.parent)


def _hint(path: Path, line: str) -> str:
    """Say what a line that is no JSON most likely is."""
    if line.rstrip().endswith(","):
        return "; a comma stands behind it, which belongs into lists alone"
    if line.strip() in ("{", "["):
        return "; write each object on one line, or all of them as one list in a file called .json"
    if line.lstrip().startswith("{'"):
        return "; it looks like Python: write it with json.dumps"
    return ""


def read_json(path: Path, encoding: str = "") -> Table:
    """Read one list of objects, one object that holds such a list, one object of columns, or one object a
    line.
    """
    text = "".join(line for _, line in text_lines(path, encoding))
    if not text.strip():
        raise DataError(f"{path}: is empty; a data set needs at least one row")
    try:
        value = parse(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip()[:1] == "{" and "\n" in text.strip():
            return read_jsonl(path, encoding)
        raise DataError(f"{path}: is not JSON ({json_reason(error)}); repair or write it again") from None
    columns = _columns(value, str(path))
    return Table(origin=str(path), columns=columns, counted="item", folder=path.parent)


def _columns(value: object, origin: str) -> dict[str, Column]:
    if isinstance(value, list):
        return columns_of(value, name=lambda row: f"item {row}", origin=origin)
    if not isinstance(value, dict):
        raise DataError(f"{origin}: is a {type(value).__name__}; it must be a list of objects")
    lists = {}
    for key, item in value.items():
        if isinstance(item, list):
            lists[key] = item
    tables = {}
    for key, item in lists.items():
        if item and all(isinstance(row, dict) for row in item):
            tables[key] = item
    if len(tables) == 1:
        return _columns(next(iter(tables.values())), origin)
    if len(tables) > 1:
        raise DataError(
            f"{origin}: holds {len(tables)} lists of rows ({listed(tables)}); write each into a file of "
            "its own, train.json and validation.json"
        )
    lengths = set()
    for item in lists.values():
        lengths.add(len(item))
    if len(lists) == len(value) > 0 and len(lengths) == 1:
        columns: dict[str, Column] = {}
        for key, item in lists.items():
            columns[key] = typed(item)
        return columns
    if all(isinstance(item, str | int | float | bool | None) for item in value.values()):
        return columns_of([value], name=lambda row: f"item {row}", origin=origin)
    raise DataError(f"{origin}: is an object without one list of rows; write a list of objects, one per row")


def columns_of(rows: Sequence[object], *, name: Callable[[int], str], origin: str) -> dict[str, Column]:
    """Turn rows into columns.

    Raises:
      DataError: a row is no object, or has other keys than the first.
    """
    columns: dict[str, list[Any]] = {}
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(
                f"{origin}: {name(number)} is a {type(row).__name__}; every row must be an object"
            )
        if number == 0:
            columns = {}
            for key in row:
                columns[str(key)] = []
        if row.keys() != columns.keys():
            odd = _other_keys(columns.keys(), row.keys(), name(0))
            raise DataError(f"{origin}: {name(number)} {odd}; give all of them the same keys")
        for key, values in columns.items():
            values.append(row[key])
    return {key: typed(values) for key, values in columns.items()}


def parse(text: str) -> object:
    """Parse JSON as the standard has it: NaN and Infinity are refused, and so is a key named twice."""
    return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, JsonValue]]) -> dict[str, JsonValue]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("an object names a key twice")
    return table


def _no_constant(name: str) -> JsonValue:
    raise ValueError(f"{name} is not JSON, which writes null for it")


def typed(values: list[Any]) -> Column:
    """Make whole columns of int, float or bool arrays; leave mixed ones for the checks of the column that is
    used.
    """
    kinds = set()
    for value in values:
        kinds.add(type(value))
    if len(kinds) == 1 and kinds <= {int, float, bool}:
        try:
            return np.array(values, dtype=np.int64 if kinds == {int} else None)
        except OverflowError:
            return values
    return values


def json_reason(error: Exception) -> str:
    """Say where a text stops being JSON, in words that quote nothing of it."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, character {error.pos + 1}"
    if isinstance(error, RecursionError):
        return "too deeply nested"
    return str(error)[:160]


def _other_keys(known: Set[str], keys: Set[str], first: str) -> str:
    """Name the keys a row lacks and count those it has beyond: a key that only one row has may be private."""
    lacking = sorted(known - keys)
    beyond = len(keys - known)
    parts = [f"lacks {listed(lacking)}"] * bool(lacking)
    parts += [f"has {beyond} more key{'s' * (beyond > 1)} than"] * bool(beyond)
    return f"{' and '.join(parts)} {first}" if beyond else f"{parts[0]}, which {first} has"
