"""A run of the engine that is kept going, and who is in it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import httpx

from ffm_secure.engines.flower import wire
from ffm_secure.engines.flower.bell import Bell
from ffm_secure.engines.flower.relay import HELLO
from ffm_secure.engines.flower.superlink import EngineRun, Presence, SuperLink
from ffm_secure.engines.flower.wire import BROKEN
from ffm_secure.transport.local_socket import Words

_LOG = logging.getLogger(__name__)
_ALIVE: Final = 10.0  # seconds between two words with the engine's server
_HELLO: Final = 10.0  # seconds that a site has for a word
_REASONS: Final = {
    "run": "has not allowed this run",
    "version": "speaks another version of the relay: another release of ffm-secure is installed there",
    "service": "has a relay, and no service behind it",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long things may take, in seconds."""

    answer: float = 600.0  # for a message that carries no deadline of its own
    look: float = 0.5  # between two looks at who is there
    renew: float = 2.0  # before a site that did not join is asked again


@dataclass(frozen=True, slots=True, kw_only=True)
class _Greeting:
    name: str
    presence: Presence
    until: float  # seconds since 1970


class Keeper:
    """Keep a run of the engine for a run of ours, in a thread of its own.

    Guarantee: a site counts as joined from its first word in the run on, and only as long as its node is the
    one that said it: a node that fell and came back has to say it anew.
    """

    def __init__(
        self, link: SuperLink, bell: Bell, sites: Sequence[str], run: str, patience: Patience
    ) -> None:
        self._link, self._bell, self._sites, self._run = link, bell, frozenset(sites), run
        self._patience = patience
        self._closing = threading.Event()
        self._greetings: dict[str, _Greeting] = {}
        self._asked: dict[str, float] = {}
        self._alive = 0.0
        self.joined: dict[str, Presence] = {}
        self.reasons: dict[str, str] = {}
        self.current: EngineRun | None = None
        self.begun = 0
        self._thread = threading.Thread(target=self._keep, name="engine's run", daemon=True)
        self._thread.start()

    def wait(self, until: float) -> EngineRun | None:
        """Return the run that goes on; wait for one until a time, in seconds since 1970."""
        while self.current is None and time.time() < until and not self._closing.is_set():
            time.sleep(0.05)
        return self.current

    def away(self, name: str, presence: Presence) -> None:
        """Count on a node no more until it has said a word again."""
        if self.joined.get(name) == presence:
            del self.joined[name]
            self._asked[name] = time.monotonic()

    def close(self) -> None:
        """End the run."""
        self._closing.set()
        self._thread.join(60.0)
        run, self.current = self.current, None
        if run is not None:
            self._link.end(run)

    def _keep(self) -> None:
        while not self._closing.is_set():
            try:
                self._tend()
            except httpx.HTTPStatusError as error:
                if error.response.status_code < 500:
                    self._lose(error)
            except BROKEN as error:
                _LOG.debug("the engine's server is away: %s", type(error).__name__)
            except Exception:  # a thread that dies would lose every site; the next look may be luckier
                _LOG.exception("looking after the engine's run failed")
            missing = self._sites - set(self.joined)
            self._closing.wait(self._patience.look if missing else 2 * self._patience.look)

    def _tend(self) -> None:
        run = self.current
        if run is None:
            run = self._link.begin(self._run)
            self.begun += 1
            self.current = run
        if time.monotonic() - self._alive > _ALIVE:
            self._alive = time.monotonic()
            if not run.alive():
                self._lose(None)
                return
        present = run.present()
        for name in tuple(self.joined):
            if present.get(name) != self.joined[name]:
                self.joined.pop(name, None)
        self._listen(run)
        self._greet(run, present)

    def _greet(self, run: EngineRun, present: dict[str, Presence]) -> None:
        """Ask every node of a site for a word that has not said one."""
        waited_for = {item.name for item in self._greetings.values()}
        for name in self._sites & set(present) - set(self.joined) - waited_for:
            if time.monotonic() - self._asked.get(name, 0.0) < self._patience.renew:
                continue
            self._asked[name] = time.monotonic()
            words: Words = {"stage": HELLO, "speaks": wire.SPEAKS}
            message = run.send(present[name], words, b"", _HELLO)
            self._bell.ring(name)
            self._greetings[message] = _Greeting(
                name=name, presence=present[name], until=time.time() + _HELLO
            )
        if self._greetings:
            self._bell.wait(self._bell.rung, self._patience.look)
            self._listen(run)

    def _listen(self, run: EngineRun) -> None:
        """Hear who has said a word."""
        if not self._greetings:
            return
        for answer in run.answered(tuple(self._greetings)):
            greeting = self._greetings.pop(answer.message, None)
            if greeting is None or answer.tree is None:
                continue
            words, _ = run.fetch(answer.tree, greeting.until)
            run.let_go(answer.tree)
            if words.get("answered") is True:
                self.reasons.pop(greeting.name, None)
                self.joined[greeting.name] = greeting.presence
            else:
                self.reasons[greeting.name] = _REASONS.get(str(words.get("why")), "does not take part")
        over = [name for name, item in self._greetings.items() if item.until < time.time()]
        for name in over:
            del self._greetings[name]

    def _lose(self, error: httpx.HTTPStatusError | None) -> None:
        """Take the run for ended; the next look begins another."""
        _LOG.info("the engine's run has ended: %s", "" if error is None else error.response.text[:200])
        run, self.current = self.current, None
        self.joined.clear()
        self._greetings.clear()
        self._asked.clear()
        if run is not None:
            run.close()
