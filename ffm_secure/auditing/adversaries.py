"""Malicious sites in a simulation: they learn from poisoned rows, or send something else than they learned.
 Only a program reaches this, on a simulation it has built itself; no run file names it, and a site of its own
has no such part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from attacks.poisoning.backdoor import Active
from attacks.poisoning.updates import UpdateAttack
from defenses.random_source import RandomSource
from ffm_secure.engines.simulation import Simulation
from ffm_secure.lifecycle import ModelUpdate
from ffm_secure.records import RoundPlan
from ffm_secure.site.trainer import SiteData, SiteTrainer
from ffm_secure.tasks.encoded import Encoded

RowPoison = Callable[[Encoded], Encoded]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adversaries:
    """Say who is malicious, in which rounds, and what they do.

    rows: what they learn from instead of their own. update: what they send instead of what they learned; it
    then passes through the same bound, noise and code as an honest update, so it stays inside the bound.
    """

    sites: frozenset[int]
    update: UpdateAttack | None = None
    rows: RowPoison | None = None
    active: Active = Active()


@dataclass(slots=True, kw_only=True)
class PoisoningTrainer(SiteTrainer):
    """Train honest sites as ever, and malicious ones as their attack says."""

    adversaries: Adversaries
    accomplices: Mapping[int, SiteData]  # rows of every malicious site
    _known: dict[int, Tensor] = field(default_factory=dict)
    _known_in: tuple[bytes, int, int] = (b"", 0, 0)

    def learn(self, data: SiteData, plan: RoundPlan, start: Tensor, source: RandomSource) -> ModelUpdate:
        """Learn as an honest site, or poison what was learned."""
        malicious = data.index in self.adversaries.sites and plan.round in self.adversaries.active
        if not malicious:
            return super(PoisoningTrainer, self).learn(data, plan, start, source)
        own = self._learn_poisoned(data, plan, start, source)
        if self.adversaries.update is None:
            return own
        known = self._honest(plan, start, source)
        vector = self.adversaries.update(
            known[data.index].double(), torch.stack(list(known.values())).double()
        )
        return replace(own, vector=vector.to(own.vector.dtype))

    def _learn_poisoned(
        self, data: SiteData, plan: RoundPlan, start: Tensor, source: RandomSource
    ) -> ModelUpdate:
        examples = data.examples if self.adversaries.rows is None else self.adversaries.rows(data.examples)
        return super(PoisoningTrainer, self).learn(replace(data, examples=examples), plan, start, source)

    def _honest(self, plan: RoundPlan, start: Tensor, source: RandomSource) -> Mapping[int, Tensor]:
        """Return what every malicious site of the cohort would have sent; colluders learn it once a round."""
        attempt = (plan.run_id, plan.round, plan.attempt)
        if attempt != self._known_in:
            self._known_in, self._known = attempt, {}
            for site in sorted(self.adversaries.sites & set(plan.cohort)):
                own_source = source.derive("accomplice", site)
                learned = self._learn_poisoned(self.accomplices[site], plan, start, own_source)
                self._known[site] = learned.vector.detach().cpu()
        return self._known


def play(ready: Simulation, adversaries: Adversaries) -> None:
    """Let some sites of a simulation be malicious from now on; its sites take turns with one trainer."""
    trainer = PoisoningTrainer(
        spec=ready.spec,
        trainable=ready.trainable,
        task=ready.task,
        states=ready.states,
        adversaries=adversaries,
        accomplices={site: ready.sites[site].data for site in adversaries.sites},
    )
    ready.courier.trainers.replace([trainer])
