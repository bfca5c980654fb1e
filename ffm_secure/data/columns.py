"""What the columns of a table mean: which hold the text, the label, the picture or a chat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ffm_secure.data.table import Table, count_more, listed
from ffm_secure.errors import DataError
from ffm_secure.registry import TASKS

Kind: TypeAlias = str  # one of the tasks of the registry

TEXT_PAIRS = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("text_a", "text_b"),
    ("question", "sentence"),
)
TEXT_NAMES = ("text", "sentence", "note", "content", "document", "review", "question")
ANSWERED = (  # the last column is what a model is asked to say; the others are what it is told
    ("instruction", "input", "output"),
    ("instruction", "output"),
    ("instruction", "context", "response"),
    ("context", "question", "answer"),
    ("question", "answer"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "response"),
    ("question", "response"),
    ("query", "answer"),
    ("query", "response"),
    ("inputs", "targets"),
)
SOURCES = (  # what a model reads, and what it is to write
    ("source", "target"),
    ("input_text", "target_text"),
    ("input", "output"),
    ("document", "summary"),
    ("article", "summary"),
    ("article", "highlights"),
    ("dialogue", "summary"),
    ("text", "summary"),
)
CHAT_NAMES = ("messages", "conversations", "conversation", "chat", "dialogue", "dialog")
CORPUS_GROUPS = (
    ("text",),
    *((name,) for name in CHAT_NAMES),
    *ANSWERED,
    ("sentence",),
    ("note",),
    ("content",),
    ("document",),
)
LABEL_NAMES = ("label", "labels", "target", "class")
IMAGE_NAMES = ("image", "images", "img", "pixels", "file_name", "filename")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What the caller fixed about the columns; empty means: guess by the rules of `docs/data.md`."""

    kind: Kind
    text: tuple[str, ...] = ()
    label: str = ""
    image: str = ""
    owner: str = ""  # names the data owners; read by a natural split and by cleaning
    person: str = ""  # names the people behind rows
    image_size: int | None = None
    class_names: tuple[str, ...] = ()
    clean: tuple[str, ...] = ()


def label_column(table: Table, choices: Choices) -> str | None:
    """Return the column of the labels, None for a task that has none.

    Raises:
      DataError: no column is known to hold labels.
    """
    if not choices.kind.endswith("classification"):
        return None
    return _one_of(table, choices.label, LABEL_NAMES, "label", "label_column")


def image_column_name(table: Table, choices: Choices) -> str | None:
    """Return the column of the pictures, None for a task that has none.

    Raises:
      DataError: no column is known to hold pictures.
    """
    if not choices.kind.startswith("image"):
        return None
    return _one_of(table, choices.image, IMAGE_NAMES, "picture", "image_column")


def _one_of(table: Table, chosen: str, names: Sequence[str], what: str, option: str) -> str:
    if chosen:
        return chosen
    present = _by_plain_name(table)
    name = next((present[name] for name in names if name in present), None)
    if name is None:
        raise DataError(
            f"{table.origin}: no {what} column among {listed(table.columns)}; set {option} to one of them"
        )
    return name


def _by_plain_name(table: Table) -> dict[str, str]:
    """Find columns whatever the case of their names; an exact name wins."""
    return {
        **{name.casefold(): name for name in reversed(table.columns)},
        **{name: name for name in table.columns},
    }


def text_columns(table: Table, choices: Choices) -> tuple[str, ...]:
    """Return the columns of the text, in the order they are read.

    Raises:
      DataError: no column is known to hold text.
    """
    if choices.text:
        single = choices.text[0]
        if len(choices.text) == 1 and single not in table.columns and "," in single:
            return tuple(part.strip() for part in single.split(","))
        return choices.text
    singles = tuple((name,) for name in TEXT_NAMES)
    if choices.kind == "text_classification":
        candidates = (*TEXT_PAIRS, *singles)
    elif TASKS.has(choices.kind, "answers"):
        return _source_and_answer(table)
    else:
        candidates = (*CORPUS_GROUPS, *TEXT_PAIRS, *singles)
    present = _by_plain_name(table)
    for names in candidates:
        if all(name in present for name in names):
            return tuple(present[name] for name in names)
    sides = " and ".join(present[name] for name in ("chosen", "rejected") if name in present)
    if sides:
        raise DataError(
            f"{table.origin}: holds preferences ({sides}), which no task learns from; set text_column to the "
            f"side that is to be learned, {present.get('chosen', sides)!r}"
        )
    raise DataError(
        f"{table.origin}: no text column among {listed(table.columns)}; set text_column to one of them"
    )


def _source_and_answer(table: Table) -> tuple[str, ...]:
    """Return the columns a model reads and, last, the one it is to write."""
    present = _by_plain_name(table)
    for names in (*ANSWERED, *SOURCES):
        if all(name in present for name in names):
            return tuple(present[name] for name in names)
    raise DataError(
        f"{table.origin}: no column to read and column to write among {listed(table.columns)}; set "
        "text_column to both, the one to write last, as in 'question, answer'"
    )


def require_columns(table: Table, names: Sequence[str]) -> None:
    """Refuse a table without one of the columns."""
    for name in names:
        if name not in table.columns:
            raise DataError(f"{table.origin}: no column {name!r}; there are {listed(table.columns)}")


def check_text(table: Table, names: Sequence[str]) -> None:
    """Refuse what is not text; the first row is named and the others are counted."""
    for name in names:
        values = table.columns[name]
        bad = [row for row, value in enumerate(values) if not isinstance(value, str)]
        if bad:
            value = values[bad[0]]
            shown = "nothing"
            if value is not None:
                shown = type(value).__name__
            first = f"column {name!r} holds {shown}, not text"
            chat = isinstance(value, list) and bool(value) and isinstance(value[0], dict)
            advice = "fill or remove the row, or name a column of texts"
            if isinstance(value, dict) and {*value} & {"en", "de", "fr", "es", "zh"}:
                advice = "write each language into a column of its own"
            if chat:
                advice = "chats are read by causal_lm and masked_lm"
            raise DataError(f"{table.place(bad[0])}: {count_more(first, len(bad), 'rows')}; {advice}")
