"""Tables from disk: parquet, jsonl, csv, npz and picture folders, read strictly, nothing in them ever run."""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ffm_secure.data.delimited import read_csv, read_tsv
from ffm_secure.data.images import SUFFIXES as PICTURES
from ffm_secure.data.json_files import read_json, read_jsonl
from ffm_secure.data.saved import is_saved, read_saved, saved_splits
from ffm_secure.data.table import MAX_BYTES, Column, Table, listed, require_bounded
from ffm_secure.errors import DataError

VALIDATION_NAMES = ("validation", "valid", "val", "dev")
_OTHER_PARTS = ("test", "testing", "eval", "evaluation", "holdout", "unlabelled", "unlabeled", "extra")
_LEFTOVERS = ("__MACOSX", "Thumbs.db", "desktop.ini", "@eaDir")
_SHEETS = (".xlsx", ".xls", ".ods")
_FRAMES = (".arrow", ".feather", ".orc", ".pkl", ".pickle", ".h5", ".hdf5", ".dta", ".sav", ".rds", ".pt")
_PACKED = (".gz", ".zip", ".bz2", ".xz", ".zst", ".7z")
_INDEXES = (
    "metadata.csv",
    "metadata.jsonl",
    "metadata.parquet",
)  # name the pictures beside them, and their labels


def read_source(path: Path, encoding: str = "") -> tuple[Table, Table | None]:
    """Read the train table, and the validation table where the folder has one; text files may name their
    `encoding`.
    """
    if path.is_file():
        return read_table(path, encoding), None
    if is_saved(path):
        return _read_saved(path)
    train, validation = _split_files(path, ("train",)), _split_files(path, VALIDATION_NAMES)
    if train:
        first = _joined(train, encoding)
        held_out = _joined(validation, encoding) if validation else None
        return _with_notes(first, _unread_parts(path, bool(validation))), held_out
    folders = _folders(path)
    held_out_folder = next((folders[name] for name in VALIDATION_NAMES if name in folders), None)
    if "train" in folders:
        first, held_out = _folder_parts(folders["train"], held_out_folder, encoding)
        return _with_notes(first, _unread_parts(path, held_out is not None)), held_out
    if class_folders(path):
        return read_pictures(path, class_folders(path)), None
    raise DataError(f"{path}: no data found; {_advice(path)}")


def _folders(path: Path) -> dict[str, Path]:
    """Return the subfolders by their names in small letters; the one that is written so wins."""
    folders = {}
    for sub in sorted(path.iterdir()):
        if sub.is_dir() and (sub.name.casefold() not in folders or sub.name.islower()):
            folders[sub.name.casefold()] = sub
    return folders


def _folder_parts(train: Path, held_out: Path | None, encoding: str) -> tuple[Table, Table | None]:
    """Read the pictures of two folders, by the table that names them or by their class folders."""
    index = _index(train)
    if index is not None:
        beside = None
        if held_out is not None:
            beside = _index(held_out)
        return read_table(index, encoding), None if beside is None else read_table(beside, encoding)
    names = class_folders(train)
    shown = None
    if held_out is not None:
        shown = read_pictures(held_out, names)
    return read_pictures(train, names), shown


def _with_notes(table: Table, notes: tuple[str, ...]) -> Table:
    return replace(table, notes=(*table.notes, *notes))


def _unread_parts(path: Path, validated: bool) -> tuple[str, ...]:
    """Say which files or folders beside the train part look like parts of the data and are not read."""
    unread = []
    for item in sorted(path.iterdir()):
        part = re.split(r"[-_.]", item.name.casefold())[0]
        known = item.is_dir() or item.suffix.lower() in (*READERS, *TEXT_READERS)
        if known and part in _OTHER_PARTS:
            unread.append(item.name)
    if not unread:
        return ()
    more = "" if validated else "; a part called validation is read for the public rows"
    verb = "is" if len(unread) == 1 else "are"
    return (f"{path.name}: {listed(unread)} {verb} not read{more}",)


def _advice(folder: Path) -> str:
    files = []
    for file in sorted(folder.iterdir()):
        if file.is_file() and not _is_hidden(file):
            files.append(file.name)
    beside = ""
    if files:
        more = f" and {len(files) - 5} more" if len(files) > 5 else ""
        beside = f" (it holds {', '.join(files[:5])}{more}; a file can also be named itself)"
    return (
        "put train.parquet (or .jsonl, .json, .csv, .tsv, .npz) there, or train/<class>/<picture>, or "
        f"what save_to_disk writes{beside}"
    )


def _index(folder: Path) -> Path | None:
    return next((folder / name for name in _INDEXES if (folder / name).is_file()), None)


