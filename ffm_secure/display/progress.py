"""Progress for people: a bar with the time left, one line a round, and the attack an audit tries."""

from __future__ import annotations

import math
import sys

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ffm_secure.display.console import SafeConsole
from ffm_secure.quantities import bound, metric, size
from ffm_secure.records import RoundPlan, RoundRecord


def round_line(record: RoundRecord, *, rounds: int, budget: float) -> str:
    """Say one round in one line; a budget of 0 is one that is not known here."""
    spent = bound(record.epsilon_spent)
    if math.isfinite(record.epsilon_spent) and budget:
        spent = f"{spent:<5} / {budget:g}"
    answered = (
        f"{len(record.survivors)}/{len(record.cohort)}" if record.phase == "private" else "none, public phase"
    )
    note = f"  ABORTED: {record.aborted}" if record.aborted else ""
    return (
        f"round {record.round:>{len(str(rounds))}}/{rounds}  loss {record.loss:7.4f}  "
        f"{record.metric_name} {metric(record.metric):>8}  "
        f"epsilon {spent}  clients {answered}  up {size(record.bytes_up)}  down "
        f"{size(record.bytes_down)}  "
        f"{record.seconds:.1f} s{note}"
    )


def _progress(description: str, console: SafeConsole, *, quiet: bool) -> Progress:
    """Return bars with count, time gone and time left; none where nobody sees them move."""
    return Progress(
        TextColumn(description),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    )


class Bars:
    """Show two bars, rounds and clients, and print a line as each round ends."""

    def __init__(self, *, rounds: int, budget: float, quiet: bool, finished: int = 0) -> None:
        self.rounds, self.budget, self.quiet = rounds, budget, quiet
        console = SafeConsole(
            file=sys.stderr if not sys.stdout.isatty() else sys.stdout, highlight=False, soft_wrap=True
        )
        self.console = console
        self.progress = _progress("{task.description}", console, quiet=quiet)
        self.of_rounds = self.progress.add_task("rounds", total=rounds, completed=finished)
        self.of_clients = self.progress.add_task("clients", total=None)

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def round_started(self, plan: RoundPlan, total: int) -> None:
        """Reset the bar of clients."""
        self.progress.update(self.of_rounds, completed=plan.round - 1)
        self.progress.reset(self.of_clients, total=len(plan.cohort))

    def client_finished(self, finished: int, total: int) -> None:
        """Advance the bar of clients."""
        self.progress.update(self.of_clients, completed=finished, total=total)

    def round_finished(self, record: RoundRecord) -> None:
        """Print the round's line."""
        self.progress.update(self.of_rounds, completed=record.round)
        if not self.quiet:
            self.console.print(round_line(record, rounds=self.rounds, budget=self.budget), markup=False)


class AuditBar:
    """Show one bar over the attacks of an audit, named by the one that is tried, with the time left."""

    def __init__(self, *, quiet: bool, console: SafeConsole | None = None) -> None:
        console = console or SafeConsole(file=sys.stderr, highlight=False, soft_wrap=True)
        self.progress = _progress("auditing: {task.description}", console, quiet=quiet)
        self.task = self.progress.add_task("looks at the update", total=None)

    def __enter__(self) -> AuditBar:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def watch(self, name: str, place: int, total: int) -> None:
        """Name what is tried next, and how many were tried before it."""
        self.progress.update(self.task, description=name, completed=place, total=total)
