"""Who was in a step is asked many times over the same candidates, so that its verdict is no coin flip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ffm_secure as ffm
from attacks import Observation
from attacks.membership import candidate_loss
from attacks.registry import build
from attacks.steps import counted
from ffm_secure.auditing import replayed as client_replay
from ffm_secure.auditing.budget import AuditBudget
from ffm_secure.auditing.findings import Ran, repeated, run_attacks
from ffm_secure.auditing.step import REGROUPED, ReplayedStep, with_draws
from ffm_secure.engines import simulation

RUN = Path(__file__).resolve().parents[2] / "examples" / "audit" / "text.toml"
SMALL = (
    "task.data=builtin:clinic_notes?size=400&validation=80",
    "task.clients=4",
    "federation.cohort=4",
    "task.evaluation_examples=20",
)
NOISE = "privacy={unit='record',epsilon=8.0,delta=1e-5,clip_norm=0.5}"
SHARED = (
    "privacy={unit='record',epsilon=8.0,delta=1e-5,clip_norm=0.5,noise_shares='sum'}",
    "protection={kind='secagg',threshold=3}",
    "federation.lifecycle={kind='finetune',local_steps=1,batch_size=8,learning_rate=0.1}",
)
TESTS = ("matched_filter", "projection_residual")


def prepared(*settings: str) -> simulation.Prepared:
    return ffm.load(RUN, (*SMALL, *settings)).prepared()


def stage_of(run: simulation.Prepared, seed: int = 0) -> ReplayedStep:
    return with_draws(run, run.trainable.flatten(), 16, seed=seed)


def verdicts(run: simulation.Prepared, seed: int, attacks: tuple[str, ...]) -> dict[str, str]:
    config = replace(run.config, audit=replace(run.config.audit, attacks=attacks))
    with counted():
        purse = AuditBudget(name="quick")
        stages = [stage_of(run, seed)]
        findings, _ = run_attacks(stages, ("server",), config, purse, str, {}, {})
    return {one.attack: one.verdict for one in findings}


def assert_gradient_of(batch: Mapping[str, Tensor], stage: ReplayedStep, seen: Observation) -> None:
    trained = dict(stage.model.named_parameters())
    wanted = [trained[name].requires_grad_(True) for name in seen.tensors]
    slopes = torch.autograd.grad(candidate_loss(stage.model, batch), wanted)
    for (name, value), slope in zip(seen.tensors.items(), slopes, strict=True):
        torch.testing.assert_close(value, slope, rtol=1e-3, atol=1e-6, msg=name)


def test_the_undefended_step_of_a_private_run_is_the_gradient_of_its_records() -> None:
    stage = stage_of(prepared(NOISE))
    assert stage.points == {"raw", "clipped", "noised"}
    candidates = stage.prior.candidates
    assert candidates is not None
    assert_gradient_of(
        {name: value[:16] for name, value in candidates.items()}, stage, stage.at("raw").observation
    )


def test_the_update_of_other_members_is_theirs() -> None:
    run = prepared()
    stage = stage_of(run)
    candidates = stage.prior.candidates
    assert candidates is not None
    memberships = set()
    for number in (0, 1, REGROUPED - 1):
        scene = stage.regroup("raw", number)
        assert scene is not None
        members = scene.truth.members
        assert members is not None
        assert sum(members) == 16
        memberships.add(members)
        own = {name: value[torch.tensor(members)] for name, value in candidates.items()}
        assert_gradient_of(own, stage, scene.observation)
    assert len(memberships) == 3
    assert stage.regroup("raw", REGROUPED) is None


def test_a_sum_of_other_members_holds_fresh_noise_and_the_same_others() -> None:
    run = prepared(*SHARED)
    stage = stage_of(run)
    first, again, second = (stage.regroup("aggregated", number) for number in (0, 0, 1))
    assert first is not None
    assert second is not None
    assert first.observation.contributors == second.observation.contributors == 2
    assert again is not None
    name = max(first.observation.tensors, key=lambda one: first.observation.tensors[one].numel())
    noise_deviation = first.observation.known("noise_deviation")
    assert noise_deviation is not None
    difference = first.observation.tensors[name] - second.observation.tensors[name]
    assert float(difference.std()) == pytest.approx(2**0.5 * float(noise_deviation), rel=0.1)
    assert torch.equal(first.observation.tensors[name], again.observation.tensors[name])


def test_clients_of_a_cohort_add_up_the_same_alone_and_in_one_pass() -> None:
    run = prepared(*SHARED)
    others = client_replay.companions(run, 0, clients=4, records=5, seed=3)
    assert len(others) == 3
    for (other, sums), known in zip(client_replay.companion_sums(run, others), others, strict=True):
        assert other is known
        ((_, alone),) = client_replay.companion_sums(run, [other])
        assert sums.clipped is not None
        assert alone.clipped is not None
        assert sums.raw is None
        torch.testing.assert_close(sums.clipped.gradients, alone.clipped.gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_membership_is_judged_alike_at_every_seed() -> None:
    """One membership of each seed says now this, now that; many say the same."""
    bare, shared = prepared(), prepared(*SHARED)
    for seed in range(2):
        assert verdicts(bare, seed, TESTS[:1]) == {TESTS[0]: "leaked"}
    assert verdicts(shared, 0, TESTS[1:]) == {TESTS[1]: "not leaked"}


def test_what_does_not_fit_a_sum_is_not_drawn_again() -> None:
    run, attack = prepared(*SHARED), build("idlg_label")
    numbers: list[int] = []
    stage = with_draws(run, run.trainable.flatten(), 1)

    def again(number: int) -> ReplayedStep:
        numbers.append(number)
        return with_draws(run, run.trainable.flatten(), 1, seed=number)

    with counted():
        purse, ran = AuditBudget(name="quick"), Ran()
        control = repeated(attack, replace(stage, again=None), "raw", purse, ran)
        assert control is not None
        assert control[1] is not None
        seen = repeated(attack, replace(stage, again=again), "aggregated", purse, ran, like=control)
    assert seen is not None
    assert not seen[0].applicable
    assert numbers == []
