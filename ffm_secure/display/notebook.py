"""What a notebook shows: a bar while a run goes on, a small table when it is done."""

from __future__ import annotations

import html
import math
import sys
from collections.abc import Sequence

from ffm_secure.federation import Callback
from ffm_secure.quantities import INFINITE, bound, metric, small
from ffm_secure.records import RoundPlan, RoundRecord, RunSummary


class Callbacks:
    """Tell several callbacks of a run's progress, in order."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self.callbacks = tuple(callbacks)

    def round_started(self, plan: RoundPlan, total: int) -> None:
        """A round was charged and begins."""
        for callback in self.callbacks:
            callback.round_started(plan, total)

    def client_finished(self, finished: int, total: int) -> None:
        """One more client of the round has contributed or was lost."""
        for callback in self.callbacks:
            callback.client_finished(finished, total)

    def round_finished(self, record: RoundRecord) -> None:
        """A round is durable."""
        for callback in self.callbacks:
            callback.round_finished(record)


def in_notebook() -> bool:
    """Tell whether a kernel with a page to draw on runs this code."""
    shell = sys.modules.get("IPython")
    running = None
    if shell is not None and hasattr(shell, "get_ipython"):
        running = shell.get_ipython()
    return type(running).__name__ == "ZMQInteractiveShell"


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Write pairs of a name and a value as a table, every text escaped."""
    lines = (f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{''.join(lines)}</table>"


def summary_rows(summary: RunSummary) -> list[tuple[str, str]]:
    """Return what a run reached and spent, for people; every number in it is in the report."""
    statement = summary.statements[0]
    spent = (
        f"{bound(statement.epsilon)} at delta {small(statement.delta)}"
        if math.isfinite(statement.epsilon)
        else INFINITE
    )
    rows = [
        ("run", f"{summary.name}, {summary.status}"),
        ("rounds", str(len(summary.rounds))),
        (
            summary.metric_name,
            f"{metric(summary.metric_final)} (before training {metric(summary.metric_zero_round)})",
        ),
        ("epsilon", f"{spent}, per {statement.unit}"),
    ]
    if summary.metric_majority is not None:
        rows.insert(3, ("always the commonest class", metric(summary.metric_majority)))
    return [*rows, *(("note", stamp) for stamp in summary.stamps)]
