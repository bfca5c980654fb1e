"""What every task offers: encode once, batch, per-sample losses, evaluate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from ffm_secure.errors import ModelError
from ffm_secure.foreign import Cells
from ffm_secure.models.backbone import Backbone
from ffm_secure.records import Layout
from ffm_secure.tasks.encoded import Encoded, EncodedText


class Columns(Protocol):
    """What a task needs of a table of examples."""

    def __len__(self) -> int:
        """Count the rows."""

    def column(self, name: str) -> Cells:
        """Return one column."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What a model reaches on a set: mean loss in nats (per sample, or per predicted token) and the task's
    metric.
    """

    loss: float
    metric: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskData:
    """Which columns of the examples a task reads."""

    text_columns: tuple[str, ...] = ()
    label_column: str | None = None
    label_names: tuple[str, ...] = ()
    image_column: str | None = None
    answered: tuple[str, ...] = ()  # columns the text was joined from, the last of which is the answer
    is_chat: bool = False  # the text column holds packed chats
    answers_only: bool = True  # whether a causal model learns the answers alone


class Task:
    """A task for one backbone and one data set. It is stateless once built and may be shared by threads.

    Guarantee (every kind): `losses` returns one number per sample that depends on that sample alone, up to
    rounding: a token loss is averaged over the sample's own tokens, never over the batch. This is what a
    bound on one record's influence rests on.
    """

    notes: tuple[str, ...] = ()  # lines for the person who plans the run
    kind: ClassVar[str]
    metric_name: ClassVar[str]
    higher_is_better: ClassVar[bool]

    def __init__(
        self, backbone: Backbone, data: TaskData, *, max_length: int = 64, fixed_length: bool = False
    ) -> None:
        self.backbone, self.data = backbone, data
        limit = backbone.max_positions
        if max_length < 2 or (limit is not None and max_length > limit):
            raise ModelError(
                f"task.max_length = {max_length}: must be from 2 to the {limit} "
                f"positions of {backbone.source}"
            )
        self.max_length = max_length
        # Below float32 the width of a batch shows in every sample's rounding, so a long text would move the
        # others.
        narrow = any(parameter.dtype == torch.bfloat16 for parameter in backbone.model.parameters())
        self.length = max_length if fixed_length or narrow else None

    def encode(self, examples: Columns) -> Encoded:
        """Turn examples into compact arrays, once."""
        raise NotImplementedError

    def full_lengths(self, examples: Columns) -> NDArray[np.int64] | None:
        """Count the tokens of each text before it is cut, int64 [n]; None where there is no text."""
        return None

    @property
    def layout(self) -> Layout:
        """Say how a model is given what it goes on from."""
        return "text"

    def unanswered(self, examples: Columns) -> float | None:
        """Return the share of examples whose answer is cut off whole; None where all of a text is learned."""
        return None

    def remarks(self, examples: Columns) -> tuple[str, ...]:
        """Return what the owner of the examples should know of how they are read."""
        return ()

    def batch(
        self, encoded: Encoded, indices: ArrayLike, *, device: str, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Pad the chosen examples into tensors;
        `generator` draws what a task draws anew each time (masks).
        """
        raise NotImplementedError

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return per-sample losses float32 [B], in nats."""
        raise NotImplementedError

    def evaluate(
        self, model: nn.Module, encoded: Encoded, *, batch_size: int = 64, device: str = "cpu"
    ) -> Evaluation:
        """Return mean loss and metric over a set;
        the order and the batch size do not matter beyond rounding.
        """
        loss = right = count = 0.0
        with _evaluating(model):
            for indices in _by_length(encoded, batch_size):
                batch = self.evaluation_batch(encoded, indices, device)
                part_loss, part_right, part_count = self._score(model, batch)
                loss, right, count = loss + part_loss, right + part_right, count + part_count
        if count == 0:
            return Evaluation(loss=math.nan, metric=math.nan)
        return Evaluation(loss=loss / count, metric=self._metric(loss / count, right / count))

    def majority(self, train: Columns, validation: Columns) -> float | None:
        """Return the metric of always answering with the commonest training label; None where there is no
        label.
        """
        return None

    def evaluation_batch(
        self, encoded: Encoded, indices: NDArray[np.int64], device: str
    ) -> dict[str, Tensor]:
        """Pad the chosen examples; what a task draws depends on each example alone, so it is the same in any
        batch.
        """
        return self.batch(encoded, indices, device=device)

    def _score(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[float, float, int]:
        """Return the summed loss, the number right and the number of terms of one batch."""
        raise NotImplementedError

    def _metric(self, loss: float, share_right: float) -> float:
        return share_right


class Classification(Task):
    """What text and image classification share."""

    metric_name = "accuracy"
    higher_is_better = True

    def __init__(
        self, backbone: Backbone, data: TaskData, *, max_length: int = 64, fixed_length: bool = False
    ) -> None:
        super().__init__(backbone, data, max_length=max_length, fixed_length=fixed_length)
        config = backbone.config
        if (
            len(data.label_names) == config.num_labels
        ):  # an exported model then answers with the names people know
            config.id2label = dict(enumerate(data.label_names))
            config.label2id = {name: number for number, name in config.id2label.items()}

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the cross-entropy of each sample."""
        return nn.functional.cross_entropy(logits(model, batch).float(), batch["labels"], reduction="none")

    def majority(self, train: Columns, validation: Columns) -> float | None:
        """Return the validation accuracy of the commonest training label."""
        training_labels, wanted = self.labels(train), self.labels(validation)
        if len(training_labels) == 0 or len(wanted) == 0:
            return None
        return float(np.mean(wanted == np.bincount(training_labels).argmax()))

    def chances(self, model: nn.Module, encoded: Encoded, *, device: str = "cpu") -> NDArray[np.float64]:
        """Return the probability of every class for every row, float64 [n, classes]."""
        chances = np.zeros((len(encoded), int(self.backbone.config.num_labels)))
        with _evaluating(model):
            for indices in _by_length(encoded, 64):
                scores = logits(model, self.evaluation_batch(encoded, indices, device))
                chances[indices] = scores.double().softmax(dim=1).cpu().numpy()
        return chances

    def labels(self, examples: Columns) -> NDArray[np.int64]:
        """Return the labels, checked against the number of classes of the model."""
        if self.data.label_column is None:
            raise ModelError(f"{self.kind}: the data has no label column; set task.label_column")
        labels = np.asarray(examples.column(self.data.label_column), dtype=np.int64)
        classes = int(self.backbone.config.num_labels)
        if len(labels) and (labels.min() < 0 or labels.max() >= classes):
            raise ModelError(
                f"labels run from {labels.min()} to {labels.max()}, the model has classes 0 to {classes - 1}"
            )
        return labels

    def _score(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[float, float, int]:
        scores, wanted = logits(model, batch).float(), batch["labels"]
        loss = nn.functional.cross_entropy(scores, wanted, reduction="sum")
        return float(loss), float((scores.argmax(dim=1) == wanted).sum()), len(wanted)


def logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Call a model without its labels, so that it forms no batch mean of its own, and return its logits."""
    out = model(**{name: value for name, value in batch.items() if name not in ("labels", "targets")})
    scores: Tensor = out.logits
    return scores


def as_indices(indices: ArrayLike) -> NDArray[np.int64]:
    """Turn a list, slice-free array or tensor of row numbers into int64."""
    return np.asarray(indices, dtype=np.int64).reshape(-1)


def text_columns(examples: Columns, names: Sequence[str]) -> list[Sequence[str]]:
    """Return the text columns of a task."""
    text_columns: list[Sequence[str]] = []
    for name in names:
        text_columns.append(examples.column(name))
    return text_columns


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def _by_length(encoded: Encoded, batch_size: int) -> Iterator[NDArray[np.int64]]:
    """Yield batches of similar length, longest first, so that little is padded and memory peaks at once."""
    if isinstance(encoded, EncodedText):
        lengths = encoded.lengths()
    else:
        lengths = np.zeros(len(encoded), dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
