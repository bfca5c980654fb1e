"""Messages in the engine's form, and what a relay answers, without the engine's processes."""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")

import flwr
from flwr.app import Error, Metadata
from flwr.app.message import make_message

from ffm_secure.engines.flower import running, wire
from ffm_secure.engines.flower.node import Announced
from ffm_secure.engines.flower.relay import HELLO, Relay
from ffm_secure.engines.flower.wire import PIECE, NotWhole, Outgoing
from ffm_secure.errors import FfmError
from ffm_secure.transport.local_socket import Gone, Late

WORDS = {"stage": "mask", "number": 7, "speaks": wire.SPEAKS}


def metadata(seconds: float = 10.0) -> Metadata:
    return Metadata(
        run_id=5,
        message_id="",
        src_node_id=1,
        dst_node_id=2,
        reply_to_message_id="",
        group_id="",
        created_at=time.time(),
        ttl=seconds,
        message_type=wire.TYPE,
    )


class Store:
    """Stand where the engine keeps objects; one may be away for a while, or for ever."""

    def __init__(self, message: Outgoing) -> None:
        self.parts: dict[str, bytes] = {}
        self.absent: dict[str, int] = {}
        wire.push(message, tuple(message.objects), self.take)

    def take(self, name: str, part: bytes) -> bool:
        self.parts[name] = part
        return True

    def ask(self, name: str) -> SimpleNamespace:
        left = self.absent.get(name, 0)
        self.absent[name] = left - 1
        there = left <= 0
        return SimpleNamespace(
            object_found=name in self.parts,
            object_available=there,
            object_content=self.parts.get(name, b"") if there else b"",
        )


@pytest.mark.parametrize("size", [0, 1, PIECE, PIECE + 1, 3 * PIECE])
def test_what_is_sent_is_opened_whole_and_in_small_parts(size: int) -> None:
    content = np.random.default_rng(size).bytes(size)
    message = wire.outgoing(metadata(), WORDS, content)
    store = Store(message)
    assert max(map(len, store.parts.values())) < PIECE + 1024
    assert wire.opened(wire.pull(message.tree, store.ask, time.time() + 5.0)) == (WORDS, content)


def test_a_part_that_is_still_on_its_way_is_waited_for() -> None:
    message = wire.outgoing(metadata(), WORDS, b"abc")
    store = Store(message)
    store.absent = dict.fromkeys(store.parts, 3)
    assert wire.opened(wire.pull(message.tree, store.ask, time.time() + 5.0))[1] == b"abc"


def test_a_message_that_does_not_come_whole_is_none() -> None:
    message = wire.outgoing(metadata(), WORDS, b"abc")
    store = Store(message)
    store.absent = dict.fromkeys(store.parts, 1_000_000)
    with pytest.raises(NotWhole, match="in time"):
        wire.pull(message.tree, store.ask, time.time() + 0.1)
    store.absent, store.parts = {}, {}
    with pytest.raises(NotWhole, match="is gone"):
        wire.pull(message.tree, store.ask, time.time() + 5.0)
    with pytest.raises(NotWhole, match="dropped"):
        wire.push(message, tuple(message.objects), lambda name, part: False)


def test_what_is_no_message_of_ours_is_not_opened() -> None:
    with pytest.raises(NotWhole, match="error"):
        wire.opened(make_message(metadata=metadata(), error=Error(code=5, reason="away")))


class Service:
    """A site's service that allows one run."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def allows(self, run: str) -> bool:
        return run == "allowed"

    def answer(self, stage: str, content: bytes, seconds: float) -> tuple[bool, bytes]:
        self.heard.append(stage)
        if stage in ("late", "gone"):
            raise Late if stage == "late" else Gone
        return stage != "refused", content[::-1]


def reply(words: dict[str, object], run: str = "allowed") -> tuple[dict[str, object], bytes, list[str]]:
    service = Service()
    relay = Relay(SimpleNamespace(run_of=lambda number: run), service)  # type: ignore[arg-type]
    announced = Announced(metadata=metadata(), tree=SimpleNamespace())  # type: ignore[arg-type]
    answer, content = relay._reply(announced, words, b"abc")  # type: ignore[arg-type]
    return dict(answer), content, service.heard


def test_a_relay_hands_on_what_is_allowed_and_nothing_else() -> None:
    assert reply(WORDS) == ({"answered": True}, b"cba", ["mask"])
    for run in ("another", ""):  # the second brings a bundle that is none of ours
        assert reply(WORDS, run) == ({"answered": False, "why": "run"}, b"", [])
    assert reply({**WORDS, "stage": HELLO}) == ({"answered": True, "speaks": wire.SPEAKS}, b"", [])
    for why in ("late", "refused"):
        assert reply({**WORDS, "stage": why}) == ({"answered": False, "why": why}, b"", [why])
    assert reply({**WORDS, "stage": "gone"})[0] == {"answered": False, "why": "service"}


def test_relays_of_two_releases_do_not_guess() -> None:
    for speaks in (wire.SPEAKS + 1, 0, "1", None):
        refusal = {"answered": False, "why": "version", "speaks": wire.SPEAKS}
        assert reply({**WORDS, "speaks": speaks}) == (refusal, b"", [])


def test_another_release_of_the_engine_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    running.require_release()
    monkeypatch.setattr(flwr, "__version__", "1.43.0")
    with pytest.raises(FfmError, match=r"flwr 1\.43\.0 is installed, and this release works with flwr 1\.42"):
        running.require_release()
