"""Tables from disk: parquet, jsonl, csv, npz and picture folders, read strictly, nothing in them ever run."""

from __future__ import annotations

import csv
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ffm_secure.data.images import SUFFIXES as PICTURES
from ffm_secure.errors import DataError

Column = Any  # list of str, bytes, dict or None, or a numpy array with one row per example

MAX_BYTES = 16 * 2**30  # unpacked size of one table; more is a damaged header or a decompression bomb
VALIDATION_NAMES = ("validation", "valid", "val", "dev")


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Hold one file's columns as they were stored, and how to point at a row of it."""

    origin: str
    columns: dict[str, Column]
    numbers: Sequence[int] | None = None  # what the file calls each row, where that is not its position
    counted: str = "row"  # what the numbers count
    label_names: tuple[str, ...] | None = None
    owners: tuple[str, ...] = ()  # columns that name data owners, where that is known

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def place(self, row: int) -> str:
        """Name the file and the row as an editor or a data frame counts it."""
        return f"{self.origin}: {self.counted} {row if self.numbers is None else self.numbers[row]}"


def read_source(path: Path) -> tuple[Table, Table | None]:
    """Read the train table, and the validation table where the folder has one."""
    if path.is_file():
        return read_table(path), None
    train, validation = _split_files(path, ("train",)), _split_files(path, VALIDATION_NAMES)
    if train:
        return _joined(train), _joined(validation) if validation else None
    if (path / "train").is_dir():
        names = class_folders(path / "train")
        held_out = next((path / name for name in VALIDATION_NAMES if (path / name).is_dir()), None)
        return read_pictures(path / "train", names), None if held_out is None else read_pictures(
            held_out, names
        )
    if class_folders(path):
        return read_pictures(path, class_folders(path)), None
    raise DataError(
        f"{path}: no data found; put train.parquet (or .jsonl, .csv, .tsv, .npz) there, or train/<class>/<picture>"
    )


def _split_files(folder: Path, names: Sequence[str]) -> list[Path]:
    """Find `train.parquet` or its pieces `train-*.parquet`; two formats at once are ambiguous."""
    pattern = re.compile(rf"({'|'.join(names)})(-.*)?", re.ASCII)
    found = sorted(
        path
        for path in folder.iterdir()
        if path.suffix in READERS and pattern.fullmatch(path.stem) and path.is_file()
    )
    bases = {(path.suffix, path.stem.split("-")[0]) for path in found}
    if len(bases) > 1:
        listed = ", ".join(path.name for path in found)
        raise DataError(f"{folder}: {listed} compete for the same part; keep one of them")
    return found


def _joined(paths: Sequence[Path]) -> Table:
    tables = [read_table(path) for path in paths]
    if len(tables) == 1:
        return tables[0]
    first = tables[0]
    for table in tables[1:]:
        if set(table.columns) != set(first.columns):
            raise DataError(
                f"{table.origin}: its columns differ from those of {first.origin}; write all pieces alike"
            )
    columns = {name: _concatenate([table.columns[name] for table in tables]) for name in first.columns}
    return Table(origin=str(paths[0].parent / "train"), columns=columns, label_names=first.label_names)


def _concatenate(parts: Sequence[Column]) -> Column:
    if all(isinstance(part, np.ndarray) for part in parts):
        return np.concatenate(parts)
    return [value for part in parts for value in part]


def read_table(path: Path) -> Table:
    """Read one file by its suffix, or say what is wrong with it."""
    reader = READERS.get(path.suffix)
    if reader is None:
        raise DataError(f"{path}: unknown format {path.suffix!r}; use one of {', '.join(sorted(READERS))}")
    try:
        table = reader(path)
    except DataError:
        raise
    except (
        Exception
    ) as error:  # a damaged file makes the parsers raise nearly anything; users get one clear line
        reason = (str(error).splitlines() or [""])[0][:160] or type(error).__name__
        raise DataError(
            f"{path}: not a readable {path.suffix[1:]} file ({reason}); write it again"
        ) from error
    if len(table) == 0:
        raise DataError(f"{path}: holds no rows; a data set needs at least one")
    return table


def read_parquet(path: Path) -> Table:
    """Read a parquet file, class names from the `datasets` metadata included."""
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        unpacked = sum(
            file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups)
        )
        if unpacked > MAX_BYTES:
            raise DataError(
                f"{path}: claims {unpacked} bytes unpacked, more than the bound of {MAX_BYTES}; split it"
            )
        table = file.read()
        table.validate(full=True)  # offsets of a damaged file must not be followed blindly
    return arrow_table(table, origin=str(path))


def arrow_table(table: pa.Table, *, origin: str) -> Table:
    """Turn an Arrow table into plain columns: numbers to arrays, the rest to lists."""
    if len(set(table.column_names)) != len(table.column_names):
        raise DataError(f"{origin}: two columns have the same name; rename one")
    columns: dict[str, Column] = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        number = (
            pa.types.is_integer(column.type)
            or pa.types.is_floating(column.type)
            or pa.types.is_boolean(column.type)
        )
        columns[name] = column.to_numpy() if number and column.null_count == 0 else column.to_pylist()
    return Table(origin=origin, columns=columns, label_names=_class_names(table.schema.metadata))


