"""Write docs/run_file.md from the run file's schema, so that the page cannot drift from the checks."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path

from ffm_secure.config.run_file import RunConfig

HEAD = """# The run file

One TOML file describes one run. It is inert data: no code, no dotted paths. Every problem is reported at
once, with name, value, bound and a suggestion. `--set section.key=value` overrides any key and is checked
like the file. The effective file is stored with the run.

`[privacy]` and `[protection]` have no default: what protects people is said, never assumed. `[speed]`
cannot change epsilon. `[document]` stands in the report: who answers for the run, what it is for, whom to
ask, on which legal basis. It may change at any time: `run` on a finished run writes its report anew.
"""


def rows(kind: type, where: str = "") -> Iterator[str]:
    """Yield one table row for every key below `kind`."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name, hint, rules = f"{where}{field.name}", hints[field.name], field.metadata
        if dataclasses.is_dataclass(hint):
            yield from rows(typing.cast(type, hint), f"{name}.")
            continue
        bounds = [
            f"{word} {rules[key]:g}"
            for key, word in (
                ("minimum", "at least"),
                ("above", "above"),
                ("maximum", "at most"),
                ("below", "below"),
            )
            if key in rules
        ]
        if "choices" in rules:
            bounds.append(" \\| ".join(f"`{choice}`" for choice in rules["choices"]))
        if "only_for" in rules:
            bounds.append("only with kind " + ", ".join(rules["only_for"]))
        default = (
            "required"
            if field.default is dataclasses.MISSING
            else f"`{list(field.default) if isinstance(field.default, tuple) else field.default}`"
        )
        origin = typing.get_origin(hint)
        kind_name = "list" if origin is tuple else "str" if origin is typing.Literal else hint.__name__
        yield f"| `{name}` | {kind_name} | {default} | {', '.join(bounds)} | {rules.get('help', '')} |"


def page() -> str:
    """Return the whole page."""
    return (
        HEAD
        + "\n| key | type | default | bounds | meaning |\n|---|---|---|---|---|\n"
        + "\n".join(rows(RunConfig))
        + "\n"
    )


if __name__ == "__main__":
    Path(__file__).with_name("run_file.md").write_text(page())
