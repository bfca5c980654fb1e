"""One data owner's account: reserve before a row is touched, spend after the release, tell the server a
receipt.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from defenses.dp import Charge, Event, Ledger, Reservation
from defenses.errors import BudgetExceeded
from ffm_secure.config.run_file import Privacy
from ffm_secure.records import LEARN, NOT_BEGUN, Receipt, RoundPlan, RoundRecord
from ffm_secure.site.allowance import within_run
from ffm_secure.site.stage_accounts import Payment, StageAccounts


def always(round: int) -> bool:
    """Tell that an owner's rows are read in every round it takes part in."""
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteLedger:
    """Hold what one owner's ledger is asked in one run.

    Guarantee: `reserve` charges the blocks of this owner's rows alone, and what is reserved counts as spent
    from then on. A round is refused that would pass the rows' lifetime budget or this run's own epsilon. Only
    a round whose noise is replayed from a seed (a test) may repeat a charge without paying twice, because it
    repeats the very release.
    """

    ledger: Ledger
    owner: str
    index: int
    dataset: str  # a label; rows are known by their blocks
    blocks: tuple[int, ...]  # none for an owner without rows, who pays nothing
    privacy: Privacy
    unit: str
    delta: float
    event: Event
    guaranteed: bool  # whether the run promises anything, so that epsilon means something
    replay_key: bytes = b""  # empty for real noise; a digest of seed and run for seeded noise
    answers: Mapping[str, Event] = field(default_factory=dict)  # what an answer to each query is charged as
    held_back: Mapping[str, float] = field(
        default_factory=dict
    )  # queries of rows never learned from: their epsilon
    held_back_blocks: tuple[int, ...] = ()
    stages: StageAccounts | None = None  # of a stream, whose rounds charge what has arrived alone
    learns: Callable[[int], bool] = always  # whether this owner's rows are read in a round of learning

    def __repr__(self) -> str:
        return f"SiteLedger(owner={self.owner!r})"

    def affords(self, plan: RoundPlan) -> bool:
        """Tell whether the budget pays for a round; nothing is written."""
        charges = self._charges(plan)
        if not charges:
            return True
        try:
            self._check_run(plan)
            self.ledger.check(charges)
        except BudgetExceeded:
            return False
        return True

    def reserve(self, plan: RoundPlan) -> tuple[Reservation, ...]:
        """Pay for a round.

        Raises:
          BudgetExceeded: the owner cannot pay; nothing was charged.
        """
        charges = self._charges(plan)
        if not charges:
            return ()
        self._check_run(plan)
        return self.ledger.reserve(charges)

    def _check_run(self, plan: RoundPlan) -> None:
        """Refuse a round beyond this run's own epsilon; aborted attempts count."""
        if self.replay_key:
            return
        if self.stages is not None:
            self._check_stages(self.stages, plan)
            return
        apart = {self.answers[query] for query in self.held_back}
        there = plan.query in self.held_back
        charged = [
            (event, count)
            for event, count in self.ledger.charged(self.owner, plan.run_id.hex())
            if (event in apart) == there
        ]
        epsilon = sum(self.held_back.values()) if there else self.privacy.epsilon
        if not within_run(charged, self._event_of(plan), self.privacy, epsilon=epsilon):
            rounds = sum(count for _, count in charged) + 1
            raise BudgetExceeded(
                f"{self.owner}: {rounds} rounds of this run cost more than its epsilon {epsilon:g}"
            )

    def _check_stages(self, stages: StageAccounts, plan: RoundPlan) -> None:
        """Refuse a round beyond this run's own epsilon for any kind of row it may draw."""
        charged = self.ledger.charged(self.owner, plan.run_id.hex())
        for due in stages.due(plan.turn, self._event_of(plan), charged):
            if not within_run(due.before, due.event, self.privacy):
                raise BudgetExceeded(
                    f"{self.owner}: a round of stage {stages.stage(plan.turn) + 1} costs some rows more than "
                    f"the run's epsilon {self.privacy.epsilon:g}"
                )

    def _event_of(self, plan: RoundPlan) -> Event:
        return self.event if plan.query == LEARN else self.answers[plan.query]

    def _blocks_of(self, plan: RoundPlan) -> tuple[int, ...]:
        if plan.query == LEARN and not self.learns(plan.round):
            return ()  # the site adds noise and reads no row
        return self.held_back_blocks if plan.query in self.held_back else self.blocks

    def spend(self, reservations: Sequence[Reservation]) -> None:
        """Note that the reserved round was released."""
        self.ledger.spend(reservations)

    def missing(self, records: Sequence[RoundRecord], run_id: bytes) -> tuple[int, ...]:
        """Return the rounds this site was charged for and its ledger does not hold: a lost or foreign ledger
        undercounts.
        """
        if self.replay_key or not (self.blocks or self.held_back_blocks):
            return ()
        entries = self.ledger.entries(owner=self.owner)
        charged = set()
        for entry in entries:
            if entry.kind == "reserve" and entry.run == run_id.hex():
                charged.add(entry.round)
        taken_part = (
            record.round
            for record in records
            if self.index in record.cohort
            and record.dropped.get(self.index) not in NOT_BEGUN
            and (record.query != LEARN or self.learns(record.round))
        )
        return tuple(number for number in taken_part if number not in charged)

    def epsilon(self) -> float:
        """Return what the row of this owner that has spent most has spent, in all runs."""
        everything = (*self.blocks, *self.held_back_blocks)
        if everything:
            return self.ledger.epsilon_of(everything, self.unit, self.delta)
        return 0.0

    def events(self) -> tuple[Event, ...]:
        """Return what that row went through, equal events together."""
        return self.ledger.events_of((*self.blocks, *self.held_back_blocks), self.unit, self.delta)

    def receipt(self) -> Receipt:
        """Return what the server may know of the ledger."""
        head = self.ledger.head()
        epsilon = math.inf
        if self.guaranteed:
            epsilon = self.epsilon()
        return Receipt(epsilon=epsilon, entries=head.sequence, head=head.hash)

    def _charges(self, plan: RoundPlan) -> list[Charge]:
        """Return who pays what for a round; nothing where it draws from none of this owner's rows."""
        event, blocks = self._event_of(plan), self._blocks_of(plan)
        payments: tuple[Payment, ...] = (Payment(event=event, blocks=blocks),)
        if self.stages is not None:
            payments = self.stages.payments(plan.turn, event)
        return [
            Charge(
                owner=self.owner,
                dataset=self.dataset,
                event=payment.event,
                run=plan.run_id.hex(),
                round=plan.round,
                release="update" if plan.query == LEARN else plan.query,
                commitment=self._commitment(plan, place),
                blocks=payment.blocks,
            )
            for place, payment in enumerate(payments)
            if payment.blocks
        ]

    def _commitment(self, plan: RoundPlan, place: int) -> bytes:
        if not self.replay_key:
            return b""
        text = f"{plan.round}|{self.index}|{plan.fingerprint}|{plan.mechanism}"
        if place:
            text += f"|{place}"
        return hashlib.sha256(self.replay_key + text.encode()).digest()