def _class_names(metadata: dict[bytes, bytes] | None) -> tuple[str, ...] | None:
    """Find the one ClassLabel in the metadata that the `datasets` library writes; anything odd counts as none."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"].values()
        found = [tuple(map(str, item["names"])) for item in features if item.get("_type") == "ClassLabel"]
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return None
    return found[0] if len(found) == 1 else None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def read_jsonl(path: Path) -> Table:
    """Read one JSON object per line; all lines hold the same keys."""
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    for number, line in _text_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path}: line {number} is not JSON ({error}); repair or remove the line"
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                f"{path}: line {number} is a {type(row).__name__}; every line must be a JSON object"
            )
        if rows and row.keys() != rows[0].keys():
            odd = ", ".join(sorted(row.keys() ^ rows[0].keys()))
            raise DataError(
                f"{path}: line {number} differs from line {lines[0]} in the keys {odd}; give all lines the same"
            )
        rows.append(row)
        lines.append(number)
    columns = {name: _typed([row[name] for row in rows]) for name in (rows[0] if rows else ())}
    return Table(origin=str(path), columns=columns, numbers=lines, counted="line")


def _typed(values: list[Any]) -> Column:
    """Make whole columns of int, float or bool arrays; leave mixed ones for the checks of the column that is used."""
    kinds = {type(value) for value in values}
    if len(kinds) == 1 and kinds <= {int, float, bool}:
        try:
            return np.array(values, dtype=np.int64 if kinds == {int} else None)
        except OverflowError:
            return values
    return values


def _text_lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}: line {number} is not UTF-8; save the file as UTF-8") from error


def read_csv(path: Path) -> Table:
    """Read comma-separated values with a header; a column of whole numbers becomes int64, all else stays text."""
    return _read_delimited(path, ",")


def read_tsv(path: Path) -> Table:
    """Read tab-separated values with a header; quotes are ordinary characters."""
    return _read_delimited(path, "\t")


def _read_delimited(path: Path, delimiter: str) -> Table:
    lines_of_text = (line for _, line in _text_lines(path))
    if delimiter == "\t":
        reader = csv.reader(lines_of_text, delimiter=delimiter, quoting=csv.QUOTE_NONE, strict=True)
    else:
        reader = csv.reader(lines_of_text, delimiter=delimiter, strict=True)
    rows: list[list[str]] = []
    lines: list[int] = []
    header: list[str] | None = None
    start = 1
    try:
        for row in reader:
            if header is None:
                header = row
            elif row:
                if len(row) != len(header):
                    raise DataError(
                        f"{path}: line {start} has {len(row)} fields, the header {len(header)}; quote fields that hold "
                        f"{delimiter!r}"
                    )
                rows.append(row)
                lines.append(start)
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}: line {start} is not valid ({error}); check its quotes") from error
    header = header or []
    if len(set(header)) != len(header):
        raise DataError(f"{path}: two columns of the header have the same name; rename one")
    columns = {name: _whole_numbers(list(values)) for name, values in zip(header, zip(*rows), strict=False)}
    return Table(origin=str(path), columns=columns, numbers=lines, counted="line")


_WHOLE = re.compile(r"-?\d{1,18}", re.ASCII)


def _whole_numbers(values: list[str]) -> Column:
    if all(_WHOLE.fullmatch(value) for value in values):
        return np.array([int(value) for value in values], dtype=np.int64)
    return values


def read_npz(path: Path) -> Table:
    """Read named arrays with one row per example; pickled objects are refused, sizes are checked before allocation."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        unpacked = sum(member.file_size for member in members)
        if unpacked > MAX_BYTES:
            raise DataError(
                f"{path}: claims {unpacked} bytes unpacked, more than the bound of {MAX_BYTES}; split it"
            )
        columns = {
            member.filename.removesuffix(".npy"): _read_array(archive, member, path) for member in members
        }
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{path}: arrays differ in length ({lengths}); every array needs one row per example")
    return Table(origin=str(path), columns=columns)


def _read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> Column:
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version not in _HEADERS:
            raise DataError(f"{path}: array {member.filename} has format {version}; save it with numpy.savez")
        shape, _, dtype = _HEADERS[version](file)
    if dtype.hasobject or dtype.kind not in "biufU":
        raise DataError(
            f"{path}: array {member.filename} is {dtype}; only numbers and text are read, never objects"
        )
    size = dtype.itemsize
    for length in shape:
        size *= length
    if not shape or size > member.file_size:
        raise DataError(f"{path}: array {member.filename} is damaged (shape {shape}); write it again")
    with archive.open(member) as file:
        values: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    return values.tolist() if dtype.kind == "U" else values


_HEADERS: dict[tuple[int, int], Callable[[Any], tuple[tuple[int, ...], bool, np.dtype[Any]]]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def class_folders(folder: Path) -> tuple[str, ...]:
    """List the subfolders that hold pictures, in sorted order."""
    return tuple(
        sorted(
            sub.name
            for sub in folder.iterdir()
            if sub.is_dir() and any(f.suffix.lower() in PICTURES for f in sub.iterdir())
        )
    )


def read_pictures(folder: Path, names: tuple[str, ...]) -> Table:
    """List the pictures of a folder with one subfolder per class; they are decoded later."""
    unknown = sorted(set(class_folders(folder)) - set(names))
    if unknown:
        raise DataError(
            f"{folder}: holds the classes {unknown}, which the train part lacks; add or remove them"
        )
    paths = [
        (file, label)
        for label, name in enumerate(names)
        if (folder / name).is_dir()
        for file in sorted((folder / name).iterdir())
        if file.suffix.lower() in PICTURES
    ]
    if not paths:
        raise DataError(f"{folder}: holds no pictures; put them in one subfolder per class")
    labels = np.array([label for _, label in paths], dtype=np.int64)
    return Table(
        origin=str(folder), columns={"image": [file for file, _ in paths], "label": labels}, label_names=names
    )


READERS: dict[str, Callable[[Path], Table]] = {
    ".parquet": read_parquet,
    ".jsonl": read_jsonl,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".npz": read_npz,
}
