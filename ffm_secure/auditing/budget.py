"""What an audit may spend, and which attacks it may spend it on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from attacks import steps
from attacks.contract import Attack, Budget
from ffm_secure.auditing.step import ReplayedStep
from ffm_secure.records import (
    AuditFinding,
    Observer,
    Point,
)

CANARIES = 3000

# Attacks that search for minutes: they are given one record, the client's worst case, and no place in a quick
# audit.
HEAVY = frozenset({"matching", "text search", "fedavg", "learned", "aggregate"})
# Closed forms: where they fail on many records, they are tried on one, unless they are dear on this model.
CLOSED = frozenset({"presence", "labels", "linear", "least squares", "span"})
DEAR = 5_000  # steps
# Closed forms that cost tens of thousands of steps on a real model: they come last, so that cheap attacks
# never lose their verdict.
LATE = frozenset({"adapter_readout", "span", "span_exact"})
# Steps are counted from what is computed, so that a loaded core tries the same attacks; a thousand of them
# take about a second of a quiet one.
STEPS = {
    "quick": (20_000, 120_000),
    "standard": (45_000, 1_400_000),
    "exhaustive": (3_600_000, float("inf")),
}  # an attack, all
NULL_STEPS = {
    "quick": 1_000,
    "standard": 20_000,
    "exhaustive": 600_000,
}  # of one attack on noise, at one place
REGROUPING_STEPS = {"quick": 2_000, "standard": 20_000, "exhaustive": 200_000}  # of one attack at one point
# Draws of records and noise, for attacks cheap enough that luck need not decide their verdict. Of a single
# record's label
# there are few outcomes, so it takes more of them.
DRAWS, DRAWS_OF_ONE = 6, 12
CHEAP = 500  # steps
DRAWING = 1 / 24  # of the steps of all attacks may go into drawing, for several records and for one each

SHOWN_PICTURES = 2  # of one finding


Watch = Callable[[str, int, int], None]  # what is done next, its place, and how many there are


def unwatched(name: str, place: int, total: int) -> None:
    """Show nothing."""


@dataclass(slots=True, kw_only=True)
class AuditBudget:
    """The steps of one audit, shared out among its attacks in order.

    Assumes: the whole audit runs inside `attacks.steps.counted`. `watch` is told what comes next.
    """

    name: str
    began: float = field(default_factory=steps.so_far)
    drawing: dict[int, float] = field(default_factory=dict)  # steps spent on draws, by records
    watch: Watch = unwatched

    def budget(self, attack: Attack) -> Budget | None:
        """Return what an attack may spend; None when the audit has nothing left for it."""
        each, total = STEPS[self.name]
        left = total - (steps.so_far() - self.began)
        if left <= 0 or (self.name == "quick" and attack.family in HEAVY):
            return None
        preset = Budget.named(self.name)
        if self.name == "standard" and attack.family in HEAVY:
            restarts = 2
        else:
            restarts = preset.restarts
        return replace(preset, steps=min(each, left), restarts=restarts)

    def draw(self, stage: ReplayedStep, number: int, point: Point) -> ReplayedStep | None:
        """Draw a stage anew; None once drawing has had its share, for on a large model attacks are worth
        more.
        """
        if stage.again is None or self.drawing.get(stage.records, 0.0) > DRAWING * STEPS[self.name][1]:
            return None
        began = steps.so_far()
        other = stage.again(number)
        other.at(point)
        self.drawing[stage.records] = self.drawing.get(stage.records, 0.0) + steps.so_far() - began
        return other

    def refusal(self, attack: Attack) -> str:
        """Say why an attack is not run."""
        if self.name == "quick" and attack.family in HEAVY:
            return "not tried: it searches for minutes; run the audit with --budget standard"
        return f"not tried: the attacks before it used up the {STEPS[self.name][1]:,.0f} steps of this audit"


def not_run(observer: Observer, attack: str, point: Point, reason: str) -> AuditFinding:
    """Say that nothing is known of an attack that was not run, and why."""
    return AuditFinding(
        observer=observer,
        attack=attack,
        point=point,
        verdict="inconclusive",
        measure="not run",
        score=None,
        reason=reason,
    )
