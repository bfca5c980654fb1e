"""Noise in shares, in whole runs: what is opened holds the charged noise, through masks and encryption,
with losses.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from defenses.dp import Accountant, Ledger, SampledSkellamEvent
from defenses.random_source import RandomSource
from ffm_secure.engines import simulation, summary
from ffm_secure.errors import Interrupted, PlanRefused
from ffm_secure.federation import NullCallback
from ffm_secure.lifecycle.base import Algorithm, SiteRound
from ffm_secure.lifecycle.finetune import BoundedSum, ModelUpdate
from ffm_secure.privacy.expectations import site_noise_variance
from ffm_secure.privacy.calibration import calibrate
from ffm_secure.privacy.mechanism import SumNoise
from ffm_secure.records import RoundRecord
from ffm_secure.registry import LIFECYCLES, STRATEGIES, Kind
from ffm_secure.server.sum_check import honest_bound
from ffm_secure.strategies.average import Average
from tests.federation.helpers import finish, make, prepared, train

STEP = {"kind": "finetune", "local_steps": 1, "batch_size": 8, "learning_rate": 0.5}
SHARED = {
    "unit": "record",
    "epsilon": 8.0,
    "delta": 1e-5,
    "clip_norm": 1.0,
    "noise_shares": "sum",
    "ledger": "run",
}
MASKED = {"kind": "secagg", "threshold": 4}


def shared_run(**changes: Any) -> Any:
    """Return the config of a small run with noise in shares over six sites."""
    task = {"kind": "image_classification", "data": "builtin:digits", "clients": 6, "evaluation_examples": 20}
    federation = {"rounds": 2, "cohort": 6, "lifecycle": STEP, **changes.pop("federation", {})}
    return make(
        task={**task, **changes.pop("task", {})},
        federation=federation,
        privacy={**SHARED, **changes.pop("privacy", {})},
        protection=changes.pop("protection", MASKED),
        **changes,
    )


def noise_only(**changes: Any) -> Any:
    """Return a run of 81,226 numbers in which practically no record is ever sampled."""
    return shared_run(
        task={"nominal_examples": 1_000_000_000},
        model={"name": "builtin:tiny-vit", "trainable": {"kind": "full"}},
        federation={"rounds": 1, "lifecycle": {**STEP, "batch_size": 1}, **changes.pop("federation", {})},
        **changes,
    )


def sum_noise(ready: simulation.Simulation) -> SumNoise:
    """Return the run's mechanism."""
    mechanism = ready.spec.mechanism.sum_level
    assert mechanism is not None
    return mechanism


def opened_sum(ready: simulation.Simulation, folder: Path) -> tuple[np.ndarray, RoundRecord]:
    """Run one round; return what was opened, as the average that the model moved by times the survivors."""
    start = ready.spec.strategy.start(ready.trainable.flatten().cpu()).vector.double()
    result = finish(ready, folder)
    moved = (result.state.vector.double() - start).numpy()
    return moved * len(result.records[-1].survivors), result.records[-1]


class Killed(NullCallback):
    """Die when the second round is durable."""

    def round_finished(self, record: RoundRecord) -> None:
        """Die."""
        if record.round == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("kind", "rate"),
    [
        ("secagg", 0.25),
        pytest.param("bfv", 0.0, marks=pytest.mark.slow),
        pytest.param("secagg", 0.0, marks=pytest.mark.slow),
        pytest.param("bfv", 0.25, marks=pytest.mark.slow),
    ],
)
def test_the_opened_sum_holds_the_charged_deviation(kind: str, rate: float, tmp_path: Path) -> None:
    """Within 1 % per share counted on, with and without losses; never below the charged one."""
    dropout = {"rate": rate, "stages": ["train"]}
    made = noise_only(seed=5, protection={"kind": kind, "threshold": 4}, federation={"dropout": dropout})
    ready = simulation.build(prepared(made), tmp_path)
    mechanism = sum_noise(ready)
    event = ready.event
    assert isinstance(event, SampledSkellamEvent)
    opened, record = opened_sum(ready, tmp_path)
    assert not record.aborted, record.aborted
    assert (len(record.survivors) < 6) == (rate > 0)
    deviation = float(np.std(opened * mechanism.scale))
    charged = math.sqrt(event.variance)
    honest = len(record.survivors) - 1  # one of them may be a colluder, who knows its own share
    assert deviation * math.sqrt(3 / len(record.survivors)) == pytest.approx(charged, rel=0.01)
    assert deviation * math.sqrt(honest / len(record.survivors)) >= 0.99 * charged
    assert mechanism.inner.share_variance * honest >= event.variance


