"""Turn a run's summary into report.json and report.html: pure, byte-stable, and readable back without loss."""

from __future__ import annotations

import json
import math
import os
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ffm_secure.errors import StoreError
from ffm_secure.records import RunSummary
from ffm_secure.report.page import render_html

__all__ = ["from_json", "render_html", "render_json", "write"]

FORMAT = 1
_WORDS = {"infinity": math.inf, "-infinity": -math.inf, "nan": math.nan}


@cache
def _hints(record: Any) -> dict[str, Any]:
    return get_type_hints(record)


def render_json(summary: RunSummary) -> str:
    """Write a summary as JSON text that `report.schema.json` describes.

    Guarantee: the same summary gives the same bytes; `from_json` gives the summary back. Infinity and not-a-number
    are the strings "infinity", "-infinity" and "nan". Keys of mappings are sorted; fields keep their order.
    Raises: StoreError where a value does not have its declared type.
    """
    return (
        json.dumps(_encode(summary, RunSummary, "report"), indent=1, ensure_ascii=True, allow_nan=False)
        + "\n"
    )


def from_json(text: str) -> RunSummary:
    """Read what `render_json` wrote.

    Guarantee: strict; a missing, unknown, doubled or mistyped field is refused with its path. A field with a default
    may be missing: it came after the report was written.
    Raises: StoreError
    """
    try:
        tree = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise StoreError(
            f"report.json cannot be read: {error}; write it again with `ffm-secure report`"
        ) from None
    _require_format(tree)
    summary: RunSummary = _decode(tree, RunSummary, "report")
    return summary


def write(summary: RunSummary, folder: Path) -> tuple[Path, Path]:
    """Write report.html and report.json into `folder` and return their paths.

    Guarantee: a reader, or a crash at any moment, sees the old file or the new one, never a part of one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page, data = folder / "report.html", folder / "report.json"
    contents = {data: render_json(summary), page: render_html(summary)}
    for path, text in contents.items():
        _replace(path, text.encode("utf-8"))
    return page, data


def _replace(path: Path, content: bytes) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return found


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def _require_format(tree: Any) -> None:
    if not isinstance(tree, dict):
        raise StoreError("report: not an object; this is not a report of ffm-secure")
    if type(tree.get("format")) is not int or tree["format"] != FORMAT:
        raise StoreError(
            f"report.format = {_short(tree.get('format'))}: this version reads format {FORMAT} only"
        )


def _short(value: Any) -> str:
    words = repr(value)
    return words if len(words) <= 60 else f"{words[:57]}..."


def _wrong(at: str, value: Any, wanted: str) -> StoreError:
    return StoreError(f"{at} = {_short(value)}: must be {wanted}")


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _encode(value: Any, hint: Any, at: str) -> Any:
    if _is_union(hint):
        inner = next(arg for arg in get_args(hint) if arg is not type(None))
        return None if value is None else _encode(value, inner, at)
    if is_dataclass(hint):
        if not isinstance(value, hint):  # type: ignore[arg-type]
            raise _wrong(at, value, f"a {getattr(hint, '__name__', hint)}")
        inner_hints = _hints(hint)  # type: ignore[arg-type]
        return {
            f.name: _encode(getattr(value, f.name), inner_hints[f.name], f"{at}.{f.name}")
            for f in fields(hint)
        }
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is tuple:
        return [_encode(item, arguments[0], f"{at}[{place}]") for place, item in enumerate(value)]
    if origin is Mapping:
        return {str(key): _encode(value[key], arguments[1], f"{at}.{key}") for key in sorted(value)}
    if hint is Any:
        return _encode_any(value, at)
    return _encode_scalar(value, hint, at)


def _encode_scalar(value: Any, hint: Any, at: str) -> Any:
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise _wrong(at, value, f"one of {', '.join(map(repr, get_args(hint)))}")
        return str(value)
    if hint is float and isinstance(value, Real) and not isinstance(value, bool):
        return _finite_or_word(float(value))
    if hint is int and isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if hint in (str, bool) and isinstance(value, hint):
        return value
    raise _wrong(
        at, value, {float: "a number", int: "a whole number", str: "text", bool: "true or false"}[hint]
    )


def _finite_or_word(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "nan" if math.isnan(value) else "infinity" if value > 0 else "-infinity"


def _encode_any(value: Any, at: str) -> Any:
    """Encode a value of the run file; dates and paths become text, an infinite number becomes its word."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return _finite_or_word(float(value))
    if isinstance(value, Mapping):
        return {str(key): _encode_any(value[key], f"{at}.{key}") for key in sorted(value, key=str)}
    if isinstance(value, (list, tuple)):
        return [_encode_any(item, f"{at}[{place}]") for place, item in enumerate(value)]
    return str(value)


def _decode(value: Any, hint: Any, at: str) -> Any:
    if _is_union(hint):
        inner = next(arg for arg in get_args(hint) if arg is not type(None))
        return None if value is None else _decode(value, inner, at)
    if is_dataclass(hint):
        return _decode_record(value, hint, at)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is tuple:
        if not isinstance(value, list):
            raise _wrong(at, value, "a list")
        return tuple(_decode(item, arguments[0], f"{at}[{place}]") for place, item in enumerate(value))
    if origin is Mapping:
        if not isinstance(value, dict):
            raise _wrong(at, value, "an object")
        return {
            _decode_key(key, arguments[0], at): _decode(item, arguments[1], f"{at}.{key}")
            for key, item in value.items()
        }
    return value if hint is Any else _decode_scalar(value, hint, at)


def _decode_record(value: Any, hint: Any, at: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong(at, value, "an object")
    names = [f.name for f in fields(hint)]
    if unknown := sorted(set(value) - set(names)):
        raise StoreError(f"{at}.{unknown[0][:60]}: unknown field; known are {', '.join(names)}")
    needed = [f.name for f in fields(hint) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in needed if name not in value]:
        raise StoreError(f"{at}.{missing[0]}: missing; write the report again with `ffm-secure report`")
    inner = _hints(hint)
    return hint(
        **{name: _decode(value[name], inner[name], f"{at}.{name}") for name in names if name in value}
    )


def _decode_key(key: str, hint: Any, at: str) -> Any:
    if hint is int:
        if not (len(key) <= 18 and key.isascii() and key.isdigit() and str(int(key)) == key):
            raise _wrong(at, key, "a whole number as key")
        return int(key)
    return _decode_scalar(key, hint, at)


def _decode_scalar(value: Any, hint: Any, at: str) -> Any:
    if get_origin(hint) is Literal:
        if not isinstance(value, str) or value not in get_args(hint):
            raise _wrong(at, value, f"one of {', '.join(map(repr, get_args(hint)))}")
        return value
    if hint is float and isinstance(value, str) and value in _WORDS:
        return _WORDS[value]
    if hint is float and type(value) in (int, float):
        return _finite_number(value, at)
    if hint in (int, str, bool) and type(value) is hint:
        return value
    raise _wrong(
        at, value, {float: "a number", int: "a whole number", str: "text", bool: "true or false"}[hint]
    )


def _finite_number(value: float, at: str) -> float:
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):  # 1e999 reads as infinity; infinity has a word of its own
        raise _wrong(at, value, 'a finite number, or "infinity"')
    return found
