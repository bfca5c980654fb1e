"""A coordinator that signs whatever it likes is refused: why, the site's log says; nothing is charged."""

from __future__ import annotations

import dataclasses
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from defenses.dp import Ledger
from defenses.random_source import RandomSource
from defenses.secagg import Identity
from ffm_secure import record_codec
from ffm_secure.agreed.agreement import Proposal, RunTerms, SignedAcceptance
from ffm_secure.config.federated import release
from ffm_secure.engines.coordinator_folder import Headquarters
from ffm_secure.records import Acceptance, RoundPlan
from ffm_secure.server.rounds import plan_round
from ffm_secure.site.service import open_session
from ffm_secure.site.session import SiteSession
from ffm_secure.transport import envelope
from ffm_secure.transport.envelope import REFUSAL, Header, Request
from ffm_secure.transport.stages import (
    BEGIN,
    FINISH,
    JOIN,
    OPENED,
    PLAN,
    encode_vector,
    join_acceptances,
    join_plan,
)
from tests.parties.helpers import RECORD, SEEDED, Direct, Federation, found, log_of, notes_run, open_all, run

RUN = bytes(range(16))
MASKS = {"kind": "secagg", "threshold": 3}


@dataclasses.dataclass
class Wire:
    """What a coordinator can do to one site: sign and send."""

    federation: Federation
    session: SiteSession
    key: Identity
    terms: RunTerms
    plan: RoundPlan
    vector: torch.Tensor
    words: tuple[bytes, ...] = ()  # acceptances of all four
    last: float = 0.0

    def sealed(self, stage: str, content: bytes, *, key: Identity | None = None, **changes: Any) -> bytes:
        self.last = max(time.time(), self.last + 1e-3)
        header = Header(
            software="0.1",
            run=RUN,
            round=1,
            stage=stage,
            site="north",
            sent=self.last,
            deadline=self.last + 60,
        )
        return envelope.seal(dataclasses.replace(header, **changes), content, (key or self.key).sign)

    def send(self, stage: str, content: bytes, **changes: Any) -> bytes:
        return self.session.handle(stage, self.sealed(stage, content, **changes))

    def join(self, terms: RunTerms | None = None, **changes: Any) -> bytes:
        proposal = Proposal(name="test", terms=terms or self.terms)
        return self.send(JOIN, record_codec.canonical_bytes(proposal), round=0, **changes)

    def plan_message(self, plan: RoundPlan, vector: torch.Tensor | None = None) -> bytes:
        broadcast = encode_vector(self.vector if vector is None else vector)
        return join_acceptances(self.words, join_plan(record_codec.canonical_bytes(plan), broadcast))

    def accepts(self, answer: bytes) -> bool:
        if answer == REFUSAL:
            return False
        content = bytes(answer[1 + 64 :])
        return record_codec.from_bytes(Acceptance, content, "answer").accepted

    def charges(self) -> int:
        with Ledger.open(self.federation.site("north") / "ledger.sqlite", create=False) as ledger:
            return sum(entry.kind == "reserve" for entry in ledger.entries())

    def log(self) -> str:
        return log_of(self.federation, "north")


def wire_to(federation: Federation, sessions: Direct) -> Wire:
    """Open the coordinator's side by hand, and let all four sites sign that they take part."""
    ready = federation.coordinator()
    coordinator = ready.coordinator
    coordinator.server.run_id = RUN
    state = coordinator.server.spec.strategy.start(coordinator.server.trainable.flatten().cpu())
    wire = Wire(
        federation=federation,
        session=sessions.sessions[0],
        key=Headquarters(place=federation.place / "coordinator").key(),
        terms=coordinator.terms,
        plan=plan_round(coordinator.server, 1, state),
        vector=state.vector,
    )
    ready.close()
    words = []
    proposal = record_codec.canonical_bytes(Proposal(name="test", terms=wire.terms))
    for number, name in enumerate(("north", "south", "east", "west")):
        session = sessions.sessions.get(number)
        if session is not None:
            answer = session.handle(JOIN, wire.sealed(JOIN, proposal, round=0, site=name))
            assert answer != REFUSAL, log_of(federation, name)
            words.append(bytes(answer[1 + 64 :]))
    wire.words = tuple(words)
    return wire


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return found(tmp_path_factory.mktemp("hostile"), notes_run(privacy=SEEDED, protection=MASKS))


