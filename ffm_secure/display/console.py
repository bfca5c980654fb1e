"""How commands speak: lines for people, one JSON object for machines, one clear message for every failure."""

from __future__ import annotations

import errno
import json as json_module
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.text import Text

from defenses.errors import BudgetExceeded, DefenseError, ParameterError, TamperedError
from ffm_secure import record_codec
from ffm_secure.display.printable import printable
from ffm_secure.errors import BudgetExhausted, ConfigError, FfmError, StoreError
from ffm_secure.foreign import LibraryObject


class SafeConsole(Console):
    """Print every text, in a line or in a table's cell, with what a terminal would obey written out."""

    def render_str(self, text: str, **options: LibraryObject) -> Text:
        """Turn a text into what is printed."""
        return super().render_str(printable(text), **options)


OF_THE_DISK: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS})
_MEND: Final = "free space or mend the disk, then run the same command again: what was finished is not lost"
console = SafeConsole(highlight=False, soft_wrap=True, markup=False)


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn the errors of the defences into the command line's own, each with its exit code."""
    try:
        yield
    except TamperedError:
        raise StoreError(
            "the ledger is not authentic: a row was changed, removed or cut off; do not train on "
            "this data until this is explained"
        ) from None
    except BudgetExceeded as error:
        raise BudgetExhausted(str(error)) from None
    except ParameterError as error:
        raise ConfigError("refused", str(error).split("; ")) from None
    except DefenseError as error:
        raise FfmError(str(error)) from None
    except sqlite3.OperationalError as error:
        raise StoreError(f"a ledger cannot be read or written ({error}); {_MEND}") from None
    except OSError as error:
        if error.errno not in OF_THE_DISK:
            raise
        raise StoreError(f"{error.filename or 'a file'}: {error.strerror}; {_MEND}") from None


def say(value: object, lines: list[str], *, json: bool, quiet: bool = False) -> None:
    """Print the value as JSON, or the lines unless asked to be quiet."""
    if json:
        print_json(value)
    elif not quiet:
        print_lines(lines)


def print_lines(lines: list[str]) -> None:
    """Print lines as they are, wrapped by nobody."""
    for line in lines:
        console.print(line)


def print_json(value: object) -> None:
    """Print one JSON object; infinity becomes a word, because JSON has none."""
    sys.stdout.write(json_module.dumps(record_codec.to_plain(value), allow_nan=False) + "\n")


def number(value: object) -> str:
    """Return a value as people read it.

    >>> number(1e-05), number([{"q": 0.01, "steps": 1000}])
    ('1e-5', 'q 0.01, steps 1000')
    """
    if isinstance(value, float):
        return f"{value:.6g}".replace("e-0", "e-").replace("e+0", "e+")
    if isinstance(value, list | tuple):
        return "; ".join(map(number, value))
    if isinstance(value, dict):
        return ", ".join(f"{name} {number(item)}" for name, item in value.items())
    return str(value)
