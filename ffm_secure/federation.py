"""THE LOOP: plan a round, charge it, collect sealed updates, open the sum, step, record. Read this first."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

from defenses.errors import BudgetExceeded
from ffm_secure.engines import Engine, LocalEngine, RoundResult
from ffm_secure.engines.setup import Setup
from ffm_secure.errors import Interrupted
from ffm_secure.records import RoundPlan, RoundRecord, RunStatus
from ffm_secure.server import rounds as server
from ffm_secure.storage.run_directory import Store
from ffm_secure.strategies import ServerState


class Callback(Protocol):
    """See a run progress; nothing private passes through here."""

    def round_started(self, plan: RoundPlan, total: int) -> None:
        """A round was charged and begins."""

    def client_finished(self, done: int, total: int) -> None:
        """One more client of the round has contributed or was lost."""

    def round_finished(self, record: RoundRecord) -> None:
        """A round is durable."""


class NullCallback:
    """Callback nothing."""

    def round_started(self, plan: RoundPlan, total: int) -> None:
        """Ignore."""

    def client_finished(self, done: int, total: int) -> None:
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
    setup: Setup, store: Store, *, watch: Callback | None = None, engine: Engine | None = None
) -> TrainingResult:
    """Train until the rounds or the budget end; continue where a killed run stopped.

    Guarantee: no client's data is touched before its ledger holds a reservation for the round; what was reserved stays spent
    whatever happens next; a finished round is on disk before the next one begins.
    """
    watch, engine = watch or NullCallback(), engine or LocalEngine(setup)
    state, records = _begin(setup, store)
    try:
        for number in range(len(records) + 1, setup.config.federation.rounds + 1):
            began = time.perf_counter()
            plan = server.plan_round(setup, number, state, records)
            watch.round_started(plan, setup.config.federation.rounds)
            reservations = setup.charges.reserve(plan)
            outcome = (
                engine.collect(plan, state.vector, watch.client_finished)
                if plan.cohort
                else RoundResult(sum=None)
            )
            state = server.advance(setup, plan, state, outcome)
            setup.charges.spend(reservations)
            record = server.record(setup, plan, outcome, state, records, began=began)
            store.commit(state, record, run_id=setup.run_id)
            records = (*records, record)
            watch.round_finished(record)
    except BudgetExceeded as refusal:
        return TrainingResult(state=state, records=records, status="budget exhausted", reason=str(refusal))
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped after round {len(records)}; run the same command again to continue"
        ) from None
    finally:
        engine.close()
    return TrainingResult(state=state, records=records, status="complete")


def _begin(setup: Setup, store: Store) -> tuple[ServerState, tuple[RoundRecord, ...]]:
    resumed = store.resume()
    if resumed is None:
        return setup.prepared.strategy.start(setup.trainable.flatten().cpu()), ()
    state, records, run_id = resumed
    setup.adopt(state, records, run_id)
    return state, records
