"""Text tasks: classification of one text or a pair, causal language modelling, masked language modelling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from ffm_secure.errors import ModelError
from ffm_secure.models.backbone import Backbone
from ffm_secure.records import Layout
from ffm_secure.tasks.base import Classification, Columns, Task, TaskData, as_indices, logits, text_columns
from ffm_secure.tasks.chat import NO_TEMPLATE, has_template, render_all
from ffm_secure.tasks.encoded import (
    IGNORED,
    Encoded,
    EncodedText,
    encode_answered,
    encode_texts,
    pad_texts,
    readable,
)
from ffm_secure.tasks.marks import marks_of


class TextTask(Task):
    """What the text tasks share: the tokenizer and padding."""

    columns_read: ClassVar[tuple[int, int]] = (1, 1)  # fewest, most

    def __init__(
        self, backbone: Backbone, data: TaskData, *, max_length: int = 64, fixed_length: bool = False
    ) -> None:
        super().__init__(backbone, data, max_length=max_length, fixed_length=fixed_length)
        if backbone.tokenizer is None:
            raise ModelError(f"{self.kind}: the model {backbone.source} has no tokenizer")
        fewest, most = self.columns_read
        if not fewest <= len(data.text_columns) <= most:
            raise ModelError(
                f"{self.kind}: cannot read text columns {list(data.text_columns)}; set task.text_column"
            )
        self.tokenizer = backbone.tokenizer

    def encode(self, examples: Columns) -> EncodedText:
        """Tokenise the text columns, cut to `max_length` tokens."""
        columns = text_columns(examples, self.data.text_columns)
        return encode_texts(
            self.tokenizer, columns, max_length=self.max_length, labels=self._labels(examples)
        )

    def full_lengths(self, examples: Columns) -> NDArray[np.int64] | None:
        """Count the tokens of each text before it is cut, int64 [n]."""
        columns = [[readable(text) for text in column] for column in self.written(examples)]
        out = self.tokenizer(
            *columns,
            truncation=False,
            padding=False,
            return_attention_mask=False,
            split_special_tokens=not self.data.is_chat,
            verbose=False,
        )
        return np.array([len(row) for row in out["input_ids"]], dtype=np.int64)

    def remarks(self, examples: Columns) -> tuple[str, ...]:
        """Say how many texts hold a mark of the model, which is read as plain words."""
        pattern = marks_of(self.tokenizer).pattern()
        if pattern is None:
            return ()
        holding: list[str] = []
        for texts in zip(*text_columns(examples, self.data.text_columns), strict=True):
            mark = pattern.search("\n".join(map(str, texts)))
            if mark is not None:
                holding.append(mark.group())
        if not holding:
            return ()
        return (
            f"{len(holding):,} of {len(examples):,} texts hold marks of the model, such as {holding[0]!r}; "
            "they are read as plain words, and end or open nothing",
        )

    def written(self, examples: Columns) -> list[list[str]]:
        """Return the texts as the tokenizer reads them, one list per column."""
        return [list(map(str, column)) for column in text_columns(examples, self.data.text_columns)]

    def batch(
        self, encoded: Encoded, indices: ArrayLike, *, device: str, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Build `input_ids` and `attention_mask` [B, T], and `labels` [B] where there are any."""
        assert isinstance(encoded, EncodedText)
        chosen = as_indices(indices)
        return pad_texts(encoded, chosen, pad=self.tokenizer.pad_token_id, device=device, length=self.length)

    def _labels(self, examples: Columns) -> NDArray[np.int64] | None:
        return None


class TextClassification(Classification, TextTask):
    """Assign one of a fixed set of labels to a text or a pair of texts."""

    kind = "text_classification"
    columns_read = (1, 2)

    def _labels(self, examples: Columns) -> NDArray[np.int64] | None:
        return self.labels(examples)


