"""Compressed updates in whole runs: the same sums under every protection, the same bounds, fewer bytes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from defenses.random_source import RandomSource
from defenses.secagg import ring
from ffm_secure.agreed.loaded_model import load_model, read_facts
from ffm_secure.auditing.recorded import recorded
from ffm_secure.config.run_file import RunConfig
from ffm_secure.engines import simulation, summary
from ffm_secure.errors import ConfigError, PlanRefused
from ffm_secure.federation import NullCallback
from ffm_secure.lifecycle.finetune import ModelUpdate
from ffm_secure.privacy.field import Demand, finest_levels, fits, reach
from ffm_secure.privacy.mechanism import SumNoise
from ffm_secure.records import RoundPlan
from ffm_secure.server.sum_check import honest_bound
from ffm_secure.site.client_state import ClientStateStore, residual_store
from ffm_secure.site.trainer import SiteData, SiteTrainer
from tests.federation.helpers import CLIENT, RECORD, SECAGG, finish, make, prepared, train

SUPPORT = {"kind": "support", "share": 0.25, "by_lot": 0.4}
SHORT = {"kind": "projection", "share": 0.1, "field_bits": 16}
STEP = {"kind": "finetune", "local_steps": 1, "batch_size": 8, "learning_rate": 0.5}
SHARED = {**RECORD, "noise_shares": "sum"}
PLAIN = {"unit": "none", "reason": "test data"}


def compressed(compression: dict[str, Any], **sections: Any) -> RunConfig:
    """Return a small run with a compression; two rounds where nothing else is said."""
    federation = {"rounds": 2, **sections.pop("federation", {})}
    return make(compression=compression, federation=federation, **sections)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "support with residual, record": ({**SUPPORT, "residual": True}, RECORD),
    "projection in 16 bits, record": (SHORT, RECORD),
    "rotation, no unit": ({"kind": "rotation", "field_bits": 16}, PLAIN),
}


@pytest.mark.parametrize(
    "name", [name if "support" in name else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_masked_equals_unmasked_bit_for_bit(name: str, tmp_path: Path) -> None:
    compression, privacy = CASES[name]
    results = []
    protections: dict[str, dict[str, Any]] = {"open": {"kind": "none", "threshold": 3}, "masked": SECAGG}
    for kind, protection in protections.items():
        _, trained = train(compressed(compression, privacy=privacy, protection=protection), tmp_path / kind)
        assert not any(record.aborted for record in trained.records)
        results.append(trained.state.vector)
    assert torch.equal(results[0], results[1])
    assert float(results[0].abs().sum()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("privacy", [RECORD, SHARED, CLIENT], ids=["record", "shared", "client"])
@pytest.mark.parametrize("compression", [SUPPORT, SHORT], ids=["support", "projection"])
def test_encrypted_equals_masked_bit_for_bit(
    compression: dict[str, Any], privacy: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("tenseal", reason="the extra 'he' is not installed")
    kinds = ("secagg", "bfv", "ckks") if privacy is RECORD else ("secagg", "bfv")
    results = []
    for kind in kinds:
        config = compressed(
            compression,
            privacy=privacy,
            protection={"kind": kind, "threshold": 3, "value_bits": 12},
            federation={"lifecycle": STEP},
        )
        _, trained = train(config, tmp_path / kind)
        assert not any(record.aborted for record in trained.records)
        results.append(trained.state.vector)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("compression", [SUPPORT, SHORT, {"kind": "rotation"}], ids=lambda c: c["kind"])
def test_one_record_moves_what_is_sent_by_at_most_its_bound(
    compression: dict[str, Any], tmp_path: Path
) -> None:
    """Every record of a site is in the sum, then every one but the first: what is sent differs by one bound
    at most, rounding aside, whatever the compression.
    """
    lifecycle = {**STEP, "batch_size": 1000}
    config = compressed(compression, privacy=SHARED, protection=SECAGG, federation={"lifecycle": lifecycle})
    ready = prepared(config)
    mechanism = ready.mechanism
    assert isinstance(mechanism, SumNoise)
    trainer = SiteTrainer(spec=ready.spec, trainable=ready.trainable, task=ready.task)
    plan = RoundPlan(run_id=bytes(16), round=1, cohort=(0,), fingerprint="", mechanism="")
    start = ready.trainable.flatten()
    encoded = ready.task.encode(ready.data.rows(0).take(range(12)))
    sent = []
    for rows in (range(12), range(1, 12)):
        data = SiteData(index=0, name="", examples=encoded.take(np.array(rows)))
        update = trainer.learn(data, plan, start, RandomSource.seeded(1))
        sent.append(trainer._compressed(update, data, plan, start).vector)
    assert sent[0].numel() == ready.codec.size == mechanism.inner.dimension
    moved = float((sent[0] - sent[1]).norm())
    assert 0.0 < moved <= mechanism.inner.bound * (1 + 1e-3)


class Killed(NullCallback):
    """Die in the third round, when two of its four sites have sent."""

    def client_finished(self, finished: int, total: int) -> None:
        self.finished = getattr(self, "finished", 0) + 1
        if self.finished == 10:
            raise RuntimeError("killed")


def test_a_run_goes_on_with_what_sites_left_out(tmp_path: Path) -> None:
    config = compressed({**SUPPORT, "residual": True}, federation={"rounds": 4})
    _, whole = train(config, tmp_path / "whole")
    first = simulation.build(prepared(config), tmp_path / "killed")
    with pytest.raises(RuntimeError, match="killed"):
        finish(first, tmp_path / "killed", callback=Killed())
    first.ledger.close()
    again = simulation.build(simulation.prepare(config, Path.cwd(), tmp_path / "killed"), tmp_path / "killed")
    assert torch.equal(finish(again, tmp_path / "killed").state.vector, whole.state.vector)
    _, without = train(compressed(SUPPORT, federation={"rounds": 4}), tmp_path / "without")
    assert not torch.equal(without.state.vector, whole.state.vector)


def test_what_was_sent_and_what_was_left_out_are_all_that_was_learned(tmp_path: Path) -> None:
    """Over rounds, a site's messages and its residual add up to its updates; a round played again after a
    kill begins with what the site had before it.
    """
    ready = prepared(compressed({**SUPPORT, "residual": True}))
    states = ClientStateStore(folder=tmp_path, owners=ready.owners)
    store = residual_store(ready.spec, states)
    trainer = SiteTrainer(spec=ready.spec, trainable=ready.trainable, task=ready.task, states=states)
    data = SiteData(index=1, name="", examples=ready.task.encode(ready.data.rows(1).take([0])))
    start, size = ready.trainable.flatten(), ready.trainable.size
    learned, received = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    for number in (1, 2, 3):
        plan = RoundPlan(run_id=bytes(16), round=number, cohort=(1,), fingerprint="", mechanism="")
        update = ModelUpdate(vector=torch.randn(size), loss=0.0, steps=1)
        trainer._compressed(replace(update, vector=torch.ones(size)), data, plan, start)  # a killed attempt
        sent = trainer._compressed(update, data, plan, start).vector
        assert sent.numel() == ready.codec.size == round(0.25 * size)
        learned += update.vector
        received += ready.spec.compression.restore(sent, ready.spec.public_state(plan, start))
    left = store.load(1, torch.zeros(size), run_id=bytes(16), before=4)
    assert torch.allclose(received + left, learned, atol=1e-5)
    assert float(left.norm()) > 0


@pytest.mark.parametrize("privacy", [SHARED, CLIENT], ids=["shared", "client"])
def test_a_narrow_field_holds_the_noise_that_is_charged(privacy: dict[str, Any], tmp_path: Path) -> None:
    narrow = prepared(
        compressed(
            {"kind": "bits", "field_bits": 16},
            privacy=privacy,
            protection=SECAGG,
            federation={"lifecycle": STEP},
        )
    )
    wide = prepared(
        compressed({"kind": "none"}, privacy=privacy, protection=SECAGG, federation={"lifecycle": STEP})
    )
    mechanism = narrow.mechanism.sum_level or narrow.mechanism.client_level
    assert mechanism is not None
    assert narrow.codec.modulus_bits == 16 < wide.codec.modulus_bits
    assert fits(mechanism.demand, clients=4, field_bits=16)
    assert not fits(  # the grid is the finest one: a tenth finer, and sums would not fit
        Demand(largest=math.ceil(1.1 * mechanism.demand.largest), variance=1.21 * mechanism.demand.variance),
        clients=4,
        field_bits=16,
    )
    # Counted in bounds with their rounding, noise is as strong as on a fine grid; narrow noise of records is
    # not near enough to a Gaussian for its loss distribution, and Renyi moments ask for a little more.
    more = mechanism.noise_multiplier / wide.mechanism.noise_multiplier
    assert 0.99 < more < (1.02 if privacy is CLIENT else 1.25)
    plan = summary.describe(narrow)
    assert plan.bytes_up_uncompressed == wide.codec.length * wide.codec.modulus_bits // 8
    assert plan.bytes_up_per_client_round < 0.7 * plan.bytes_up_uncompressed
    assert "uncompressed" in plan.sends
    assert summary.describe(wide).bytes_up_uncompressed == 0
    assert "uncompressed" not in summary.describe(wide).sends


def test_a_field_is_filled_and_not_exceeded() -> None:
    def demand_of(levels: int) -> Demand:
        return Demand(largest=levels, variance=(0.7 * (levels + 30.0)) ** 2)

    levels = finest_levels(demand_of, most=1 << 19, clients=9, field_bits=16)
    assert reach(demand_of(levels), 9) < 1 << 15 <= reach(demand_of(levels + 1), 9)
    assert finest_levels(demand_of, most=100, clients=9, field_bits=16) == 100
    assert finest_levels(demand_of, most=1 << 19, clients=10**7, field_bits=16) == 1
    # what the tail rests on: no sum of so many noises is beyond it
    source, variance = RandomSource.seeded(2), 40.0**2
    from defenses.dp.discrete import skellam

    sums = sum(skellam(20_000, variance=variance, source=source.derive(site)) for site in range(9))
    within = reach(Demand(largest=0, variance=variance), 9)
    assert int(np.abs(sums).max()) < within < 12 * math.sqrt(9 * variance)


def test_what_cannot_hold_is_refused_with_its_reason() -> None:
    refusals: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        (
            {**SUPPORT, "residual": True},
            {"privacy": SHARED, "federation": {"lifecycle": STEP}},
            "in rounds it did not join",
        ),
        (SUPPORT, {"federation": {"strategy": {"kind": "ffa"}}}, "factors or products"),
        (SUPPORT, {"federation": {"strategy": {"kind": "adam_debiased"}}}, "numbers off the support"),
        (SHORT, {"federation": {"rounds": 1, "lifecycle": {"kind": "class_sums"}}}, "sends no update"),
        (
            {"kind": "bits", "field_bits": 16},
            {"task": {"clients": 5000}, "federation": {"cohort": 5000}},
            "smaller groups",
        ),
    ]  # fmt: skip
    for compression, sections, words in refusals:
        with pytest.raises(PlanRefused, match=words):
            summary.describe(prepared(compressed(compression, **sections)))
    with pytest.raises(PlanRefused, match="take more bits"):
        prepared(
            compressed(
                {"kind": "bits", "field_bits": 16},
                privacy={**CLIENT, "epsilon": 0.001},
                protection=SECAGG,
            )
        )
    for compression in (
        {"kind": "bits"},
        {"kind": "none", "field_bits": 16},
        {"kind": "rotation", "share": 0.5},
    ):
        with pytest.raises(ConfigError, match="compression"):
            compressed(compression)


def test_the_wire_holds_what_the_plan_says_and_an_audit_reads_it_as_an_update(tmp_path: Path) -> None:
    config = compressed(
        SHORT,
        privacy={**RECORD, "noise": "system"},
        federation={"rounds": 1, "lifecycle": STEP},
        audit={"observers": ["server"]},
    )
    ready, trained = train(config, tmp_path)
    promised = summary.describe(ready.prepared).bytes_up_per_client_round
    assert promised == ring.packed_bytes(ready.spec.codec.length, 16)
    assert [record.bytes_up for record in trained.records] == [4 * promised]
    model = load_model(config, Path.cwd(), read_facts(tmp_path))
    upload = next(iter(recorded(model, tmp_path))).observation
    numbers = torch.cat([tensor.reshape(-1) for tensor in upload.tensors.values()])
    assert numbers.numel() == ready.trainable.size
    deviation = upload.metadata["noise_deviation"]
    assert isinstance(deviation, float)
    assert float(numbers.double().square().mean()) ** 0.5 == pytest.approx(deviation, rel=0.4)


def test_the_check_of_a_sum_knows_what_a_residual_may_hold() -> None:
    plain = prepared(compressed(SUPPORT, privacy=RECORD)).spec
    holding = prepared(compressed({**SUPPORT, "residual": True}, privacy=RECORD)).spec
    assert honest_bound(plain, 4, 1.0, turns=5).norm == honest_bound(plain, 4, 1.0).norm
    once, often = honest_bound(holding, 4, 1.0).norm, honest_bound(holding, 4, 1.0, turns=5).norm
    assert once > honest_bound(plain, 4, 1.0).norm
    assert 4.0 * once < often <= 5.0 * once
