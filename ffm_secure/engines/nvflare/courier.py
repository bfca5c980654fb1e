"""A courier over NVFlare: the coordinator's process keeps its state, the engine's jobs carry its bytes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from ffm_secure.engines.nvflare.desk import Desk
from ffm_secure.engines.nvflare.enrolment import relay_name
from ffm_secure.engines.nvflare.folders import COURIER_SOCKET
from ffm_secure.engines.nvflare.jobs import Arrived, Job, JobKeeper, Patience
from ffm_secure.errors import FfmError
from ffm_secure.transport.courier import Deadline, Lost, Reply
from ffm_secure.transport.local_socket import Door, Words

__all__ = ["NVFlareCourier", "Patience"]
_GRACE = 0.5  # seconds an answer may be on its way between two processes of this machine


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A message that was written."""

    site: int
    closes: float  # seconds since 1970
    job: Job


class NVFlareCourier:
    """Carry messages to sites by their number in `sites`, in as many jobs as it takes.

    `hosts` says of a site whose relay carries for it, where that is another's: several sites in one process.

    A job is begun with the sites that are connected. A site that lost its process, or came late, is lost
    until a job has been begun beside it, which happens by itself; so it does after a fall of the server.

    Guarantee: every site that was written to is answered for once, with its bytes or as lost; an answer that
    comes after the deadline is dropped, by the engine and by its number. Safe to call from several threads.
    """

    def __init__(
        self,
        *,
        server: Path,
        submitter: Path,
        submitter_name: str,
        sites: Sequence[str],
        hosts: Mapping[str, str] = MappingProxyType({}),
        run: str,
        patience: Patience | None = None,
        deadline: Deadline | None = None,
    ) -> None:
        self._sites = tuple(sites)
        self._relays = tuple(relay_name(hosts.get(name, name)) for name in sites)
        self._patience = patience or Patience()
        self._deadline = deadline
        self._numbers = itertools.count(1)
        self._keeper = JobKeeper(
            Desk(submitter, submitter_name),
            Door(server / COURIER_SOCKET),
            tuple(dict.fromkeys(self._relays)),
            run,
            self._patience,
        )

    @property
    def jobs_begun(self) -> int:
        """Return how many jobs were begun."""
        return self._keeper.begun

    def sites(self) -> frozenset[int]:
        """Return the sites that can be written to now."""
        joined = self._keeper.joined()
        return frozenset(number for number, name in enumerate(self._relays) if name in joined)

    def open(self, *, smallest: int, seconds: float) -> None:
        """Wait until so many sites have joined.

        Raises:
          FfmError: they have not in time; it names who is missing.
        """
        closes = time.monotonic() + seconds
        while len(self.sites()) < smallest:
            if time.monotonic() > closes:
                raise FfmError(self._missing(smallest, seconds))
            time.sleep(0.1)

    def send(
        self, stage: str, messages: Mapping[int, bytes], deadline: float | None = None
    ) -> Iterator[Reply]:
        """Send each site its message; yield each answer as it comes.

        `deadline` is in seconds since 1970; without one, the messages' own deadlines hold.
        """
        arrived = Arrived()
        try:
            yield from self._send(stage, messages, deadline, arrived)
        finally:
            arrived.leave()

    def _send(
        self, stage: str, messages: Mapping[int, bytes], deadline: float | None, arrived: Arrived
    ) -> Iterator[Reply]:
        asked: dict[int, _Asked] = {}
        for site in messages:
            message = messages[site]
            closes = self._closes(message, deadline)
            self._keeper.wait(closes)
            job, number = self._keeper.job_of(self._relays[site]), next(self._numbers)
            if job is not None and self._post(job, number, site, stage, message, closes, arrived):
                asked[number] = _Asked(site=site, closes=closes, job=job)
            else:
                yield Reply(site=site, content=Lost(stage=stage))
        yield from _collect(stage, asked, arrived)

    def seconds_at_sites(self) -> float:
        """Return 0: what sites spend is theirs to know."""
        return 0.0

    def close(self) -> None:
        """End the jobs and the connection to the engine; its long-lived processes stay."""
        self._keeper.close()

    def _closes(self, message: bytes, deadline: float | None) -> float:
        if deadline is not None:
            return deadline
        if self._deadline is not None:
            return self._deadline(message)
        return time.time() + self._patience.answer

    def _post(
        self,
        job: Job,
        number: int,
        site: int,
        stage: str,
        message: bytes,
        closes: float,
        arrived: Arrived,
    ) -> bool:
        if closes <= time.time():
            return False
        words: Words = {
            "say": "send",
            "number": number,
            "site": self._relays[site],
            "stage": stage,
            "deadline": closes,
        }
        return job.post(words, message, arrived)

    def _missing(self, smallest: int, seconds: float) -> str:
        present = {self._sites[number] for number in self.sites()}
        absent = [name for name in self._sites if name not in present]
        return (
            f"{len(present)} of the {smallest} sites that are needed joined within {seconds:g} s; missing: "
            f"{', '.join(absent)}. Each of them must run `ffm-secure site start` and have allowed this run"
        )


def _collect(stage: str, asked: dict[int, _Asked], arrived: Arrived) -> Iterator[Reply]:
    """Yield what comes back, then who is lost."""
    while asked:
        latest = max(item.closes for item in asked.values())
        answer = arrived.get(latest + _GRACE - time.time())
        if answer is None:
            break
        words, content = answer
        item = asked.pop(int(str(words["number"])), None)
        if item is not None:
            on_time = bool(words["answered"]) and time.time() <= item.closes + _GRACE
            yield Reply(site=item.site, content=content if on_time else Lost(stage=stage))
    for number, item in asked.items():
        item.job.forget(number)
        yield Reply(site=item.site, content=Lost(stage=stage))
