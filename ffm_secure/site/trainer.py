"""One client's round: learn, bound, noise, quantise. What comes back is a ring vector ready to be sealed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from defenses.dp import PerSampleEngine, RecordMechanism
from defenses.random_source import RandomSource
from ffm_secure.config.run_file import RunConfig
from ffm_secure.lifecycle import ModelUpdate, finetune
from ffm_secure.lifecycle.finetune import GradientRule, PlainGradient, PrivateGradient
from ffm_secure.privacy.mechanism import ClientNoise, Mechanism
from ffm_secure.protection.codec import VectorCodec
from ffm_secure.records import RoundPlan
from ffm_secure.site.client_state import ClientStateStore
from ffm_secure.strategies import Strategy, build


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """One data owner: a name in the ledger, encoded examples that never leave, and nothing else."""

    index: int
    name: str
    examples: Any  # ffm_secure.tasks Encoded


@dataclass(frozen=True, slots=True, kw_only=True)
class Noisy:
    """A change that may be sealed: its bound and noise were applied, or the run says it has none.

    `values` is float64 [d] for a change that was privatised while learning (or not at all), int64 [d] on the grid where the
    noise is discrete. Constructed in this module only; `quantise` accepts nothing else.
    """

    values: npt.NDArray[np.float64] | npt.NDArray[np.int64]
    loss: float
    weight: int


@dataclass(slots=True, kw_only=True)
class SiteTrainer:
    """Where clients learn one after another: one replica of the model, one per-sample engine."""

    config: RunConfig
    trainable: Any
    task: Any
    mechanism: Mechanism
    code: VectorCodec
    device: str
    home: ClientStateStore = field(default_factory=ClientStateStore)
    engines: dict[tuple[str, ...], PerSampleEngine] = field(default_factory=dict)  # by what is trained
    strategy: Strategy = field(init=False)

    def __post_init__(self) -> None:
        self.strategy = build(self.config.federation.strategy, self.trainable, seed=self.config.seed)

    def contribute(
        self, client: Client, plan: RoundPlan, start: Tensor, source: RandomSource
    ) -> npt.NDArray[Any]:
        """Return what this client adds to the round's sum, as integers modulo 2^m.

        Assumes: the ledger has reserved the round's event for this client, before this call touches its data.
        """
        change = self.learn(client, plan, start, source.derive("learn"))
        noisy = self.protect(change, client, source.derive("protect"))
        return self.code.quantise(
            noisy.values, loss=noisy.loss, weight=noisy.weight, source=source.derive("round")
        )

    def learn(self, client: Client, plan: RoundPlan, start: Tensor, source: RandomSource) -> ModelUpdate:
        """Run the local steps and say what is sent of them; record-level noise is drawn here, inside every step."""
        spec, strategy, mask = (
            self.config.federation.lifecycle,
            self.strategy,
            self.strategy.mask(client.index),
        )
        start = start if mask is None else start * mask
        start = self.home.enter(client.index, start, run_id=plan.run_id, before=plan.round)
        with self.trainable.training_only(strategy.trains(plan.step)):
            rule = self.rule(client, plan, source)
            change = finetune(trainable=self.trainable, start=start, spec=spec, rule=rule, mask=mask)
        learned = change.vector.cpu()
        self.home.leave(client.index, start + learned, run_id=plan.run_id, round=plan.round)
        return replace(change, vector=strategy.message(start, learned, plan.step))

    def rule(self, client: Client, plan: RoundPlan, source: RandomSource) -> GradientRule:
        """Choose how gradients are taken: per sample with noise, or plain."""
        speed = self.config.speed
        if isinstance(self.mechanism, RecordMechanism):
            active = self.trainable.active
            if tuple(active) not in self.engines:
                self.engines[tuple(active)] = PerSampleEngine(self.trainable.model, parameters=active)
            return PrivateGradient(
                trainable=self.trainable,
                task=self.task,
                encoded=client.examples,
                mechanism=self.mechanism,
                engine=self.engines[tuple(active)],
                source=source,
                device=self.device,
                microbatch=speed.microbatch,
            )
        return PlainGradient(
            trainable=self.trainable,
            task=self.task,
            encoded=client.examples,
            spec=self.config.federation.lifecycle,
            seed=(self.config.seed, plan.round, client.index),
            device=self.device,
            microbatch=speed.microbatch,
        )

    def protect(self, change: ModelUpdate, client: Client, source: RandomSource) -> Noisy:
        """Bound and noise the whole change where the client is the unit; pass on what is already private."""
        if isinstance(self.mechanism, ClientNoise):
            return Noisy(values=self.mechanism.noisy_integers(change.vector, source), loss=0.0, weight=1)
        vector = change.vector.detach().cpu().numpy().astype(np.float64)
        if self.mechanism is None:
            weight = len(client.examples) if self.config.federation.weighting == "examples" else 1
            loss = 0.0 if np.isnan(change.loss) else float(change.loss)
            return Noisy(values=vector, loss=loss, weight=weight)
        return Noisy(values=vector, loss=0.0, weight=1)