class CausalLM(TextTask):
    """Predict each token from those before it. One example is one sequence; longer texts are cut, not split.

    Of a prompt with its answer, and of a chat, only the answers are learned and counted, unless the data says
    otherwise.
    """

    kind = "causal_lm"
    metric_name = "perplexity"
    higher_is_better = False

    def __init__(
        self, backbone: Backbone, data: TaskData, *, max_length: int = 64, fixed_length: bool = False
    ) -> None:
        super().__init__(backbone, data, max_length=max_length, fixed_length=fixed_length)
        if data.answers_only and (data.is_chat or data.answered) and not self.tokenizer.is_fast:
            raise ModelError(
                f"causal_lm: the tokenizer of {backbone.source} does not say where its tokens stand in the "
                "text; set task.loss_on = 'all'"
            )
        if data.is_chat and not has_template(self.tokenizer):
            self.notes = (NO_TEMPLATE,)

    @property
    def layout(self) -> Layout:
        """Say how the model is given what it goes on from."""
        if self.data.is_chat:
            return "template" if has_template(self.tokenizer) else "lines"
        return "answered" if self.data.answered else "text"

    def encode(self, examples: Columns) -> EncodedText:
        """Tokenise the texts or chats, cut to `max_length` tokens."""
        if not self.data.is_chat and not (self.data.answered and self.data.answers_only):
            return super().encode(examples)
        texts, answers, quoted = self.answered_texts(examples)
        if not self.data.answers_only:
            answers = []
            for text in texts:
                answers.append([(0, len(text))])
        templated = self.data.is_chat and has_template(self.tokenizer)  # a template writes its own marks
        return encode_answered(
            self.tokenizer,
            texts,
            answers,
            max_length=self.max_length,
            special=not templated,
            quoted=quoted if templated else None,
        )

    def written(self, examples: Columns) -> list[list[str]]:
        """Return the texts as the tokenizer reads them; chats in the words of their template."""
        if self.data.is_chat:
            return [self.answered_texts(examples)[0]]
        return super().written(examples)

    def unanswered(self, examples: Columns) -> float | None:
        """Return the share of examples whose answer is cut off whole, so that nothing of them is learned."""
        encoded = self.encode(examples)
        if encoded.asked is None or len(encoded) == 0:
            return None
        asked = np.concatenate([[0], np.cumsum(encoded.asked)])
        return float(np.mean(asked[encoded.offsets[1:]] == asked[encoded.offsets[:-1]]))

    def answered_texts(
        self, examples: Columns
    ) -> tuple[list[str], list[Sequence[tuple[int, int]]], list[Sequence[tuple[int, int]]]]:
        """Return each example as text, the characters of its answers, and those of marks somebody wrote."""
        column = examples.column(self.data.text_columns[0])
        if self.data.is_chat:
            chats = render_all(self.tokenizer, column)
            written: list[str] = []
            answers: list[Sequence[tuple[int, int]]] = []
            quoted: list[Sequence[tuple[int, int]]] = []
            for chat in chats:
                written.append(chat.text)
                answers.append(chat.answers)
                quoted.append(chat.quoted)
            return written, answers, quoted
        last = examples.column(self.data.answered[-1])
        texts = list(map(str, column))
        spans: list[Sequence[tuple[int, int]]] = []
        for text, answer in zip(texts, last, strict=True):
            spans.append(_answer_span(text, answer))
        return texts, spans, [()] * len(texts)

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return each sample's mean token cross-entropy; a sample with nothing to predict has loss 0."""
        nats, counted = self._token_losses(model, batch)
        return nats.sum(dim=1) / counted.sum(dim=1).clamp(min=1)

    def _token_losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        counted = batch["attention_mask"][:, 1:].bool() & batch["attention_mask"][:, :-1].bool()
        if "targets" in batch:
            counted &= batch["targets"][:, 1:] != IGNORED
        targets = batch["input_ids"][:, 1:].masked_fill(~counted, IGNORED)
        scores = logits(model, batch)[:, :-1].float()
        return token_cross_entropy(scores, targets), counted

    def _score(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[float, float, int]:
        nats, counted = self._token_losses(model, batch)
        return float(nats.double().sum()), 0.0, int(counted.sum())

    def _metric(self, loss: float, share_right: float) -> float:
        return math.exp(min(loss, 700.0))


def _answer_span(text: str, answer: str) -> list[tuple[int, int]]:
    """Return where the answer stands at the end of its text; all of a text that was changed since it was
    joined.
    """
    start = 0
    if text.endswith(answer):
        start = len(text) - len(answer)
    return [(start, len(text))]


class MaskedLM(TextTask):
    """Restore hidden tokens: 15 % of each text, at least one; 80 % of these masked, 10 % replaced, 10 % kept.

    Training masks come from the caller's generator, evaluation masks from a fixed seed and the row, so that
    batch size and order do not change the figure. The metric is the share of hidden tokens restored.
    Source: Devlin et al. 2019, arXiv:1810.04805, section 3.1.
    """

    kind = "masked_lm"
    metric_name = "masked-token accuracy"
    higher_is_better = True
    rate = 0.15
    evaluation_seed = 20_190_524

    def __init__(
        self, backbone: Backbone, data: TaskData, *, max_length: int = 64, fixed_length: bool = False
    ) -> None:
        super().__init__(backbone, data, max_length=max_length, fixed_length=fixed_length)
        if self.tokenizer.mask_token_id is None:
            raise ModelError(
                f"masked_lm: the tokenizer of {backbone.source} has no mask token; try 'causal_lm'"
            )
        self.special = np.zeros(len(self.tokenizer), dtype=bool)
        self.special[list(self.tokenizer.all_special_ids)] = True

    def batch(
        self, encoded: Encoded, indices: ArrayLike, *, device: str, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Build `input_ids` with hidden tokens, `attention_mask`, and `targets` [B, T] (-100 where nothing is
        asked).

        Without a generator the masks are those of the evaluation.
        """
        if generator is None:
            return self.evaluation_batch(encoded, as_indices(indices), device)
        batch = super().batch(encoded, indices, device="cpu")
        draws = torch.rand((3, *batch["input_ids"].shape), generator=generator).double().numpy()
        return self._hide(batch, draws, device)

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return each sample's mean cross-entropy over its hidden tokens."""
        scores, targets = asked_logits(model, batch)
        nats = token_cross_entropy(scores, targets)
        return nats.sum(dim=1) / (targets != IGNORED).sum(dim=1).clamp(min=1)

    def evaluation_batch(
        self, encoded: Encoded, indices: NDArray[np.int64], device: str
    ) -> dict[str, Tensor]:
        """Hide tokens by a stream of each example's own."""
        assert isinstance(encoded, EncodedText)
        batch = super().batch(encoded, indices, device="cpu")
        shape = tuple(batch["input_ids"].shape)
        draws = np.ones((3, *shape))
        for row, index in enumerate(indices):
            length = int(encoded.offsets[index + 1] - encoded.offsets[index])
            stream = np.random.Generator(np.random.Philox(key=[self.evaluation_seed, int(index)]))
            draws[:, row, :length] = stream.random((3, length))
        return self._hide(batch, draws, device)

    def _hide(self, batch: dict[str, Tensor], draws: NDArray[np.float64], device: str) -> dict[str, Tensor]:
        """Hide tokens by three uniform draws a place: whether, how, and by which token."""
        tokens = batch["input_ids"].numpy()
        open_to = batch["attention_mask"].numpy().astype(bool) & ~self.special[tokens]
        chance = np.where(open_to, draws[0], 2.0)
        hidden = (chance < self.rate) | ((chance == chance.min(axis=1, keepdims=True)) & open_to)
        shown = np.where(draws[1] < 0.8, self.tokenizer.mask_token_id, tokens)
        other = (draws[2] * len(self.tokenizer)).astype(np.int64)
        shown = np.where(draws[1] >= 0.9, other, shown)
        out = dict(batch)
        out["input_ids"] = torch.from_numpy(np.where(hidden, shown, tokens))
        out["targets"] = torch.from_numpy(np.where(hidden, tokens, IGNORED))
        return {name: value.to(device) for name, value in out.items()}

    def _score(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[float, float, int]:
        scores, targets = asked_logits(model, batch)
        asked = targets != IGNORED
        scores, wanted = scores[asked], targets[asked]
        nats = nn.functional.cross_entropy(scores, wanted, reduction="sum")
        return float(nats), float((scores.argmax(dim=1) == wanted).sum()), len(wanted)


def asked_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return scores [B, M, V] and targets [B, M] for the M places asked at most, instead of all T.

    A vocabulary-sized head costs as much as a small encoder, and six places of seven are never asked. The
    places are picked before the head, per sample, so the first dimension stays the sample and per-sample
    gradients stay whole. Models whose head is no single module are computed in full.
    """
    targets = batch["targets"]
    head = next((getattr(model, name) for name in ("cls", "lm_head") if hasattr(model, name)), None)
    if head is None or isinstance(head, nn.Linear):
        return logits(model, batch).float(), targets
    asked = targets != IGNORED
    width = max(1, int(asked.sum(dim=1).max()))
    places = asked.int().argsort(dim=1, descending=True, stable=True)[:, :width]

    def pick(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = inputs[0]
        return (hidden.gather(1, places.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])), *inputs[1:])

    handle = head.register_forward_pre_hook(pick)
    try:
        return logits(model, batch).float(), targets.gather(1, places)
    finally:
        handle.remove()


def token_cross_entropy(scores: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy [B, T] of scores [B, T, V]; 0 where the target is -100."""
    flat = nn.functional.cross_entropy(
        scores.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED
    )
    return flat.view(targets.shape)
