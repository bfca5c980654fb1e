"""The one codec of records: a frozen dataclass to JSON values, lines and canonical bytes, and strictly back.

A field added later with a default is filled in when an older record is read; an unknown field is refused by
name, as
is a value of another type than its field declares. What JSON cannot say becomes text: infinities and not-a-
number
are words, bytes are hexadecimal digits.
"""

from __future__ import annotations

import datetime
import errno
import json
import math
import os
import stat
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, Union, get_args, get_origin

from ffm_secure.errors import RecordError
from ffm_secure.foreign import JsonValue, Value

LARGEST_JSON = 64 << 20  # bytes
LARGEST_FILE = 1 << 30  # bytes of a file that is read whole and is no table, picture or model
FORMAT = 1  # of lines and bytes; a record without it is of format 1
Plain: TypeAlias = "bool | int | float | str | list[Plain] | dict[str, Plain] | None"
Hint: TypeAlias = Any  # an annotation as `typing.get_type_hints` returns it; typing has no name for it
T = TypeVar("T")

_WORDS = {"infinity": math.inf, "-infinity": -math.inf, "nan": math.nan}
_WANTED: dict[Hint, str] = {
    float: "a number",
    int: "a whole number",
    str: "text",
    bool: "true or false",
    bytes: "an even number of hexadecimal digits in small letters",
}
_LONGEST_KEY = 18  # digits of a whole number that is the key of a mapping


def encode(record: object, where: str = "") -> dict[str, Plain]:
    """Turn a record into plain values; fields keep their order, keys of mappings are sorted.

    `where` begins every path in an error; without it that is the name of the record's type.

    Guarantee: `decode` gives an equal record back.

    Raises:
      RecordError: a value does not have the type its field declares.
    """
    return _encode_record(record, type(record), where or type(record).__name__)


def decode(kind: type[T], plain: object, where: str) -> T:
    """Build a record of `kind` from plain values; `where` begins every path in an error.

    Guarantee: strict. A field with a default may be missing: it came after the record was written.

    Raises:
      RecordError: a field is missing, unknown or of another type; the message has its path.
    """
    record: T = _decode_record(plain, kind, where)
    return record


def to_line(record: object) -> str:
    """Write a record as one line of JSON in its canonical form, without the line's end."""
    plain = encode(record)
    return _canonical({"format": FORMAT, **plain})


def from_json(kind: type[T], text: str | bytes, where: str) -> T:
    """Read a record from JSON text: a line, or a whole file.

    Raises:
      RecordError: it is not JSON, of another format, or does not fit `kind`.
    """
    return _read(kind, parse_json(text, where), where)


def canonical_bytes(record: object) -> bytes:
    """Return the one byte form of a record: sorted keys, no spaces, ASCII.

    Guarantee: equal records have equal bytes, on every machine.
    """
    return to_line(record).encode("ascii")


def from_bytes(kind: type[T], data: bytes, where: str) -> T:
    """Read a record from its canonical bytes.

    Guarantee: bytes that hold a record in any other spelling are refused, so a digest of the bytes is
    one of the record.

    Raises:
      RecordError: they are not canonical, of another format, or do not fit `kind`.
    """
    plain = parse_json(data, where)
    if _canonical(plain).encode("ascii") != data:
        raise RecordError(f"{where}: is not in canonical form")
    return _read(kind, plain, where)


def to_plain(value: object, where: str = "value") -> Plain:
    """Turn a table of no declared type, and the records inside it, into plain values in their order.

    Dates and paths become text.

    Raises:
      RecordError: it holds something that has no plain form.
    """
    return _encode_free(value, where)


def parse_json(text: str | bytes, where: str) -> Plain:
    """Parse JSON as its standard has it: no key twice in an object, no `NaN` or `Infinity`.

    Raises:
      RecordError: it is anything else.
    """
    try:
        plain: Plain = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested"
        if not isinstance(error, RecursionError):
            reason = str(error)
        raise RecordError(f"{where}: is not JSON: {reason[:200]}") from None
    return plain


def read_json(path: Path) -> JsonValue:
    """Read a small JSON file that somebody else may have written.

    Raises:
      OSError: it cannot be read, is no regular file, or too large.
      ValueError: it is no JSON, or nested too deeply.
    """
    try:
        return json.loads(read_regular(path, LARGEST_JSON))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_regular(path: Path, most: int = LARGEST_FILE) -> bytes:
    """Read a whole file.

    Guarantee: returns for a pipe, too, and never reads more than `most` bytes.

    Raises:
      OSError: it cannot be read, is no regular file, or is larger; `strerror` says which.
    """
    require_regular(path)  # of a folder no file object is made, and its descriptor would stay open
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
        status = os.fstat(stream.fileno())
        _require_mode(status.st_mode, path)
        if status.st_size > most:
            raise OSError(errno.EINVAL, f"is larger than {most:,} bytes, as no such file is", str(path))
        return stream.read(most)


def require_regular(path: Path) -> None:
    """Refuse what a library must not open by its name.

    Raises:
      OSError: it is not there, or no regular file.
    """
    _require_mode(path.stat().st_mode, path)


