"""What every engine must do, whatever carries its bytes; one joins by giving a federation of four sites.

A site answers by the stage: `echo` returns the message, `slow` waits first, `fail` raises.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import pytest

from defenses.errors import ProtocolError
from ffm_secure.transport.courier import Lost, MachineCourier, Reply
from ffm_secure.transport.stages import PLAN

SITES = 4
ALL = range(SITES)
SECRET = "a row of this site"
Handle = Callable[[str, bytes], bytes]


@dataclass(slots=True)
class EchoSite:
    """A site that answers what it is sent, and counts."""

    handled: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def handle(self, stage: str, message: bytes) -> bytes:
        with self.lock:
            self.handled[stage] += 1
        if stage == "slow":
            time.sleep(float(message[:8]))
        if stage == "fail":
            raise ProtocolError if message == b"protocol" else RuntimeError(SECRET)
        return bytes(message)


class Federation(Protocol):
    """Four echo sites and what an engine is tried with."""

    courier: MachineCourier
    sites: Mapping[int, EchoSite]
    notice: float
    """Seconds within which the engine notices that a site has gone."""
    rejoin: float
    """Seconds within which a site that came back is reached by the next plan."""

    def kill(self, site: int) -> None:
        """End a site's processes as a loss of power would."""

    def revive(self, site: int) -> None:
        """Start them again."""

    def restart(self) -> None:
        """End the coordinator's process as a crash would, and open a courier anew."""


def by_site(
    courier: MachineCourier, stage: str, messages: Mapping[int, bytes], **words: float
) -> dict[int, Reply]:
    replies = list(courier.send(stage, messages, **words))
    answered = [reply.site for reply in replies]
    assert sorted(answered) == sorted(messages), f"answered for: {answered}"
    return {reply.site: reply for reply in replies}


def content(reply: Reply) -> bytes:
    assert not isinstance(reply.content, Lost), f"site {reply.site} was lost at {reply.content.stage}"
    return bytes(reply.content)


class CourierContract:
    """Inherit, give a fixture `federation`, and every test below holds."""

    def test_each_site_is_answered_for_once_with_its_own_bytes(self, federation: Federation) -> None:
        messages = {site: f"for {site}".encode() for site in ALL}
        before = {site: federation.sites[site].handled["echo"] for site in ALL}
        replies = by_site(federation.courier, "echo", messages)
        assert {site: content(reply) for site, reply in replies.items()} == messages
        assert {site: federation.sites[site].handled["echo"] - before[site] for site in ALL} == dict.fromkeys(
            ALL, 1
        )

    def test_everybody_can_be_written_to(self, federation: Federation) -> None:
        assert federation.courier.sites() == frozenset(ALL)

    def test_some_are_asked_and_the_others_hear_nothing(self, federation: Federation) -> None:
        before = federation.sites[0].handled["echo"]
        replies = by_site(federation.courier, "echo", {1: b"a", 3: b""})
        assert {site: content(reply) for site, reply in replies.items()} == {1: b"a", 3: b""}
        assert federation.sites[0].handled["echo"] == before

    def test_twenty_megabytes_arrive_as_they_were_sent(self, federation: Federation) -> None:
        large = np.random.default_rng(7).bytes(20_000_000)
        replies = by_site(federation.courier, "echo", {0: large, 2: large[::-1]})
        assert content(replies[0]) == large
        assert content(replies[2]) == large[::-1]

    def test_the_same_bytes_again_are_carried_again(self, federation: Federation) -> None:
        before = federation.sites[2].handled["echo"]
        for _ in range(2):
            assert content(by_site(federation.courier, "echo", {2: b"again"})[2]) == b"again"
        assert federation.sites[2].handled["echo"] == before + 2

    @pytest.mark.parametrize("kind", [b"protocol", b"error"])
    def test_a_site_that_refuses_is_lost_and_says_nothing(self, federation: Federation, kind: bytes) -> None:
        replies = by_site(federation.courier, "fail", {1: kind})
        assert isinstance(replies[1].content, Lost)
        assert SECRET not in repr(replies[1])
        assert content(by_site(federation.courier, "echo", {1: b"on"})[1]) == b"on"

    def test_a_deadline_loses_the_slow_and_nobody_else(self, federation: Federation) -> None:
        began = time.monotonic()
        messages = {0: b"00000000", 1: b"00000008", 3: b"00000000"}
        replies = by_site(federation.courier, "slow", messages, deadline=time.time() + 2.0)
        assert isinstance(replies[1].content, Lost)
        assert {content(replies[0]), content(replies[3])} == {b"00000000"}
        assert time.monotonic() - began < 5.0

    def test_a_late_answer_is_no_answer_to_what_comes_next(self, federation: Federation) -> None:
        late = by_site(federation.courier, "slow", {2: b"00000002"}, deadline=time.time() + 0.5)
        assert isinstance(late[2].content, Lost)
        time.sleep(0.2)  # whoever gives up at the deadline has done so
        assert 2 in federation.courier.sites(), "a site that is slow is there"
        for number in range(8):
            mark = f"next {number}".encode()
            assert content(by_site(federation.courier, "echo", {2: mark})[2]) == mark
            time.sleep(0.4)

    def test_a_deadline_that_has_passed_sends_nothing(self, federation: Federation) -> None:
        before = federation.sites[0].handled["echo"]
        replies = by_site(federation.courier, "echo", {0: b"x"}, deadline=time.time() - 1.0)
        assert isinstance(replies[0].content, Lost)
        assert federation.sites[0].handled["echo"] == before


class CourierLossContract:
    """What must hold when processes die; slower, so an engine may mark it."""

    def test_a_killed_site_is_lost_alone_and_joins_the_next_plan(self, federation: Federation) -> None:
        threading.Timer(1.0, federation.kill, (1,)).start()
        began = time.monotonic()
        messages = dict.fromkeys(ALL, b"00000004")
        replies = by_site(federation.courier, "slow", messages, deadline=time.time() + 120.0)
        assert isinstance(replies[1].content, Lost)
        assert all(content(replies[site]) == b"00000004" for site in ALL if site != 1)
        assert time.monotonic() - began < 4.0 + federation.notice
        gone = by_site(federation.courier, "echo", dict.fromkeys(ALL, b"x"))
        assert isinstance(gone[1].content, Lost)
        federation.revive(1)
        closes = time.monotonic() + federation.rejoin
        while isinstance(by_site(federation.courier, PLAN, dict.fromkeys(ALL, b"plan"))[1].content, Lost):
            assert time.monotonic() < closes, "the site did not rejoin"
            time.sleep(0.5)
        assert federation.courier.sites() == frozenset(ALL)

    def test_a_coordinator_that_starts_again_reaches_everybody(self, federation: Federation) -> None:
        federation.restart()
        replies = by_site(federation.courier, PLAN, dict.fromkeys(ALL, b"plan"))
        assert {content(reply) for reply in replies.values()} == {b"plan"}
