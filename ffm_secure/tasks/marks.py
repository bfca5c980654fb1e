"""A model's own marks in what people wrote: "</s>" in somebody's text is text, and ends or opens nothing.

Tokenizers can be asked to read such marks as plain words, but some know them as words too and give the mark
all the same. So every token is looked at, and a mark that no template wrote is spelled in other tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ffm_secure.foreign import ModelTokenizer

_PRIVATE_USE = 0xE000  # the first of 6,400 characters that no standard gives a meaning


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """Hold the marks of a tokenizer: what begins, ends or pads a text, and who speaks in a chat."""

    tokenizer: ModelTokenizer = field(repr=False)
    words: Mapping[int, str]

    def pattern(self) -> re.Pattern[str] | None:
        """Return what finds any mark in a text, the longest first; None where there is none."""
        words = sorted(self.words.values(), key=len, reverse=True)
        if not words:
            return None
        return re.compile("|".join(map(re.escape, words)))

    def spelled(self, token: int) -> list[int]:
        """Return tokens that read like a mark and are none."""
        word = self.words[token]
        pieces = self._plain(word)
        if not self.words.keys().isdisjoint(pieces):
            pieces = []
            for letter in word:
                pieces += self._plain(letter)
        spelling = []
        for piece in pieces:
            if piece not in self.words:
                spelling.append(piece)
        return spelling or [_spare(self)]

    def _plain(self, text: str) -> list[int]:
        out = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return list(out["input_ids"])

    def replaced(
        self, tokens: Sequence[int], own: Sequence[int], *, max_length: int
    ) -> tuple[list[int], list[int]]:
        """Spell out the marks of a row that are not its `own`; return the tokens, and the place each is from.

        What then is too long is cut before the marks at its end.
        """
        spelled: list[int] = []
        places: list[int] = []
        for place, token in enumerate(tokens):
            pieces = [token]
            if token in self.words and not own[place]:
                pieces = self.spelled(token)
            spelled += pieces
            places += [place] * len(pieces)
        excess = len(spelled) - max_length
        cut = len(spelled) - 1
        while excess > 0 and cut >= 0:
            if not own[places[cut]]:
                del spelled[cut], places[cut]
                excess -= 1
            cut -= 1
        return spelled, places


def _spare(marks: Marks) -> int:
    unknown = marks.tokenizer.unk_token_id
    if unknown is not None:
        return int(unknown)
    return next(token for token in range(len(marks.tokenizer)) if token not in marks.words)


def marks_of(tokenizer: ModelTokenizer) -> Marks:
    """Collect a tokenizer's marks. The token of unknown words is none: people's words do become it."""
    words: dict[int, str] = {}
    for token, added in getattr(tokenizer, "added_tokens_decoder", {}).items():
        if getattr(added, "special", False):
            words[int(token)] = str(added)
    for token, word in zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=False):
        words[int(token)] = str(word)
    words.pop(tokenizer.unk_token_id, None)
    for token in list(words):
        if not words[token].strip():
            del words[token]
    return Marks(tokenizer=tokenizer, words=words)


def stand_ins(texts: Sequence[str], pattern: re.Pattern[str]) -> dict[str, str]:
    """Choose a character that none of the texts holds for every mark they hold: mark -> character.

    A template sees these instead, so that it can neither read a mark of somebody's as its own nor be found to
    have written it.
    """
    letters = set("".join(texts))
    marks: dict[str, str] = {}
    code = _PRIVATE_USE
    for text in texts:
        for mark in pattern.findall(text):
            while mark not in marks and chr(code) in letters:
                code += 1
            if mark not in marks:
                marks[mark] = chr(code)
                code += 1
    return marks


def without_stand_ins(
    text: str, characters: Mapping[str, str]
) -> tuple[str, list[tuple[int, int]], list[int]]:
    """Put marks back in the place of their characters (mark -> character).

    Return the text, the span of every mark in it, and the new place of each old character and of the end.
    """
    marks = dict(zip(characters.values(), characters.keys(), strict=True))
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    places: list[int] = []
    length = 0
    for letter in text:
        places.append(length)
        piece = marks.get(letter, letter)
        if letter in marks:
            spans.append((length, length + len(piece)))
        pieces.append(piece)
        length += len(piece)
    return "".join(pieces), spans, [*places, length]
