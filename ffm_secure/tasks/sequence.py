"""Sequence to sequence: an encoder reads a prompt, a decoder learns to write the answer to it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from ffm_secure.models.backbone import Backbone
from ffm_secure.models.model_checks import start_token
from ffm_secure.tasks.base import Columns, TaskData, as_indices, logits, text_columns
from ffm_secure.tasks.encoded import IGNORED, Encoded, EncodedText, encode_texts
from ffm_secure.tasks.text import TextTask, token_cross_entropy

READ, WRITTEN = 0, 1  # segments of an encoded example


class SequenceToSequence(TextTask):
    """Write an answer to a prompt, as T5 and BART do. The loss is on the answer alone, its end included.

    Prompt and answer are each cut to `max_length` tokens.
    """

    kind = "sequence_to_sequence"
    metric_name = "perplexity"
    higher_is_better = False
    columns_read = (2, 2)

    def __init__(
        self, backbone: Backbone, data: TaskData, *, max_length: int = 64, fixed_length: bool = False
    ) -> None:
        super().__init__(backbone, data, max_length=max_length, fixed_length=fixed_length)
        self.start = start_token(backbone.source, backbone.config)

    def encode(self, examples: Columns) -> EncodedText:
        """Tokenise prompts and answers; an example holds both, told apart by its segments."""
        prompts, answers = text_columns(examples, self.data.text_columns)
        read = encode_texts(self.tokenizer, [prompts], max_length=self.max_length, labels=None)
        written = encode_texts(
            self.tokenizer, [answers], max_length=self.max_length, labels=None, as_target=True
        )
        return _joined(read, self._ended(written))

    def full_lengths(self, examples: Columns) -> NDArray[np.int64]:
        """Count the tokens of each prompt or answer, whichever is longer, before it is cut, int64 [n]."""
        lengths = []
        for column in self.written(examples):
            out = self.tokenizer(column, truncation=False, split_special_tokens=True, verbose=False)
            lengths.append(list(map(len, out["input_ids"])))
        longest: NDArray[np.int64] = np.array(lengths, dtype=np.int64).max(axis=0)
        return longest

    def batch(
        self, encoded: Encoded, indices: ArrayLike, *, device: str, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Build `input_ids`, `attention_mask` [B, S], `decoder_input_ids`, `decoder_attention_mask` and
        `targets` [B, T] (-100 where nothing is asked).
        """
        assert isinstance(encoded, EncodedText)
        assert encoded.segments is not None
        places, real = encoded.positions(as_indices(indices))
        tokens, segments = encoded.tokens[places], encoded.segments[places]
        read = real & (segments == READ)
        prompts, asked = self._side(tokens, read, first=np.zeros(len(tokens), dtype=np.int64))
        answers, inside = self._side(tokens, real & (segments == WRITTEN), first=read.sum(axis=1))
        before = np.full_like(answers, self.tokenizer.pad_token_id)
        before[:, 0] = self.start
        before[:, 1:] = np.where(inside[:, 1:], answers[:, :-1], before[:, 1:])
        batch = {
            "input_ids": prompts,
            "attention_mask": asked,
            "decoder_input_ids": before,
            "decoder_attention_mask": inside,
            "targets": np.where(inside, answers, IGNORED),
        }
        return {name: torch.from_numpy(values.astype(np.int64)).to(device) for name, values in batch.items()}

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return each sample's mean cross-entropy over the tokens of its answer."""
        nats = token_cross_entropy(logits(model, batch).float(), batch["targets"])
        return nats.sum(dim=1) / (batch["targets"] != IGNORED).sum(dim=1).clamp(min=1)

    def _side(
        self, tokens: NDArray[np.int32], real: NDArray[np.bool_], *, first: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return one side of each row, from its place `first` on, padded [B, width], and what is real."""
        lengths = real.sum(axis=1)
        width = self.length or int(lengths.max(initial=1))
        steps = np.arange(width)[None, :]
        inside = steps < lengths[:, None]
        chosen = np.take_along_axis(tokens, np.where(inside, first[:, None] + steps, 0), axis=1)
        return np.where(inside, chosen, self.tokenizer.pad_token_id).astype(np.int64), inside

    def _ended(self, answers: EncodedText) -> EncodedText:
        """Close every answer that was not cut with the end token, where the tokenizer does not."""
        end = self.tokenizer.eos_token_id
        rows = np.split(answers.tokens, answers.offsets[1:-1])
        if end is None or len(answers) == 0:
            return answers
        ended = []
        for row in rows:
            open_end = row[-1] != end and len(row) < self.max_length
            if open_end:
                row = np.append(row, np.int32(end))
            ended.append(row)
        lengths = list(map(len, ended))
        return EncodedText(
            tokens=np.concatenate(ended).astype(np.int32),
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        )

    def _score(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[float, float, int]:
        nats = token_cross_entropy(logits(model, batch).float(), batch["targets"])
        return float(nats.double().sum()), 0.0, int((batch["targets"] != IGNORED).sum())

    def _metric(self, loss: float, share_right: float) -> float:
        return math.exp(min(loss, 700.0))


def _joined(read: EncodedText, written: EncodedText) -> EncodedText:
    """Put each prompt and its answer end to end."""
    rows: list[NDArray[np.int32]] = []
    segments: list[NDArray[np.int8]] = []
    for number in range(len(read)):
        for side, encoded in ((READ, read), (WRITTEN, written)):
            row = encoded.tokens[encoded.offsets[number] : encoded.offsets[number + 1]]
            rows.append(row)
            segments.append(np.full(len(row), side, dtype=np.int8))
    empty = np.zeros(0, dtype=np.int32)
    return EncodedText(
        tokens=np.concatenate([empty, *rows]).astype(np.int32),
        offsets=(read.offsets + written.offsets).astype(np.int64),
        segments=np.concatenate([empty, *segments]).astype(np.int8),
    )
