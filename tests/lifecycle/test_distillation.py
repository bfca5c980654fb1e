"""Distillation: what leaves an owner, what a mask changes, what is refused, what the student learns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from defenses.random_source import RandomSource
from ffm_secure.config import compatibility
from ffm_secure.config.distilled import models_of
from ffm_secure.config.models import OwnModel, TrainableSpec
from ffm_secure.config.run_file import RunConfig
from ffm_secure.engines import simulated_data, simulation
from ffm_secure.errors import BroadcastRefused, ConfigError, DataError, Interrupted, PlanRefused
from ffm_secure.federation import NullCallback
from ffm_secure.lifecycle.base import AnswerSheet
from ffm_secure.lifecycle.distillation import Distil, Lesson, as_chances, balanced, vote_length, votes_of
from ffm_secure.records import RoundRecord, RoundSum
from ffm_secure.server.sum_check import why_no_answers
from ffm_secure.site.broadcast_guard import AnswersGuard
from ffm_secure.site.client_state import own_models
from ffm_secure.site.trainer import SiteTrainer
from ffm_secure.trainable import TrainableModel
from tests.federation.helpers import RECORD, SECAGG, finish, first_plan, make, prepared, train

HEAD = {"name": "builtin:tiny-bert", "trainable": {"kind": "head"}}
LORA = {"name": "builtin:tiny-gpt2", "trainable": {"kind": "lora", "rank": 2}}
PROMPT = {"name": "builtin:tiny-llama", "trainable": {"kind": "prompt", "length": 2}}
FEW_STEPS = {"kind": "few_steps", "steps": 1, "batch_size": 1, "learning_rate": 0.1}
NOTES = {
    "kind": "text_classification",
    "data": "builtin:clinic_notes?size=120&validation=40",
    "clients": 3,
    "max_length": 12,
    "evaluation_examples": 20,
}


def three(**sections: Any) -> RunConfig:
    """Return a run of two rounds over three owners with models of three architectures."""
    base: dict[str, Any] = {
        "task": NOTES,
        "model": {"name": "builtin:tiny-bert", "trainable": {"kind": "head"}},
        "federation": {
            "rounds": 2,
            "cohort": 3,
            "lifecycle": {
                "kind": "distillation",
                "local_steps": 1,
                "batch_size": 8,
                "learning_rate": 0.5,
                "public_examples": 20,
            },
        },
        "privacy": RECORD,
        "distillation": {
            "steps": 3,
            "learning_rate": 0.05,
            "back_steps": 1,
            "models": [HEAD, LORA, PROMPT],
        },
    }
    for name, values in sections.items():
        base[name] = values if "kind" in values or "unit" in values else {**base.get(name, {}), **values}
    return make(**base)


def test_masks_and_an_interruption_change_no_bit(tmp_path: Path) -> None:
    in_the_clear, trained = train(three(), tmp_path / "none")
    _, masked = train(three(protection=SECAGG), tmp_path / "secagg")
    assert torch.equal(trained.state.vector, masked.state.vector)
    assert in_the_clear.spec.codec.size == 20 * 10, "as many numbers as answers, whatever the models are"
    assert [record.aborted for record in trained.records] == ["", ""]
    assert in_the_clear.epsilon() <= 8.0

    class Stop(NullCallback):
        def round_finished(self, record: RoundRecord) -> None:
            raise KeyboardInterrupt

    part = simulation.build(prepared(three()), tmp_path / "part")
    with pytest.raises(Interrupted):
        finish(part, tmp_path / "part", callback=Stop())
    again, resumed = train(three(), tmp_path / "part")
    assert torch.equal(resumed.state.vector, trained.state.vector), "own models are taken up where they were"
    for site in again.sites:
        folders = [own_models(one.spec, one.states).place(site.data.index) for one in (again, in_the_clear)]
        newest = [max(folder.glob("*.safetensors")).read_bytes()[-64:] for folder in folders]
        assert newest[0] == newest[1]
    architectures = {type(own.trainable.model).__name__ for own in in_the_clear.prepared.owned}
    assert len(architectures) == 3


def test_rows_that_no_step_drew_change_no_bit_of_what_is_sent(tmp_path: Path) -> None:
    """Priors, lengths, validation, stopping, weights: anything beside the charged steps would show here."""
    made = three(distillation={"balance": True})
    built = simulation.build(prepared(made), tmp_path)
    data, plan = built.sites[0].data, first_plan(built)
    assert data.teacher is not None
    told = as_chances(torch.rand(20, 10, generator=torch.Generator().manual_seed(1))).float().reshape(-1)
    trainer = SiteTrainer(spec=built.spec, trainable=built.trainable, task=built.task)
    sent = trainer.learn(data, plan, told, RandomSource.seeded(1)).vector
    drawn, rows = trainer.rows_used, len(data.examples)
    assert 0 < len(drawn) < rows
    first = min(drawn)
    places = [place if place in drawn else first for place in range(rows)]
    other = replace(data.teacher, examples=data.teacher.examples.take(places))
    again = trainer.learn(
        replace(data, teacher=other, examples=data.examples.take(places)), plan, told, RandomSource.seeded(1)
    ).vector
    assert torch.equal(sent, again)
    fewer = replace(data.teacher, examples=data.teacher.examples.take([first] * rows))
    changed = trainer.learn(replace(data, teacher=fewer), plan, told, RandomSource.seeded(1)).vector
    assert not torch.equal(sent, changed), "rows that were drawn do count"


class _RunsOff:
    """Steps without a number, as plain steps at a far too large rate take them under the client unit."""

    rows_used: ClassVar[set[int]] = set()

    def __init__(self, trainable: TrainableModel) -> None:
        self.trainable = trainable

    def steps(self) -> Iterator[Mapping[str, torch.Tensor]]:
        yield {name: torch.full_like(value, math.nan) for name, value in self.trainable.active.items()}

    def loss(self) -> float:
        return math.nan


def test_a_model_that_has_run_off_answers_evenly_and_comes_back(tmp_path: Path) -> None:
    """Kept, it could not be read again, and its owner's rows would decide who takes part in later rounds."""
    built = simulation.build(prepared(three(distillation={"models": [HEAD]})), tmp_path)
    site, plan = built.sites[0], first_plan(built)
    teacher = site.data.teacher
    assert teacher is not None
    lesson = Lesson(
        trainable=teacher.trainable,
        task=teacher.task,
        start=teacher.start,
        spec=built.config.federation.lifecycle,
        rule=_RunsOff(teacher.trainable),
        public=teacher.public,
        guide=torch.zeros(0),
        seed=(0,),
        device="cpu",
        config=built.config,
    )
    taught = Distil().teach(lesson)
    assert taught.answers.numpy() == pytest.approx(np.full(20 * 10, 0.1))
    store = own_models(built.spec, built.states, size=teacher.trainable.size)
    store.save(site.data.index, taught.own, run_id=plan.run_id, round=1)
    kept = store.load(site.data.index, torch.zeros_like(teacher.start), run_id=plan.run_id, before=2)
    assert torch.equal(kept, teacher.start)


