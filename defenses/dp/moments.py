"""Rows that hold the second moments of a vector, kept as the vector:
bounded and added up without writing them out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from defenses.errors import ParameterError

Reals = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class MomentRows:
    """One row a record: the upper half of x x', its sides times sqrt(2), then x in the place of its class.

    `features` are float64 [n, width], `labels` int64 [n] in [0, classes). A row is width (width + 1) / 2 +
    classes x width numbers long; for 384 features and 10 classes that is 77,760, of which nothing but x is
    ever needed: its squared norm is |x|^4 + |x|^2, and a weighted sum of rows is a product of matrices.

    Guarantee: `norms` and `weighted_sum` say of the rows what `dense` writes out, up to rounding in float64.

    Example:
      >>> rows = MomentRows(features=np.array([[1.0, 2.0]]), labels=np.array([0]), classes=1)
      >>> [round(float(value), 3) for value in rows.dense()[0]]
      [1.0, 2.828, 4.0, 1.0, 2.0]
      >>> round(float(rows.norms()[0]) ** 2, 9)
      30.0
    """

    features: Reals
    labels: Integers
    classes: int

    def __post_init__(self) -> None:
        if self.features.ndim != 2 or self.labels.shape != self.features.shape[:1]:
            raise ParameterError(
                f"features {self.features.shape}, labels {self.labels.shape}: must be [n, width] and [n]"
            )
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < self.classes:
            raise ParameterError(f"labels: must lie in [0, {self.classes})")

    def __len__(self) -> int:
        return len(self.features)

    @property
    def dimension(self) -> int:
        """Return the length of a row."""
        width = int(self.features.shape[1])
        return width * (width + 1) // 2 + self.classes * width

    @staticmethod
    def read(total: Reals, *, width: int, classes: int) -> tuple[Reals, Reals]:
        """Return the whole symmetric matrix [width, width] and the sums by class [classes, width] that a sum
        of rows, float64 [d], stands for.
        """
        upper, scale = _upper_half(width)
        moments = np.zeros((width, width))
        moments[upper] = total[: len(scale)] / scale
        moments = moments + np.triu(moments, 1).T
        return moments, total[len(scale) :].reshape(classes, width)

    def norms(self) -> Reals:
        """Return the L2 norm of every row, float64 [n]; not finite where a feature is not."""
        with np.errstate(over="ignore", invalid="ignore"):
            squares = np.einsum("nw,nw->n", self.features, self.features)
            norms: Reals = np.sqrt(squares * squares + squares)
        return norms

    def weighted_sum(self, weights: Reals) -> Reals:
        """Return the sum of the rows times their weights [n], float64 [d]; a row of weight 0 is left out,
        whatever it holds.
        """
        counted = weights != 0.0
        features, weights = self.features[counted], weights[counted]
        scaled = features * weights[:, None]
        upper, scale = _upper_half(features.shape[1])
        moments = (features.T @ scaled)[upper] * scale
        by_class = np.zeros((self.classes, features.shape[1]))
        np.add.at(by_class, self.labels[counted], scaled)
        return np.concatenate((moments, by_class.reshape(-1)))

    def dense(self) -> Reals:
        """Write the rows out, float64 [n, d]: the definition, and slow."""
        count, width = self.features.shape
        upper, scale = _upper_half(width)
        moments = np.zeros((count, len(scale)))
        for row, x in enumerate(self.features):
            moments[row] = np.outer(x, x)[upper] * scale
        by_class = np.zeros((count, self.classes, width))
        by_class[np.arange(count), self.labels] = self.features
        return np.concatenate((moments, by_class.reshape(count, self.classes * width)), axis=1)


@cache
def _upper_half(width: int) -> tuple[tuple[Integers, Integers], Reals]:
    rows, columns = np.triu_indices(width)
    return (rows, columns), np.where(rows == columns, 1.0, math.sqrt(2.0))
