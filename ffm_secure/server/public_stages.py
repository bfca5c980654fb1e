"""What public rows say of the stages of a stream: which classes each has, and how a model does on it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ffm_secure.records import StageScore


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicStages:
    """Hold the stages' names, the stage of every public row of the evaluation, and the classes of each stage.

    Assumes: which classes occur in which stage is public; it is read from public rows.
    """

    names: tuple[str, ...]
    of_row: NDArray[np.int64]  # [n]; -1 for a row of no stage
    classes: NDArray[np.bool_]  # [stages, classes]

    def scores(self, logits: NDArray[np.float32], labels: NDArray[np.int64]) -> tuple[StageScore, ...]:
        """Return the accuracy on every stage from logits [n, classes], among all and among its classes."""
        scores = []
        for stage, name in enumerate(self.names):
            rows = np.flatnonzero(self.of_row == stage)
            inside = np.where(self.classes[stage], logits[rows], -np.inf)
            scores.append(
                StageScore(
                    stage=name,
                    rows=len(rows),
                    unknown=_share(logits[rows].argmax(axis=1) == labels[rows]),
                    known=_share(inside.argmax(axis=1) == labels[rows]),
                )
            )
        return tuple(scores)


def _share(right: NDArray[np.bool_]) -> float:
    return float(right.mean()) if len(right) else float("nan")
