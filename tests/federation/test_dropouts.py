"""Clients lost at every stage of masked rounds:
the run equals the open one over the same survivors, or a round is given up.
"""

from __future__ import annotations

import dataclasses
import os
import html
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from defenses import he, secagg
from defenses.errors import ProtocolError
from defenses.secagg import ring
from ffm_secure.config import compatibility
from ffm_secure.config.run_file import RunConfig
from ffm_secure.engines import simulation, summary
from ffm_secure.engines.local import LocalEngine, _is_over, lost_clients
from ffm_secure.errors import PlanRefused
from ffm_secure.protection.base import AFTER_UPLOAD, UPLOAD, AggregationResult, ServerRound
from ffm_secure.protection.codec import VectorCodec, real_codec
from ffm_secure.protection.enrolment import Enrolment, enrol
from ffm_secure.protection.masked import MaskedClient, sharing_graph
from ffm_secure.records import RoundPlan, RoundRecord, RunSummary
from ffm_secure.report.details import render_details_html
from ffm_secure.report.page import render_html
from ffm_secure.report.release import released
from ffm_secure.quantities import size
from ffm_secure.transport.courier import Reply
from ffm_secure.transport.stages import PLAN, split_plan
from tests.federation.helpers import RECORD, finish, make, prepared, train

ROUND = RoundPlan(run_id=bytes(range(16)), round=1, cohort=(0, 1, 2, 3), fingerprint="aa" * 32, mechanism="")
STAGES = ["advertise", "share", "train", "upload", "confirm", "unmask"]


class SumRound:
    """Ask those who survived another run, and add up what they send."""

    stages = (UPLOAD,)

    def __init__(self, codec: VectorCodec, record: RoundRecord) -> None:
        self.bits, self.record = codec.modulus_bits, record
        self.vectors: list[npt.NDArray[np.int64]] = []

    def messages(self, stage: str) -> Mapping[int, bytes]:
        return {} if self.record.aborted else dict.fromkeys(self.record.survivors, b"")

    def receive(self, stage: str, site: int, reply: bytes) -> None:
        self.vectors.append(ring.signed(ring.unpack(reply, self.bits), self.bits))

    def open_sum(self, lost: Mapping[int, str]) -> AggregationResult:
        assert not lost
        if self.record.aborted:
            return AggregationResult(ring_sum=None, aborted="as in the other run")
        total: npt.NDArray[np.int64] = np.sum(self.vectors, axis=0, dtype=np.int64)
        return AggregationResult(ring_sum=ring.from_signed(total, self.bits), survivors=self.record.survivors)


class SumOf:
    """The slow, obvious definition:
    add up, in the clear, the vectors of the clients that survived another run.
    """

    kind = "none"

    def __init__(self, codec: VectorCodec, records: Sequence[RoundRecord]) -> None:
        self.codec, self.records = codec, records

    def open_round(self, plan: RoundPlan) -> ServerRound:
        return SumRound(self.codec, self.records[plan.round - 1])


