"""The engine's two relays joined in one process, without the engine: large messages cross in pieces."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("nvflare", reason="the extra 'nvflare' is not installed")

from nvflare.apis.shareable import Shareable

from ffm_secure.engines.nvflare import topics
from ffm_secure.engines.nvflare.folders import SITE_SOCKET
from ffm_secure.engines.nvflare.jobs import Job
from ffm_secure.engines.nvflare.pieces import PIECE
from ffm_secure.engines.nvflare.server_side import _Relay
from ffm_secure.engines.nvflare.site_service import serve
from ffm_secure.engines.nvflare.site_side import RelayExecutor
from ffm_secure.transport.local_socket import Door, Frames, Gone, Words, connect

SITE = "site-north"


class Wire:
    """Stands where the engine carries a message to a site's process; it notes the size of what it carries."""

    def __init__(self, executor: RelayExecutor) -> None:
        self.largest, self.silent = 0, False
        self.topics: list[str] = []
        self._handlers: dict[str, Callable[[str, Shareable, object], Shareable]] = {
            topics.MESSAGE: executor._message,
            topics.PIECE: executor._piece,
            topics.MORE: executor._more,
            topics.HELLO: executor._hello,
        }

    def get_clients(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=SITE)]

    def new_context(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def send_aux_request(
        self, *, targets: list[str], topic: str, request: Shareable, **_: object
    ) -> dict[str, Shareable]:
        if self.silent:
            return {}
        reply = self._handlers[topic](topic, request, None)
        sizes = [len(item.get(topics.CONTENT, b"")) for item in (request, reply)]
        self.largest = max(self.largest, *sizes)
        self.topics.append(topic)
        return {targets[0]: reply}


class Pair:
    """The coordinator's end of a relay, and what a site does."""

    def __init__(self, frames: Frames, wire: Wire) -> None:
        self.frames, self.wire = frames, wire

    def ask(self, number: int, stage: str, content: bytes, seconds: float = 30.0) -> tuple[Words, bytes]:
        words = {
            "say": "send",
            "number": number,
            "site": SITE,
            "stage": stage,
            "deadline": time.time() + seconds,
        }
        self.frames.write(words, content)
        while (frame := self.frames.read(60.0)) is not None:
            if frame[0].get("number") == number:
                return frame
        raise AssertionError("no answer")


def answer(stage: str, message: bytes) -> bytes:
    if stage == "slow":
        time.sleep(1.0)
    if stage == "fail":
        raise RuntimeError
    return b"" if stage == "nothing" else bytes(message)[::-1]


def run_until_gone(relay: _Relay) -> None:
    with contextlib.suppress(Gone):
        relay.run(SimpleNamespace(triggered=False))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    place: Path = tmp_path_factory.mktemp("pair")
    service = serve(place, answer, lambda run: True)
    executor = RelayExecutor()
    executor._socket = place / SITE_SOCKET
    wire, door = Wire(executor), Door(place / "courier.sock")
    relay = _Relay(wire, connect(place / "courier.sock"))
    accepted = door.accept(10.0)
    assert accepted is not None
    relay.announce("a job")
    running = threading.Thread(target=run_until_gone, args=(relay,), daemon=True)
    running.start()
    yield Pair(accepted, wire)
    accepted.close()
    running.join(10.0)
    door.close()
    service.close()
    assert not running.is_alive()


@pytest.mark.parametrize("size", [0, 1, PIECE, PIECE + 1, 20_000_000])
def test_what_is_sent_is_answered_whole(pair: Pair, size: int) -> None:
    content = np.random.default_rng(size).bytes(size)
    words, reply = pair.ask(1 + size, "echo", content)
    assert words["answered"]
    assert reply == content[::-1]
    assert pair.wire.largest <= PIECE


def test_a_large_message_with_a_small_answer(pair: Pair) -> None:
    words, reply = pair.ask(7, "nothing", bytes(3 * PIECE))
    assert words["answered"]
    assert reply == b""


def test_refusals_and_delays_are_told_apart_and_leave_nothing(pair: Pair) -> None:
    words, reply = pair.ask(8, "fail", bytes(2 * PIECE + 5))
    assert (words["answered"], words["away"], reply) == (False, "", b"")
    words, reply = pair.ask(9, "slow", bytes(PIECE), seconds=0.3)
    assert (words["answered"], words["away"], reply) == (False, "", b"")
    words, reply = pair.ask(10, "echo", b"on")
    assert reply == b"no"


def test_a_relay_that_dies_after_its_service_is_lost_and_not_waited_for(tmp_path: Path) -> None:
    """The service was killed and its relay a moment later: no second job began, the site stayed away."""
    executor = RelayExecutor()
    executor._socket = tmp_path / SITE_SOCKET  # nobody listens: the service is gone
    wire, door = Wire(executor), Door(tmp_path / "courier.sock")
    relay = _Relay(wire, connect(tmp_path / "courier.sock"))
    accepted = door.accept(10.0)
    assert accepted is not None
    relay.announce("a job")
    accepted.read(10.0)
    job = Job(accepted, frozenset({SITE}))
    threading.Thread(target=job.listen, args=(threading.Event(),), daemon=True).start()
    until(lambda: job.heard() == {SITE})
    wire.silent = True
    until(lambda: job.heard() == set())
    assert SITE in job.lost
    assert SITE not in job.members
    job.close()
    door.close()


def until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    closes = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < closes
        time.sleep(0.05)
