"""A courier over Flower: the coordinator's process talks to the engine's server, and keeps its own state."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Final

from ffm_secure.engines.flower import wire
from ffm_secure.engines.flower.bell import Bell
from ffm_secure.engines.flower.keeper import Keeper, Patience
from ffm_secure.engines.flower.superlink import Answered, EngineRun, Presence, SuperLink
from ffm_secure.engines.flower.wire import BROKEN
from ffm_secure.engines.nvflare.enrolment import relay_name
from ffm_secure.errors import FfmError
from ffm_secure.transport.courier import Deadline, Lost, Reply
from ffm_secure.transport.local_socket import Words

__all__ = ["FlowerCourier", "Patience"]
_GRACE: Final = 0.5  # seconds an answer may be on its way
_AT_A_TIME: Final = (
    4  # messages that go at a time, and answers that come: memory does not grow with the sites
)
_SOONEST, _LATEST = 0.02, 1.0  # seconds between two looks for answers


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A message that was sent."""

    site: int
    closes: float  # seconds since 1970
    presence: Presence


class FlowerCourier:
    """Carry messages to sites by their number in `sites`, in as many runs of the engine as it takes.

    A site whose node falls is lost, and reached again as soon as the node is back and has said a word, in the
    same run of the engine. A fall of the engine's server costs the answers on their way.

    Guarantee: every site that was written to is answered for once, with its bytes or as lost; an answer that
    comes after the deadline is dropped, by the engine and by the name of its message. Safe to call from
    several threads.
    """

    def __init__(
        self,
        *,
        link: SuperLink,
        bell: Bell,
        sites: Sequence[str],
        run: str,
        patience: Patience | None = None,
        deadline: Deadline | None = None,
    ) -> None:
        self._names = tuple(sites)
        self._relays = tuple(relay_name(name) for name in sites)
        self._patience = patience or Patience()
        self._deadline, self._link, self._bell = deadline, link, bell
        self._numbers = itertools.count(1)
        self._keeper = Keeper(link, bell, self._relays, run, self._patience)

    @property
    def runs_begun(self) -> int:
        """Return how many runs of the engine were begun."""
        return self._keeper.begun

    def sites(self) -> frozenset[int]:
        """Return the sites that can be written to now."""
        joined = set(self._keeper.joined)
        return frozenset(number for number, name in enumerate(self._relays) if name in joined)

    def open(self, *, smallest: int, seconds: float) -> None:
        """Wait until so many sites have joined.

        Raises:
          FfmError: they have not in time; it names who is missing, and what is known of why.
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
        asked: dict[str, _Asked] = {}
        run = self._post_all(stage, messages, deadline, asked)
        for site in set(messages) - {item.site for item in asked.values()}:
            yield Reply(site=site, content=Lost(stage=stage))
        if run is not None:
            yield from self._collect(run, stage, asked)

    def seconds_at_sites(self) -> float:
        """Return 0: what sites spend is theirs to know."""
        return 0.0

    def close(self) -> None:
        """End the run of the engine and the connection to its server; its long-lived processes stay."""
        self._keeper.close()
        self._link.close()
        self._bell.close()

    def _closes(self, message: bytes, deadline: float | None) -> float:
        if deadline is not None:
            return deadline
        if self._deadline is not None:
            return self._deadline(message)
        return time.time() + self._patience.answer

    def _post_all(
        self,
        stage: str,
        messages: Mapping[int, bytes],
        deadline: float | None,
        asked: dict[str, _Asked],
    ) -> EngineRun | None:
        """Send every site its message, a few at a time; note those that were sent, and return the run."""
        run: EngineRun | None = None
        waiting: set[Future[None]] = set()
        with ThreadPoolExecutor(_AT_A_TIME) as pool:
            for site in messages:
                message = messages[site]
                closes = self._closes(message, deadline)
                run = run or self._keeper.wait(closes)
                if run is None:
                    continue
                if len(waiting) == _AT_A_TIME:
                    waiting = set(wait(waiting, return_when=FIRST_COMPLETED).not_done)
                waiting.add(pool.submit(self._post, run, site, stage, message, closes, asked))
        return run

    def _post(
        self,
        run: EngineRun,
        site: int,
        stage: str,
        message: bytes,
        closes: float,
        asked: dict[str, _Asked],
    ) -> None:
        """Send one message, and note it where it was sent."""
        presence, left = self._keeper.joined.get(self._relays[site]), closes - time.time()
        if presence is None or left <= 0:
            return
        words: Words = {"stage": stage, "number": next(self._numbers), "speaks": wire.SPEAKS}
        try:
            name = run.send(presence, words, message, left)
        except BROKEN:
            return
        self._bell.ring(self._relays[site])
        asked[name] = _Asked(site=site, closes=closes, presence=presence)

    def _collect(self, run: EngineRun, stage: str, asked: dict[str, _Asked]) -> Iterator[Reply]:
        """Yield what comes back, then who is lost."""
        while asked and time.time() < max(item.closes for item in asked.values()) + _GRACE:
            some, rung = False, self._bell.rung
            for answer in self._look(run, asked):
                item = asked.pop(answer.message, None)
                if item is not None:
                    some = True
                    yield Reply(site=item.site, content=self._content(run, stage, answer, item))
            for name in self._gone(run, asked):
                yield Reply(site=asked.pop(name).site, content=Lost(stage=stage))
            if not some and asked:
                self._wait(rung, max(item.closes for item in asked.values()))
        for item in asked.values():
            yield Reply(site=item.site, content=Lost(stage=stage))

    def _wait(self, rung: int, closes: float) -> None:
        """Wait until a site has sent something, until it is time, or for a while."""
        self._bell.wait(rung, min(_LATEST, max(0.0, closes + _GRACE - time.time())))
        time.sleep(_SOONEST)  # what is sent comes in parts

    def _look(self, run: EngineRun, asked: Mapping[str, _Asked]) -> Iterator[Answered]:
        names = tuple(asked)
        for place in range(0, len(names), _AT_A_TIME):
            try:
                yield from run.answered(names[place : place + _AT_A_TIME])
            except BROKEN:
                return  # the keeper finds out whether the run has ended

    def _gone(self, run: EngineRun, asked: Mapping[str, _Asked]) -> list[str]:
        """Return the messages whose site has fallen since, or whose run has ended."""
        joined = self._keeper.joined
        ended = self._keeper.current is not run
        return [
            name
            for name, item in asked.items()
            if ended or joined.get(self._relays[item.site]) != item.presence
        ]

    def _content(self, run: EngineRun, stage: str, answer: Answered, item: _Asked) -> bytes | Lost:
        """Fetch an answer; it is lost where it comes late, or says that there is none."""
        if answer.tree is None:
            return Lost(stage=stage)
        try:
            words, content = run.fetch(answer.tree, item.closes + _GRACE)
        except BROKEN:
            return Lost(stage=stage)
        threading.Thread(target=run.let_go, args=(answer.tree,), daemon=True).start()
        if words.get("why") == "service":
            self._keeper.away(self._relays[item.site], item.presence)
        on_time = words.get("answered") is True and time.time() <= item.closes + _GRACE
        return content if on_time else Lost(stage=stage)

    def _missing(self, smallest: int, seconds: float) -> str:
        present = self.sites()
        absent = [self._absent(number) for number in range(len(self._names)) if number not in present]
        return (
            f"{len(present)} of the {smallest} sites that are needed joined within {seconds:g} s; missing: "
            f"{', '.join(absent)}. Each of them must run `ffm-secure site start --engine flower` and have "
            "allowed this run"
        )

    def _absent(self, number: int) -> str:
        reason = self._keeper.reasons.get(self._relays[number], "")
        return f"{self._names[number]} ({reason})" if reason else self._names[number]