def lora(parties: int, *, rounds: int, kind: str = "secagg", rate: float = 0.2, **sections: Any) -> RunConfig:
    """Return a LoRA run of a tiny text encoder in which every party is asked in every round."""
    lifecycle = {"kind": "finetune", "local_steps": 1, "batch_size": 4, "learning_rate": 0.2}
    return make(
        task={
            "kind": "text_classification",
            "data": f"builtin:clinic_notes?size={max(80, 4 * parties)}&validation=20",
            "clients": parties,
            "max_length": 16,
            "evaluation_examples": 8,
        },
        model={"name": "builtin:tiny-bert", "trainable": {"kind": "lora", "rank": 2}},
        federation={
            "rounds": rounds,
            "cohort": parties,
            "lifecycle": lifecycle,
            "evaluate_every": rounds,
            "dropout": {"rate": rate, "stages": STAGES},
        },
        **{"protection": {"kind": kind, "threshold": max(3, (2 * parties + 2) // 3)}, **sections},
    )


def check(parties: int, folder: Path, *, rounds: int, seed: int) -> tuple[RoundRecord, ...]:
    """Compare a masked run that loses clients with the open one, without losses, over its survivors:
    bit for bit.
    """
    _, masked = train(lora(parties, rounds=rounds, seed=seed), folder / "masked")
    assert masked.status == "complete"
    assert len(masked.records) == rounds
    for record in masked.records:
        early = {client for client, stage in record.dropped.items() if stage not in AFTER_UPLOAD}
        assert record.aborted or set(record.survivors) == set(record.cohort) - early
        assert not 0 < len(record.survivors) < 3
    made = lora(parties, rounds=rounds, seed=seed, kind="none", rate=0.0)
    built = simulation.build(prepared(made), folder / "open")
    built.server.protection = SumOf(built.spec.codec, masked.records)
    start = built.trainable.flatten().clone()
    expected = finish(built, folder / "open").state.vector
    assert torch.equal(masked.state.vector, expected)
    assert not torch.equal(start, expected), "nothing was learned, so nothing was compared"
    return masked.records


def seed_where(parties: int, rounds: int, wanted: Callable[[list[dict[int, str]]], bool]) -> int:
    """Return the first seed whose drawn losses, round by round, are of the kind a test is about."""
    for seed in range(1000):
        asked = lora(parties, rounds=rounds, seed=seed)
        drawn = [lost_clients(asked, number, range(parties)) for number in range(1, rounds + 1)]
        if wanted(drawn):
            return seed
    raise AssertionError("no seed loses clients in the way this test needs")


def every_stage_and_enough_left(parties: int, drawn: list[dict[int, str]]) -> bool:
    """Lose somebody at each stage, and in no round so many that it must be given up."""
    return {stage for lost in drawn for stage in lost.values()} == set(STAGES) and all(
        len(lost) <= parties / 4 + 1 for lost in drawn
    )


def first_and_last_round_lose_somebody(drawn: list[dict[int, str]]) -> bool:
    return [bool(lost) for lost in drawn] == [True, *[False] * (len(drawn) - 2), True]


def stages(records: Sequence[RoundRecord]) -> set[str]:
    return {stage for record in records for stage in record.dropped.values()}


def test_three_parties_with_a_fifth_lost_at_random_stages(tmp_path: Path) -> None:
    """Three cannot spare one, or two would read each other:
    a round with a loss is given up, the others are exact.
    """
    records = check(3, tmp_path, rounds=3, seed=seed_where(3, 3, first_and_last_round_lose_somebody))
    assert [bool(record.dropped) for record in records] == [True, False, True]
    assert [bool(record.aborted) for record in records] == [True, False, True]


def test_twenty_parties_with_a_fifth_lost_at_random_stages(tmp_path: Path) -> None:
    seed = seed_where(20, 3, lambda drawn: every_stage_and_enough_left(20, drawn))
    records = check(20, tmp_path, rounds=3, seed=seed)
    assert stages(records) == set(STAGES)
    assert not any(record.aborted for record in records)
    assert min(len(record.survivors) for record in records) < 20


@pytest.mark.slow
def test_two_hundred_parties_with_a_fifth_lost_at_random_stages(tmp_path: Path) -> None:
    seed = seed_where(200, 2, lambda drawn: every_stage_and_enough_left(200, drawn))
    records = check(200, tmp_path, rounds=2, seed=seed)
    assert stages(records) == set(STAGES)
    assert not any(record.aborted for record in records)
    assert min(len(record.survivors) for record in records) < 200


class Remembering(LocalEngine):
    """Note the model that every round starts from."""

    def __init__(self, built: simulation.Simulation) -> None:
        super().__init__(built.config, built.sites, built.courier.trainers)
        self.starts: list[torch.Tensor] = []

    def send(self, stage: str, messages: Mapping[int, bytes]) -> Iterator[Reply]:
        if stage == PLAN:
            _, broadcast = split_plan(next(iter(messages.values())))
            self.starts.append(torch.from_numpy(np.frombuffer(broadcast, dtype="<f4").copy()))
        return super().send(stage, messages)


def test_an_aborted_round_stays_spent_and_the_run_goes_on(tmp_path: Path) -> None:
    seed = seed_where(3, 3, first_and_last_round_lose_somebody)
    made = lora(3, rounds=3, seed=seed, privacy={**RECORD, "noise": "system", "epsilon": 50.0})
    built = simulation.build(prepared(made), tmp_path)
    engine = Remembering(built)
    trained = finish(built, tmp_path, courier=engine)
    aborted = [bool(record.aborted) for record in trained.records]
    assert aborted == [True, False, True]
    assert trained.status == "complete"
    reasons = {record.aborted for record in trained.records if record.aborted}
    assert reasons == {"fewer than 3 clients could open the sum"}
    models = [*engine.starts, trained.state.vector]
    assert [torch.equal(before, after) for before, after in pairwise(models)] == aborted
    for owner in built.prepared.owners:
        assert sum(entry.kind == "reserve" for entry in built.ledger.entries(owner=owner)) == 3
    spent = [record.epsilon_spent for record in trained.records]
    assert 0 < spent[0] < spent[1] < spent[2] <= 50.0
    _check_report(summary.summarise(built, trained, zero_metric=0.0, outcomes=(), seconds=1.0, ended=""))


def _check_report(found: RunSummary) -> None:
    """Look for bytes, time, survivors, aborts and the collusion statement on the page."""
    public = released(found)
    written = render_html(public) + render_details_html(public)
    page = re.sub(r"<[^>]+>", "", html.unescape(written)).replace("\N{NO-BREAK SPACE}", " ")
    assert "Rounds aborted" in page
    assert "Round 1: fewer than 3 clients could open the sum" in page
    assert "Smallest sum opened" in page
    assert "over 3 clients" in page
    for record in found.rounds:
        assert record.bytes_up > 0
        assert record.seconds > 0
        assert size(record.bytes_up).replace("\N{NO-BREAK SPACE}", " ") in page
        assert all(f"client {client}: {stage}" in page for client, stage in record.dropped.items())
    assert found.plan.breaks in page
    assert "The server together with 2 or more clients; up to 1 are tolerated" in found.plan.breaks
    assert "even if the server lies" in found.plan.breaks


@pytest.mark.parametrize("kind", ["bfv", "ckks", "none"])
def test_the_plan_says_who_can_decrypt_and_what_breaks_it(kind: str) -> None:
    stages = {"federation": {"dropout": {"rate": 0.2, "stages": ["train"]}}}
    breaks = summary._breaks(make(protection={"kind": kind, "threshold": 3}, **stages))
    if kind == "none":
        assert breaks.startswith("Nobody needs to: updates travel in clear.")
    else:
        assert "Each of the 4 clients alone" in breaks
        assert "The server together with any 1 of the 4 clients reads every update of the run." in breaks


@pytest.mark.parametrize(
    "cohort, mode, kind",
    [
        (256, "active", "complete"),
        (300, "active", "harary"),
        (1000, "active", "harary"),
        (300, "semi_honest", "harary"),
    ],
)
@pytest.mark.parametrize("colluding", [0, 1, 20])
def test_large_cohorts_share_on_a_ring_that_clients_accept(
    cohort: int, mode: str, kind: str, colluding: int
) -> None:
    made = make(
        task={"clients": cohort},
        federation={"cohort": cohort},
        protection={"kind": "secagg", "mode": mode, "colluding": colluding, "threshold": cohort * 3 // 4},
    )
    graph = sharing_graph(made)
    assert graph.kind == kind
    assert graph.threshold <= graph.neighbours
    assert kind == "complete" or graph.neighbours < cohort / 2
    codec = real_codec(size=5, clients=cohort, value_bits=8, bound=1.0, max_weight=1, carries_loss=False)
    site = enrol(made, codec, [str(number) for number in range(cohort)]).sites[0]
    assert isinstance(site, MaskedClient)
    round_plan = RoundPlan(
        run_id=bytes(16), round=1, cohort=tuple(range(cohort)), fingerprint="aa" * 32, mechanism=""
    )
    policy = site._terms.policy(site._operator, round_plan)
    policy.admit(site._terms.session(round_plan), now=0)  # raises if a client would refuse


def test_nobody_colluding_and_nobody_lying_needs_two_shares() -> None:
    made = make(protection={"kind": "secagg", "mode": "semi_honest", "colluding": 0, "threshold": 3})
    assert sharing_graph(made).threshold == 2


CODEC = real_codec(size=5, clients=4, value_bits=8, bound=1.0, max_weight=1, carries_loss=False)


def contribution(client: int) -> npt.NDArray[Any]:
    return ring.frame(np.full(5, client + 1, dtype=np.uint16), weight=1, modulus_bits=CODEC.modulus_bits)


def carry(enrolment: Enrolment, plan: RoundPlan, drop: Mapping[int, str]) -> AggregationResult:
    """Carry one round between the halves; a client in `drop` answers no more from its stage on."""
    rounds = {site: enrolment.sites[site].join(plan) for site in plan.cohort}
    session, lost = enrolment.server.open_round(plan), {}
    for stage in session.stages:
        try:
            messages = session.messages(stage)
        except ProtocolError:
            break
        for site, message in messages.items():
            if site in lost or (site in drop and _is_over(drop[site], stage)):
                lost[site] = drop[site]
                continue
            half = rounds[site]
            try:
                if stage == UPLOAD:
                    reply = half.seal(message, contribution(site), update=os.urandom(32))
                else:
                    reply = half.respond(stage, message)
                session.receive(stage, site, reply)
            except ProtocolError:
                lost[site] = stage
    return session.open_sum(lost)


@pytest.mark.parametrize("kind", ["none", "secagg"])
@pytest.mark.parametrize("mode", ["active", "semi_honest"])
def test_who_is_lost_after_the_upload_counts_in_every_protection(kind: str, mode: str) -> None:
    protection = {
        "kind": kind,
        "threshold": 3,
        "colluding": 0,
        **({"mode": mode} if kind == "secagg" else {}),
    }
    built = enrol(make(protection=protection), CODEC, ["a", "b", "c", "d"])
    for stage in sorted(AFTER_UPLOAD):
        round_plan = dataclasses.replace(ROUND, round=1 + sorted(AFTER_UPLOAD).index(stage))
        found = carry(built, round_plan, {0: stage})
        assert found.survivors == (0, 1, 2, 3)
        assert found.ring_sum is not None
        assert found.ring_sum.tolist() == [4, 4, 10, 10, 10, 10, 10]
    for number, stage in enumerate(STAGES[:4], start=5):
        round_plan = dataclasses.replace(ROUND, round=number)
        found = carry(built, round_plan, {0: stage})
        assert found.survivors == (1, 2, 3)
        assert found.ring_sum is not None
        assert found.ring_sum.tolist() == [3, 3, 9, 9, 9, 9, 9]


@pytest.mark.parametrize("kind", ["bfv", "ckks"])
def test_clients_that_opened_different_sums_abort_the_round(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tenseal", reason="the extra 'he' is not installed")
    built = enrol(make(protection={"kind": kind, "threshold": 3}), CODEC, ["a", "b", "c", "d"])
    found = carry(built, ROUND, {})
    assert found.ring_sum is not None
    assert found.ring_sum.tolist() == [4, 4, 10, 10, 10, 10, 10]
    honest = he.EncryptedClient.confirm
    monkeypatch.setattr(he.EncryptedClient, "confirm", lambda *args: honest(*args)[:-1] + b"\0")
    found = carry(built, dataclasses.replace(ROUND, round=2), {})
    assert (found.ring_sum, found.aborted) == (None, "protocol aborted")
    assert min(found.bytes_up, found.bytes_down) > 0


@pytest.mark.parametrize("stage", sorted(AFTER_UPLOAD))
def test_a_stage_that_encryption_lacks_is_refused(stage: str) -> None:
    made = make(
        protection={"kind": "bfv", "threshold": 3}, federation={"dropout": {"rate": 0.1, "stages": [stage]}}
    )
    with pytest.raises(PlanRefused, match=f"'{stage}' does not exist"):
        compatibility.check(made)


def test_a_site_that_deals_rubbish_is_left_out_of_the_next_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its victim misses one round, not the run; the dealer misses the rest."""
    made = make(
        task={"clients": 5},
        federation={"cohort": 5},
        protection={"kind": "secagg", "threshold": 3, "colluding": 1},
    )
    codec = real_codec(size=5, clients=5, value_bits=8, bound=1.0, max_weight=1, carries_loss=False)
    enrolment = enrol(made, codec, [str(number) for number in range(5)])
    plan = dataclasses.replace(ROUND, cohort=(0, 1, 2, 3, 4))
    honest = secagg.ServerSession._ciphertext
    dealer = enrolment.server.terms.members[0]
    victim = enrolment.server.terms.members[3]

    def spoiled(session: secagg.ServerSession, sender: int, receiver: int) -> bytes:
        """Stand for a ciphertext that its dealer signed although nobody can open it."""
        pair = (session._order[sender], session._order[receiver])
        return bytes(86) if pair == (dealer, victim) else honest(session, sender, receiver)

    with monkeypatch.context() as patched:
        patched.setattr(secagg.ServerSession, "_ciphertext", spoiled)
        assert carry(enrolment, plan, {}).survivors == (0, 1, 2, 4)
    for number in (2, 3):
        following = dataclasses.replace(plan, round=number, fingerprint=f"{number:02x}" * 32)
        assert carry(enrolment, following, {}).survivors == (1, 2, 3, 4)