def test_private_rows_are_not_taken_for_public_ones() -> None:
    def loaded(public: str, **sections: Any) -> simulated_data.SimulatedData:
        made = three(**sections)
        lifecycle = replace(made.federation.lifecycle, public_examples=0, public_data=public)
        made = replace(made, federation=replace(made.federation, lifecycle=lifecycle))
        return simulated_data.load(made, Path.cwd())

    with pytest.raises(DataError, match=r"public_data = .*: 120 of its 120 rows are private rows"):
        loaded(NOTES["data"])
    other = loaded("builtin:clinic_notes?seed=9&size=30&validation=40")
    assert other.public is not None
    assert len(other.public) == 30
    assert loaded(NOTES["data"], privacy={"unit": "none", "reason": "nothing is promised"}).public is not None


def test_what_a_model_learned_before_the_run_is_said_not_to_be_counted() -> None:
    made = three()
    brought = replace(made.distillation.models[0], name="north-s-own-folder")
    made = replace(made, distillation=replace(made.distillation, models=(brought,)))
    assert "north-s-own-folder learned from before" in Distil().describe(made, 20)
    assert "learned from before" not in Distil().describe(three(), 20)


def test_votes_of_one_owner_are_never_longer_than_the_bound() -> None:
    made = three()
    for rows in (1, 7, 300):
        answers = torch.rand(rows, 10, dtype=torch.float64)
        votes = votes_of(answers) * vote_length(made, rows=rows)
        slow = math.sqrt(math.fsum(float(value) ** 2 for value in votes.reshape(-1)))
        assert slow == pytest.approx(made.privacy.clip_norm, rel=1e-12)
        assert [int(row.argmax()) for row in votes] == [int(row.argmax()) for row in answers]


