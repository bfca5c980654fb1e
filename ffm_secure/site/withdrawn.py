"""What a plan says of rows and owners that have left a ledger."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from defenses.dp import Ledger
from defenses.dp.records import Records


def objections(ledger: Ledger, place: Path, rows: Sequence[Records], owners: Sequence[str]) -> list[str]:
    """Return why a run may not use these rows of these owners; nothing is written."""
    if not ledger.withdrawals():
        return []
    withdrawals = {}
    for withdrawal in ledger.withdrawals(ledger.known_blocks(rows)):
        withdrawals[withdrawal.sequence] = withdrawal
    for withdrawal in ledger.withdrawals():
        if withdrawal.owner in owners:
            withdrawals[withdrawal.sequence] = withdrawal
    problems = []
    for _, withdrawal in sorted(withdrawals.items()):
        problems.append(
            f"task.data: holds rows that {place} charges no more ({withdrawal.words()}); leave them out, or "
            "say privacy.ledger = 'run' if they are fictitious or public"
        )
    return problems
