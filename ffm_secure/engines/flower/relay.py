"""A site's relay: `python -m ffm_secure.engines.flower.relay FOLDER`.

It stands where the engine has a node: it connects outwards, hands each message to the site's own service
over the socket in its folder, and sends the answer back. It sees bytes and a socket, no row, no ledger, and
unpacks no bundle: what a run brings is not opened anywhere.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from ffm_secure.engines.flower import wire
from ffm_secure.engines.flower.folders import SITE_SOCKET
from ffm_secure.engines.flower.node import Announced, Node, reason
from ffm_secure.engines.flower.wire import NotWhole
from ffm_secure.engines.nvflare.relay import is_served
from ffm_secure.errors import StoreError
from ffm_secure.transport.local_socket import Gone, Late, Words, ask, connect

_LOG = logging.getLogger("relay")
HELLO: Final = ""
"""The stage at which a site is asked nothing but whether it takes part."""
_HEARTBEAT: Final = 5.0  # seconds
_AGAIN: Final = 2.0  # seconds before a connection is tried again
_SOONEST: Final = 0.05  # seconds between two looks for a message: the gate holds each until there is one
_MOST: Final = 16  # messages at a time
_LOCAL: Final = 5.0  # seconds for a word of the service
_LONGEST: Final = 86_400.0  # seconds that a message may take at most


class Service:
    """The site's own service behind its socket, and whether it is there."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._there = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    @property
    def is_there(self) -> bool:
        """Tell whether the service listens."""
        return self._there.is_set()

    def allows(self, run: str) -> bool:
        """Ask whether a person at this site has allowed a run; what cannot be asked is not allowed."""
        try:
            words, _ = ask(self._socket, {"ask": "allowed", "run": run}, seconds=_LOCAL)
        except Gone:
            return False
        return words.get("allowed") is True

    def answer(self, stage: str, content: bytes, seconds: float) -> tuple[bool, bytes]:
        """Return whether the service answers a message, and with what.

        Raises:
          Late, Gone: it does not in time, or at all.
        """
        words, answer = ask(self._socket, {"ask": "answer", "stage": stage}, content, seconds=seconds)
        return words.get("answered") is True, answer

    def _watch(self) -> None:
        """Hold a connection: it ends when the service does."""
        while True:
            try:
                frames = connect(self._socket)
                self._there.set()
                frames.read()
            except Gone:
                self._there.clear()
            time.sleep(0.2)


class Relay:
    """Carry messages between a node of the engine and a service, each in a thread.

    Guarantee: nothing of a run is handed to the service before the service has said that the run is allowed,
    nor where the run brings a bundle other than the empty one.
    """

    def __init__(self, node: Node, service: Service) -> None:
        self._node, self._service = node, service
        self._allowed: dict[int, bool] = {}
        self._beat = 0.0
        self._room = threading.Semaphore(_MOST)
        self._said = ""

    def run(self, should_stop: Callable[[], bool]) -> None:
        """Carry until told to stop."""
        pause = threading.Event()
        while not should_stop():
            pause.wait(self._step())
        self._node.close()

    def _step(self) -> float:
        """Do what is next; return how long to wait after it."""
        try:
            if not self._service.is_there:
                self._node.deactivate()
                self._say("the site's service is not there: ffm-secure site start")
                return 0.2
            if not self._node.is_active:
                self._node.activate()
                self._beat = time.monotonic()
                self._say(f"connected to {self._node.place}")
            self._keep_alive()
            return self._look()
        except Exception as error:  # the engine reads another party's bytes, and raises what it raises
            self._node.forget()
            self._say(f"the coordinator at {self._node.place} {reason(error)}")
            return _AGAIN

    def _keep_alive(self) -> None:
        if time.monotonic() - self._beat < _HEARTBEAT:
            return
        self._beat = time.monotonic()
        if not self._node.heartbeat():
            raise ConnectionError("the coordinator's server has forgotten this node")

    def _look(self) -> float:
        """Take the next message, if there is one and room for it."""
        if not self._room.acquire(blocking=False):
            return _SOONEST
        announced = None
        try:
            announced = self._node.receive()
        finally:
            if announced is None:
                self._room.release()
        if announced is not None:
            threading.Thread(target=self._carry, args=(announced,), daemon=True).start()
            return 0.0
        return _SOONEST

    def _carry(self, announced: Announced) -> None:
        try:
            words, content = self._node.fetch(announced)
            try:
                reply, answer = self._reply(announced, words, content)
                del content
                self._node.answer(announced, reply, answer)
            finally:
                self._node.let_go(announced)  # last: whoever waits for the answer does not wait for this
        except Exception as error:
            if not isinstance(error, NotWhole):  # late: nobody waits for it any more
                self._say(f"a message was lost: the coordinator {reason(error)}")
        finally:
            self._room.release()

    def _reply(self, announced: Announced, words: Words, content: bytes) -> tuple[Words, bytes]:
        """Return the answer of the service, or that there is none."""
        if words.get("speaks") != wire.SPEAKS:
            return _no("version", speaks=wire.SPEAKS), b""
        if not self._is_allowed(announced.metadata.run_id):
            return _no("run"), b""
        if words.get("stage") == HELLO:
            return {"answered": True, "speaks": wire.SPEAKS}, b""
        try:
            seconds = min(announced.metadata.ttl, _LONGEST)
            answered, answer = self._service.answer(str(words.get("stage")), content, seconds)
        except Late:
            return _no("late"), b""
        except Gone:
            return _no("service"), b""
        return ({"answered": True}, answer) if answered else (_no("refused"), b"")

    def _is_allowed(self, number: int) -> bool:
        """Ask once for every run of the engine whether it carries a run that is allowed here."""
        if not self._allowed.get(number):
            run = self._node.run_of(number)
            self._allowed[number] = bool(run) and self._service.allows(run)
            if not self._allowed[number]:
                named = run[:16] or "with a bundle that is none of ours"
                self._say(f"run {named}: nobody here has allowed it")
        return self._allowed[number]

    def _say(self, words: str) -> None:
        """Log what is new."""
        if words != self._said:
            self._said = words
            _LOG.info("%s", words)


def _no(why: str, **more: int) -> Words:
    return {"answered": False, "why": why, **more}


def main() -> int:
    """Run the relay until a signal, or look once whether the service is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the site's folder of the engine, named flower")
    parser.add_argument("--check", action="store_true", help="exit 0 where the service answers, 1 where not")
    words = parser.parse_args()
    folder = words.folder.resolve()
    if words.check:
        return 0 if is_served(folder) else 1
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    _LOG.setLevel(logging.INFO)
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: asked.append(received))
    try:
        Relay(Node(folder), Service(folder / SITE_SOCKET)).run(lambda: bool(asked))
    except StoreError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