def _require_mode(mode: int, path: Path) -> None:
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "is no regular file", str(path))


def _read(kind: type[T], plain: Plain, where: str) -> T:
    if not isinstance(plain, dict):
        raise RecordError(f"{where}: must be an object")
    own = "format" in {field.name for field in _fields(typing.cast(type, kind))}
    version = plain.get("format", None if own else FORMAT)
    if type(version) is not int or version != FORMAT:
        raise RecordError(f"{where}.format = {_short(version)}: this version reads format {FORMAT} only")
    if own:
        return decode(kind, plain, where)
    return decode(kind, {name: value for name, value in plain.items() if name != "format"}, where)


def _canonical(plain: Plain) -> str:
    try:
        return json.dumps(plain, separators=(",", ":"), sort_keys=True, allow_nan=False)
    except ValueError:
        raise RecordError("a number beyond the range of a float") from None


def _unique_keys(pairs: list[tuple[str, Plain]]) -> dict[str, Plain]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return table


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is not a number of JSON")


@cache
def _fields(kind: type) -> tuple[Field[Any], ...]:
    if not is_dataclass(kind):
        raise TypeError(f"{kind.__name__} is not a dataclass")
    return tuple(field for field in fields(kind) if field.init)


@cache
def _hints(kind: type) -> dict[str, Hint]:
    return typing.get_type_hints(kind)


def _short(value: object) -> str:
    words = ascii(value)
    if len(words) <= 60:
        return words
    return f"{words[:57]}..."


def _wrong(where: str, value: object, wanted: str) -> RecordError:
    return RecordError(f"{where} = {_short(value)}: must be {wanted}")


def _choices(hint: Hint) -> str:
    return f"one of {', '.join(map(repr, get_args(hint)))}"


def _is_union(hint: Hint) -> bool:
    origin: Hint = get_origin(hint)
    return origin in (Union, types.UnionType)


def _without_none(hint: Hint) -> Hint:
    """Return what an optional hint may hold beside None."""
    inner = []
    for argument in get_args(hint):
        if argument is not type(None):
            inner.append(argument)
    if len(inner) != 1:
        raise TypeError(f"{hint}: a record holds one type, or one type and None")
    return inner[0]


def _item_hints(hint: Hint, count: int, where: str) -> Sequence[Hint]:
    """Return the hint of each of `count` items of a tuple."""
    arguments = get_args(hint)
    if arguments[-1] is Ellipsis:
        return [arguments[0]] * count
    if len(arguments) != count:
        raise RecordError(f"{where}: must be a list of {len(arguments)}, not of {count}")
    return arguments


def _encode_value(value: object, hint: Hint, where: str) -> Plain:
    origin: Hint = get_origin(hint)
    if _is_union(hint):
        if value is None:
            return None
        return _encode_value(value, _without_none(hint), where)
    if is_dataclass(hint):
        return _encode_record(value, typing.cast(type, hint), where)
    if origin is tuple:
        return _encode_items(value, hint, where)
    if origin is Mapping:
        return _encode_mapping(value, hint, where)
    if hint is Any:
        return _sorted(_encode_free(value, where))
    return _encode_scalar(value, hint, where)


def _encode_record(value: object, kind: type, where: str) -> dict[str, Plain]:
    declared, hints = _fields(kind), _hints(kind)
    if type(value) is not kind:
        raise _wrong(where, type(value).__name__, f"a {kind.__name__}")
    plain: dict[str, Plain] = {}
    for field in declared:
        inner = getattr(value, field.name)
        plain[field.name] = _encode_value(inner, hints[field.name], f"{where}.{field.name}")
    return plain


def _encode_items(value: object, hint: Hint, where: str) -> list[Plain]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise _wrong(where, value, "a sequence")
    hints = _item_hints(hint, len(value), where)
    return [_encode_value(value[place], hints[place], f"{where}[{place}]") for place in range(len(value))]


def _encode_mapping(value: object, hint: Hint, where: str) -> dict[str, Plain]:
    if not isinstance(value, Mapping):
        raise _wrong(where, value, "a mapping")
    key_hint, item_hint = get_args(hint)
    plain: dict[str, Plain] = {}
    for key in sorted(value):
        word = str(_encode_value(key, key_hint, f"{where}, a key"))
        plain[word] = _encode_value(value[key], item_hint, f"{where}.{word}")
    return plain


def _encode_scalar(value: object, hint: Hint, where: str) -> Plain:
    origin: Hint = get_origin(hint)
    if origin is Literal:
        if not _is_choice(value, hint):
            raise _wrong(where, value, _choices(hint))
        return typing.cast(Plain, value)
    if hint is float and isinstance(value, Real) and not isinstance(value, bool):
        return _finite_or_word(float(value))
    if hint is int and isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if hint is bytes and isinstance(value, bytes):
        return value.hex()
    if hint is str and isinstance(value, str):
        return str(value)
    if hint is bool and isinstance(value, bool):
        return value
    raise _wrong(where, type(value).__name__ if hint is bytes else value, _wanted(hint))


