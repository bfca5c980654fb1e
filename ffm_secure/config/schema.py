"""Read frozen dataclasses from TOML tables: types, bounds, choices, unknown keys, all problems at once."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import tomllib
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from ffm_secure.errors import ConfigError
from ffm_secure.foreign import JsonValue, Value

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")
Hint: TypeAlias = Any  # an annotation as `typing.get_type_hints` returns it; typing has no name for it
Rules: TypeAlias = Mapping[str, Any]  # what `option` declares of a field
_LARGEST_FILE = 1 << 20


class Problems(list[str]):
    """Collect problems as lines of name, value and what to do."""

    def add(self, name: str, value: object, advice: str) -> None:
        """Note one problem."""
        self.append(f"{name} = {show(value)}: {advice}")


_KINDS: dict[type, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    list: "a list",
    dict: "a table",
}


def show(value: object) -> str:
    """Return a value as a message shows it, at most 80 characters long."""
    try:
        words = repr(value)
    except ValueError:  # Python writes no whole number of more digits than it reads
        return "a number of thousands of digits"
    if len(words) <= 80:
        return words
    return f"{words[:77]}..."


def option(
    default: Value = dataclasses.MISSING,
    *,
    help: str = "",
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Collection[Any] = (),
    pattern: str = "",
    only_for: tuple[str, ...] = (),
) -> Value:
    """Declare a field with its bounds; the same words serve the error, the documentation and the check."""
    rules = {
        "help": help,
        "minimum": minimum,
        "maximum": maximum,
        "above": above,
        "below": below,
        "choices": choices,
        "pattern": pattern,
        "only_for": only_for,
    }
    return dataclasses.field(
        default=default, metadata={key: rule for key, rule in rules.items() if rule not in (None, "", ())}
    )


def parse_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
      ConfigError: the file is missing, too large, not UTF-8 or not TOML.
    """
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise ConfigError(
                str(path), [f"file size = {path.stat().st_size} bytes: must be at most {_LARGEST_FILE}"]
            )
        with path.open("rb") as stream:
            content = stream.read(_LARGEST_FILE + 1)  # a device says that it is empty, and never ends
        if len(content) > _LARGEST_FILE:
            raise ConfigError(str(path), [f"file size: must be at most {_LARGEST_FILE} bytes"])
        return tomllib.loads(content.decode("utf-8"))
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read: {error.strerror or error}"]) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a plain ValueError
        raise ConfigError(str(path), [f"is not TOML: {str(error)[:200]}"]) from None


def load_file(kind: type[T], path: Path) -> T:
    """Read a TOML file as one checked dataclass.

    Raises:
      ConfigError: with every problem at once.
    """
    problems = Problems()
    value = read_table(kind, parse_toml(path), "", problems)
    if problems or value is None:
        raise ConfigError(str(path), list(problems))
    return value


def set_value(table: dict[str, Any], override: str, problems: Problems) -> None:
    """Apply one `section.key=value` override in place; the value is read as TOML, or as a plain string."""
    name, separator, text = override.partition("=")
    keys = []
    for key in name.split("."):
        keys.append(key.strip())
    if not separator or not all(keys):
        problems.add("--set", override, "must look like section.key=value")
        return
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    except (ValueError, RecursionError) as error:
        problems.add("--set", override, f"cannot be read: {str(error)[:200]}")
        return
    here: JsonValue = table
    for key in keys[:-1]:
        here = here.setdefault(key, {})
        if not isinstance(here, dict):
            problems.add("--set", override, f"'{key}' is not a table")
            return
    here[keys[-1]] = value


def read_table(kind: type[T], table: object, where: str, problems: Problems) -> T | None:
    """Build `kind` from a table, noting every problem under its dotted name."""
    if not isinstance(table, dict):
        problems.add(where or "run", table, "must be a table")
        return None
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    before = len(problems)
    for key in table:
        if key not in fields:
            hint = did_you_mean(str(key), fields).removeprefix("; ") or f"known keys: {', '.join(fields)}"
            problems.append(f"{_join(where, str(key))}: unknown key; {hint}")
    values = {}
    for name, field in fields.items():
        dotted = _join(where, name)
        if name in table:
            values[name] = _read_value(hints[name], table[name], dotted, field.metadata, problems)
        elif field.default is dataclasses.MISSING:
            advice = field.metadata.get("choices") or field.metadata.get("help") or "required"
            problems.append(f"{dotted}: missing; {_say_choices(advice)}")
    _check_relevance(fields, values, table, where, problems)
    if len(problems) == before:
        return kind(**values)
    return None


def _check_relevance(
    fields: Mapping[str, dataclasses.Field[Any]],
    values: Mapping[str, object],
    table: Mapping[str, object],
    where: str,
    problems: Problems,
) -> None:
    """Refuse a key that the chosen kind would ignore: a setting nobody reads is a mistake."""
    chosen = values.get("kind")
    for name, field in fields.items():
        kinds = field.metadata.get("only_for")
        if (
            kinds
            and name in table
            and chosen is not None
            and chosen not in kinds
            and values[name] != field.default
        ):
            problems.add(
                _join(where, name),
                values[name],
                f"is not read with kind = '{chosen}', only with {_say_choices(kinds)}",
            )


