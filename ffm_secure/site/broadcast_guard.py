"""What a client looks at before it trains:
does the broadcast it was sent carry the marks of a crafted model?
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from defenses.broadcast_check import Reason, TensorLayout, check_broadcast, layout_of
from ffm_secure.errors import BroadcastRefused
from ffm_secure.lifecycle.base import AnswerSheet
from ffm_secure.trainable import TrainableModel

# What starts at zero and has seen a few examples is sparse and of low rank without anybody's intent.
_OF_LITTLE_TRAINING = ("zeroed block", "parallel rows")


_APART = 1e-3  # that probabilities of one row may add up to more or less than 1


class AnswersGuard:
    """Judge broadcasts of a student's answers: probabilities, and nothing else, ever reach an own model."""

    def __init__(self, sheet: AnswerSheet) -> None:
        self.sheet = sheet

    def accept(self, vector: Tensor) -> None:
        """Check a broadcast vector: empty, or [rows * classes].

        Raises: BroadcastRefused with the reason.
        """
        if not vector.numel():
            return
        answers = vector.view(self.sheet.rows, self.sheet.classes)
        apart = float((answers.sum(dim=1) - 1.0).abs().max())
        if not math.isfinite(apart) or apart > _APART or float(answers.min()) < 0.0:
            raise BroadcastRefused(["what the student is said to answer are no probabilities"])


class BroadcastGuard:
    """Judge every broadcast of a run against the start that all clients agreed on.

    Guarantee: `accept` returns only for a vector whose tensors are finite and show no mark that the start did
    not show itself; the same vector is judged once. Assumes: built before the first round, while the model
    still holds its start; the frozen backbone is the client's own copy and is never sent.
    """

    def __init__(self, trainable: TrainableModel) -> None:
        self.layout = trainable.layout
        start = self._tensors(trainable.flatten().cpu())
        self.reference: dict[str, TensorLayout] = layout_of(start)
        self.familiar = {(reason.rule, reason.tensor) for reason in check_broadcast(start, self.reference)}
        self.accepted: Tensor | None = None

    def accept(self, vector: Tensor) -> None:
        """Check a broadcast vector [d].

        Raises: BroadcastRefused with every reason.
        """
        if vector is self.accepted:
            return
        marks = check_broadcast(self._tensors(vector.detach().cpu()), self.reference)
        reasons = []
        for reason in marks:
            if self._new(reason):
                reasons.append(str(reason))
        if reasons:
            raise BroadcastRefused(reasons)
        self.accepted = vector

    def _new(self, reason: Reason) -> bool:
        if reason.rule in _OF_LITTLE_TRAINING and self.reference[reason.tensor].zero_at_start:
            return False
        return (reason.rule, reason.tensor) not in self.familiar

    def _tensors(self, vector: Tensor) -> dict[str, Tensor]:
        sizes = []
        for _, shape in self.layout:
            sizes.append(math.prod(shape))
        parts = torch.split(vector.float(), sizes)
        tensors: dict[str, Tensor] = {}
        for (name, shape), part in zip(self.layout, parts, strict=True):
            tensors[name] = part.view(shape)
        return tensors
