"""THE LOOP: plan a round, let the sites decide and pay, open the sum, step, record. Read this first.

Who is who: `ServerContext` is the server, `Courier` carries bytes, and behind it each `Site` owns its rows,
its ledger and its keys. Neither side can reach the other but through the courier.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ffm_secure.errors import Interrupted
from ffm_secure.queries import agenda
from ffm_secure.records import RoundPlan, RoundRecord, RunStatus
from ffm_secure.server import rounds
from ffm_secure.server.context import ServerContext
from ffm_secure.storage.run_directory import Store
from ffm_secure.strategies import ServerState
from ffm_secure.transport.courier import Courier

OVER_BUDGET = "the budgets of too many sites do not pay for another round"


class Callback(Protocol):
    """See a run progress; nothing private passes through here."""

    def round_started(self, plan: RoundPlan, total: int) -> None:
        """A round begins."""

    def client_finished(self, finished: int, total: int) -> None:
        """One more client of the round has contributed or was lost."""

    def round_finished(self, record: RoundRecord) -> None:
        """A round is durable."""


class NullCallback:
    """Look at nothing."""

    def round_started(self, plan: RoundPlan, total: int) -> None:
        """Ignore."""

    def client_finished(self, finished: int, total: int) -> None:
        """Ignore."""

    def round_finished(self, record: RoundRecord) -> None:
        """Ignore."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingResult:
    """What the loop leaves behind: the last state, one record a round, and how it ended."""

    state: ServerState
    records: tuple[RoundRecord, ...]
    status: RunStatus
    reason: str = ""


def run(
    server: ServerContext,
    courier: Courier,
    store: Store,
    *,
    start: tuple[ServerState, tuple[RoundRecord, ...]],
    callback: Callback | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainingResult:
    """Train until the rounds or the budgets end; `start` is where the run begins, or where a killed one
    stopped.

    Guarantee: no site learns from its rows before its own ledger holds a reservation for the round: `collect`
    asks the sites, lets them pay, then collects. What was reserved stays spent whatever happens next; an
    aborted round counts as one; a finished round is on disk before the next one begins.
    """
    callback = callback or NullCallback()
    state, records = start
    config = server.spec.config
    total = agenda.rounds(config)
    try:
        while agenda.next_turn(config, records) is not None:
            began = time.perf_counter()
            attempt = store.begin_attempt(len(records) + 1, server.run_id)
            plan = rounds.plan_round(server, len(records) + 1, state, records, attempt=attempt)
            callback.round_started(plan, total)
            result = rounds.collect(server, plan, state, courier, callback.client_finished)
            if result.cannot_pay:
                names = ", ".join(server.spec.owners[site] for site in result.cannot_pay)
                reason = f"{OVER_BUDGET}, by what they say: {names}"
                return TrainingResult(state=state, records=records, status="budget exhausted", reason=reason)
            state, result = rounds.advance(server, plan, state, result, records)
            record = rounds.record(server, plan, result, state, records, courier, began=began)
            best = rounds.is_best(records, record, higher=server.task.higher_is_better)
            store.commit(state, record, run_id=server.run_id, best=best)
            records = (*records, record)
            callback.round_finished(record)
            if should_stop() and agenda.next_turn(config, records) is not None:
                raise Interrupted(
                    f"stopped after round {len(records)}, which cost nothing beyond it; run the same "
                    "command again to continue"
                )
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped after round {len(records)}, inside the next: whoever had paid for it has paid "
            f"({server.spec.config.privacy.spare_rounds} spare attempts in all, privacy.spare_rounds); run "
            "the same command again to continue"
        ) from None
    return TrainingResult(state=state, records=records, status="complete")
