"""Class sums: the sum of the unit-length features of every class, which make a head in one round."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ffm_secure.queries.base import Opened, Query, Rows, Setting, Viewed, head_of, keep_absent, with_head
from ffm_secure.strategies.base import ServerState

NAME = "class_sums"
_LEAST = 1e-9
_LEAST_SIGNAL = (
    0.3  # chosen, like the square root below, on training rows no figure of the results page was taken from
)
_SHARPNESS = 2.0  # only the loss depends on it, not the answer


def build(setting: Setting) -> Query:
    """Return the query for the head of a model.

    One record adds its features, scaled to length 1, to the row of its class: bound 1, size classes x width.
    """
    head = head_of(setting.trainable)
    size = head.classes * head.width

    def answer(rows: Rows, model: Viewed) -> Tensor:
        return spread(unit_rows(model.features(rows)), rows.labels(), head.classes)

    def use(state: ServerState, opened: Opened) -> ServerState:
        sums = torch.from_numpy(opened.values).view(head.classes, head.width)
        deviation: float | Tensor = opened.deviation
        if opened.by_class is not None:
            deviation = torch.from_numpy(opened.by_class)[:, None]
        weight = class_head(sums, deviation=deviation)
        return with_head(state, head, keep_absent(state, head, weight, opened))

    return Query(
        name=NAME,
        size=size,
        bound=1.0,
        answer=answer,
        use=use,
        by_class=0,
        words=f"one unit vector of {head.width} numbers a record, summed by class",
    )


def unit_rows(features: Tensor) -> Tensor:
    """Scale every row [n, width] to length 1; zeros stay."""
    rows = features.double()
    lengths: Tensor = rows.norm(dim=1, keepdim=True).clamp(min=_LEAST)
    return rows / lengths


def spread(features: Tensor, labels: np.ndarray, classes: int) -> Tensor:
    """Put every row of features [n, width] into the place of its class: [n, classes * width]."""
    count, width = features.shape if len(features) else (0, 1)
    if count == 0:
        return torch.zeros((0, 1), dtype=torch.float64)
    table = torch.zeros((count, classes, width), dtype=torch.float64)
    table[torch.arange(count), torch.from_numpy(labels)] = features.double()
    return table.view(count, classes * width)


def class_head(sums: Tensor, *, deviation: float | Tensor) -> Tensor:
    """Return the weights [classes, width] of a head from noisy sums by class; `deviation` may be one a class,
    [classes, 1].

    What all classes share is taken off their means, and of what is left far classes are shortened by the
    square root of their length, which lies between a mean and a direction.
    """
    counts = lengths_without_noise(sums, deviation=deviation)
    means, pooled = sums / counts, sums.sum(dim=0) / counts.sum()
    apart = means - pooled
    weight: Tensor = apart / apart.norm(dim=1, keepdim=True).clamp(min=_LEAST).sqrt()
    return _SHARPNESS * weight


def lengths_without_noise(sums: Tensor, *, deviation: float | Tensor) -> Tensor:
    """Return how long each sum [classes, width] would be without its noise, [classes, 1]: it grows with the
    records.

    Where noise is nearly all there is, a part of the length stands for it.
    """
    lengths = sums.norm(dim=1, keepdim=True)
    signal = (lengths.square() - sums.shape[1] * deviation**2).clamp(min=0.0).sqrt()
    return torch.maximum(signal, _LEAST_SIGNAL * lengths).clamp(min=_LEAST)