def _read_saved(folder: Path) -> tuple[Table, Table | None]:
    splits = saved_splits(folder)
    held_out = next((splits[name] for name in VALIDATION_NAMES if name in splits), None)
    if "train" not in splits:
        raise DataError(f"{folder}: has no part called train, only {', '.join(splits)}; save one")
    train = _saved_table(splits["train"])
    unread = sorted(set(splits) - {"train", *VALIDATION_NAMES})
    if unread:
        train = replace(train, notes=(f"{folder.name}: the parts {', '.join(unread)} are not read",))
    return train, None if held_out is None else _saved_table(held_out)


def _saved_table(folder: Path) -> Table:
    table = arrow_table(read_saved(folder, MAX_BYTES), origin=str(folder))
    if len(table) == 0:
        raise DataError(f"{folder}: holds no rows; a data set needs at least one")
    return table


def _split_files(folder: Path, names: Sequence[str]) -> list[Path]:
    """Find `train.parquet` or its pieces `train-*.parquet`; two formats at once are ambiguous."""
    pattern = re.compile(rf"({'|'.join(names)})(-.*)?", re.ASCII | re.IGNORECASE)
    paths = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in (*READERS, *TEXT_READERS)
        and pattern.fullmatch(path.stem)
        and path.is_file()
    )
    bases = set()
    for path in paths:
        bases.add((path.suffix.lower(), path.stem.split("-")[0].casefold()))
    if len(bases) > 1:
        listed = ", ".join(path.name for path in paths)
        raise DataError(f"{folder}: {listed} compete for the same part; keep one of them")
    return paths


def _joined(paths: Sequence[Path], encoding: str) -> Table:
    tables = []
    for path in paths:
        tables.append(read_table(path, encoding))
    if len(tables) == 1:
        return tables[0]
    first = tables[0]
    for table in tables[1:]:
        if set(table.columns) != set(first.columns):
            raise DataError(
                f"{table.origin}: its columns differ from those of {first.origin}; write all pieces alike"
            )
    columns = {}
    for name in first.columns:
        columns[name] = _concatenate([table.columns[name] for table in tables])
    notes = tuple(note for table in tables for note in table.notes)
    return Table(
        origin=str(paths[0].parent / "train"),
        columns=columns,
        label_names=first.label_names,
        notes=notes,
        folder=paths[0].parent,
    )


def _concatenate(parts: Sequence[Column]) -> Column:
    if all(isinstance(part, np.ndarray) for part in parts):
        return np.concatenate(parts)
    return [value for part in parts for value in part]


def read_table(path: Path, encoding: str = "") -> Table:
    """Read one file by its suffix, or say what is wrong with it."""
    suffix = path.suffix.lower()
    if suffix not in READERS and suffix not in TEXT_READERS:
        known = ", ".join(sorted((*READERS, *TEXT_READERS)))
        sheet = ""
        if suffix in _SHEETS:
            sheet = " (save the sheet as CSV)"
        if suffix in _PACKED:
            sheet = " (unpack it first)"
        if suffix in _FRAMES:
            sheet = " (write it with to_parquet)"
        if suffix == ".txt":
            sheet = " (give its columns names in a first line and call it .csv or .tsv)"
        raise DataError(f"{path}: unknown format {path.suffix!r}; use one of {known}{sheet}")
    try:
        require_bounded(path)
        if suffix in TEXT_READERS:
            table = TEXT_READERS[suffix](path, encoding)
        else:
            table = READERS[suffix](path)
    except DataError:
        raise
    except (
        Exception
    ) as error:  # a damaged file makes the parsers raise nearly anything; users get one clear line
        raise DataError(
            f"{path}: not a readable {path.suffix[1:]} file ({_reason(error)}); write it again"
        ) from None
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
    return replace(arrow_table(table, origin=str(path)), folder=path.parent)


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
    """Find the one ClassLabel in the metadata that the `datasets` library writes; anything odd counts as
    none.
    """
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"].values()
        declared = []
        for item in features:
            if item.get("_type") == "ClassLabel":
                declared.append(tuple(map(str, item["names"])))
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return None
    if len(declared) == 1:
        return declared[0]
    return None


