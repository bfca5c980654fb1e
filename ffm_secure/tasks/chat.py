"""Chats as one text, by the template of the model's own tokenizer, with the places an assistant speaks."""

from __future__ import annotations

import json
import re
from itertools import chain
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ffm_secure.errors import ModelError
from ffm_secure.foreign import ModelTokenizer
from ffm_secure.tasks.marks import marks_of, stand_ins, without_stand_ins

Span = tuple[int, int]  # first character, and the one after the last

Turn = tuple[str, str]  # role, content
_ANSWER = 0xF8F0  # a private character that stands for an answer; stand-ins of marks are counted from below

NO_TEMPLATE = "the tokenizer has no chat template: each turn is written as a line 'role: words'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """Hold one chat as text, and where the answers stand in it."""

    text: str = field(repr=False)  # private
    answers: tuple[Span, ...]
    quoted: tuple[Span, ...] = ()  # where somebody wrote what reads like a mark of the model


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Hold a chat up to where the assistant is to speak, and what the model's template writes behind an
    answer.
    """

    text: str = field(repr=False)
    quoted: tuple[Span, ...] = ()
    behind: str = ""


def has_template(tokenizer: ModelTokenizer) -> bool:
    """Tell whether a tokenizer knows how its model writes chats."""
    return bool(getattr(tokenizer, "chat_template", None))


def render_all(tokenizer: ModelTokenizer, packed: Sequence[str]) -> list[Rendered]:
    """Write packed chats (JSON lists of [role, content]) as texts.

    Guarantee: a mark of the model that stands in somebody's words is `quoted`, and moves neither roles nor
    answers.
    Raises:
      ModelError: the template refuses some of them; they are counted, not shown.
    """
    rendered: list[Rendered] = []
    refused: list[str] = []
    pattern = marks_of(tokenizer).pattern()
    for row in packed:
        turns: list[tuple[str, str]] = json.loads(row)
        try:
            rendered.append(_quoting(tokenizer, turns, pattern))
        except Exception as error:  # a template is a program of the model's authors and raises what it likes
            refused.append((str(error).splitlines() or [type(error).__name__])[0][:120])
    if refused:
        raise ModelError(
            f"the chat template refuses {len(refused):,} of {len(packed):,} chats ({refused[0]}); bring "
            "them into the order of roles it expects, or choose another model"
        )
    return rendered


def render_question(tokenizer: ModelTokenizer, turns: Sequence[Turn]) -> Question:
    """Write a chat that the assistant is to go on with.

    Guarantee: the text is what a chat of training begins with that has the same turns and one answer more.
    Raises:
      ModelError: the template refuses the chat.
    """
    pattern = marks_of(tokenizer).pattern()
    letters = set("".join(chain.from_iterable(turns)))
    answer = next(
        chr(code) for code in range(_ANSWER, _ANSWER + len(letters) + 1) if chr(code) not in letters
    )
    try:
        chat = _quoting(tokenizer, [*turns, ("assistant", answer)], pattern)
    except Exception as error:  # as above
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise ModelError(
            f"the chat template refuses this chat ({reason}); bring its turns into the order of roles it "
            "expects"
        ) from None
    place = chat.text.rfind(answer)
    if place < 0:
        raise ModelError(
            "the chat template writes no word of an answer; answer with transformers and a template that does"
        )
    quoted = tuple(span for span in chat.quoted if span[1] <= place)
    return Question(text=chat.text[:place], quoted=quoted, behind=chat.text[place + 1 :])


def end_of_answer(tokenizer: ModelTokenizer, behind: str) -> tuple[int, ...]:
    """Return the mark that ends an answer: the first one a template writes behind it."""
    marks = marks_of(tokenizer)
    pattern = marks.pattern()
    mark = pattern.search(behind) if pattern is not None else None
    if mark is None:
        return ()
    return tuple(token for token, word in marks.words.items() if word == mark.group())


def _quoting(
    tokenizer: ModelTokenizer, turns: Sequence[tuple[str, str]], pattern: re.Pattern[str] | None
) -> Rendered:
    """Write one chat; marks in what people wrote are kept from the template."""
    words = list(chain.from_iterable(turns))
    characters: dict[str, str] = {}
    if pattern is not None:
        characters = stand_ins(words, pattern)
    messages = []
    for role, content in turns:
        messages.append({"role": _stood_in(role, characters), "content": _stood_in(content, characters)})
    chat = _templated(tokenizer, messages) if has_template(tokenizer) else _plain(messages)
    if not characters:
        return chat
    text, quoted, places = without_stand_ins(chat.text, characters)
    answers = tuple((places[first], places[end]) for first, end in chat.answers)
    return Rendered(text=text, answers=answers, quoted=tuple(quoted))


def _stood_in(text: str, characters: Mapping[str, str]) -> str:
    for mark in sorted(characters, key=len, reverse=True):
        text = text.replace(mark, characters[mark])
    return text


def _plain(messages: Sequence[Mapping[str, str]]) -> Rendered:
    text = ""
    answers = []
    for message in messages:
        text += f"{message['role']}: "
        start = len(text)
        text += f"{message['content']}\n"
        if message["role"] == "assistant":
            answers.append((start, len(text)))
    return Rendered(text=text, answers=tuple(answers))


def _templated(tokenizer: ModelTokenizer, messages: list[dict[str, str]]) -> Rendered:
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    answers = []
    cursor = 0
    for number, message in enumerate(messages):
        span = _by_prefix(tokenizer, messages, number, text) or _by_content(text, message["content"], cursor)
        cursor = span[1]
        if message["role"] == "assistant":
            answers.append(span)
    return Rendered(text=text, answers=tuple(answers))


def _by_prefix(
    tokenizer: ModelTokenizer, messages: list[dict[str, str]], number: int, text: str
) -> Span | None:
    """Find a turn between the chat before it, with the words that open an answer, and the chat after it.

    Templates that rewrite earlier turns, or refuse a chat that is cut there, give None.
    """
    if number == 0 or messages[number]["role"] != "assistant":
        return None
    try:
        before = tokenizer.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: number + 1], tokenize=False)
    except Exception:  # as above
        return None
    if text.startswith(after) and after.startswith(before):
        return (len(before), len(after))
    return None


def _by_content(text: str, content: str, cursor: int) -> Span:
    """Find the words of a turn after those of the turns before it;
    templates may cut the blanks around them.
    """
    if content in text[cursor:]:
        words = content
    else:
        words = content.strip()
    start = text.find(words, cursor)
    if start >= 0 and words:
        return (start, start + len(words))
    return (cursor, cursor)
