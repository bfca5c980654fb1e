"""The server of a federation of machines: it proposes a run to sites that decide for themselves."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ffm_secure import federation
from ffm_secure.agreed.agreement import RunTerms
from ffm_secure.errors import StoreError
from ffm_secure.federation import Callback, TrainingResult
from ffm_secure.protection.masked import fewest_to_open
from ffm_secure.records import LEARN, RoundRecord
from ffm_secure.server.context import ServerContext
from ffm_secure.coordinator.sealed_courier import Proposer, SealedCourier, Watch
from ffm_secure.server.timetable import Timetable
from ffm_secure.storage.run_directory import Store
from ffm_secure.strategies import ServerState
from ffm_secure.transport.courier import Courier
from ffm_secure.transport.envelope import Sign
from ffm_secure.transport.receipts import SignedReceipt
from ffm_secure.transport.roster import FederationRoster


@dataclass(slots=True, kw_only=True)
class Coordinator:
    """Hold what a coordinator has: the server of a run, its store, and the key it signs its messages with. No
    ledger, no row, no key of a site.
    """

    server: ServerContext
    store: Store
    roster: FederationRoster
    terms: RunTerms
    sign: Sign = field(repr=False)
    timetable: Timetable = Timetable()
    watch: Watch | None = None
    callback: Callback | None = None
    should_stop: Callable[[], bool] = lambda: False
    clock: Callable[[], float] = time.time
    receipts: dict[str, SignedReceipt] = field(default_factory=dict)  # the newest of every site

    def run(self, courier: Courier) -> TrainingResult:
        """Train over a courier until the rounds or the budgets end, from where the store stopped.

        The courier carries bytes it does not read, to sites by their number on the roster; whoever does not
        answer by the deadline in a message's header (`transport.envelope.header_of`) is lost to that stage.
        """
        start = self.begin()
        sealed = self.sealed(courier)
        try:
            return federation.run(
                self.server,
                sealed,
                self.store,
                start=start,
                callback=self.callback,
                should_stop=self.should_stop,
            )
        finally:
            self.receipts.update(sealed.receipts)

    def begin(self) -> tuple[ServerState, tuple[RoundRecord, ...]]:
        """Return where the run begins, or where a stopped coordinator left it: under the same id.

        Raises:
          StoreError: what is stored does not fit this model.
        """
        trainable, resumed = self.server.trainable, self.store.resume()
        if resumed is None:
            self.server.run_id = self.store.run_begun() or self.server.run_id
            return self.server.spec.strategy.start(trainable.flatten().cpu()), ()
        state, records, self.server.run_id = resumed
        if state.vector.numel() != trainable.size:
            raise StoreError(
                f"the checkpoint holds {state.vector.numel()} numbers, this run trains {trainable.size}"
            )
        return state, records

    def sealed(self, courier: Courier) -> SealedCourier:
        """Return the courier of the run that `begin` has named."""
        proposer = Proposer(
            run=self.server.run_id,
            name=self.server.spec.config.name,
            terms=self.terms,
            roster=self.roster,
            sign=self.sign,
            fewest=fewest_to_open(self.server.spec.config) * self.server.spec.fewest_groups(LEARN),
            timetable=self.timetable,
            clock=self.clock,
        )
        return SealedCourier(courier, proposer, self.watch)
