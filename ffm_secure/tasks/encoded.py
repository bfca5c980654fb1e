"""Tokenised texts and pictures kept compact, and how they become padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ffm_secure.foreign import ModelTokenizer
from ffm_secure.tasks.marks import Marks, marks_of

IGNORED = -100  # target of a position that is not predicted
_CHUNK = 4096  # texts tokenised at a time: Python lists of token numbers never exist for the whole set


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class EncodedText:
    """Hold n token sequences end to end: sequence i is `tokens[offsets[i]:offsets[i + 1]]`."""

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    segments: NDArray[np.int8] | None = (
        None  # 0 for the first text of a pair, 1 for the second; beside tokens
    )
    labels: NDArray[np.int64] | None = None
    asked: NDArray[np.bool_] | None = (
        None  # beside tokens: whether a model is to learn it; None where it learns all
    )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self) -> NDArray[np.int64]:
        """Return the number of tokens of each sequence."""
        return np.diff(self.offsets)

    def positions(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return where the tokens of the chosen sequences lie, padded to the longest, and which places are
        real.
        """
        starts, lengths = self.offsets[indices], self.offsets[indices + 1] - self.offsets[indices]
        steps = np.arange(int(lengths.max(initial=0)), dtype=np.int64)[None, :]
        real = steps < lengths[:, None]
        return np.where(real, starts[:, None] + steps, 0), real

    def take(self, indices: ArrayLike) -> EncodedText:
        """Choose sequences."""
        chosen = np.asarray(indices, dtype=np.int64)
        places, real = self.positions(chosen)
        lengths = self.offsets[chosen + 1] - self.offsets[chosen]
        flat = places[real]
        segments, labels, asked = self.segments, self.labels, self.asked
        if segments is not None:
            segments = segments[flat]
        if labels is not None:
            labels = labels[chosen]
        if asked is not None:
            asked = asked[flat]
        return EncodedText(
            tokens=self.tokens[flat],
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            segments=segments,
            labels=labels,
            asked=asked,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class EncodedImages:
    """Hold n pictures as bytes, at the size the model wants: uint8 [n, channels, side, side]."""

    pixels: Tensor
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: ArrayLike) -> EncodedImages:
        """Choose pictures."""
        chosen = np.asarray(indices, dtype=np.int64)
        return EncodedImages(pixels=self.pixels[torch.from_numpy(chosen)], labels=self.labels[chosen])


Encoded = EncodedText | EncodedImages


def encode_texts(
    tokenizer: ModelTokenizer,
    columns: Sequence[Sequence[str]],
    *,
    max_length: int,
    labels: NDArray[np.int64] | None,
    as_target: bool = False,
) -> EncodedText:
    """Tokenise one or two columns of text, cut to `max_length` tokens. An empty text becomes one unknown
    token.

    `as_target` reads a single column as what a model is to write, which some tokenizers do in another way.
    """
    count = len(columns[0])
    # Only models that were trained with segments get them; GPT-2, for one, would read them as words.
    segmented = len(columns) == 2 and "token_type_ids" in tokenizer.model_input_names
    marks = marks_of(tokenizer)
    tokens: list[NDArray[np.int32]] = []
    segments: list[NDArray[np.int8]] = []
    lengths = np.zeros(count, dtype=np.int64)
    for start in range(0, count, _CHUNK):
        texts = []
        for column in columns:
            texts.append([readable(str(text)) for text in column[start : start + _CHUNK]])
        out = tokenizer(
            *(() if as_target else texts),
            text_target=texts[0] if as_target else None,
            truncation=True,
            max_length=max_length,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=segmented,
            return_special_tokens_mask=True,
            split_special_tokens=True,  # "</s>" in somebody's text is text, not the end of it
            verbose=False,
        )
        rows, kinds = _spelled_out(out, marks, max_length)
        for number, row in enumerate(rows):
            rows[number] = row or [_spare(tokenizer)]
        lengths[start : start + len(rows)] = list(map(len, rows))
        tokens.append(np.fromiter((t for row in rows for t in row), dtype=np.int32))
        if segmented:
            segments.append(np.fromiter((t for row in kinds for t in (row or [0])), dtype=np.int8))
    if not tokens:
        tokens.append(np.zeros(0, dtype=np.int32))
    return EncodedText(
        tokens=np.concatenate(tokens),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        segments=np.concatenate(segments) if segments else None,
        labels=labels,
    )


