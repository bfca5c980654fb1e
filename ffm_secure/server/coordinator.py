"""The server of a federation of machines: it proposes a run to sites that decide for themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ffm_secure import federation
from ffm_secure.federation import Callback, TrainingResult
from ffm_secure.server.context import ServerContext
from ffm_secure.storage.run_directory import Store
from ffm_secure.transport.courier import Courier


@dataclass(slots=True, kw_only=True)
class Coordinator:
    """Hold what a coordinator has: the server of a run and its store. No ledger, no row, no key of a site."""

    server: ServerContext
    store: Store
    callback: Callback | None = None
    should_stop: Callable[[], bool] = field(default=lambda: False)

    def run(self, courier: Courier) -> TrainingResult:
        """Train over a courier until the rounds or the budgets end, from where the store stopped.

        The courier carries bytes it does not read, to sites by their number on the roster; whoever does not
        answer by the deadline in a message's header (`transport.envelope.header_of`) is lost to that stage.
        """
        resumed = self.store.resume()
        state = self.server.spec.strategy.start(self.server.trainable.flatten().cpu())
        start = (state, ()) if resumed is None else resumed[:2]
        return federation.run(
            self.server,
            courier,
            self.store,
            start=start,
            callback=self.callback,
            should_stop=self.should_stop,
        )