def test_a_run_charges_every_round_as_one_sampled_sum_and_ends_on_its_budget(tmp_path: Path) -> None:
    """The ledger holds the event of the mechanism, once for every site and round, and never more than
    epsilon.
    """
    ready, result = train(shared_run(federation={"rounds": 3}), tmp_path)
    assert result.status == "complete"
    assert 7.9 < result.records[-1].epsilon_spent <= 8.0
    events = ready.sites[0].ledger.events()
    assert [type(event) for event in events] == [SampledSkellamEvent] * 3
    assert all(replace(event, release="x") == replace(events[0], release="x") for event in events)
    accountant = Accountant()
    accountant.compose(events[0], 3)
    assert accountant.epsilon(1e-5).epsilon == pytest.approx(result.records[-1].epsilon_spent, rel=1e-3)
    path = ready.ledger_path
    ready.ledger.close()
    ledger = Ledger.open(path, create=False)
    assert sum(entry.kind == "reserve" for entry in ledger.entries()) == 6 * 3
    ledger.close()


def test_a_killed_run_goes_on_with_the_same_noise(tmp_path: Path) -> None:
    """Resumed, the multiplier is the one the run began with, and the budget still holds."""
    made = shared_run(federation={"rounds": 3}, privacy={"spare_rounds": 1})
    first = simulation.build(prepared(made), tmp_path)
    multiplier = sum_noise(first).noise_multiplier

    with pytest.raises(Interrupted):
        finish(first, tmp_path, callback=Killed())
    first.ledger.close()
    again = simulation.build(simulation.prepare(made, Path.cwd(), tmp_path), tmp_path)
    assert sum_noise(again).noise_multiplier == multiplier
    result = finish(again, tmp_path)
    assert result.status == "complete"
    assert result.records[-1].epsilon_spent <= 8.0


def test_too_few_survivors_close_the_sum_and_the_round_is_charged(tmp_path: Path) -> None:
    """Below the honest survivors counted on nothing is opened, the model stays, and those who began
    have paid.
    """
    dropout = {"rate": 0.6, "stages": ["upload"]}
    made = shared_run(
        federation={"rounds": 1, "dropout": dropout}, protection={"kind": "secagg", "threshold": 5}
    )
    ready, result = train(made, tmp_path)
    record = result.records[-1]
    assert record.aborted
    assert not record.survivors
    assert result.state.round == 0
    assert ready.epsilon() > 0


@pytest.mark.parametrize("kind", ["secagg", "bfv"])
def test_every_observer_is_told_what_the_epsilon_rests_on(kind: str) -> None:
    """Masks and honest survivors are named; a key holder on the server's side is infinity, with the
    reason.
    """
    plan = summary.describe(prepared(shared_run(protection={"kind": kind, "threshold": 4})))
    told = {statement.observer: statement for statement in plan.statements}
    hidden = "masks" if kind == "secagg" else "encryption"
    for observer in ("public", "client", "server"):
        assert f"rests on the {hidden} and on at least 3 honest sites" in told[observer].note
        assert told[observer].epsilon == 8.0
    colluding = told["colluding_server"]
    assert math.isinf(colluding.epsilon) == (kind == "bfv")
    assert "protects nobody" in colluding.note
    assert "1 part in 3 of the variance" in plan.spends


