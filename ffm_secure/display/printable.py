"""Make text safe to print: what came from a file, a model or another party must not move a terminal."""

from __future__ import annotations

import unicodedata

_KEPT = "\n\t"
_UNSAFE = frozenset(
    {"Cc", "Cf", "Cs", "Zl", "Zp"}
)  # controls, marks of direction, halves of a pair, line ends


def printable(text: str) -> str:
    """Return a text with every character that a terminal would obey written out; line ends and tabs stay.

    >>> printable("a\\x1b[2Jb\\u202ec\\n")
    'a\\\\x1b[2Jb\\\\u202ec\\n'
    """
    return "".join(_written_out(character) for character in text)


def _written_out(character: str) -> str:
    if character in _KEPT or unicodedata.category(character) not in _UNSAFE:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
