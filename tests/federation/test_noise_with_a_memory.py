"""`privacy.correlation = "banded"`: a run by turns, charged by turns, resumed as if nothing had happened."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from attacks import canary
from defenses.dp import MatrixFactorizationEvent
from defenses.errors import ProtocolError
from defenses.random_source import RandomSource
from ffm_secure.auditing.canary_rounds import client_canaries
from ffm_secure.config import compatibility
from ffm_secure.config.run_file import RunConfig
from ffm_secure.engines import simulation
from ffm_secure.engines.simulation import Simulation
from ffm_secure.errors import FfmError
from ffm_secure.federation import NullCallback, TrainingResult
from ffm_secure.privacy.statements import statements
from ffm_secure.records import LEARN, RoundPlan
from ffm_secure.site.noise_memory import NoiseMemory
from tests.federation.helpers import CLIENT, finish, first_plan, make, prepared, train

ROUNDS, SEPARATION = 5, 2


class Killed(Exception):
    """Stands for a death of the process."""


class KilledInTheThirdRound(NullCallback):
    def client_finished(self, finished: int, total: int) -> None:
        self.finished = getattr(self, "finished", 0) + 1
        if self.finished == 10:
            raise Killed


def banded(rounds: int = ROUNDS, **privacy: object) -> RunConfig:
    return make(
        task={"evaluation_examples": 20},
        federation={
            "rounds": rounds,
            "cohort": 4,
            "lifecycle": {"kind": "finetune", "local_steps": 1, "batch_size": 4, "learning_rate": 0.05},
        },
        privacy={**CLIENT, "correlation": "banded", "separation": SEPARATION, "delta": 1e-3, **privacy},
        protection={"kind": "secagg", "threshold": 4},
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Simulation, TrainingResult]:
    return train(banded(), tmp_path_factory.mktemp("whole"))


def test_an_owner_pays_for_the_rounds_it_learns_in(whole: tuple[Simulation, TrainingResult]) -> None:
    built, trained = whole
    assert [record.survivors for record in trained.records] == [(0, 1, 2, 3)] * ROUNDS
    for index, owner in enumerate(built.prepared.owners):
        reserved = [entry for entry in built.ledger.entries(owner=owner) if entry.kind == "reserve"]
        turns = [number for number in range(1, ROUNDS + 1) if (index + number) % SEPARATION == 0]
        assert [entry.round for entry in reserved] == turns
        assert all(isinstance(entry.event, MatrixFactorizationEvent) for entry in reserved)
    assert built.epsilon() <= built.config.privacy.epsilon
    assert compatibility.paid_rounds(built.config) == 3
    assert built.epsilon() > 0.95 * built.config.privacy.epsilon  # three turns of the event, not five


def test_a_mean_is_one_over_those_whose_turn_it_is(whole: tuple[Simulation, TrainingResult]) -> None:
    """The opened sum is that of two learners with the noise of all; the divisor is two."""
    built, _ = whole
    plan, site = first_plan(built), built.sites[1]
    trainer = simulation._trainer(built.prepared, built.states, 0)
    start = built.trainable.flatten().cpu()
    idle = trainer._update(built.sites[0].data, plan, start, RandomSource.seeded(1))
    assert not idle.vector.any()
    assert not trainer.rows_used
    busy = trainer._update(site.data, plan, start, RandomSource.seeded(1))
    assert busy.vector.any()
    assert trainer.rows_used
    assert compatibility.turns_apart(built.config) == SEPARATION


def test_a_run_that_is_killed_goes_on_with_the_noise_it_began(
    whole: tuple[Simulation, TrainingResult], tmp_path: Path
) -> None:
    _, trained = whole

    stopped = simulation.build(prepared(banded()), tmp_path)
    with pytest.raises(Killed):
        finish(stopped, tmp_path, callback=KilledInTheThirdRound())
    again = simulation.build(prepared(banded()), tmp_path)
    resumed = finish(again, tmp_path)
    assert torch.equal(resumed.state.vector, trained.state.vector)
    assert again.epsilon() <= again.config.privacy.epsilon


def plan_of(number: int, attempt: int = 0, run: bytes = b"r" * 16) -> RoundPlan:
    return RoundPlan(
        run_id=run, round=number, cohort=(0,), fingerprint="", mechanism="", attempt=attempt, query=LEARN
    )


def test_a_site_keeps_its_secret_and_draws_no_row_twice(
    whole: tuple[Simulation, TrainingResult], tmp_path: Path
) -> None:
    noise = whole[0].mechanism.client_level
    assert noise is not None
    assert noise.correlated is not None
    memory = NoiseMemory.at(tmp_path, noise.correlated)
    rows = [memory.row(plan_of(number)) for number in (1, 2)]
    with pytest.raises(ProtocolError):
        memory.row(plan_of(2))
    again = NoiseMemory.at(tmp_path, noise.correlated)
    with pytest.raises(ProtocolError):
        again.row(plan_of(1))
    assert not np.array_equal(again.row(plan_of(2, attempt=1)), rows[1])
    third = again.row(plan_of(3))
    assert not np.array_equal(
        NoiseMemory.at(tmp_path, noise.correlated).row(plan_of(3, run=b"s" * 16)), third
    )
    assert (tmp_path / "noise.key").stat().st_mode & 0o077 == 0
    assert "hidden" in repr(again)
    (tmp_path / "noise_guard.json").unlink()
    with pytest.raises(FfmError, match="restore both"):
        NoiseMemory.at(tmp_path, noise.correlated)


def test_fresh_noise_alone_cannot_be_asked_of_it(whole: tuple[Simulation, TrainingResult]) -> None:
    built, _ = whole
    with pytest.raises(TypeError, match="stream"):
        built.mechanism.protect(torch.zeros(3), loss=0.0, weight=1, source=RandomSource.seeded(1))


def test_an_audit_weighs_all_rounds_a_turn_comes_back_in(whole: tuple[Simulation, TrainingResult]) -> None:
    noise = whole[0].mechanism.client_level
    assert noise is not None
    assert noise.correlated is not None
    coins = canary.Canaries(count=2, dimension=20_000, norm=noise.clip_norm, seed=1)
    totals = client_canaries(noise, coins, RandomSource.seeded(2))
    one, two = next(totals), next(totals)
    rest = (two - 2 * coins.contribution(noise.inner.clip).double()).std()
    assert bool((two != one).any())
    shares = replace(noise, dimension=20_000).correlated
    assert shares is not None
    fresh = shares.noise_multiplier * shares.l2_sensitivity / noise.scale
    expected = fresh / float(np.linalg.norm(shares.coefficients)) * 2**0.5
    assert float(rest) == pytest.approx(expected, rel=0.03)


def test_the_statement_says_what_it_rests_on(whole: tuple[Simulation, TrainingResult]) -> None:
    built, _ = whole
    made = banded(noise="system")
    for statement in statements(made, built.mechanism):
        assert "in every round" in statement.note
        assert "banded" in statement.mechanism[0]
