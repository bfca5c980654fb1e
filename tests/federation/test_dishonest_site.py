"""One dishonest site: what it sends is refused with the reason, the round is given up,
and the run goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from defenses.random_source import RandomSource
from defenses.secagg import ring
from defenses.secagg.masks import RingVector
from ffm_secure.engines import simulation
from ffm_secure.engines.own_models import make_own_models
from ffm_secure.federation import TrainingResult
from ffm_secure.protection.codec import real_codec
from ffm_secure.records import REFUSED, RoundPlan, RoundSum
from ffm_secure.server import rounds
from ffm_secure.server.evidence import Evidence
from ffm_secure.server.rounds import NOT_FINITE, RoundResult
from ffm_secure.server.sum_check import why_too_large
from ffm_secure.site.noise_memory import NoiseMemory
from ffm_secure.site.trainer import SiteData, SiteTrainer
from tests.federation.helpers import CLIENT, RECORD, SECAGG, finish, first_plan, make, prepared
from tests.queries.helpers import HEAD

LIAR = 1
NONE = {"unit": "none", "reason": "test data"}
Lie = Callable[[RingVector, int], RingVector]


class LyingTrainer(SiteTrainer):
    """Change what one site sends in the second round."""

    lie: Lie

    def run_round(
        self,
        data: SiteData,
        plan: RoundPlan,
        start: torch.Tensor,
        source: RandomSource,
        noise: NoiseMemory | None = None,
    ) -> RingVector:
        honest = super().run_round(data, plan, start, source, noise)
        if data.index != LIAR or plan.round != 2:
            return honest
        return self.lie(honest.copy(), self.spec.codec.modulus_bits)


def everything(vector: RingVector, bits: int) -> RingVector:
    """Set every coordinate to much more than the bound on the whole update, as far as the ring allows."""
    values = ring.signed(vector, bits)
    values[2:] = min(2**19 - 1 if bits <= 24 else 2**30, (1 << (bits - 1)) // 8)
    return ring.from_signed(values, bits)


def counted(weight: int) -> Lie:
    """Claim another weight, so that the mean is divided by something else."""

    def lie(vector: RingVector, bits: int) -> RingVector:
        values = ring.signed(vector, bits)
        values[1] = weight
        return ring.from_signed(values, bits)

    return lie


def two_of_itself(vector: RingVector, bits: int) -> RingVector:
    values = ring.signed(vector, bits)
    values[0] = 2
    return ring.from_signed(values, bits)


def run_with(lie: Lie, folder: Path, **sections: Any) -> tuple[simulation.Simulation, TrainingResult]:
    ready = simulation.build(prepared(make(**sections)), folder)
    trainer = LyingTrainer(spec=ready.spec, trainable=ready.trainable, task=ready.task, states=ready.states)
    trainer.lie = lie
    ready.courier.trainers.replace([trainer])
    return ready, finish(ready, folder)


def check_evidence(folder: Path, trained: TrainingResult) -> None:
    """The signed uploads of the refused round, and of no other, are named and kept."""
    named = [set(record.evidence) for record in trained.records]
    assert named == [set(), {0, 1, 2, 3}, set()]
    kept = sorted(path.name for path in (folder / "evidence").glob("*"))
    assert kept == ["round-000002"]
    for site, digest in trained.records[1].evidence.items():
        upload = (folder / "evidence" / "round-000002" / f"{site}.upload").read_bytes()
        assert hashlib.sha256(upload).hexdigest() == digest
        index = json.loads((folder / "evidence" / "round-000002" / "index.json").read_text())
        assert index["uploads"][site]["sha256"] == digest
        assert index["reason"] == trained.records[1].aborted


@pytest.mark.parametrize("protection", ["secagg", "bfv"])
@pytest.mark.parametrize("lie", [counted(-3), counted(-2), counted(2), two_of_itself])
def test_a_false_count_or_weight_ends_the_round_alone(lie: Lie, protection: str, tmp_path: Path) -> None:
    """At four clients -3 made the divisor 0 and -2 multiplied the mean by four, unnoticed."""
    if protection == "bfv":
        pytest.importorskip("tenseal", reason="the extra 'he' is not installed")
    kind = SECAGG if protection == "secagg" else {"kind": protection, "threshold": 3}
    _, trained = run_with(lie, tmp_path, privacy=RECORD, protection=kind)
    assert trained.status == "complete"
    check_evidence(tmp_path, trained)
    reasons = [record.aborted for record in trained.records]
    assert reasons == ["", "the opened sum is impossible for its survivors", ""]
    assert bool(torch.isfinite(trained.state.vector).all())


@pytest.mark.parametrize("lie", [counted(-3), counted(2), two_of_itself, everything])
def test_where_updates_are_visible_a_liar_is_left_out_and_named(lie: Lie, tmp_path: Path) -> None:
    """One liar ended the round, and with it the work of everybody."""
    _, trained = run_with(lie, tmp_path / "lied", privacy=RECORD, protection={"kind": "none", "threshold": 3})
    assert [record.aborted for record in trained.records] == ["", "", ""]
    assert [dict(record.dropped) for record in trained.records] == [{}, {LIAR: REFUSED}, {}]
    assert [record.survivors for record in trained.records] == [(0, 1, 2, 3), (0, 2, 3), (0, 1, 2, 3)]
    assert bool(torch.isfinite(trained.state.vector).all())


def test_a_liar_that_is_left_out_counts_as_missing(tmp_path: Path) -> None:
    _, trained = run_with(everything, tmp_path, privacy=RECORD, protection={"kind": "none", "threshold": 4})
    assert [record.aborted for record in trained.records] == ["", "3 of at least 4 clients answered", ""]
    assert [dict(record.dropped) for record in trained.records] == [{}, {LIAR: REFUSED}, {}]


@pytest.mark.parametrize(
    ("privacy", "because"),
    [(RECORD, "the record unit"), (CLIENT, "the client unit")],
    ids=["record", "client"],
)
def test_a_site_cannot_set_the_whole_model(privacy: dict[str, Any], because: str, tmp_path: Path) -> None:
    _, trained = run_with(everything, tmp_path, privacy=privacy, protection=SECAGG)
    assert trained.status == "complete"
    assert [bool(record.aborted) for record in trained.records] == [False, True, False]
    assert "honest clients send at most" in trained.records[1].aborted
    assert because in trained.records[1].aborted
    assert trained.records[1].norm is None
    assert trained.records[1].loss == trained.records[0].loss, "the model stayed as it was"


def test_without_a_unit_a_declared_bound_is_held(tmp_path: Path) -> None:
    _, free = run_with(everything, tmp_path / "free", privacy=NONE, protection=SECAGG)
    assert not any(record.aborted for record in free.records), "nothing follows from the run file"
    bounded = {**SECAGG, "norm_bound": 1.0}
    _, held = run_with(everything, tmp_path / "held", privacy=NONE, protection=bounded)
    assert [bool(record.aborted) for record in held.records] == [False, True, False]
    assert "protection.norm_bound" in held.records[1].aborted


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("privacy", [RECORD, CLIENT], ids=["record", "client"])
def test_honest_sums_pass_with_room(privacy: dict[str, Any], optimizer: str, tmp_path: Path) -> None:
    lifecycle = {
        "kind": "finetune", "local_steps": 3, "batch_size": 8, "learning_rate": 0.05, "optimizer": optimizer,
    }  # fmt: skip
    made = make(privacy=privacy, protection=SECAGG, federation={"lifecycle": lifecycle})
    ready = simulation.build(prepared(made), tmp_path)
    trained = finish(ready, tmp_path)
    assert not any(record.aborted for record in trained.records)
    assert all(record.norm is not None and record.norm > 0 for record in trained.records)


def test_a_model_that_is_not_finite_is_never_committed(tmp_path: Path) -> None:
    ready = simulation.build(prepared(make()), tmp_path)
    state = ready.spec.strategy.start(ready.trainable.flatten().cpu())
    values = np.full(ready.trainable.size, 1e39)  # finite, but no float32
    opened = RoundSum(round=1, survivors=(0, 1, 2, 3), values=values, loss_sum=None, weight_sum=1.0)
    after, result = rounds.advance(ready.server, first_plan(ready), state, RoundResult(sum=opened))
    assert after is state
    assert (result.sum, result.aborted) == (None, NOT_FINITE)


def test_a_sum_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    ready = simulation.build(prepared(make()), tmp_path)
    for value in (np.inf, np.nan):
        opened = RoundSum(round=1, survivors=(0, 1), values=np.full(3, value), loss_sum=None, weight_sum=2.0)
        assert "not finite" in why_too_large(opened, ready.spec, torch.zeros(3))


def test_of_large_uploads_the_digests_are_kept(tmp_path: Path) -> None:
    evidence = Evidence(folder=tmp_path / "evidence", owners=("a", "b"), limit=10)
    plan = RoundPlan(run_id=bytes(16), round=7, cohort=(0, 1), fingerprint="aa" * 32, mechanism="")
    evidence.begin()
    evidence.upload(0, b"12345678")
    evidence.upload(1, b"12345678")
    assert set(evidence.keep(plan, "why")) == {0, 1}
    index = json.loads((tmp_path / "evidence" / "round-000007" / "index.json").read_text())
    assert [(item["owner"], item["file"], item["bytes"]) for item in index["uploads"]] == [
        ("a", "0.upload", 8),
        ("b", "", 8),
    ]
    evidence.begin()
    assert [path.name for path in (tmp_path / "evidence").iterdir()] == ["round-000007"]


def test_what_is_kept_bears_its_senders_name_and_signature(tmp_path: Path) -> None:
    ready, trained = run_with(counted(-2), tmp_path, privacy=RECORD, protection=SECAGG)
    terms = ready.server.protection.terms  # type: ignore[attr-defined]
    for site in trained.records[1].evidence:
        upload = (tmp_path / "evidence" / "round-000002" / f"{site}.upload").read_bytes()
        assert upload[2:34] == terms.members[site], "it bears its sender's name"
        assert any(upload[34:98]), "and its signature"


def test_a_vector_that_encryption_cannot_hold_loses_its_site_and_no_round(tmp_path: Path) -> None:
    pytest.importorskip("tenseal", reason="the extra 'he' is not installed")

    def top_of_the_ring(vector: RingVector, bits: int) -> RingVector:
        values = ring.signed(vector, bits)
        values[2:] = (1 << (bits - 1)) - 1
        return ring.from_signed(values, bits)

    _, trained = run_with(top_of_the_ring, tmp_path, protection={"kind": "bfv", "threshold": 3})
    assert [record.aborted for record in trained.records] == ["", "", ""]
    assert [dict(record.dropped) for record in trained.records] == [{}, {LIAR: "upload"}, {}]


NO_UPDATES: tuple[Callable[[RingVector], Any], ...] = (
    lambda vector: vector[:-1],
    lambda vector: np.append(vector, vector),
    lambda vector: vector.astype(np.uint64),
    lambda vector: vector.astype(vector.dtype.newbyteorder(">")),
    lambda vector: np.full(len(vector), np.nan),
    lambda vector: vector.reshape(1, -1),
    lambda vector: vector.astype(object),
    lambda vector: None,
)
"""What a site may try to seal that is no update of its run."""


class ShapelessTrainer(SiteTrainer):
    """Make something else than an update at one site, in every round but the last."""

    made: tuple[Callable[[RingVector], Any], ...]

    def run_round(
        self,
        data: SiteData,
        plan: RoundPlan,
        start: torch.Tensor,
        source: RandomSource,
        noise: NoiseMemory | None = None,
    ) -> RingVector:
        honest = super().run_round(data, plan, start, source, noise)
        if data.index != LIAR or plan.round > len(self.made):
            return honest
        vector: RingVector = self.made[plan.round - 1](honest)
        return vector


@pytest.mark.parametrize("kind", ["none", "secagg", pytest.param("bfv", marks=pytest.mark.slow)])
def test_what_is_no_update_loses_its_site_and_ends_no_run(kind: str, tmp_path: Path) -> None:
    """Under masks, a vector of another length ended a simulation with an error of its own code."""
    if kind == "bfv":
        pytest.importorskip("tenseal", reason="the extra 'he' is not installed")
    lifecycle = {
        "kind": "finetune",
        "local_steps": 1,
        "batch_size": 8,
        "learning_rate": 0.1,
        "start": "class_sums",
    }
    made = make(
        model=HEAD,
        privacy={**RECORD, "spare_rounds": 1},
        federation={"rounds": 3, "lifecycle": lifecycle},
        protection={"kind": kind, "threshold": 3},
        personal={"kind": "few_steps", "steps": 1, "batch_size": 8, "learning_rate": 0.1},
    )
    ready = simulation.build(prepared(made), tmp_path)
    trainer = ShapelessTrainer(
        spec=ready.spec, trainable=ready.trainable, task=ready.task, states=ready.states
    )
    trainer.made = NO_UPDATES[:3]
    ready.courier.trainers.replace([trainer])
    untrained = ready.trainable.flatten().cpu().clone()
    trained = finish(ready, tmp_path)
    assert trained.status == "complete"
    assert [record.dropped.get(LIAR) for record in trained.records[:3]] == ["upload"] * 3, "it is named"
    assert not any(record.dropped or record.aborted for record in trained.records[3:])
    closed = [bool(record.aborted) for record in trained.records[:3]]
    assert closed == [kind == "secagg"] * 3, "four sites under masks need all four, the others three"
    assert len(make_own_models(ready, trained, untrained)) == 4


def test_a_code_holds_vectors_of_its_own_form_alone() -> None:
    codec = real_codec(size=5, clients=3, value_bits=8, bound=1.0, max_weight=1, carries_loss=False)
    vector = np.zeros(codec.length, dtype=np.uint32)
    assert codec.modulus_bits <= 32
    assert codec.holds(vector)
    assert [codec.holds(made(vector)) for made in NO_UPDATES] == [False] * len(NO_UPDATES)
