"""A hostile server repeats, reorders and invents messages; a lying site answers nonsense:
nothing is released or paid twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from defenses.errors import ProtocolError
from ffm_secure import record_codec
from ffm_secure.engines import simulation, summary
from ffm_secure.engines.local import LocalEngine
from ffm_secure.records import Acceptance, Receipt
from ffm_secure.tasks.base import Evaluation
from ffm_secure.transport.courier import Lost, Reply
from ffm_secure.transport.stages import BEGIN, EVALUATE, FINISH, OPENED, PLAN, encode_vector, join_plan
from tests.federation.helpers import RECORD, SECAGG, finish, first_plan, make, prepared

REAL = {**RECORD, "noise": "system"}


def ready(folder: Path, **sections: Any) -> simulation.Simulation:
    return simulation.build(prepared(make(**sections)), folder)


def message(built: simulation.Simulation, **changes: Any) -> bytes:
    plan = replace(first_plan(built), **changes)
    return join_plan(record_codec.canonical_bytes(plan), encode_vector(built.trainable.flatten()))


def reservations(built: simulation.Simulation) -> int:
    return sum(entry.kind == "reserve" for entry in built.ledger.entries())


@pytest.mark.parametrize("protection", [{"kind": "none"}, SECAGG], ids=["none", "secagg"])
def test_one_reservation_pays_for_one_draw(protection: dict[str, Any], tmp_path: Path) -> None:
    """In the clear a second upload came back with other noise,
    and one more average of it away was the truth.
    """
    built = ready(tmp_path, privacy=REAL, protection=protection)
    site = built.sites[0]
    site.handle(PLAN, message(built))
    site.handle(BEGIN, b"")
    if protection["kind"] == "none":
        assert site.handle("upload", b"")
    else:
        with pytest.raises(ProtocolError):
            site.handle("upload", b"nonsense")  # learned, and refused when it was to be sealed
    with pytest.raises(ProtocolError):
        site.handle("upload", b"")
    assert reservations(built) == 1


def test_begin_is_paid_for_once(tmp_path: Path) -> None:
    built = ready(tmp_path, privacy=REAL, protection=SECAGG)
    site = built.sites[0]
    site.handle(PLAN, message(built))
    site.handle(BEGIN, b"")
    for _ in range(3):
        with pytest.raises(ProtocolError):
            site.handle(BEGIN, b"")
    site.handle(FINISH, b"\0")
    site.handle(PLAN, message(built))
    with pytest.raises(ProtocolError):
        site.handle(
            BEGIN, b""
        )  # the identity took part in this round, and what it cannot join it does not pay
    assert reservations(built) == 1


def test_nothing_is_spent_before_an_upload(tmp_path: Path) -> None:
    built = ready(tmp_path, privacy=REAL)
    site = built.sites[0]
    site.handle(PLAN, message(built))
    site.handle(BEGIN, b"")
    site.handle(FINISH, OPENED)
    assert not any(entry.kind == "spend" for entry in built.ledger.entries())


@pytest.mark.parametrize("run_id", [b"", bytes(5), bytes(4000)])
def test_an_id_that_is_none_is_refused_and_free(run_id: bytes, tmp_path: Path) -> None:
    built = ready(tmp_path, privacy=REAL, protection=SECAGG)
    answer = built.sites[0].handle(PLAN, message(built, run_id=run_id))
    assert not record_codec.from_bytes(Acceptance, bytes(answer), "answer").accepted
    assert reservations(built) == 0


def test_another_run_is_refused(tmp_path: Path) -> None:
    """Ten invented runs spent ten times a run's epsilon of the owner's lifetime budget."""
    built = ready(tmp_path, privacy=REAL)
    site = built.sites[0]
    for number, accepted in ((0, True), (1, False)):
        answer = site.handle(PLAN, message(built, run_id=bytes([number]) * 16))
        assert record_codec.from_bytes(Acceptance, bytes(answer), "answer").accepted is accepted
    with pytest.raises(ProtocolError):
        site.handle(EVALUATE, message(built, run_id=bytes([1]) * 16))
    with pytest.raises(ProtocolError):
        site.handle(EVALUATE, message(built, run_id=bytes(16), fingerprint="no"))


def test_a_message_without_parts_is_improper(tmp_path: Path) -> None:
    pytest.importorskip("tenseal", reason="the extra 'he' is not installed")
    built = ready(tmp_path, protection={"kind": "bfv", "threshold": 3})
    site = built.sites[0]
    site.handle(PLAN, message(built))
    site.handle(BEGIN, b"")
    with pytest.raises(ProtocolError):
        site.handle("open", b"")


class Lying(LocalEngine):
    """Let one site answer nonsense at one stage."""

    def __init__(self, built: simulation.Simulation, stage: str, content: bytes) -> None:
        super().__init__(built.config, built.sites, built.courier.trainers)
        self.stage, self.content = stage, content

    def send(self, stage: str, messages: Mapping[int, bytes]) -> Iterator[Reply]:
        for reply in super().send(stage, messages):
            lie = stage == self.stage and reply.site == 1
            yield Reply(site=reply.site, content=self.content) if lie else reply


RECEIPT = record_codec.canonical_bytes(Receipt(epsilon=2.0, entries=1, head="ab"))
NAN_RECEIPT = RECEIPT.replace(b"2.0", b'"nan"')
LESS_THAN_NOTHING = RECEIPT.replace(b"2.0", b"-2.0")
A_TERMINALS_RECEIPT = RECEIPT.replace(b"ab", b"\\u001b[2J")
FAR_TOO_GOOD = record_codec.canonical_bytes(Evaluation(loss=-1e300, metric=1e300))
NAN_EVALUATION = record_codec.canonical_bytes(Evaluation(loss=float("nan"), metric=float("nan")))


@pytest.mark.parametrize(
    ("stage", "content"),
    [
        (PLAN, b"no"),
        (BEGIN, b"no"),
        (FINISH, b"no"),
        (FINISH, NAN_RECEIPT),
        (FINISH, LESS_THAN_NOTHING),
        (FINISH, A_TERMINALS_RECEIPT),
        (EVALUATE, b"no"),
        (EVALUATE, NAN_EVALUATION),
        (EVALUATE, FAR_TOO_GOOD),
    ],
)
def test_one_sites_nonsense_ends_no_run(stage: str, content: bytes, tmp_path: Path) -> None:
    federation = {"strategy": {"kind": "fedsa"}} if stage == EVALUATE else {}
    built = ready(tmp_path, privacy=REAL, protection=SECAGG, federation=federation)
    trained = finish(built, tmp_path, courier=Lying(built, stage, content))
    assert trained.status == "complete"
    assert len(trained.records) == 3
    assert all(record.epsilon_spent >= 0 and record.loss == record.loss for record in trained.records)
    assert all(0 <= record.metric <= 1 for record in trained.records)
    assert all(re.fullmatch("[0-9a-f]*", receipt.head) for receipt in built.server.receipts.values())
    spent = [record.epsilon_spent for record in trained.records]
    assert spent == sorted(spent)


@pytest.mark.parametrize("groups", [1, 2])
def test_one_site_does_not_dictate_an_encrypted_sum(groups: int, tmp_path: Path) -> None:
    """Nor does it end the round: it closed every round, at the cost of everybody, and had no name."""
    pytest.importorskip("tenseal", reason="the extra 'he' is not installed")
    built = ready(
        tmp_path,
        task={"clients": 3 * groups},
        federation={"cohort": 3 * groups, "rounds": 2},
        protection={"kind": "bfv", "threshold": 3, "groups": groups},
    )
    codec = built.spec.codec
    false = bytes(codec.length * codec.modulus_bits // 8)
    trained = finish(built, tmp_path, courier=Lying(built, "total", false))
    assert [record.aborted for record in trained.records] == [""] * 2
    assert [record.survivors for record in trained.records] == [tuple(range(3 * groups))] * 2
    assert [dict(record.dropped) for record in trained.records] == [{1: "total"}] * 2, "it is named"
    assert all(record.norm for record in trained.records), "no sum of zeros"


def test_a_sum_that_no_majority_hands_on_stays_closed(tmp_path: Path) -> None:
    pytest.importorskip("tenseal", reason="the extra 'he' is not installed")
    built = ready(tmp_path, federation={"rounds": 1}, protection={"kind": "bfv", "threshold": 3})
    codec = built.spec.codec

    class Torn(LocalEngine):
        def send(self, asked: str, messages: Mapping[int, bytes]) -> Iterator[Reply]:
            for reply in super().send(asked, messages):
                lie = asked == "total" and reply.site < 2
                false = bytes(codec.length * codec.modulus_bits // 8)
                yield Reply(site=reply.site, content=false) if lie else reply

    torn = Torn(built.config, built.sites, built.courier.trainers)
    (record,) = finish(built, tmp_path, courier=torn).records
    assert record.aborted == "the sites say they opened different sums"


def test_a_run_that_budgets_end_says_who_said_so(tmp_path: Path) -> None:
    """Where every client is needed one false word ends the run; nobody has paid, and it has an author."""
    built = ready(tmp_path, privacy=REAL, protection={"kind": "secagg", "threshold": 4})
    refusal = record_codec.canonical_bytes(Acceptance(accepted=False, affordable=False))
    trained = finish(built, tmp_path, courier=Lying(built, PLAN, refusal))
    assert trained.status == "budget exhausted"
    assert trained.reason.endswith(f"by what they say: {built.spec.owners[1]}")
    assert reservations(built) == 0
    assert any("a sum needs all 4 clients" in line for line in summary.describe(built.prepared).warnings)
    other = ready(tmp_path / "b", privacy=REAL, protection={**SECAGG, "colluding": 0})
    assert finish(other, tmp_path / "b", courier=Lying(other, PLAN, refusal)).status == "complete"


@pytest.mark.parametrize("stage", ["advertise", "share", "upload", "confirm", "unmask"])
def test_who_answers_with_anothers_message_is_named(stage: str, tmp_path: Path) -> None:
    """The session took it for a repetition, and nobody was missed."""
    built = ready(tmp_path, privacy=REAL, protection={**SECAGG, "colluding": 0})

    class Parrot(LocalEngine):
        def send(self, asked: str, messages: Mapping[int, bytes]) -> Iterator[Reply]:
            first: bytes | memoryview | Lost = b""
            for reply in super().send(asked, messages):
                first = reply.content if reply.site == 0 else first
                copies = asked == stage and reply.site == 1
                yield Reply(site=1, content=first) if copies else reply

    parrot = Parrot(built.config, built.sites, built.courier.trainers)
    trained = finish(built, tmp_path, courier=parrot)
    assert {record.dropped.get(1) for record in trained.records} == {stage}


def test_a_round_that_cannot_be_opened_costs_nobody_anything(tmp_path: Path) -> None:
    """A sum may cover three of four, but unmasking needs all four: one that declined had the others pay for
    every round, and none was opened.
    """
    built = ready(tmp_path, privacy=REAL, protection=SECAGG)
    refusal = record_codec.canonical_bytes(Acceptance(accepted=False))
    trained = finish(built, tmp_path, courier=Lying(built, PLAN, refusal))
    assert {record.aborted for record in trained.records} == {"3 of at least 4 clients answered"}
    assert reservations(built) == 0
    assert any("a sum needs all 4 clients" in line for line in summary.describe(built.prepared).warnings)
    other = ready(tmp_path / "b", privacy=REAL, protection={**SECAGG, "colluding": 0})
    trained = finish(other, tmp_path / "b", courier=Lying(other, PLAN, refusal))
    assert [record.survivors for record in trained.records] == [(0, 2, 3)] * 3


@pytest.mark.parametrize("stage", ["open", "confirm"])
def test_one_site_that_confirms_nothing_ends_no_encrypted_round(stage: str, tmp_path: Path) -> None:
    """Every round waited for the word of every site in the sum; a majority is what clients insist on."""
    pytest.importorskip("tenseal", reason="the extra 'he' is not installed")
    built = ready(tmp_path, protection={"kind": "bfv", "threshold": 3})

    class Silent(LocalEngine):
        def send(self, asked: str, messages: Mapping[int, bytes]) -> Iterator[Reply]:
            for reply in super().send(asked, messages):
                away = asked == stage and reply.site == 1
                yield Reply(site=1, content=Lost(stage=asked)) if away else reply

    silent = Silent(built.config, built.sites, built.courier.trainers)
    trained = finish(built, tmp_path, courier=silent)
    assert [record.aborted for record in trained.records] == ["", "", ""]
    assert all(record.survivors == (0, 1, 2, 3) for record in trained.records), "its upload is in the sum"
    assert all(record.dropped == {1: stage} for record in trained.records)


def test_a_site_that_is_away_and_one_that_declines_are_told_apart(tmp_path: Path) -> None:
    """A report said of a site that was down that its owner had declined."""
    built = ready(tmp_path, privacy=REAL, protection=SECAGG)

    class Away(LocalEngine):
        def send(self, asked: str, messages: Mapping[int, bytes]) -> Iterator[Reply]:
            for reply in super().send(asked, messages):
                away = asked == PLAN and reply.site == 1
                yield Reply(site=1, content=Lost(stage=asked)) if away else reply

    away = finish(built, tmp_path, courier=Away(built.config, built.sites, built.courier.trainers))
    assert all(record.dropped == {1: "absent"} for record in away.records)
    other = ready(tmp_path / "b", privacy=REAL, protection=SECAGG)
    refusal = record_codec.canonical_bytes(Acceptance(accepted=False, affordable=True))
    declined = finish(other, tmp_path / "b", courier=Lying(other, PLAN, refusal))
    assert all(record.dropped == {1: "declined"} for record in declined.records)


def test_a_confirmation_in_anothers_name_is_none(tmp_path: Path) -> None:
    pytest.importorskip("tenseal", reason="the extra 'he' is not installed")
    built = ready(tmp_path, protection={"kind": "bfv", "threshold": 3})

    class Copying(LocalEngine):
        def send(self, asked: str, messages: Mapping[int, bytes]) -> Iterator[Reply]:
            first = None
            for reply in super().send(asked, messages):
                first = reply.content if first is None else first
                copied = asked == "open" and reply.site == 1
                yield Reply(site=1, content=first) if copied else reply

    copying = Copying(built.config, built.sites, built.courier.trainers)
    trained = finish(built, tmp_path, courier=copying)
    assert all(record.dropped == {1: "open"} and not record.aborted for record in trained.records)
