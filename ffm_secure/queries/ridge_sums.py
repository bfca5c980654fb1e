"""Ridge sums: the features' second moments and their sums by class, which solve for a linear head in one
round.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from defenses.dp import MomentRows
from ffm_secure.queries.base import Opened, Query, Rows, Setting, Viewed, head_of, keep_absent, with_head
from ffm_secure.queries.class_sums import unit_rows
from ffm_secure.strategies.base import ServerState

NAME = "ridge_sums"
_SHARPNESS = 10.0  # regression answers with 0 and 1; a softmax needs scores further apart


def build(setting: Setting) -> Query:
    """Return the query for the head of a model.

    One record adds x x' and x y' for its unit-length features x and its class y: bound sqrt(2), size
    width (width + 1) / 2 + classes x width. Of the symmetric matrix one half is sent, its sides times
    sqrt(2), so that the vector is as long as the matrix.
    """
    head = head_of(setting.trainable)
    corner_count = head.width * (head.width + 1) // 2

    def answer(rows: Rows, model: Viewed) -> MomentRows:
        features = unit_rows(model.features(rows))
        if not len(rows):
            features = torch.zeros((0, head.width), dtype=torch.float64)
        return MomentRows(features=features.numpy(), labels=rows.labels(), classes=head.classes)

    def use(state: ServerState, opened: Opened) -> ServerState:
        moments, targets = map(
            torch.from_numpy, MomentRows.read(opened.values, width=head.width, classes=head.classes)
        )
        weight = ridge_head(moments, targets, deviation=opened.deviation)
        return with_head(state, head, keep_absent(state, head, weight, opened))

    return Query(
        name=NAME,
        size=corner_count + head.classes * head.width,
        bound=math.sqrt(2.0),
        answer=answer,
        use=use,
        by_class=corner_count,
        words=f"second moments of {head.width} features and their sums by class",
    )


def ridge_head(moments: Tensor, targets: Tensor, *, deviation: float) -> Tensor:
    """Return the weights [classes, width] of ridge regression from noisy sums.

    The penalty follows from the noise, which is public: half the largest singular value that noise of this
    deviation alone has (the edge of its semicircle law), so that hardly any direction is divided by noise.
    Which part of it was chosen on training rows and on the public rows of the demo. Negative eigenvalues
    are noise and count as 0.
    """
    width = moments.shape[0]
    penalty = 1.0 + deviation * math.sqrt(width / 2.0)
    values, vectors = torch.linalg.eigh(moments)
    inverse = 1.0 / (values.clamp(min=0.0) + penalty)
    weight: Tensor = _SHARPNESS * (targets @ vectors * inverse) @ vectors.T
    return weight