def read_npz(path: Path) -> Table:
    """Read named arrays with one row per example; pickled objects are refused, sizes are checked before
    allocation.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        unpacked = sum(member.file_size for member in members)
        if unpacked > MAX_BYTES:
            raise DataError(
                f"{path}: claims {unpacked} bytes unpacked, more than the bound of {MAX_BYTES}; split it"
            )
        columns = {}
        for member in members:
            columns[member.filename.removesuffix(".npy")] = _read_array(archive, member, path)
    lengths = {}
    for name, values in columns.items():
        lengths[name] = len(values)
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
    if dtype.kind == "U":
        return values.tolist()
    return values


_HEADERS: dict[tuple[int, int], Callable[[Any], tuple[tuple[int, ...], bool, np.dtype[Any]]]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def class_folders(folder: Path) -> tuple[str, ...]:
    """List the subfolders that hold pictures, in sorted order; what programs leave behind is none."""
    names = []
    for sub in folder.iterdir():
        if sub.is_dir() and not _is_hidden(sub) and any(map(_is_picture, sub.iterdir())):
            names.append(sub.name)
    return tuple(sorted(names))


def _is_hidden(path: Path) -> bool:
    """Tell whether a program put a file or folder there for itself: notebooks, finders, archives."""
    return path.name.startswith((".", "~$")) or path.name in _LEFTOVERS


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURES and not _is_hidden(path)


def read_pictures(folder: Path, names: tuple[str, ...]) -> Table:
    """List the pictures of a folder with one subfolder per class; they are decoded later."""
    unknown = sorted(set(class_folders(folder)) - set(names))
    if unknown:
        raise DataError(
            f"{folder}: holds the classes {unknown}, which the train part lacks; add or remove them"
        )
    paths = []
    for label, name in enumerate(names):
        if (folder / name).is_dir():
            for file in sorted((folder / name).iterdir()):
                if _is_picture(file):
                    paths.append((file, label))
    if not paths:
        raise DataError(f"{folder}: holds no pictures; put them in one subfolder per class{_deeper(folder)}")
    labels = np.array([label for _, label in paths], dtype=np.int64)
    return Table(
        origin=str(folder),
        columns={"image": [file for file, _ in paths], "label": labels},
        label_names=names,
        notes=_left_out(folder, names),
    )


def _deeper(folder: Path) -> str:
    """Say where else pictures lie, if anywhere: beside the class folders, or a level below them."""
    for sub in sorted(folder.iterdir()):
        if sub.is_dir() and any(
            _is_picture(file) for inner in sub.iterdir() if inner.is_dir() for file in inner.iterdir()
        ):
            return f": there are some in folders inside {listed([sub.name])}; move them up"
    if any(map(_is_picture, folder.iterdir())):
        return ": there are some beside where such subfolders belong"
    return ""


def _left_out(folder: Path, names: tuple[str, ...]) -> tuple[str, ...]:
    """Say what of a folder of pictures is not read: other files, and subfolders without a picture."""
    notes = []
    empty = sorted(
        sub.name for sub in folder.iterdir() if sub.is_dir() and sub.name not in names and not _is_hidden(sub)
    )
    if empty:
        verbs = "holds no picture of a known kind and is no class"
        if len(empty) > 1:
            verbs = "hold no picture of a known kind and are no classes"
        notes.append(f"{folder.name}: {listed(empty)} {verbs}")
    outside = sum(map(_is_picture, folder.iterdir()))
    if outside:
        lie = "picture lies" if outside == 1 else "pictures lie"
        left = "is" if outside == 1 else "are"
        notes.append(f"{folder.name}: {outside:,} {lie} in no class folder and {left} left out")
    others: Counter[str] = Counter()
    deeper: list[str] = []
    for name in names:
        if (folder / name).is_dir():
            for file in (folder / name).iterdir():
                if file.is_dir() and not _is_hidden(file):
                    deeper.append(f"{name}/{file.name}")
                elif not _is_picture(file):
                    others[file.name if _is_hidden(file) else file.suffix.lower() or file.name] += 1
    if others:
        kinds = ", ".join(f"{count:,} {listed([suffix])}" for suffix, count in sorted(others.items()))
        notes.append(f"{folder.name}: files that are no pictures of a known kind are left out: {kinds}")
    if deeper:
        notes.append(f"{folder.name}: folders inside class folders are not read: {listed(sorted(deeper))}")
    return tuple(notes)


READERS: dict[str, Callable[[Path], Table]] = {".parquet": read_parquet, ".npz": read_npz}
TEXT_READERS: dict[str, Callable[[Path, str], Table]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
}


def _reason(error: Exception) -> str:
    """Say why a parser failed; the words of those that quote what they read are left out, for that is
    private.
    """
    words = (str(error).splitlines() or [""])[0][:160]
    quotes_nothing = isinstance(error, OSError | pa.ArrowException | zipfile.BadZipFile | zlib.error)
    if words and quotes_nothing:
        return words
    return type(error).__name__