def _spelled_out(
    out: ModelTokenizer, marks: Marks, max_length: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Return tokens and segments of every row, without marks that the tokenizer did not add itself."""
    rows: list[list[int]] = list(out["input_ids"])
    kinds: list[list[int]] = list(out.get("token_type_ids") or [[]] * len(rows))
    for number, (row, own) in enumerate(zip(rows, out["special_tokens_mask"], strict=True)):
        if any(token in marks.words and not added for token, added in zip(row, own, strict=True)):
            rows[number], places = marks.replaced(row, own, max_length=max_length)
            if kinds[number]:
                kinds[number] = [kinds[number][place] for place in places]
    return rows, kinds


def encode_answered(
    tokenizer: ModelTokenizer,
    texts: Sequence[str],
    answers: Sequence[Sequence[tuple[int, int]]],
    *,
    max_length: int,
    special: bool,
    quoted: Sequence[Sequence[tuple[int, int]]] | None = None,
) -> EncodedText:
    """Tokenise texts of which only some characters are to be learned; `special` adds the tokenizer's own
    tokens.

    `answers` holds, per text, spans of characters (first, one after the last). A token is learned where it
    overlaps one. `quoted` holds the spans whose marks somebody wrote; None says that a template wrote no part
    of the texts, so that all marks in them are such.
    """
    marks = marks_of(tokenizer)
    tokens: list[int] = []
    asked: list[bool] = []
    lengths: list[int] = []
    for start in range(0, len(texts), _CHUNK):
        out = tokenizer(
            [readable(text) for text in texts[start : start + _CHUNK]],
            truncation=True,
            max_length=max_length,
            padding=False,
            add_special_tokens=special,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            split_special_tokens=quoted is None,
            return_attention_mask=False,
            verbose=False,
        )
        for number, row in enumerate(out["input_ids"]):
            spans, places = answers[start + number], out["offset_mapping"][number]
            own = out["special_tokens_mask"][number]
            if quoted is not None:
                own = [not _overlaps(place, quoted[start + number]) for place in places]
            if any(token in marks.words and not added for token, added in zip(row, own, strict=True)):
                row, sources = marks.replaced(row, own, max_length=max_length)
                places = [places[source] for source in sources]
            tokens += row or [_spare(tokenizer)]
            asked += [_overlaps(place, spans) for place in places] or [False]
            lengths.append(len(row) or 1)
    return EncodedText(
        tokens=np.array(tokens, dtype=np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        asked=np.array(asked, dtype=bool),
    )


def _overlaps(place: tuple[int, int], spans: Sequence[tuple[int, int]]) -> bool:
    first, end = place
    return end > first and any(end > start and first < stop for start, stop in spans)


def readable(text: str) -> str:
    """Return a text that has a Unicode form: half of a surrogate pair becomes the mark of a lost character.

    A tokenizer raises for it, and an error about one private row would tell of it.

    >>> readable("a\\ud800b")
    'a\ufffdb'
    """
    if text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text):
        return text
    return "".join("\ufffd" if "\ud800" <= letter <= "\udfff" else letter for letter in text)


def _spare(tokenizer: ModelTokenizer) -> int:
    for candidate in (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def pad_texts(
    encoded: EncodedText, indices: NDArray[np.int64], *, pad: int, device: str, length: int | None = None
) -> dict[str, Tensor]:
    """Build `input_ids`, `attention_mask`, for pairs `token_type_ids` [B, T]; T is the longest here or
    `length`.

    Texts of which a part is learned get `targets` [B, T], -100 elsewhere.
    """
    places, real = encoded.positions(indices)
    if length is not None and places.shape[1] < length:
        extra = ((0, 0), (0, length - places.shape[1]))
        places, real = np.pad(places, extra), np.pad(real, extra)
    batch = {"input_ids": np.where(real, encoded.tokens[places], pad), "attention_mask": real}
    if encoded.asked is not None:
        batch["targets"] = np.where(real & encoded.asked[places], encoded.tokens[places], IGNORED)
    if encoded.segments is not None:
        batch["token_type_ids"] = np.where(real, encoded.segments[places], 0)
    out = {}
    for name, values in batch.items():
        out[name] = torch.from_numpy(values.astype(np.int64)).to(device)
    if encoded.labels is not None:
        out["labels"] = torch.from_numpy(encoded.labels[indices]).to(device)
    return out
