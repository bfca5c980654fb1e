"""The coordinator's process of `benchmarks.faults`: `python -m benchmarks.fault_parties PLACE ENGINE`.

What every site sealed and what the coordinator opened is recorded with the product's own means: the record of
a site for its audit of itself, and the transcript of a server.
"""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from ffm_secure.config.federated import run_digest
from ffm_secure.engines import headquarters
from ffm_secure.engines.headquarters import ReadyRun
from ffm_secure.engines.nvflare import running
from ffm_secure.engines.nvflare.folders import SITE_SOCKET
from ffm_secure.engines.nvflare.courier import Patience
from ffm_secure.server.transcript import Transcript
from ffm_secure.storage.observations import ObservationStore
from ffm_secure.transport.courier import Courier, Lost, Reply
from ffm_secure.transport.envelope import header_of
from ffm_secure.transport.local_socket import Gone, ask

OBSERVED = "observed"
COORDINATOR = "coordinator"


class DoorCourier:
    """Carry bytes to the sockets of sites on this machine, each in a thread; who has gone is lost at once."""

    def __init__(self, doors: Sequence[Path]) -> None:
        self._doors = tuple(doors)

    def send(self, stage: str, messages: Mapping[int, bytes]) -> Iterator[Reply]:
        """Ask each site; yield each answer as it comes."""
        arrived: queue.SimpleQueue[Reply] = queue.SimpleQueue()
        for site in messages:
            words = (site, stage, messages[site], arrived)
            threading.Thread(target=self._ask, args=words, daemon=True).start()
        for _ in messages:
            yield arrived.get()

    def _ask(self, site: int, stage: str, message: bytes, arrived: queue.SimpleQueue[Reply]) -> None:
        content: bytes | Lost = Lost(stage=stage)
        seconds = header_of(message).deadline - time.time()
        with contextlib.suppress(Gone):
            words = {"ask": "answer", "stage": stage}
            heading, answer = ask(self._doors[site] / SITE_SOCKET, words, message, seconds=seconds)
            content = answer if heading.get("answered") else content
        arrived.put(Reply(site=site, content=content))

    def seconds_at_sites(self) -> float:
        """Return 0: what sites spend is theirs to know."""
        return 0.0

    def close(self) -> None:
        """Nothing is open between two messages."""


def coordinate(place: Path, engine: str) -> None:
    """Run the coordinator of a federation to its end, from where an earlier one was killed."""
    torch.set_num_threads(1)
    quarters = place / COORDINATOR
    ready = headquarters.prepare_run(quarters, quarters / "run.toml")
    ready.coordinator.server.transcript = _transcript(ready)
    with contextlib.closing(ready), _courier(place, ready, engine) as courier:
        ready.coordinator.run(courier)


def _transcript(ready: ReadyRun) -> Transcript:
    rounds = frozenset(range(1, 1 + ready.loaded.config.federation.rounds))
    store = ObservationStore(folder=ready.folder / OBSERVED, limit=1 << 33)
    return Transcript(spec=ready.loaded.spec, store=store, rounds=rounds, observers=("server",))


@contextlib.contextmanager
def _courier(place: Path, ready: ReadyRun, engine: str) -> Iterator[Courier]:
    names = ready.coordinator.roster.names
    if engine == "plain":
        yield DoorCourier([place / name for name in names])
        return
    digest = run_digest(ready.loaded.config)
    patience = Patience(start=240.0, join=120.0, renew=10.0)  # many processes start on few cores
    with running.open_courier(
        place / COORDINATOR,
        names,
        digest,
        deadline=lambda message: header_of(message).deadline,
        patience=patience,
    ) as courier:
        yield courier


def main() -> None:
    """Be the coordinator."""
    coordinate(Path(sys.argv[1]), sys.argv[2])


if __name__ == "__main__":
    main()