@pytest.fixture(scope="module")
def sessions(federation: Federation) -> Iterator[Direct]:
    opened = open_all(federation)
    yield opened
    opened.close()


@pytest.fixture
def wire(federation: Federation, sessions: Direct) -> Iterator[Wire]:
    fresh = wire_to(federation, sessions)
    before = fresh.charges()
    yield fresh
    assert fresh.charges() == before, "something was charged"


def refused(wire: Wire, answer: bytes, words: str) -> None:
    assert answer == REFUSAL
    assert words in wire.log()


def test_an_honest_plan_is_accepted(wire: Wire) -> None:
    assert wire.accepts(wire.send(PLAN, wire.plan_message(wire.plan)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cohort": (0, 1, 2)}, "cohort of turn 0 is not the schedule's"),
        ({"cohort": (0,)}, "cohort of turn 0 is not the schedule's"),
        ({"mechanism": "0" * 64}, "the mechanism is not the one that was agreed on"),
        ({"layout": "0" * 64}, "names, shapes or codec"),
        ({"round": 3}, "round = 3: must be from 1 to 2"),
        ({"turn": 9}, "turn = 9"),
        ({"phase": "public"}, "private rounds alone"),
        ({"fingerprint": "0" * 64}, "the broadcast model is not the one the plan names"),
        ({"run_id": bytes(4)}, "the run's id has 4 bytes"),
    ],
)
def test_another_plan_is_declined_and_cannot_begin(wire: Wire, changes: dict[str, Any], words: str) -> None:
    plan = dataclasses.replace(wire.plan, **changes)
    answer = wire.send(PLAN, wire.plan_message(plan))
    assert not wire.accepts(answer)
    assert wire.send(BEGIN, b"") == REFUSAL
    assert words in wire.log()
    honest = wire.send(PLAN, wire.plan_message(wire.plan))
    assert wire.accepts(honest), "a round that never began was spent"


def test_another_model_is_refused(wire: Wire) -> None:
    crafted = wire.vector.clone()
    crafted[3] = torch.inf
    assert not wire.accepts(wire.send(PLAN, wire.plan_message(wire.plan, crafted)))
    longer = torch.cat([wire.vector, torch.zeros(1)])
    assert not wire.accepts(wire.send(PLAN, wire.plan_message(wire.plan, longer)))


def test_a_run_that_nobody_allowed_is_refused(wire: Wire) -> None:
    other = dataclasses.replace(wire.terms, run_file="f" * 64)
    refused(wire, wire.join(other), "nobody here has allowed the run 'test'")


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("backbone", "another copy of the model"),
        ("start", "the numbers that training starts from"),
        ("mechanism", "what decides epsilon"),
        ("schedule", "who takes part in which round"),
        ("roster", "the newest from the operator"),
        ("software", "the same minor version"),
    ],
)
def test_other_terms_than_the_site_computes_are_refused_by_name(wire: Wire, field: str, words: str) -> None:
    refused(wire, wire.join(dataclasses.replace(wire.terms, **{field: "9" * 64})), words)


def test_another_release_is_named_with_both_versions(wire: Wire) -> None:
    words = f"ffm-secure is {release()} here and '0.9' at the coordinator"
    refused(wire, wire.join(dataclasses.replace(wire.terms, software="0.9")), words)
    unreadable = wire.send(JOIN, b'{"terms":"of a later release"}', round=0, software="0.9")
    refused(wire, unreadable, words)


