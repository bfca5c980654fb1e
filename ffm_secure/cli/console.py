"""How commands speak: lines for people, one JSON object for machines, one clear message for every failure."""

from __future__ import annotations

import dataclasses
import json as json_module
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from defenses.errors import BudgetExceeded, DefenseError, ParameterError, TamperedError
from ffm_secure.errors import BudgetExhausted, ConfigError, FfmError, StoreError

console = Console(highlight=False, soft_wrap=True, markup=False)


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn the errors of the defences into the command line's own, each with its exit code."""
    try:
        yield
    except TamperedError:
        raise StoreError(
            "the ledger is not authentic: a row was changed, removed or cut off; do not train on this data until this is explained"
        ) from None
    except BudgetExceeded as error:
        raise BudgetExhausted(str(error)) from None
    except ParameterError as error:
        raise ConfigError("refused", str(error).split("; ")) from None
    except DefenseError as error:
        raise FfmError(str(error)) from None


def say(value: Any, lines: list[str], *, json: bool, quiet: bool = False) -> None:
    """Print the value as JSON, or the lines unless asked to be quiet."""
    if json:
        print_json(value)
    elif not quiet:
        print_lines(lines)


def print_lines(lines: list[str]) -> None:
    """Print lines as they are, wrapped by nobody."""
    for line in lines:
        console.print(line)


def print_json(value: Any) -> None:
    """Print one JSON object; infinity becomes a word, because JSON has none."""
    sys.stdout.write(json_module.dumps(_plain(value), allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "infinity"
    if isinstance(value, Path):
        return str(value)
    return value


def number(value: Any) -> str:
    """Return a value as people read it."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
