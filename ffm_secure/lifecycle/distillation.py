"""Distillation: owners answer public rows from models of their own, and a student learns the mean of it.

An owner sends no number of its model, only the probability of every class for every public row. The mean over
the owners is what the server opens; the student learns from it, and its own answers may go back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from ffm_secure.aggregation.base import Aggregate
from ffm_secure.config.run_file import Lifecycle, RunConfig
from ffm_secure.lifecycle.base import AnswerSheet, Algorithm, ServerPhase, SiteRound
from ffm_secure.lifecycle.finetune import GradientRule, ModelUpdate, PlainGradient, finetune
from ffm_secure.strategies.base import ServerState, Strategy
from ffm_secure.tasks.base import Classification, Task, logits
from ffm_secure.tasks.encoded import Encoded
from ffm_secure.trainable.base import TrainableModel

TOLD = "student.answers"  # slot of a server's state: what the student answers, float32 [rows * classes]
_LEAST = 1e-12


class SoftTargets(PlainGradient):
    """Plain steps on public rows towards given probabilities, every batch of one size: nothing is private."""

    def __init__(
        self,
        *,
        trainable: TrainableModel,
        task: Task,
        public: Encoded,
        targets: Tensor,
        spec: Lifecycle,
        seed: tuple[int, ...],
        device: str,
        microbatch: int,
    ) -> None:
        super().__init__(
            trainable=trainable,
            task=task,
            encoded=public,
            spec=spec,
            seed=seed,
            device=device,
            microbatch=microbatch,
        )
        self.targets = targets
        self.order = np.random.default_rng(list(seed))  # public rows are read without a draw of the task

    def steps(self) -> Iterator[Mapping[str, Tensor]]:
        """Iterate over minibatches of reshuffled epochs, one going on where the last ends."""
        places = np.zeros(0, dtype=np.int64)
        for _ in range(self.spec.local_steps):
            while len(places) < min(self.spec.batch_size, len(self.encoded)):
                places = np.concatenate([places, self.order.permutation(len(self.encoded))])
            chosen, places = places[: self.spec.batch_size], places[self.spec.batch_size :]
            yield self._gradient(chosen)

    def _add(self, rows: np.ndarray, divisor: int) -> None:
        batch = self.task.evaluation_batch(self.encoded, rows, self.device)
        scores = logits(self.trainable.model, batch).float()
        targets = self.targets[torch.from_numpy(rows)].to(scores)
        torch.autograd.backward(nn.functional.cross_entropy(scores, targets, reduction="sum") / divisor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """What an owner brings to its part of a round: its own model, its rule, the public rows as it reads
    them.
    """

    trainable: TrainableModel
    task: Classification
    start: Tensor  # float32 [d]: the own model as it was before the round
    spec: Lifecycle
    rule: GradientRule
    public: Encoded
    guide: Tensor  # float32 [rows * classes]: what the student answers; empty where nothing goes back
    seed: tuple[int, ...]
    device: str
    config: RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Taught:
    """What came of a lesson: the own model, which stays, and the answers, which are sent."""

    own: Tensor  # float32 [d]
    answers: Tensor  # float64 [rows * classes]
    loss: float
    steps: int


class Distil(Algorithm):
    """Owners learn at home and answer public rows; the server teaches the student the mean of the answers.

    Guarantee: what an owner sends is a function of its own model and of public rows. With the record or the
    person unit that model has learned from private rows through noised gradients alone, so its answers to any
    number of rows cost nothing beyond them; with the client unit the whole vector of answers is bounded.
    """

    kind = "distillation"
    reads_public_rows = True

    def learn(self, site_round: SiteRound) -> ModelUpdate:
        """Refuse: an owner is given a lesson, not a broadcast model."""
        raise NotImplementedError("an owner of a distillation learns its own model")

    def sheet(self, rows: int, classes: int | None, digest: str) -> AnswerSheet:
        """Return what is answered, where answers are sent."""
        return AnswerSheet(rows=rows, classes=classes or 0, digest=digest)

    def teach(self, lesson: Lesson) -> Taught:
        """Let the own model learn from the student, then from its owner's rows, then answer.

        Guarantee: one that has run off answers evenly, and stands afterwards where it stood before the round;
        so no owner stays away from a later round because of what its rows did to its model.
        """
        start = lesson.start
        if lesson.config.distillation.back_steps and lesson.guide.numel():
            start = self._learned_back(lesson)
        update = finetune(trainable=lesson.trainable, start=start, spec=lesson.spec, rule=lesson.rule)
        own = start.cpu() + update.vector.cpu()
        lesson.trainable.load_vector(own)
        answers = answers_of(lesson.task, lesson.trainable, lesson.public, device=lesson.device)
        if lesson.config.distillation.balance:
            answers = balanced(answers)
        if lesson.config.privacy.unit == "client":
            answers = votes_of(answers) * vote_length(lesson.config, rows=len(answers))
        if not bool(own.isfinite().all()):  # kept as it is, its owner would be lost to every later round
            own = lesson.start.cpu()
        return Taught(own=own, answers=answers.reshape(-1), loss=update.loss, steps=update.steps)

    def _learned_back(self, lesson: Lesson) -> Tensor:
        """Return the own model after its steps towards the student's answers, which are public by then."""
        spec = replace(plain(lesson.spec), local_steps=lesson.config.distillation.back_steps)
        rule = SoftTargets(
            trainable=lesson.trainable,
            task=lesson.task,
            public=lesson.public,
            targets=lesson.guide.view(len(lesson.public), -1),
            spec=spec,
            seed=lesson.seed,
            device=lesson.device,
            microbatch=lesson.config.speed.microbatch,
        )
        update = finetune(trainable=lesson.trainable, start=lesson.start, spec=spec, rule=rule)
        return lesson.start.cpu() + update.vector.cpu()

    def broadcast(self, state: ServerState) -> Tensor:
        """Return what goes down to the owners: the student's answers once it has learned, or nothing."""
        return state.optimizer_state.get(TOLD, torch.zeros(0))

    def step(
        self, phase: ServerPhase, strategy: Strategy, state: ServerState, aggregate: Aggregate
    ) -> ServerState:
        """Return the state after the student has learned the mean of the answers."""
        config, task = phase.config, phase.task
        assert phase.public is not None, "the plan refuses a distillation without public rows"
        assert isinstance(task, Classification), "the plan refuses tasks without classes"
        rows = len(phase.public)
        mean = aggregate.mean.view(rows, -1)
        if config.privacy.unit == "client":
            mean = mean / vote_length(config, rows=rows)
        spec = student_spec(config)
        rule = SoftTargets(
            trainable=phase.trainable,
            task=task,
            public=phase.public,
            targets=as_chances(mean),
            spec=spec,
            seed=(config.seed, phase.round, config.task.clients),
            device=phase.device,
            microbatch=config.speed.microbatch,
        )
        update = finetune(trainable=phase.trainable, start=state.vector, spec=spec, rule=rule)
        vector = state.vector + update.vector.to(state.vector.device)
        slots = dict(state.optimizer_state)
        if config.distillation.back_steps:
            phase.trainable.load_vector(vector)
            guide = answers_of(task, phase.trainable, phase.public, device=phase.device)
            slots[TOLD] = guide.reshape(-1).float()
        return ServerState(round=state.round + 1, vector=vector, optimizer_state=slots)

    def describe(self, config: RunConfig, public_rows: int) -> str:
        """Say who answers what, and who learns from it."""
        table = config.distillation
        models = ", ".join(f"{own.name} ({own.trainable.kind})" for own in table.models)
        back = f"; its answers go back, {table.back_steps} steps a round" if table.back_steps else ""
        brought = [own.name for own in table.models if not own.name.startswith("builtin:")]
        if brought and config.privacy.unit in ("record", "person"):
            back += f"; what {', '.join(brought)} learned from before this run is not counted here"
        return (
            f"a student, by {table.steps} steps a round on the owners' mean answer to {public_rows:,} public "
            f"rows; owners learn at home: {models or 'the same model'}, never sent{back}"
        )