def test_a_disk_that_is_full_is_named_whoever_notices(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = (OSError(28, "No space left on device"), sqlite3.OperationalError("database or disk is full"))
    for fault in faults:

        def fails(*_: object, fault: Exception = fault) -> bytes:
            raise fault

        monkeypatch.setattr(type(wire.session), "_join", fails)
        words = "free space or mend it here, and nothing is lost"
        refused(wire, wire.join(), words)
    assert "the ledger cannot be written (database or disk is full)" in wire.log()


def test_a_second_run_of_a_file_that_was_allowed_once(tmp_path: Path) -> None:
    config = notes_run(privacy=SEEDED, protection={"kind": "none", "threshold": 3}, federation={"rounds": 1})
    federation = found(tmp_path, config)
    sessions = open_all(federation)
    try:
        run(federation, sessions)
        wire = wire_to_second_run(federation, sessions)
        refused(wire, wire.join(), "was allowed for one run, which has begun")
        assert wire.charges() == 1
    finally:
        sessions.close()


def wire_to_second_run(federation: Federation, sessions: Direct) -> Wire:
    ready = federation.coordinator()
    terms = ready.coordinator.terms
    ready.close()
    return Wire(
        federation=federation,
        session=sessions.sessions[0],
        key=Headquarters(place=federation.place / "coordinator").key(),
        terms=terms,
        plan=RoundPlan(run_id=RUN, round=1, cohort=(0,), fingerprint="", mechanism=""),
        vector=torch.zeros(1),
    )


def test_who_is_no_coordinator_is_refused(wire: Wire) -> None:
    stranger = Identity.generate(RandomSource.system())
    assert wire.send(PLAN, wire.plan_message(wire.plan), key=stranger) == REFUSAL
    assert wire.join(key=stranger) == REFUSAL


def test_a_message_is_good_for_its_stage_and_its_site_alone(wire: Wire) -> None:
    content = wire.plan_message(wire.plan)
    refused(wire, wire.session.handle(BEGIN, wire.sealed(PLAN, content)), "another stage or another site")
    refused(wire, wire.send(PLAN, content, site="south"), "another stage or another site")
    assert wire.send(PLAN, content, run=bytes(16)) == REFUSAL


def test_time_is_kept(wire: Wire) -> None:
    content, now = wire.plan_message(wire.plan), time.time()
    late = "after its deadline, 120 s after it was sent by this machine's clock"
    refused(wire, wire.send(PLAN, content, sent=now - 120, deadline=now - 60), late)
    refused(wire, wire.send(PLAN, content, sent=now - 600), "clock is 600 s ahead of the coordinator's")
    refused(wire, wire.send(PLAN, content, sent=now + 600), "s behind the coordinator's")


def test_a_site_that_is_too_slow_reads_so_in_its_own_log(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    late, real = [0.0], type(wire.session)._join

    def slow(session: SiteSession, request: Request) -> bytes:
        late[0] += 70.0
        return real(session, request)

    monkeypatch.setattr(wire.session, "_clock", lambda: time.time() + late[0])
    monkeypatch.setattr(type(wire.session), "_join", slow)
    assert wire.join() != REFUSAL
    assert "answered 'join' 10." in wire.log()
    assert "this site needs a faster machine, or the coordinator longer [deadlines]" in wire.log()


def test_the_same_bytes_are_answered_with_the_same_bytes_and_older_ones_not(wire: Wire) -> None:
    first = wire.sealed(PLAN, wire.plan_message(wire.plan))
    answer = wire.session.handle(PLAN, first)
    assert wire.accepts(answer)
    assert wire.session.handle(PLAN, first) == answer
    earlier = wire.sealed(PLAN, wire.plan_message(wire.plan))
    later = wire.sealed(PLAN, wire.plan_message(wire.plan))
    assert wire.accepts(wire.session.handle(PLAN, later))
    refused(wire, wire.session.handle(PLAN, earlier), "a later message was answered before")


def test_oversized_and_malformed_messages(wire: Wire) -> None:
    refused(wire, wire.session.handle(PLAN, bytes(1 << 26)), "nothing of this run has more than")
    good = wire.sealed(PLAN, wire.plan_message(wire.plan))
    draw = np.random.default_rng(5)
    for _ in range(200):
        broken = bytearray(good)
        broken[draw.integers(len(broken))] ^= int(draw.integers(1, 256))
        assert wire.session.handle(PLAN, bytes(broken[: draw.integers(1, len(broken) + 1)])) == REFUSAL
    for stage in (PLAN, BEGIN, FINISH, "upload", "evaluate", "mask", ""):
        for content in (b"", b"\x00", os.urandom(64), b"\xff" * 64):
            answer = wire.send(stage, content)
            assert answer == REFUSAL, stage


def test_another_version_of_the_wire_is_named(wire: Wire) -> None:
    message = bytearray(wire.sealed(PLAN, wire.plan_message(wire.plan)))
    message[16] = 9
    refused(wire, wire.session.handle(PLAN, bytes(message)), "speaks version 9 of the wire")


def test_a_plan_comes_with_the_word_of_enough_sites(wire: Wire) -> None:
    whole = wire.words
    for words in ((), whole[:1], (whole[0],) * 4):
        wire.words = words
        answer = wire.send(PLAN, wire.plan_message(wire.plan))
        refused(wire, answer, "sites have accepted the run: policy.smallest_cohort = 3")
    forged = record_codec.canonical_bytes(SignedAcceptance(site="west", signature=os.urandom(64)))
    wire.words = (*whole[:3], forged)
    assert wire.send(PLAN, wire.plan_message(wire.plan)) == REFUSAL


def test_stages_out_of_turn_charge_nothing(wire: Wire) -> None:
    for stage in (BEGIN, "advertise", "upload", FINISH):
        wire.join()
        assert wire.send(stage, OPENED) == REFUSAL
    assert wire.accepts(wire.send(PLAN, wire.plan_message(wire.plan)))
    for stage in ("advertise", "share", "upload", "confirm", "unmask"):
        assert wire.send(stage, b"") == REFUSAL
        assert wire.accepts(wire.send(PLAN, wire.plan_message(wire.plan)))


def test_no_round_is_begun_twice_whatever_a_restart_forgets(tmp_path: Path) -> None:
    federation = found(tmp_path, notes_run(privacy=SEEDED, protection=MASKS))
    sessions = open_all(federation)
    try:
        wire = wire_to(federation, sessions)
        assert wire.accepts(wire.send(PLAN, wire.plan_message(wire.plan)))
        begin = wire.sealed(BEGIN, b"")
        answer = wire.session.handle(BEGIN, begin)
        assert wire.accepts(answer)
        assert wire.session.handle(BEGIN, begin) == answer
        assert wire.send(BEGIN, b"") == REFUSAL
        assert wire.charges() == 1
        wire.session.close()
        wire.session = open_session(federation.site("north"))
        sessions.sessions[0] = wire.session
        assert wire.join() != REFUSAL
        refused(wire, wire.send(PLAN, wire.plan_message(wire.plan)), "round 1 was begun before")
        assert wire.session.handle(BEGIN, begin) == REFUSAL
        assert wire.charges() == 1
    finally:
        sessions.close()


def test_rounds_that_are_broken_off_cost_no_more_than_the_run_that_was_allowed(tmp_path: Path) -> None:
    """It begins attempt after attempt and opens nothing: what a person here allowed is where it ends."""
    federation = found(tmp_path, notes_run(privacy=RECORD, protection=MASKS))
    sessions = open_all(federation)
    try:
        wire = wire_to(federation, sessions)
        for attempt in range(2):  # the run has two rounds, and spares none
            plan = dataclasses.replace(wire.plan, attempt=attempt)
            assert wire.accepts(wire.send(PLAN, wire.plan_message(plan)))
            assert wire.accepts(wire.send(BEGIN, b""))
        assert wire.charges() == 2
        again = dataclasses.replace(wire.plan, attempt=2)
        assert not wire.accepts(wire.send(PLAN, wire.plan_message(again)))
        assert wire.send(BEGIN, b"") == REFUSAL
        assert wire.charges() == 2
        assert "its budget does not pay" in wire.log()
    finally:
        sessions.close()


def test_a_full_disk_is_said_and_nothing_is_charged(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    assert wire.accepts(wire.send(PLAN, wire.plan_message(wire.plan)))
    real = os.replace

    def full(source: Any, target: Any) -> None:
        if str(target).endswith((".run", ".guard")):
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    refused(wire, wire.send(BEGIN, b""), "No space left on device; free space")
