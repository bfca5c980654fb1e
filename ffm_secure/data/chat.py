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
    "ai": "assistant",
    "system prompt": "system",
    "chatgpt": "assistant",
}
_ROLE_NAMES, _WORD_NAMES = frozenset(("role", "from")), frozenset(("content", "value"))
EXPECTED = (
    'a chat is a list such as [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
)


def is_chat(value: object) -> bool:
    """Tell whether a cell holds a list of messages, or its JSON."""
    if isinstance(value, str):
        return value.lstrip().startswith("[{")
    if isinstance(value, dict):
        return _is_two_lists(value)
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _is_two_lists(value: dict[str, object]) -> bool:
    """Tell whether a chat is kept as a list of roles beside a list of words."""
    names = _ROLE_NAMES & value.keys(), _WORD_NAMES & value.keys()
    return all(names) and all(isinstance(value[name], list) for group in names for name in group)


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
            packed.append(pack(turns_of(value)))
        except (ValueError, RecursionError) as error:
            odd.append((row, str(error)))
    if odd:
        first = count_more(f"column {name!r} holds {odd[0][1]}", len(odd), "rows")
        raise DataError(f"{table.place(odd[0][0])}: {first}; {EXPECTED}")
    return packed


def turns_of(value: object) -> list[Turn]:
    """Read a list of messages, or its JSON.

    Raises:
      ValueError: says what the value is instead.
    """
    messages = value
    if isinstance(value, str):
        try:
            messages = json.loads(value)
        except ValueError:
            raise ValueError(
                "a text that is no JSON (names and words stand between double quotes there)"
            ) from None
    if isinstance(messages, dict) and _is_two_lists(messages):
        roles, words = (messages[min(names & messages.keys())] for names in (_ROLE_NAMES, _WORD_NAMES))
        if len(roles) != len(words):
            raise ValueError("lists of roles and words that differ in length")
        messages = [{"role": role, "content": text} for role, text in zip(roles, words, strict=True)]
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
