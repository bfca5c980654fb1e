"""One row an attack, observers as columns: the one count of an audit, on every page and in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ffm_secure.records import AuditFinding, Observer
from ffm_secure.report.markup import OBSERVERS
from ffm_secure.report.release import NOT_TRIED

Outcome = Literal["leaked", "not leaked", "inconclusive", "not tried", "not applicable"]
# Answers come before what proves nothing; of several findings of one attack the first of these counts.
ORDER: tuple[Outcome, ...] = ("leaked", "not leaked", "inconclusive", "not tried", "not applicable")
ANSWERS: tuple[Outcome, ...] = ("leaked", "not leaked")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttackRow:
    """How one attack ended for each observer, over all points and rounds it was tried at."""

    attack: str
    cells: Mapping[Observer, Outcome]
    findings: tuple[AuditFinding, ...]

    @property
    def outcome(self) -> Outcome:
        """Return how it ended at worst."""
        return min(self.cells.values(), key=ORDER.index)

    @property
    def telling(self) -> AuditFinding:
        """Return the finding its outcome rests on."""
        return next(item for item in self.findings if outcome_of(item) == self.outcome)


def outcome_of(finding: AuditFinding) -> Outcome:
    """Return the verdict, or that the attack was never started."""
    return "not tried" if finding.measure == NOT_TRIED else finding.verdict


def attack_rows(findings: Sequence[AuditFinding]) -> tuple[AttackRow, ...]:
    """Put findings together by attack, answers first, worst first; the order of the audit within."""
    attacks: dict[str, list[AuditFinding]] = {}
    for finding in findings:
        attacks.setdefault(finding.attack, []).append(finding)
    rows = [
        AttackRow(attack=attack, cells=_cells(own), findings=tuple(own)) for attack, own in attacks.items()
    ]
    return tuple(sorted(rows, key=lambda row: ORDER.index(row.outcome)))


def _cells(findings: Sequence[AuditFinding]) -> dict[Observer, Outcome]:
    cells: dict[Observer, Outcome] = {}
    for finding in findings:
        outcome = outcome_of(finding)
        cells[finding.observer] = min(cells.get(finding.observer, outcome), outcome, key=ORDER.index)
    return cells


def observers_of(rows: Sequence[AttackRow]) -> tuple[Observer, ...]:
    """Return the observers any attack was judged for, from the public to the best informed."""
    present = {observer for row in rows for observer in row.cells}
    return tuple(observer for observer in OBSERVERS if observer in present)


def count_outcomes(rows: Sequence[AttackRow]) -> dict[Outcome, int]:
    """Count attacks by how they ended at worst, in the order of `ORDER`, without those there are none of."""
    outcomes = [row.outcome for row in rows]
    return {outcome: outcomes.count(outcome) for outcome in ORDER if outcome in outcomes}
