"""Private evaluation: a held-back record falls into one cell, and accuracies follow from noisy counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import norm
from torch import Tensor

from ffm_secure.queries.base import Opened, Query, Rows, Setting, Viewed
from ffm_secure.records import Estimate, ReleasedEvaluation
from ffm_secure.strategies.base import ServerState

NAME = "evaluation"
BINS = 10  # of the largest probability, for the histogram
EVERYBODY = "everybody"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cells:
    """Say where each count stands: group x class x wrong or right, then confidence x wrong or right, then
    owner x wrong or right.
    """

    groups: tuple[str, ...]
    classes: int
    owners: int = 0  # 0: nothing is counted by owner

    @property
    def first(self) -> int:
        """Return how many cells tell groups and classes apart."""
        return 2 * len(self.groups) * self.classes

    @property
    def size(self) -> int:
        """Return how many cells there are."""
        return self.first + 2 * BINS + 2 * self.owners

    @property
    def tables(self) -> int:
        """Return in how many cells one record counts."""
        return 3 if self.owners else 2

    def answer(self, scores: Tensor, rows: Rows) -> Tensor:
        """Return the cells of every row, 0 or 1, [n, size]; a row of no declared group counts in none.

        Shapes: scores [n, classes].
        """
        labels = torch.from_numpy(rows.labels())
        top, chosen = scores.softmax(dim=1).max(dim=1)
        right = (chosen == labels).long()
        known = torch.zeros(len(rows), dtype=torch.long)
        if rows.groups is not None:
            known = torch.from_numpy(rows.groups)
        cells = torch.zeros(len(rows), self.size, dtype=torch.float64)
        places = (known.clamp(min=0) * self.classes + labels) * 2 + right
        here = torch.arange(len(rows))
        cells[here, places] = (known >= 0).double()
        bins = (top.double() * BINS).long().clamp(max=BINS - 1)
        cells[here, self.first + 2 * bins + right] = 1.0
        if self.owners:
            cells[here, self.first + 2 * BINS + 2 * rows.owner + right] = 1.0
        return cells

    def split(
        self, values: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Return the counts as [groups, classes, 2], [bins, 2] and [owners, 2]; the last place is wrong, then
        right.
        """
        table = values[: self.first].reshape(len(self.groups), self.classes, 2)
        rest = values[self.first :].reshape(BINS + self.owners, 2)
        return table, rest[:BINS], rest[BINS:]


def cells_of(setting: Setting) -> Cells:
    """Return the cells of a run: its declared groups, or everybody as one."""
    assert setting.classes is not None, "the plan refuses evaluations by class where there are none"
    evaluation = setting.config.evaluation
    owners = setting.config.task.clients if evaluation.by_owner else 0
    return Cells(groups=evaluation.groups or (EVERYBODY,), classes=setting.classes, owners=owners)


def build(setting: Setting) -> Query:
    """Return the query. One record adds 1 to one cell of each table: bound sqrt(2), or sqrt(3) with counts by
    owner; whole numbers.
    """
    cells = cells_of(setting)
    owners = f", and of {cells.owners} owners" if cells.owners else ""

    def answer(rows: Rows, model: Viewed) -> Tensor:
        if len(rows) == 0:
            return torch.zeros(0, cells.size, dtype=torch.float64)
        return cells.answer(model.scores(rows), rows)

    def use(state: ServerState, opened: Opened) -> ServerState:
        return state

    return Query(
        name=NAME,
        size=cells.size,
        bound=math.sqrt(cells.tables),
        answer=answer,
        use=use,
        words=f"counts of {len(cells.groups)} x {cells.classes} x right or wrong, and of {BINS} confidences"
        + owners,
        whole_numbers=True,
    )