def test_one_record_moves_a_site_by_at_most_the_bound_whatever_the_learning_rate(tmp_path: Path) -> None:
    """With and without one row, the same sample and the same model: the updates differ by at most the
    bound.
    """
    ready = simulation.build(
        prepared(shared_run(task={"nominal_examples": 8}, federation={"rounds": 1})), tmp_path
    )
    mechanism = sum_noise(ready)
    assert mechanism.inner.sampling_rate == 1.0
    site = ready.sites[0]
    with site._borrow_trainer() as borrowed:
        borrowed.trainable.load_vector(borrowed.trainable.flatten())

        def update(rows: range) -> torch.Tensor:
            rule = BoundedSum(
                trainable=borrowed.trainable,
                task=borrowed.task,
                encoded=site.data.examples.take(rows),
                sampling_rate=1.0,
                clipping=mechanism.clipping,
                engine=borrowed._engine(),
                source=RandomSource.seeded(1),
                device="cpu",
                microbatch=64,
            )
            return mechanism.update_of(rule.gradient_sum())

        whole = update(range(30))
        for leaving in (0, 7, 29):
            part = update(range(leaving)) + update(range(leaving + 1, 30))
            assert float((whole - part).norm()) <= mechanism.inner.bound * (1 + 1e-5)
        assert float((whole - update(range(29))).norm()) > 0.2 * mechanism.inner.bound


def test_the_server_knows_the_noise_it_may_take_out(tmp_path: Path) -> None:
    """The variance of a site's share is public, and the check of opened sums leaves room for it."""
    ready = simulation.build(prepared(shared_run()), tmp_path)
    mechanism = sum_noise(ready)
    lifecycle = ready.config.federation.lifecycle
    known = site_noise_variance(ready.spec.mechanism, lifecycle)
    assert known == pytest.approx(mechanism.inner.share_variance / mechanism.scale**2)
    bound = honest_bound(ready.spec, 6, 1.0)
    pure_noise = math.sqrt(6 * known * ready.spec.codec.size)
    assert pure_noise < bound.norm < math.inf


def test_debiased_adam_is_given_the_noise_of_a_round(tmp_path: Path) -> None:
    """The run goes through, and the slot that holds the known noise is the variance of the mean over
    the sites.
    """
    made = shared_run(
        federation={"rounds": 2, "strategy": {"kind": "adam_debiased", "beta2": 0.5, "learning_rate": 0.01}}
    )
    ready, result = train(made, tmp_path)
    mechanism = sum_noise(ready)
    expected = mechanism.share_deviation**2 / 6
    forgotten = 1 - 0.5**2
    noise = float(result.state.optimizer_state["noise"]) / forgotten
    assert noise == pytest.approx(expected, rel=1e-9)


class Amplified(Average):
    """Send ten times the change: no longer what a share of the noise was calibrated to."""

    def message(self, old: torch.Tensor, change: torch.Tensor, step: int) -> torch.Tensor:
        """Return ten times the change."""
        return 10 * change


class TwoSteps(Algorithm):
    """Learn in another way than by one sum."""

    def learn(self, site_round: SiteRound) -> ModelUpdate:
        """Learn twice."""
        super().learn(site_round)
        return super().learn(site_round)


@pytest.mark.parametrize("target", ["Amplified", "TwoSteps"])
def test_a_kind_of_ones_own_that_sends_something_else_is_refused(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by attacking it: a registered strategy or algorithm could send what no bound holds for."""
    axis, kind = (STRATEGIES, "average") if target == "Amplified" else (LIFECYCLES, "finetune")
    monkeypatch.setitem(axis.kinds, kind, Kind(name=kind, target=f"{__name__}:{target}"))
    with pytest.raises(PlanRefused, match="noise_shares = 'sum': it"):
        prepared(shared_run())


@pytest.mark.parametrize("rate", [0.03, 0.3])
def test_the_budget_pays_for_every_round_when_rounds_are_added_one_by_one(rate: float) -> None:
    """Found by attacking it: composed one by one the bound reads higher than all rounds at once, by a
    little.
    """
    made = shared_run(
        task={"nominal_examples": round(8 / rate)}, federation={"rounds": 30}, privacy={"epsilon": 2.0}
    )
    mechanism = calibrate(made, size=2000, public_client_size=round(8 / rate))
    event, accountant = mechanism.event("round"), Accountant()
    for _ in range(30):
        accountant.compose(event)
        running = accountant.epsilon(1e-5).epsilon
    assert 1.98 < running <= 2.0