def _read_value(hint: Hint, value: object, name: str, rules: Rules, problems: Problems) -> Value:
    if dataclasses.is_dataclass(hint):
        return read_table(typing.cast(type, hint), value, name, problems)
    origin: Hint = typing.get_origin(hint)
    if origin is typing.Literal:
        hint = type(typing.get_args(hint)[0])  # which of the words it is, the choices say
    if origin is tuple:
        if not isinstance(value, list | tuple):
            problems.add(name, value, "must be a list")
            return ()
        inner = typing.get_args(hint)[0]
        return tuple(
            _read_value(inner, item, f"{name}[{index}]", rules, problems) for index, item in enumerate(value)
        )
    if origin is typing.Literal:
        hint = str  # the choices are checked below, with a hint at the nearest
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            problems.add(name, value, "is too large")
            return None
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        problems.add(name, value, f"must be {_said(hint)}, not {_said(type(value))}")
        return None
    _check(value, name, rules, problems)
    return value


def _said(kind: type) -> str:
    """Say what kind of value a key holds, in words of a run file."""
    return _KINDS.get(kind, f"a {kind.__name__}")


def _check(value: Value, name: str, rules: Rules, problems: Problems) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        problems.add(name, value, "must be a finite number")
        return
    if rules.get("choices") and value not in rules["choices"]:
        hint = did_you_mean(str(value), map(str, rules["choices"]))
        problems.add(name, value, f"must be {_say_choices(rules['choices'])}{hint}")
    if "minimum" in rules and value < rules["minimum"]:
        problems.add(name, value, f"must be at least {rules['minimum']}")
    if "maximum" in rules and value > rules["maximum"]:
        problems.add(name, value, f"must be at most {rules['maximum']}")
    if "above" in rules and value <= rules["above"]:
        problems.add(name, value, f"must be above {rules['above']}")
    if "below" in rules and value >= rules["below"]:
        problems.add(name, value, f"must be below {rules['below']}")
    if "pattern" in rules and not re.fullmatch(rules["pattern"], value):
        problems.add(name, value, f"must be {rules.get('help') or rules['pattern']}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a hint at the known word most like this one, whatever the case; nothing if none is alike."""
    plain = {}
    for name in known:
        plain[name.casefold()] = name
    close = difflib.get_close_matches(word.casefold(), plain, n=1)
    if close:
        return f"; did you mean {plain[close[0]]!r}?"
    return ""


def _say_choices(advice: object) -> str:
    if isinstance(advice, Collection) and not isinstance(advice, str):
        return "one of " + ", ".join(repr(choice) for choice in advice)
    return str(advice)


def _join(where: str, name: str) -> str:
    if where:
        return f"{where}.{name}"
    return name


def to_table(config: DataclassInstance) -> dict[str, Any]:
    """Turn a config into plain dicts and lists, every key written out."""
    fields = dataclasses.fields(config)
    return {field.name: _to_plain(getattr(config, field.name)) for field in fields}


def chosen_table(config: DataclassInstance) -> dict[str, Any]:
    """Turn a config into plain dicts and lists, by name, without the keys that stand at their default.

    Guarantee: a release that adds or moves a key with a default returns the same table for the same choices.
    """
    table = {}
    for field in sorted(dataclasses.fields(config), key=lambda field: field.name):
        value = getattr(config, field.name)
        if value != field.default or type(value) is not type(field.default):
            table[field.name] = _chosen(value)
    return table


def _chosen(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return chosen_table(value)
    if isinstance(value, tuple):
        return [_chosen(item) for item in value]
    return _to_plain(value)


def _to_plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_table(value)
    if isinstance(value, tuple):
        return [_to_plain(item) for item in value]
    if isinstance(value, types.MappingProxyType):
        return dict(value)
    return value


def dump_toml(config: DataclassInstance | Mapping[str, Any]) -> str:
    """Write a config as TOML: scalars first, then one table per section."""
    if isinstance(config, Mapping):
        table = config
    else:
        table = to_table(config)
    lines = []
    for key, value in table.items():
        if not isinstance(value, dict):
            lines.append(f"{key} = {_literal(value)}")
    for section, values in table.items():
        if isinstance(values, dict):
            lines += ["", f"[{section}]", *(f"{key} = {_literal(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def _literal(value: object) -> str:
    if isinstance(value, bool):
        if value:
            return "true"
        return "false"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_literal(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, int):
        return str(value)
    escaped = "".join(_escape(character) for character in str(value))
    return f'"{escaped}"'


def _escape(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    if ord(character) < 0x20 or ord(character) == 0x7F:
        return f"\\u{ord(character):04x}"
    return character
