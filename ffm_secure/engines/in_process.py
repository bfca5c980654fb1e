"""Sites of a federation of machines in one process: for trials, and to compare engines with."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping

from ffm_secure.transport.courier import Deadline, Lost, Reply

Handle = Callable[[str, bytes], bytes | memoryview]
_Arrived = queue.SimpleQueue[tuple[int, bytes | memoryview | None]]


class InProcessCourier:
    """Carry messages by calling each site's `handle` in a thread of its own.

    Guarantee: what a site raises loses that site alone, and says nothing; an answer after the deadline is
    none.
    """

    def __init__(self, sites: Mapping[int, Handle], deadline: Deadline | None = None) -> None:
        self._sites = dict(sites)
        self._deadline = deadline
        self._waiting: dict[int, list[_Arrived]] = {}
        self._lock = threading.Lock()

    def sites(self) -> frozenset[int]:
        """Return the sites that can be written to now."""
        with self._lock:
            return frozenset(self._sites)

    def join(self, site: int, handle: Handle) -> None:
        """Let a site answer from now on."""
        with self._lock:
            self._sites[site] = handle

    def leave(self, site: int) -> None:
        """Lose a site at once, also where an answer of it is waited for."""
        with self._lock:
            self._sites.pop(site, None)
            waiting = self._waiting.pop(site, [])
        for arrived in waiting:
            arrived.put((site, None))

    def send(
        self, stage: str, messages: Mapping[int, bytes], deadline: float | None = None
    ) -> Iterator[Reply]:
        """Call the sites at once; yield each answer as it comes."""
        arrived: _Arrived = queue.SimpleQueue()
        closing: dict[int, float] = {}
        for site, message in messages.items():
            closes = self._closes(message, deadline)
            if closes > time.time() and self._start(site, stage, message, arrived):
                closing[site] = closes
            else:
                yield Reply(site=site, content=Lost(stage=stage))
        while closing:
            patience = max(0.0, max(closing.values()) - time.time())
            try:
                site, content = arrived.get(timeout=patience if patience < threading.TIMEOUT_MAX else None)
            except queue.Empty:
                break
            closes = closing.pop(site, 0.0)
            if closes:
                on_time = content is not None and time.time() <= closes
                yield Reply(
                    site=site, content=content if content is not None and on_time else Lost(stage=stage)
                )
        for site in closing:
            yield Reply(site=site, content=Lost(stage=stage))

    def seconds_at_sites(self) -> float:
        """Return 0: what sites spend is theirs to know."""
        return 0.0

    def close(self) -> None:
        """Call nobody any more."""
        with self._lock:
            self._sites = {}

    def _closes(self, message: bytes, deadline: float | None) -> float:
        if deadline is not None:
            return deadline
        return float("inf") if self._deadline is None else self._deadline(message)

    def _start(self, site: int, stage: str, message: bytes, arrived: _Arrived) -> bool:
        with self._lock:
            handle = self._sites.get(site)
            if handle is not None:
                self._waiting.setdefault(site, []).append(arrived)
        if handle is None:
            return False
        threading.Thread(target=self._call, args=(handle, site, stage, message, arrived), daemon=True).start()
        return True

    def _call(self, handle: Handle, site: int, stage: str, message: bytes, arrived: _Arrived) -> None:
        try:
            content: bytes | memoryview | None = handle(stage, message)
        except Exception:  # why is the site's own business
            content = None
        with self._lock:
            waiting = self._waiting.get(site, [])
            still = arrived in waiting
            if still:
                waiting.remove(arrived)
        if still:
            arrived.put((site, content))
