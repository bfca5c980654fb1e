"""What a whole grid costs the rows it reads: every private run is charged, so the runs compose, whichever of
them is shown in the end.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from defenses.dp import Accountant, Event, TuningEvent
from defenses.dp.records import Keys
from ffm_secure.config import compatibility
from ffm_secure.config.run_file import RunConfig
from ffm_secure.engines import simulation
from ffm_secure.experiments.grid_file import Cell
from ffm_secure.privacy.mechanism import replay_events
from ffm_secure.site.allowance import composed


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CellCost:
    """What one run charges, and to which rows."""

    run: str
    data: str
    keys: Keys  # of the private rows, uint64 [n]
    unit: str
    delta: float
    event: Event
    rounds: int  # most rounds one row is charged for
    guaranteed: bool
    answers: tuple[Event, ...] = ()  # what a row is charged for beside: questions, and rounds of a reservoir
    held_back: tuple[Event, ...] = ()  # what a row is charged for that is not learned from, only asked about

    def paid(self) -> Counter[Event]:
        """Return what one row of those that are learned from is charged for."""
        counts = Counter(self.answers)
        if self.rounds:  # a run that learns on public rows alone pays for no round
            counts[self.event] += self.rounds
        return counts


@dataclass(frozen=True, slots=True, kw_only=True)
class GridCost:
    """What the runs of a grid that read the same rows cost them together."""

    runs: int
    unit: str
    delta: float  # the smallest of the runs
    each: float  # the largest epsilon of one run
    together: float  # epsilon of all of them for one row
    best_only: float | None  # of releasing the best of a random number of them; None where they differ
    without: tuple[str, ...]  # runs on these rows that promise nothing

    def words(self) -> str:
        """Say it in one line."""
        line = (
            f"{self.runs} private runs on the same rows: each costs at most {self.each:.3g}, together "
            f"{self.together:.3g} per {self.unit} at delta {self.delta:g}"
        )
        if self.best_only is not None and self.runs > 1:
            line += (
                f"; releasing only the best of a random number of them, {self.runs} on average (Poisson, "
                f"drawn beforehand), would cost {self.best_only:.3g}"
            )
        if self.without:
            line += f"; with {_some(self.without)}, which read them without a bound, nothing is promised"
        return line


def costs_of(cells: Sequence[Cell], base: Path) -> tuple[GridCost, ...]:
    """Return what the runs of a grid cost together; nothing where fewer than two of them promise anything."""
    private = []
    for cell in cells:
        if cell.config.privacy.unit != "none" and cell.config.privacy.noise == "system":
            private.append(cell)
    if len(private) > 1:
        return grid_costs(cost_of_cells(cells, base))
    return ()


def cost_of_cells(cells: Iterable[Cell], base: Path) -> tuple[CellCost, ...]:
    """Work out what every run of a grid would charge; nothing is trained and no ledger is charged.

    Runs that differ by seed and name alone are worked out once.
    Raises:
      PlanRefused, DataError, ModelError: what the first such run would be refused for.
    """
    known: dict[RunConfig, CellCost] = {}
    costs = []
    for cell in cells:
        shape = _shape(cell.config)
        if shape not in known:
            known[shape] = _cost_of(cell.config, base)
        costs.append(_renamed(known[shape], cell.config.name))
    return tuple(costs)


def _shape(config: RunConfig) -> RunConfig:
    """Return a run file without what no charge depends on."""
    return replace(config, name="cell", seed=0)


def _renamed(cost: CellCost, run: str) -> CellCost:
    return replace(cost, run=run)


def _cost_of(config: RunConfig, base: Path) -> CellCost:
    data, spec = simulation.agree(config, base)
    records = data.dataset.train.records
    assert records is not None
    learned = compatibility.paid_rounds(config) if spec.learns else 0
    return CellCost(
        run=config.name,
        data=config.task.data,
        keys=np.unique(records.keys),
        unit=config.privacy.unit,
        delta=config.privacy.delta,
        event=spec.mechanism.event(release="update of one round"),
        rounds=learned,
        guaranteed=spec.has_dp_guarantee,
        answers=(*spec.answers_planned(held_back=False), *replay_events(spec.mechanism, config)),
        held_back=spec.answers_planned(held_back=True),
    )


def grid_costs(costs: Sequence[CellCost]) -> tuple[GridCost, ...]:
    """Compose what runs on the same rows cost together, by unit; nothing for rows no private run reads.

    Guarantee: rows that any two runs share are composed as if they shared all of them, so that no row costs
    more than is stated.
    """
    stated = []
    for group in _by_rows(costs):
        without = tuple(cost.run for cost in group if not cost.guaranteed)
        for unit in sorted({cost.unit for cost in group if cost.guaranteed}):
            private = []
            for cost in group:
                if cost.guaranteed and cost.unit == unit:
                    private.append(cost)
            stated.append(_composed(private, without))
    return tuple(stated)


def _composed(private: Sequence[CellCost], without: tuple[str, ...]) -> GridCost:
    """Compose the private runs of one unit.

    In one run a row is learned from or held back. In several it may be one here and the other there, so it
    is counted as both.
    """
    delta = min(cost.delta for cost in private)
    counts: Counter[Event] = Counter()
    alone = []
    for cost in private:
        counts += cost.paid() + Counter(cost.held_back)
        alone.append(max(_epsilon(cost.paid(), delta), _epsilon(Counter(cost.held_back), delta)))
    first = private[0].paid(), Counter(private[0].held_back)
    alike = all((cost.paid(), Counter(cost.held_back)) == first for cost in private)
    return GridCost(
        runs=len(private),
        unit=private[0].unit,
        delta=delta,
        each=max(alone),
        together=_epsilon(counts, delta) if len(private) > 1 else max(alone),
        best_only=_best_only(sum(first, Counter()), len(private), delta)
        if alike and len(private) > 1 and counts
        else None,
        without=without,
    )


def _epsilon(counts: Counter[Event], delta: float) -> float:
    return composed(tuple(counts.items()), delta) if counts else 0.0


def _best_only(run: Counter[Event], runs: int, delta: float) -> float:
    """Return what the best of a Poisson number of runs costs.

    Source: Papernot, Steinke, arXiv 2110.03620, theorem 6.
    """
    accountant = Accountant()
    accountant.compose(
        TuningEvent(
            base=tuple(run.elements()),
            distribution="poisson",
            stopping=float(runs),
            release="the best run",
        )
    )
    return accountant.epsilon(delta).epsilon


def _by_rows(costs: Sequence[CellCost]) -> list[list[CellCost]]:
    """Put runs together that share a row, or a data set's name, directly or through others."""
    groups: list[list[CellCost]] = []
    for cost in costs:
        related = []
        for group in groups:
            if any(_share(cost, other) for other in group):
                related.append(group)
        groups = [group for group in groups if group not in related]
        groups.append([*(item for group in related for item in group), cost])
    return groups


def _share(one: CellCost, other: CellCost) -> bool:
    if one.data == other.data or one.keys is other.keys:
        return True
    return len(np.intersect1d(one.keys, other.keys, assume_unique=True)) > 0


def _some(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    return f"{names[0]} and {len(names) - 1} more"


def as_table(cost: GridCost) -> dict[str, object]:
    """Return a cost as it stands in results.json; infinity where nothing is promised for the rows."""
    return {
        "runs": cost.runs,
        "unit": cost.unit,
        "delta": cost.delta,
        "each": cost.each,
        "together": math.inf if cost.without else cost.together,
        "private_runs_together": cost.together,
        "best_only": cost.best_only,
        "without": list(cost.without),
        "words": cost.words(),
    }
