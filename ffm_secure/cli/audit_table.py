"""An audit in the terminal, for its owner: a row for each attack with an answer, observers as columns."""

from __future__ import annotations

from collections.abc import Sequence

from ffm_secure.quantities import bound, metric
from ffm_secure.records import AuditFinding, AuditSummary
from ffm_secure.report.attack_rows import ANSWERS, AttackRow, attack_rows, observers_of

_INDENT = " " * 11


def audit_lines(audit: AuditSummary) -> list[str]:
    """Show what leaked, then what did not with its control; the rest as counts and names."""
    rows = attack_rows(audit.findings)
    answered = [row for row in rows if row.outcome in ANSWERS]
    lines = [f"  audit    {audit.sentence}"]
    if answered:
        lines += [f"{_INDENT}{line}" for line in _table(answered)]
    for outcome in ("inconclusive", "not tried", "not applicable"):
        names = [row.attack for row in rows if row.outcome == outcome]
        if names:
            lines.append(f"{_INDENT}{len(names)} {outcome}: {', '.join(names)}")
    if audit.epsilon_lower is not None:
        proven = bound(audit.epsilon_lower, upper=False)
        lines.append(f"{_INDENT}lower bound on epsilon {proven} ({audit.epsilon_lower_method})")
    return lines


def _table(rows: Sequence[AttackRow]) -> list[str]:
    """Lay out rows in columns as wide as what stands in them."""
    observers = observers_of(rows)
    cells = [["attack", *observers, "score at worst"]]
    for row in rows:
        verdicts = [row.cells.get(observer, "") for observer in observers]
        cells.append([row.attack, *verdicts, _numbers(row.telling)])
    widths = [max(len(line[place]) for line in cells) for place in range(len(cells[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]


def _numbers(finding: AuditFinding) -> str:
    """Write a score with what guessing and the undefended control reach."""
    if finding.score is None:
        return finding.measure
    beside = (
        ("as observed", finding.observed),
        ("guessing", finding.baseline),
        ("defence off", finding.control),
    )
    numbers = [f"{name} {metric(value)}" for name, value in beside if value is not None]
    return ", ".join([f"{finding.measure} {metric(finding.score)}", *numbers])