def student_spec(config: RunConfig) -> Lifecycle:
    """Return how the student learns."""
    table = config.distillation
    return Lifecycle(
        kind="distillation",
        local_steps=table.steps,
        batch_size=table.batch_size,
        learning_rate=table.learning_rate,
        optimizer=table.optimizer,
    )


def plain(spec: Lifecycle) -> Lifecycle:
    """Return how an own model learns from public rows: as from its owner's, by steps."""
    return replace(spec, local_epochs=0, proximal=0.0)


def answers_of(task: Classification, trainable: TrainableModel, public: Encoded, *, device: str) -> Tensor:
    """Return the probability of every class for every public row, float64 [rows, classes]; the same for all
    classes where a model has run off and gives no numbers.
    """
    answers = torch.from_numpy(task.chances(trainable.model, public, device=device))
    return torch.where(answers.isfinite().all(dim=1, keepdim=True), answers, 1.0 / answers.shape[1])


def balanced(answers: Tensor) -> Tensor:
    """Divide probabilities [rows, classes] by their mean over the rows, and make every row's sum 1 again.

    What an owner has most of is answered most often; on public rows that hold the classes more evenly, the
    mean answer shows it. Nothing is counted: answers are all that is read.
    """
    lifted = answers / answers.mean(dim=0, keepdim=True).clamp(min=_LEAST)
    return lifted / lifted.sum(dim=1, keepdim=True)


def votes_of(answers: Tensor) -> Tensor:
    """Return 1 at the likeliest class of every row, 0 elsewhere, float64 [rows, classes]."""
    return nn.functional.one_hot(answers.argmax(dim=1), answers.shape[1]).double()


def vote_length(config: RunConfig, *, rows: int) -> float:
    """Return what one vote counts, so that all votes of an owner together have length `clip_norm`."""
    return config.privacy.clip_norm / math.sqrt(rows)


def as_chances(mean: Tensor) -> Tensor:
    """Return an opened mean [rows, classes] as probabilities: noise may have left numbers below 0."""
    positive = mean.double().clamp(min=0.0)
    total = positive.sum(dim=1, keepdim=True)
    even = torch.full_like(positive, 1.0 / positive.shape[1])
    return torch.where(total > _LEAST, positive / total.clamp(min=_LEAST), even)
