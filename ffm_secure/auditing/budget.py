"""What an audit may spend, and which attacks it may spend it on."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

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
DEAR = 5.0  # CPU seconds
# Closed forms that cost tens of seconds on a real model: they come last, so that cheap attacks never lose
# their verdict.
LATE = frozenset({"adapter_readout", "span", "span_exact"})
SECONDS = {
    "quick": (20.0, 120.0),
    "standard": (45.0, 1_400.0),
    "exhaustive": (3_600.0, float("inf")),
}  # an attack, all
NULL_SECONDS = {"quick": 1.0, "standard": 20.0, "exhaustive": 600.0}  # of one attack on noise, at one place
# Draws of records and noise, for attacks cheap enough that luck need not decide their verdict. Of a single
# record's label
# there are few outcomes, so it takes more of them.
DRAWS, DRAWS_OF_ONE = 6, 12
CHEAP = 0.5  # CPU seconds
DRAWING = 1 / 12  # of the seconds of all attacks may go into drawing, for several records and for one each

SHOWN_PICTURES = 2  # of one finding


@dataclass(slots=True, kw_only=True)
class AuditBudget:
    """The CPU seconds of one audit, shared out among its attacks in order."""

    name: str
    began: float = field(default_factory=time.process_time)
    drawing: dict[int, float] = field(default_factory=dict)  # seconds spent on draws, by records

    def budget(self, attack: Attack) -> Budget | None:
        """Return what an attack may spend; None when the audit has nothing left for it."""
        each, total = SECONDS[self.name]
        left = total - (time.process_time() - self.began)
        if left <= 0 or (self.name == "quick" and attack.family in HEAVY):
            return None
        preset = Budget.named(self.name)
        if self.name == "standard" and attack.family in HEAVY:
            restarts = 2
        else:
            restarts = preset.restarts
        return replace(preset, seconds=min(each, left), restarts=restarts)

    def draw(self, stage: ReplayedStep, number: int, point: Point) -> ReplayedStep | None:
        """Draw a stage anew; None once drawing has had its share, for on a large model attacks are worth
        more.
        """
        if stage.again is None or self.drawing.get(stage.records, 0.0) > DRAWING * SECONDS[self.name][1]:
            return None
        began = time.process_time()
        other = stage.again(number)
        other.at(point)
        self.drawing[stage.records] = self.drawing.get(stage.records, 0.0) + time.process_time() - began
        return other

    def refusal(self, attack: Attack) -> str:
        """Say why an attack is not run."""
        if self.name == "quick" and attack.family in HEAVY:
            return "not tried: it searches for minutes; run the audit with --budget standard"
        return (
            "not tried: the attacks before it used up the "
            f"{SECONDS[self.name][1]:.0f} CPU seconds of this audit"
        )


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