def test_balance_takes_off_how_often_a_class_is_answered() -> None:
    answers = torch.tensor([[0.9, 0.1], [0.6, 0.4]], dtype=torch.float64)
    slow = []
    for row in answers.tolist():
        lifted = [row[0] / ((0.9 + 0.6) / 2), row[1] / ((0.1 + 0.4) / 2)]
        slow.append([part / sum(lifted) for part in lifted])
    assert balanced(answers).numpy() == pytest.approx(np.array(slow), rel=1e-12)
    assert as_chances(torch.tensor([[-0.1, 0.3, 0.3], [-1.0, -2.0, 0.0]])).numpy() == pytest.approx(
        np.array([[0.0, 0.5, 0.5], [1 / 3, 1 / 3, 1 / 3]])
    )


def test_models_are_named_or_dealt_in_turn() -> None:
    head = TrainableSpec(kind="head")
    a, b = OwnModel(name="a", trainable=head), OwnModel(name="b", trainable=head)
    named = OwnModel(name="c", trainable=head, owners=("north",))
    made = three()
    made = replace(made, distillation=replace(made.distillation, models=(a, named, b)))
    owners = ("east", "north", "south", "west")
    assert [own.name for own in models_of(made, owners)] == ["a", "c", "b", "a"]
    nobody = {"models": [HEAD, {**LORA, "owners": ["atlantis"]}]}
    with pytest.raises(PlanRefused, match="atlantis"):
        prepared(three(distillation=nobody))


def test_a_sum_that_holds_no_probabilities_is_refused(tmp_path: Path) -> None:
    spec = prepared(three()).spec
    even = np.full(20 * 10, 3 / 10)
    opened = RoundSum(round=1, survivors=(0, 1, 2), values=even, loss_sum=0.0, weight_sum=3)
    assert why_no_answers(opened, spec) == ""
    shifted = even.copy()
    shifted[0] += 0.5
    assert "add up" in why_no_answers(replace(opened, values=shifted), spec)
    outside = even.copy()
    outside[:2] += [4.0, -4.0]
    assert "not from 0 to 3" in why_no_answers(replace(opened, values=outside), spec)


def test_an_owner_refuses_to_learn_from_what_are_no_probabilities() -> None:
    guard = AnswersGuard(AnswerSheet(rows=2, classes=2, digest=""))
    guard.accept(torch.zeros(0))
    guard.accept(torch.tensor([0.2, 0.8, 1.0, 0.0]))
    for wrong in ([0.2, 0.9, 1.0, 0.0], [-0.2, 1.2, 1.0, 0.0], [math.nan, 1.0, 1.0, 0.0]):
        with pytest.raises(BroadcastRefused):
            guard.accept(torch.tensor(wrong))


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"compression": {"kind": "rotation"}}, "probabilities on public rows are sent"),
        ({"privacy": {**RECORD, "noise_shares": "sum"}, "protection": SECAGG}, "learns at home"),
        ({"personal": FEW_STEPS}, "a model of its own already"),
        ({"evaluation": {"rows": "held_back", "epsilon": 1.0}}, "no owner holds the student"),
        ({"privacy": {**RECORD, "unit": "client"}, "protection": SECAGG}, "at least 50"),
    ],
)
def test_every_other_option_is_taken_or_refused_with_a_reason(sections: dict[str, Any], words: str) -> None:
    made = three(**sections)
    with pytest.raises(PlanRefused) as refused:
        compatibility.check(made)
    assert words in str(refused.value)


def test_mistakes_are_told_all_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        three(distillation={"steps": 0, "learning_rate": 0.0}, protection={"kind": "none", "norm_bound": 1.0})
    for name in ("distillation.steps", "distillation.learning_rate", "protection.norm_bound"):
        assert name in str(refused.value)
    with pytest.raises(ConfigError, match="does not read the table distillation"):
        make(distillation={"steps": 3})
