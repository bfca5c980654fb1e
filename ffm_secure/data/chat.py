"""Chats as instruction data come: lists of messages, brought to one form that a column of text can hold."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ffm_secure.data.table import Table, count_more
from ffm_secure.errors import DataError

Turn = tuple[str, str]  # role, content

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
}
_EXPECTED = (
    'a chat is a list such as [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
)


def is_chat(value: object) -> bool:
    """Tell whether a cell holds a list of messages, or its JSON."""
    if isinstance(value, str):
        return value.lstrip().startswith("[{")
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def pack(turns: Sequence[Turn]) -> str:
    """Write turns as one text.

    >>> unpack(pack([("user", "Hello"), ("assistant", "Hi")]))
    [('user', 'Hello'), ('assistant', 'Hi')]
    """
    return json.dumps([list(turn) for turn in turns], ensure_ascii=False)


def unpack(text: str) -> list[Turn]:
    """Read what `pack` wrote."""
    return [(role, content) for role, content in json.loads(text)]


def chat_column(table: Table, name: str) -> list[str]:
    """Bring a column of chats to one form.

    Raises:
      DataError: a row holds no chat; the first is named, the others are counted.
    """
    packed: list[str] = []
    odd: list[tuple[int, str]] = []
    for row, value in enumerate(table.columns[name]):
        try:
            packed.append(pack(_turns(value)))
        except (ValueError, RecursionError) as error:
            odd.append((row, str(error)))
    if odd:
        first = count_more(f"column {name!r} holds {odd[0][1]}", len(odd), "rows")
        raise DataError(f"{table.place(odd[0][0])}: {first}; {_EXPECTED}")
    return packed


def _turns(value: object) -> list[Turn]:
    messages = value
    if isinstance(value, str):
        try:
            messages = json.loads(value)
        except ValueError:
            raise ValueError(
                "a text that is no JSON (names and words stand between double quotes there)"
            ) from None
    if not isinstance(messages, list) or not messages:
        raise ValueError("no messages")
    turns: list[Turn] = []
    for message in messages:
        turns.append(_turn(message))
    return turns


def _turn(message: object) -> Turn:
    if not isinstance(message, dict):
        raise ValueError(f"a message that is a {type(message).__name__}")
    role = message.get("role") or message.get("from")  # tables put together hold both, one of them empty
    content = message.get("content")
    if content is None:
        content = message.get("value")
    if not isinstance(role, str) or not role.strip():
        raise ValueError("a message without a role")
    plain = role.strip().casefold()
    return _ROLES.get(plain, plain), _text(content)


def _text(content: object) -> str:
    """Return the text of a message;
    parts that are no text are refused, since nothing here could learn them.
    """
    if content is None:
        return ""  # an assistant's turn that only calls a tool
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        kinds = set()
        texts = []
        for part in content:
            if isinstance(part, str):
                texts.append(part)
                continue
            kinds.add(str(part.get("type", "text")) if isinstance(part, dict) else "unknown")
            texts.append(str(part.get("text") or "") if isinstance(part, dict) else "")
        if kinds <= {"text"}:
            return "".join(texts)
        raise ValueError(f"a message with parts other than text ({', '.join(sorted(kinds - {'text'}))})")
    raise ValueError(f"a message whose content is a {type(content).__name__}")
