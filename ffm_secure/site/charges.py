"""Charge every data owner's ledger for a round before its data are touched."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from defenses.dp import Charge, Event, Ledger
from ffm_secure.errors import StoreError
from ffm_secure.records import RoundPlan, RoundRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Charges:
    """Hold what one run charges to its owners' ledgers each round.

    Guarantee: `reserve` either charges the whole cohort or nobody; what is reserved counts as spent from then on. Only a round
    whose noise is replayed from a seed (a test) may repeat a charge without paying twice, because it repeats the very release.
    """

    ledger: Ledger
    owners: Sequence[str]  # by client index
    dataset: str
    unit: str
    delta: float
    event: Event
    replay_key: bytes = b""  # empty for real noise; a digest of seed and run for seeded noise

    def reserve(self, plan: RoundPlan) -> tuple[Any, ...]:
        """Reserve one round for its cohort.

        Raises:
          BudgetExceeded: some owner cannot pay; nobody was charged.
        """
        if not plan.cohort:
            return ()  # a public phase touches nobody's data
        return self.ledger.reserve(
            [
                Charge(
                    owner=self.owners[client],
                    dataset=self.dataset,
                    event=self.event,
                    run=plan.run_id.hex(),
                    round=plan.round,
                    release="update",
                    commitment=self._commitment(plan, client),
                )
                for client in plan.cohort
            ]
        )

    def require(self, records: Sequence[RoundRecord], run_id: bytes) -> None:
        """Refuse to continue a run whose past this ledger does not hold: a lost or foreign ledger would undercount.

        Raises:
          StoreError: a finished round of some client is not in the ledger.
        """
        held = {
            (entry.owner, entry.round)
            for entry in self.ledger.entries()
            if entry.kind == "reserve" and entry.run == run_id.hex()
        }
        missing = [
            (record.round, self.owners[client])
            for record in records
            for client in record.cohort
            if (self.owners[client], record.round) not in held
        ]
        if missing and not self.replay_key:
            raise StoreError(
                f"the ledger lacks {len(missing)} charges of finished rounds (first: round {missing[0][0]} of {missing[0][1]}); "
                "restore it, or start a new run: what was spent cannot be forgotten"
            )

    def spend(self, reservations: Sequence[Any]) -> None:
        """Note that the reserved round was released."""
        self.ledger.spend(reservations)

    def epsilon(self) -> float:
        """Return the largest epsilon any owner has spent on this data set."""
        return max(
            self.ledger.epsilon(owner, self.dataset, self.unit, self.delta) for owner in set(self.owners)
        )

    def largest_history(self) -> tuple[Event, ...]:
        """Return the events of the owner who has spent most."""
        worst = max(sorted(set(self.owners)), key=self.epsilon_of)
        return self.ledger.events(worst, self.dataset, self.unit)

    def epsilon_of(self, owner: str) -> float:
        """Return what one owner has spent."""
        return self.ledger.epsilon(owner, self.dataset, self.unit, self.delta)

    def _commitment(self, plan: RoundPlan, client: int) -> bytes:
        if not self.replay_key:
            return b""
        text = f"{plan.round}|{client}|{plan.fingerprint}|{plan.mechanism}".encode()
        return hashlib.sha256(self.replay_key + text).digest()
