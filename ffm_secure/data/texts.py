"""What a task reads as text: columns checked, joined, or packed as chats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from ffm_secure.data import chat
from ffm_secure.data.columns import ANSWERED, Choices, check_text
from ffm_secure.data.table import Table
from ffm_secure.errors import DataError
from ffm_secure.registry import TASKS


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadText:
    """Which columns a task reads as text, and what they are."""

    columns: tuple[str, ...] = ()
    answered: tuple[str, ...] = ()
    is_chat: bool = False


def joined_text(
    tables: Sequence[Table], parts: Sequence[dict[str, Any]], text: tuple[str, ...], choices: Choices
) -> ReadText:
    """Check the text, and make one of it for a language model: chats packed, several columns joined line by
    line.

    The joined column is a new one such as `question+answer`.
    """
    language_model = TASKS.has(choices.kind, "language")
    if TASKS.has(choices.kind, "answers"):
        return _source_and_answer(tables, parts, text)
    if language_model and any(_holds_chats(table, text) for table in tables):
        return _packed_chats(tables, parts, text, choices)
    for table in tables:
        check_text(table, text)
    if not language_model or len(text) == 1:
        return ReadText(columns=text)
    joined = "+".join(text)
    for part in parts:
        rows = zip(*(part[name] for name in text), strict=True)
        part[joined] = ["\n".join(filter(None, texts)) for texts in rows]
    plain = tuple(name.casefold() for name in text)
    if choices.kind == "causal_lm" and plain in ANSWERED:
        answered = text
    else:
        answered = ()
    return ReadText(columns=(joined,), answered=answered)


def _source_and_answer(
    tables: Sequence[Table], parts: Sequence[dict[str, Any]], text: tuple[str, ...]
) -> ReadText:
    """Check what is read and what is to be written; what is read from several columns is joined."""
    for table in tables:
        if len(text) < 2:
            raise DataError(
                f"{table.origin}: text_column = {text[0]!r}: a model that writes needs a column to read "
                "and one to write; set text_column to both, the one to write last, as in 'question, answer'"
            )
        check_text(table, text)
    *sources, answer = text
    source = "+".join(sources)
    if len(sources) > 1:
        for part in parts:
            rows = zip(*(part[name] for name in sources), strict=True)
            part[source] = ["\n".join(filter(None, texts)) for texts in rows]
    return ReadText(columns=(source, answer), answered=(source, answer))


def _holds_chats(table: Table, text: Sequence[str]) -> bool:
    return all(any(map(chat.is_chat, table.columns[name])) for name in text)


def _packed_chats(
    tables: Sequence[Table], parts: Sequence[dict[str, Any]], text: tuple[str, ...], choices: Choices
) -> ReadText:
    name = "+".join(text)
    for part, table in zip(parts, tables, strict=True):
        columns = []
        for column in text:
            columns.append(chat.chat_column(table, column))
        chats = []
        for pieces in zip(*columns, strict=True):
            chats.append(list(chain.from_iterable(map(chat.unpack, pieces))))
        if choices.kind == "causal_lm":
            part[name] = [chat.pack(turns) for turns in chats]
        else:
            part[name] = ["\n".join(filter(None, (content for _, content in turns))) for turns in chats]
    return ReadText(columns=(name,), is_chat=choices.kind == "causal_lm")
