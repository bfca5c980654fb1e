"""Where a site learns: private rows in, an update out that a mechanism protected. The only file that gives
rows to a rule.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from defenses.dp import PerSampleEngine
from defenses.random_source import RandomSource
from defenses.secagg.masks import RingVector
from ffm_secure.lifecycle import ModelUpdate, SiteRound
from ffm_secure.lifecycle.distillation import Distil, Lesson
from ffm_secure.lifecycle.finetune import (
    Arrived,
    BoundedSum,
    GradientRule,
    PlainGradient,
    PrivateGradient,
    one_by_one_if_needed,
)
from ffm_secure.models.backbone import vector_fingerprint
from ffm_secure.privacy.mechanism import MechanismOutput, SumNoise, replay_of
from ffm_secure.protection.codec import fair_weight
from ffm_secure.queries import agenda
from ffm_secure.queries.base import Answers, Query, Rows, Viewed, by_length
from ffm_secure.records import LEARN, RoundPlan
from ffm_secure.agreed.run_spec import RunSpec
from ffm_secure.site.client_state import ClientStateStore, own_models, residual_store
from ffm_secure.site.noise_memory import NoiseMemory
from ffm_secure.site.teaching import Teacher, own_spec
from ffm_secure.tasks.base import Task
from ffm_secure.tasks.encoded import Encoded
from ffm_secure.trainable import TrainableModel

_NUMBERS_AT_ONCE = 1 << 22
_ROWS_AT_ONCE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteData:
    """The private rows of one data owner, encoded; they never leave it."""

    index: int
    name: str
    examples: Encoded
    held_back: Rows | None = None  # rows that are never learned from, only asked about
    stages: tuple[Arrived, ...] = ()  # what each stage of a stream may draw; none where all is there at once
    teacher: Teacher | None = None  # the owner's own model, where it answers public rows

    def arrived(self, stage: int) -> Arrived:
        """Return the rows that a round of a stage may draw."""
        if not self.stages:
            return Arrived.everything(len(self.examples))
        return self.stages[stage]

    def __repr__(self) -> str:
        return f"SiteData(index={self.index}, name={self.name!r})"


@dataclass(slots=True, kw_only=True)
class SiteTrainer:
    """One replica of the model and one per-sample engine; the sites of a simulation take turns with it."""

    spec: RunSpec
    trainable: TrainableModel
    task: Task
    states: ClientStateStore = field(default_factory=ClientStateStore)
    engines: dict[tuple[str, ...], PerSampleEngine] = field(default_factory=dict)  # by what is trained
    rows_used: frozenset[int] = frozenset()  # private: rows the newest round was learned from
    learned: bytes = b""  # private: digest of what the newest round taught, before bound, noise and rounding

    def run_round(
        self,
        data: SiteData,
        plan: RoundPlan,
        start: Tensor,
        source: RandomSource,
        noise: NoiseMemory | None = None,
    ) -> RingVector:
        """Return what this site adds to the round's sum, as integers modulo 2^m; `noise` is its own, where
        noise has a memory.

        Assumes: the site's ledger has reserved the round's event, before this call touches its rows.
        """
        if plan.query != LEARN:
            return self.answer(data, plan, start, source)
        update = self._update(data, plan, start, source.derive("learn"))
        self.learned = bytes.fromhex(vector_fingerprint(update.vector))
        update = self._compressed(update, data, plan, start)
        protected = self._protected(update, data, plan, source.derive("protect"), noise)
        return self.spec.codec.quantise(protected, source=source.derive("round"))

    def _update(self, data: SiteData, plan: RoundPlan, start: Tensor, source: RandomSource) -> ModelUpdate:
        """Learn, or send zeros where it is not this site's turn: no row is read then."""
        by_turns = self.spec.mechanism.client_level
        if by_turns is None or by_turns.learns(data.index, plan.round):
            return self.learn(data, plan, start, source)
        self.rows_used = frozenset()
        zeros = torch.zeros(self.spec.strategy.size(start.numel()))
        return ModelUpdate(vector=zeros, loss=float("nan"), steps=0)

    def _compressed(self, update: ModelUpdate, data: SiteData, plan: RoundPlan, start: Tensor) -> ModelUpdate:
        """Return what is sent of an update, before any bound or noise on the whole of it.

        With a residual, what earlier rounds left out is added first, and what this round leaves out is kept.
        Nothing of it is sent but through the bound of a round that is paid.
        """
        compression = self.spec.compression
        state = self.spec.public_state(plan, start)
        if not self.spec.config.compression.residual:
            return replace(update, vector=compression.compress(update.vector, state))
        residuals = residual_store(self.spec, self.states)
        nothing = torch.zeros(compression.size)
        kept_out = residuals.load(data.index, nothing, run_id=plan.run_id, before=plan.round)
        whole = update.vector.detach().cpu().double() + kept_out
        sent = compression.compress(whole, state)
        left = (whole - compression.restore(sent, state)).float()
        residuals.save(data.index, left, run_id=plan.run_id, round=plan.round)
        return replace(update, vector=sent)

    def _protected(
        self,
        update: ModelUpdate,
        data: SiteData,
        plan: RoundPlan,
        source: RandomSource,
        noise: NoiseMemory | None,
    ) -> MechanismOutput:
        by_turns = self.spec.mechanism.client_level
        if by_turns is None or by_turns.correlated is None:
            return self.protect(update, data, source)
        assert noise is not None, "whoever makes a site opens its noise"
        return by_turns.protect_with(update.vector.detach(), noise.row(plan), source)

    def answer(self, data: SiteData, plan: RoundPlan, start: Tensor, source: RandomSource) -> RingVector:
        """Return this site's noisy answer to a query about the broadcast model, as integers modulo 2^m."""
        question = self.spec.questions[plan.query]
        rows = Rows(encoded=data.examples)
        if data.stages and not question.item.held_back:
            rows = rows.take(self._arrived(data, plan).new)
        if question.item.held_back:
            rows = data.held_back or Rows(encoded=data.examples.take([]))
        self.trainable.load_vector(start)
        total = question.mechanism.total(self._answers(question.query, rows, plan.asked))
        self.learned = hashlib.sha256(question.query.name.encode() + total.values.tobytes()).digest()
        protected = question.mechanism.protect_total(total, source.derive("protect"))
        self.rows_used = frozenset() if question.item.held_back else frozenset(range(len(rows)))
        return question.codec.quantise(protected, source=source.derive("round"))

    def _answers(self, query: Query, rows: Rows, asked: tuple[int, ...]) -> Iterator[Answers]:
        """Answer part by part, so that no more than some million numbers exist at a time."""
        model = Viewed(
            trainable=self.trainable,
            task=self.task,
            device=self.spec.device,
            batch_size=self.spec.config.speed.microbatch,
            asked=asked,
        )
        step = max(1, min(_ROWS_AT_ONCE, _NUMBERS_AT_ONCE // query.size))
        order = by_length(rows.encoded)
        for first in range(0, len(rows), step):
            chosen = order[first : first + step]
            if self.spec.config.privacy.unit == "none":
                yield query.answer(rows.take(chosen), model)
            else:  # a row on which the query fails counts nowhere
                yield from one_by_one_if_needed(lambda part: query.answer(rows.take(part), model), chosen)

    def _arrived(self, data: SiteData, plan: RoundPlan) -> Arrived:
        """Return the rows of a round's stage; the reservoir's rate is that of the event it is charged as."""
        arrived = data.arrived(agenda.stage_of(self.spec.config, plan.turn))
        replay = replay_of(self.spec.mechanism)
        return arrived if replay is None else replace(arrived, replay_rate=replay.sampling_rate)

    def learn(self, data: SiteData, plan: RoundPlan, start: Tensor, source: RandomSource) -> ModelUpdate:
        """Run the local steps and say what is sent of them; record-level noise is drawn here, inside every
        step.
        """
        spec, strategy = self.spec, self.spec.strategy
        if data.teacher is not None:
            return self.teach(data, data.teacher, plan, start, source)
        if spec.mechanism.sum_level is not None:
            return self.add_up(spec.mechanism.sum_level, data, plan, start, source)
        mask = strategy.mask(data.index)
        if mask is not None:
            start = start * mask
        start = self.states.load(data.index, start, run_id=plan.run_id, before=plan.round)
        rule: GradientRule
        with self.trainable.training_only(strategy.trains(plan.step)):
            rule = self.rule(data, plan, source)
            site_round = SiteRound(
                trainable=self.trainable,
                start=start,
                spec=spec.config.federation.lifecycle,
                rule=rule,
                mask=mask,
            )
            update = spec.algorithm.learn(site_round)
        self.rows_used = frozenset(rule.rows_used)
        learned = update.vector.cpu()
        self.states.save(data.index, start + learned, run_id=plan.run_id, round=plan.round)
        return replace(update, vector=strategy.message(start, learned, plan.step))

    def teach(
        self, data: SiteData, teacher: Teacher, plan: RoundPlan, guide: Tensor, source: RandomSource
    ) -> ModelUpdate:
        """Let the owner's own model learn, keep it at home, and return its answers to the public rows.

        `guide` is what the student answers, float32 [rows * classes]; empty before it has learned.
        """
        spec = self.spec
        assert isinstance(spec.algorithm, Distil), "the plan gives no other lifecycle a teacher"
        own_store = own_models(spec, self.states, size=teacher.trainable.size)
        own = replace(self, trainable=teacher.trainable, task=teacher.task, engines=teacher.engines)
        own_data = replace(data, examples=teacher.examples, teacher=None)
        rule = own.rule(own_data, plan, source)
        lesson = Lesson(
            trainable=teacher.trainable,
            task=teacher.task,
            start=own_store.load(data.index, teacher.start, run_id=plan.run_id, before=plan.round),
            spec=own_spec(spec.config, teacher),
            rule=rule,
            public=teacher.public,
            guide=guide,
            seed=(spec.config.seed, plan.round, data.index, 0xBAC),
            device=spec.device,
            config=spec.config,
        )
        taught = spec.algorithm.teach(lesson)
        self.rows_used = frozenset(rule.rows_used)
        own_store.save(data.index, taught.own, run_id=plan.run_id, round=plan.round)
        return ModelUpdate(vector=taught.answers, loss=taught.loss, steps=taught.steps)

    def add_up(
        self, mechanism: SumNoise, data: SiteData, plan: RoundPlan, start: Tensor, source: RandomSource
    ) -> ModelUpdate:
        """Return the step that one bounded sum of gradients makes; it has no noise yet.

        The sum does not pass through the model's float32 weights: their rounding would be outside the bound.
        """
        with self.trainable.training_only(self.spec.strategy.trains(plan.step)):
            self.trainable.load_vector(start)
            rule = BoundedSum(
                trainable=self.trainable,
                task=self.task,
                encoded=data.examples,
                sampling_rate=mechanism.inner.sampling_rate,
                clipping=mechanism.clipping,
                engine=self._engine(),
                source=source,
                device=self.spec.device,
                microbatch=self.spec.config.speed.microbatch,
                arrived=self._arrived(data, plan),
            )
            update = mechanism.update_of(rule.gradient_sum())
        self.rows_used = frozenset(rule.rows_used)
        return ModelUpdate(vector=update, loss=float("nan"), steps=1)

    def rule(self, data: SiteData, plan: RoundPlan, source: RandomSource) -> GradientRule:
        """Choose how gradients are taken: per sample with noise, or plain."""
        config, mechanism = self.spec.config, self.spec.mechanism.record_level
        if mechanism is not None:
            return PrivateGradient(
                trainable=self.trainable,
                task=self.task,
                encoded=data.examples,
                mechanism=mechanism,
                engine=self._engine(),
                source=source,
                device=self.spec.device,
                microbatch=config.speed.microbatch,
                arrived=self._arrived(data, plan),
            )
        examples = data.examples
        if data.stages:
            examples = examples.take(self._arrived(data, plan).rows)
        return PlainGradient(
            trainable=self.trainable,
            task=self.task,
            encoded=examples,
            spec=config.federation.lifecycle,
            seed=(config.seed, plan.round, data.index),
            device=self.spec.device,
            microbatch=config.speed.microbatch,
            contained=config.privacy.unit != "none",
        )

    def _engine(self) -> PerSampleEngine:
        active = self.trainable.active
        names = tuple(active)
        if names not in self.engines:
            self.engines[names] = PerSampleEngine(self.trainable.model, parameters=active)
        return self.engines[names]

    def protect(self, update: ModelUpdate, data: SiteData, source: RandomSource) -> MechanismOutput:
        """Bound and noise the update as the mechanism says."""
        weight = 1
        federation = self.spec.config.federation
        if federation.weighting == "examples":
            weight = max(1, len(data.examples))
        if federation.weighting == "q_fair" and not np.isnan(update.loss):
            weight = fair_weight(float(update.loss), power=federation.fairness)
        loss = 0.0
        if not np.isnan(update.loss):
            loss = float(update.loss)
        return self.spec.mechanism.protect(update.vector.detach(), loss=loss, weight=weight, source=source)
