"""Shape docstrings for the site: each promise becomes a paragraph of its own, each example a block of code.

A docstring here is plain text: a first line, prose, then lines that begin with `Guarantee:`, `Assumes:`,
`Raises:` or `Source:`. Markdown would run these lines together and take `>>>` for a quotation.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

PROMISE = re.compile(r"^(Guarantee|Assumes|Raises|Returns|Source|Shapes?|Units?):", re.MULTILINE)
FENCE = "```"


def as_markdown(text: str) -> str:
    """Return a docstring as Markdown that reads as the source does."""
    lines: list[str] = []
    in_example = False
    for line in textwrap.dedent(text).splitlines():
        starts = line.startswith(">>>")
        if starts and not in_example:
            lines += ["", FENCE + "pycon"]
            in_example = True
        elif in_example and not line.strip():
            lines += [FENCE, ""]
            in_example = False
        promise = PROMISE.match(line)
        if promise and not in_example:
            lines += ["", f"**{promise[1]}.**" + line[promise.end() :]]
        elif line.startswith("- ") and not in_example and lines and not lines[-1].startswith(("- ", "  ")):
            lines += ["", line]
        else:
            lines.append(line)
    if in_example:
        lines.append(FENCE)
    return "\n".join(lines)


class Promises(griffe.Extension):
    """Give every docstring of the reference the form that `as_markdown` returns."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Rewrite every docstring of a package, once all of it was read."""
        waiting: list[griffe.Object] = [pkg]
        while waiting:
            place = waiting.pop()
            if place.docstring is not None:
                place.docstring.value = as_markdown(place.docstring.value)
            members = place.members.values()
            waiting += [
                member for member in members if isinstance(member, griffe.Object)
            ]  # an alias is read elsewhere