def _is_choice(value: object, hint: Hint) -> bool:
    return any(type(value) is type(choice) and value == choice for choice in get_args(hint))


def _wanted(hint: Hint) -> str:
    if hint not in _WANTED:
        raise TypeError(f"{hint}: no type of a record's field")
    return _WANTED[hint]


def _finite_or_word(value: float) -> float | str:
    if math.isfinite(value):
        return value
    if math.isnan(value):
        return "nan"
    if value > 0:
        return "infinity"
    return "-infinity"


def _encode_free(value: object, where: str) -> Plain:
    """Encode a value no type is declared for, with everything inside it."""
    if value is None or isinstance(value, bool | str):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return _encode_record(value, type(value), where)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return _finite_or_word(float(value))
    if isinstance(value, Mapping):
        return {str(key): _encode_free(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode_free(item, f"{where}[{place}]") for place, item in enumerate(value)]
    if isinstance(value, datetime.date | datetime.time | Path):
        return str(value)
    raise _wrong(where, type(value).__name__, "a number, a text, a list, a table or a record")


def _sorted(plain: Plain) -> Plain:
    if isinstance(plain, dict):
        return {key: _sorted(plain[key]) for key in sorted(plain)}
    if isinstance(plain, list):
        return [_sorted(item) for item in plain]
    return plain


def _decode_value(value: object, hint: Hint, where: str) -> Value:
    origin: Hint = get_origin(hint)
    if _is_union(hint):
        if value is None:
            return None
        return _decode_value(value, _without_none(hint), where)
    if is_dataclass(hint):
        return _decode_record(value, typing.cast(type, hint), where)
    if origin is tuple:
        return _decode_items(value, hint, where)
    if origin is Mapping:
        return _decode_mapping(value, hint, where)
    if hint is Any:
        return value
    return _decode_scalar(value, hint, where)


def _decode_record(value: object, kind: type, where: str) -> Value:
    declared = _fields(kind)
    if not isinstance(value, dict):
        raise _wrong(where, value, "an object")
    names = []
    for field in declared:
        names.append(field.name)
    if unknown := sorted(set(value) - set(names)):
        name = ascii(unknown[0][:60])[1:-1]
        raise RecordError(f"{where}.{name}: unknown field; known are {', '.join(names)}")
    for field in declared:
        needed = field.default is MISSING and field.default_factory is MISSING
        if needed and field.name not in value:
            raise RecordError(f"{where}.{field.name}: missing")
    hints = _hints(kind)
    values: dict[str, Any] = {}
    for name in names:
        if name in value:
            values[name] = _decode_value(value[name], hints[name], f"{where}.{name}")
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:  # of the record's own checks
        raise RecordError(f"{where}: {error}") from None


def _decode_items(value: object, hint: Hint, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _wrong(where, value, "a list")
    hints = _item_hints(hint, len(value), where)
    items = []
    for place in range(len(value)):
        items.append(_decode_value(value[place], hints[place], f"{where}[{place}]"))
    return tuple(items)


def _decode_mapping(value: object, hint: Hint, where: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise _wrong(where, value, "an object")
    key_hint, item_hint = get_args(hint)
    table: dict[Any, Any] = {}
    for key, item in value.items():
        name = ascii(key[:60])[1:-1]
        table[_decode_key(key, key_hint, where)] = _decode_value(item, item_hint, f"{where}.{name}")
    return table


def _decode_key(key: str, hint: Hint, where: str) -> Value:
    if hint is not int:
        return _decode_scalar(key, hint, f"{where}, a key")
    digits = key.removeprefix("-")
    if not (len(digits) <= _LONGEST_KEY and digits.isascii() and digits.isdigit() and str(int(key)) == key):
        raise _wrong(where, key, "a whole number as key")
    return int(key)


def _decode_scalar(value: object, hint: Hint, where: str) -> Value:
    origin: Hint = get_origin(hint)
    if origin is Literal:
        if not _is_choice(value, hint):
            raise _wrong(where, value, _choices(hint))
        return value
    if hint is float and isinstance(value, str) and value in _WORDS:
        return _WORDS[value]
    if hint is float and (type(value) is int or type(value) is float):
        return _finite_number(value, where)
    if hint is bytes:
        return _decode_bytes(value, where)
    if hint in (int, str, bool) and type(value) is hint:
        return value
    raise _wrong(where, value, _wanted(hint))


def _finite_number(value: float, where: str) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):  # 1e999 reads as infinity; infinity has a word of its own
        raise _wrong(where, value, 'a finite number, or "infinity"')
    return number


def _decode_bytes(value: object, where: str) -> bytes:
    """Read bytes; what they are shows in no message, for it may be a secret."""
    try:
        content = None
        if isinstance(value, str):
            content = bytes.fromhex(value)
    except ValueError:
        content = None
    if content is None or content.hex() != value:
        raise RecordError(f"{where}: must be {_WANTED[bytes]}")
    return content
