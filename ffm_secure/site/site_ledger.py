"""One data owner's account: reserve before a row is touched, spend after the release, tell the server a receipt."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from defenses.dp import Charge, Event, Ledger, Reservation
from defenses.errors import BudgetExceeded
from ffm_secure.records import DECLINED, Receipt, RoundPlan, RoundRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteLedger:
    """Hold what one owner's ledger is asked in one run.

    Guarantee: `reserve` charges this owner alone, and what is reserved counts as spent from then on. Only a round whose noise
    is replayed from a seed (a test) may repeat a charge without paying twice, because it repeats the very release.
    """

    ledger: Ledger
    owner: str
    index: int
    dataset: str
    unit: str
    delta: float
    event: Event
    guaranteed: bool  # whether the run promises anything, so that epsilon means something
    replay_key: bytes = b""  # empty for real noise; a digest of seed and run for seeded noise

    def __repr__(self) -> str:
        return f"SiteLedger(owner={self.owner!r})"

    def affords(self, plan: RoundPlan) -> bool:
        """Tell whether the budget pays for a round; nothing is written."""
        try:
            self.ledger.check([self._charge(plan)])
        except BudgetExceeded:
            return False
        return True

    def reserve(self, plan: RoundPlan) -> tuple[Reservation, ...]:
        """Pay for a round.

        Raises:
          BudgetExceeded: the owner cannot pay; nothing was charged.
        """
        return self.ledger.reserve([self._charge(plan)])

    def spend(self, reservations: Sequence[Reservation]) -> None:
        """Note that the reserved round was released."""
        self.ledger.spend(reservations)

    def missing(self, records: Sequence[RoundRecord], run_id: bytes) -> tuple[int, ...]:
        """Return the rounds this site was charged for and its ledger does not hold: a lost or foreign ledger undercounts."""
        if self.replay_key:
            return ()
        entries = self.ledger.entries(owner=self.owner)
        charged = {entry.round for entry in entries if entry.kind == "reserve" and entry.run == run_id.hex()}
        taken_part = (
            record.round
            for record in records
            if self.index in record.cohort and record.dropped.get(self.index) != DECLINED
        )
        return tuple(number for number in taken_part if number not in charged)

    def epsilon(self) -> float:
        """Return what this owner has spent."""
        return self.ledger.epsilon(self.owner, self.dataset, self.unit, self.delta)

    def events(self) -> tuple[Event, ...]:
        """Return what this owner has paid for."""
        return self.ledger.events(self.owner, self.dataset, self.unit)

    def receipt(self) -> Receipt:
        """Return what the server may know of the ledger."""
        head = self.ledger.head()
        epsilon = self.epsilon() if self.guaranteed else math.inf
        return Receipt(epsilon=epsilon, entries=head.sequence, head=head.hash)

    def _charge(self, plan: RoundPlan) -> Charge:
        return Charge(
            owner=self.owner,
            dataset=self.dataset,
            event=self.event,
            run=plan.run_id.hex(),
            round=plan.round,
            release="update",
            commitment=self._commitment(plan),
        )

    def _commitment(self, plan: RoundPlan) -> bytes:
        if not self.replay_key:
            return b""
        text = f"{plan.round}|{self.index}|{plan.fingerprint}|{plan.mechanism}".encode()
        return hashlib.sha256(self.replay_key + text).digest()
