"""Folders written by `save_to_disk` of the `datasets` library: Arrow streams, read without that library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from ffm_secure.errors import DataError
from ffm_secure.record_codec import read_regular, require_regular

_SPLITS, _STATE = "dataset_dict.json", "state.json"
_REWRITE = "write it again with save_to_disk, or with to_parquet"


def is_saved(folder: Path) -> bool:
    """Tell whether `save_to_disk` wrote this folder."""
    return (folder / _SPLITS).is_file() or (folder / _STATE).is_file()


def saved_splits(folder: Path) -> dict[str, Path]:
    """Return the parts of a saved folder; one data set without parts counts as the train part."""
    if not (folder / _SPLITS).is_file():
        return {"train": folder}
    names = _description(folder / _SPLITS).get("splits")
    if not isinstance(names, list) or not all(_is_plain(name) for name in names):
        raise DataError(f"{folder / _SPLITS}: lists no parts; {_REWRITE}")
    saved_splits: dict[str, Path] = {}
    for name in names:
        saved_splits[name] = folder / name
    return saved_splits


def read_saved(folder: Path, most_bytes: int) -> pa.Table:
    """Read one part as an Arrow table.

    Raises:
      DataError: files are missing, damaged or too large, or the part is a selection of rows that lie
        elsewhere.
    """
    state = _description(folder / _STATE)
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise DataError(
            f"{folder}: is a selection that was not written out; call flatten_indices() and {_REWRITE}"
        )
    entries = state.get("_data_files")
    if entries == []:
        raise DataError(f"{folder}: holds no rows; a data set needs at least one")
    if isinstance(entries, list):
        names = []
        for item in entries:
            if isinstance(item, dict):
                names.append(item.get("filename"))
    else:
        names = []
    if not names or not all(_is_plain(name) for name in names):
        raise DataError(f"{folder / _STATE}: lists no data files; {_REWRITE}")
    files = []
    for name in names:
        files.append(folder / str(name))
    size = sum(file.stat().st_size for file in files if file.is_file())
    if size > most_bytes:
        raise DataError(f"{folder}: holds {size} bytes, more than the bound of {most_bytes}; split it")
    return pa.concat_tables([_stream(file) for file in files])


def _stream(file: Path) -> pa.Table:
    try:
        require_regular(file)
        with pa.OSFile(str(file), "rb") as source, pa.ipc.open_stream(source) as reader:
            table = reader.read_all()
        table.validate(full=True)  # offsets of a damaged file must not be followed blindly
    except FileNotFoundError:
        raise DataError(f"{file}: is missing; {_REWRITE}") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise DataError(f"{file}: not a readable arrow file ({reason}); {_REWRITE}") from error
    return table


def _description(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read ({str(error)[:160]}); {_REWRITE}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: is not an object; {_REWRITE}")
    return value


def _is_plain(name: object) -> bool:
    """Tell whether a name stays inside its folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name