def released(
    opened: Opened,
    cells: Cells,
    *,
    class_names: Sequence[str] = (),
    owner_names: Sequence[str] = (),
    level: float = 0.95,
) -> ReleasedEvaluation:
    """Read accuracies from noisy counts, each with a normal interval for noise and for chance together.

    Guarantee: a function of the opened sum alone, so nothing more is spent however often it is read.
    """
    table, histogram, owned = cells.split(opened.values)
    deviation, quantile = opened.deviation, float(norm.ppf((1 + level) / 2))
    names = tuple(class_names) or tuple(map(str, range(cells.classes)))
    owners = tuple(owner_names) or tuple(map(str, range(cells.owners)))

    def estimate(name: str, counts: NDArray[np.float64]) -> Estimate:
        return share_right(
            name, counts.reshape(-1, 2).sum(axis=0), deviation * math.sqrt(counts.size / 2), quantile
        )

    by_class = [estimate(name, table[:, number]) for number, name in enumerate(names)]
    by_group = [estimate(name, table[number]) for number, name in enumerate(cells.groups)]
    by_owner = [estimate(name, owned[number]) for number, name in enumerate(owners[: cells.owners])]
    kinds = (("class", by_class), ("group", by_group), ("owner", by_owner))
    bins = [estimate(f"{low / BINS:.1f}", histogram[low]) for low in range(BINS)]
    return ReleasedEvaluation(
        accuracy=estimate("accuracy", table),
        classes=tuple(by_class),
        groups=tuple(by_group),
        confidences=tuple(bins),
        gap=gap_between(by_group, quantile),
        deviation=deviation,
        level=level,
        owners=tuple(by_owner),
        worst=tuple(worst_of(kind, items, level) for kind, items in kinds if len(items) > 1),
    )


def worst_of(kind: str, estimates: Sequence[Estimate], level: float) -> Estimate:
    """Return the smallest of several shares, with an interval for the smallest true one.

    The smallest noisy share is too small on average, so each interval is widened until all hold together
    (Bonferroni): then the true smallest lies between the smallest lower and the smallest upper end.
    """
    quantile = float(norm.ppf(1 - (1 - level) / (2 * len(estimates))))
    least = min(estimates, key=lambda item: item.value)
    return Estimate(
        name=f"worst {kind}: {least.name}",
        value=least.value,
        low=max(0.0, min(item.value - quantile * item.deviation for item in estimates)),
        high=min(1.0, min(item.value + quantile * item.deviation for item in estimates)),
        rows=least.rows,
        deviation=least.deviation,
    )


def share_right(name: str, counts: NDArray[np.float64], deviation: float, quantile: float) -> Estimate:
    """Return right over all with its interval, from counts [wrong, right] of this noise each.

    The deviation is that of the ratio to first order in the noise, beside that of drawing so many rows.
    """
    wrong, right = float(counts[0]), float(counts[1])
    total = max(wrong + right, 1.0)
    share = min(1.0, max(0.0, right / total))
    noise = deviation * math.hypot(1.0 - share, share) / total
    smooth = smoothed(share, total)
    chance = math.sqrt(smooth * (1.0 - smooth) / total)
    reach = quantile * math.hypot(noise, chance)
    return Estimate(
        name=name,
        value=share,
        low=max(0.0, share - reach),
        high=min(1.0, share + reach),
        rows=wrong + right,
        deviation=math.hypot(noise, chance),
    )


def smoothed(share: float, total: float) -> float:
    """Return a share with two rows added to either side: without an error there is still a chance of one.

    Source: Agresti and Coull 1998, The American Statistician 52(2), "add two successes and two failures".
    """
    return (share * total + 2.0) / (total + 4.0)


def gap_between(groups: Sequence[Estimate], quantile: float) -> Estimate | None:
    """Return how far the best group is above the worst; None with fewer than two."""
    if len(groups) < 2:
        return None
    best = max(groups, key=lambda item: item.value)
    worst = min(groups, key=lambda item: item.value)
    deviation = math.hypot(best.deviation, worst.deviation)
    value = best.value - worst.value
    return Estimate(
        name=f"{best.name} - {worst.name}",
        value=value,
        low=max(0.0, value - quantile * deviation),
        high=min(1.0, value + quantile * deviation),
        rows=best.rows + worst.rows,
        deviation=deviation,
    )
