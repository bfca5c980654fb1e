"""Play a malicious server: craft every broadcast the run's own model allows, and put it to a real site.

 A broadcast holds what is trained and nothing else; a frozen backbone is the site's own copy. What can be
sent goes through the site's own guard and, where that lets it pass, through its own local steps, bound,
noise and protection. *Refused*: the guard stopped it. *Leaked*: it was answered, and the answer gives records
away. *Survived*: it was answered, and nothing beyond chance was read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attacks import nulls
from attacks.contract import Attack, NotApplicable
from attacks.inversion.active import craft_fishing
from attacks.inversion.active_adapters import craft_lora_leak
from attacks.inversion.active_text import craft_decepticon, craft_encoder_bins
from attacks.judge import (
    LEVEL,
    UNCRAFTED,
    Judgement,
    Question,
    Result,
    against_noise,
    noise_values,
    null_runs,
    tried,
)
from ffm_secure.auditing import replayed as client_replay
from ffm_secure.auditing.budget import NULL_STEPS, AuditBudget
from ffm_secure.auditing.step import ReplayedStep
from ffm_secure.engines import simulation
from ffm_secure.errors import BroadcastRefused
from ffm_secure.records import Observer
from ffm_secure.site.broadcast_guard import BroadcastGuard

CRAFTERS: tuple[Observer, ...] = ("server", "colluding_server")
REFUSED, SURVIVED = "refused", "survived"
_PUBLIC = 256  # validation rows that a server crafts by
_FOREIGN = "takes a layer that the site's own model does not have, so it cannot be sent"
_ELSEWHERE = {
    "imprint": _FOREIGN,
    "adapter_leak": "takes bottleneck adapters, which no run trains, so it cannot be sent",
    "neuron_imprint": "takes bottleneck adapters, which no run trains, so it cannot be sent",
    "prompt_membership": "takes a pool of prompts with keys, which no run trains, so it cannot be sent",
    "trap_weights": "takes a ReLU behind a first layer that sees the inputs themselves",
    "model_inconsistency": "takes a ReLU behind a first layer that sees the inputs themselves",
}
Craft = Callable[[nn.Module, Mapping[str, Tensor]], nn.Module]


def _fished(model: nn.Module, public: Mapping[str, Tensor]) -> nn.Module:
    return craft_fishing(model, int(public["labels"].mode().values))


# How each attack's broadcast is made of an honest model and public records.
CRAFTS: dict[str, Craft] = {
    "decepticon": lambda model, public: craft_decepticon(model, public["input_ids"]),
    "encoder_bins": lambda model, public: craft_encoder_bins(model, public["input_ids"]),
    "lora_leak": lambda model, public: craft_lora_leak(model),
    "fishing": _fished,
}


def _shortened(words: Sequence[str]) -> str:
    """Return the first of several words, and how many follow."""
    if len(words) == 1:
        return words[0]
    return f"{words[0]} and {len(words) - 1} more"


@dataclass(frozen=True, slots=True, kw_only=True)
class MaliciousServer:
    """A run seen by a server that may send what it likes, and the guard of the sites it sends to."""

    prepared: simulation.Prepared
    guard: BroadcastGuard

    def craft(self, name: str, model: nn.Module) -> Tensor:
        """Return the crafted broadcast of an attack as a vector [d].

        Raises: NotApplicable with the reason where none can be made, or none can be sent.
        """
        if name not in CRAFTS:
            raise NotApplicable(_ELSEWHERE.get(name, "no broadcast is known to be crafted for it"))
        try:
            crafted = CRAFTS[name](model, self._public())
        except (AssertionError, AttributeError, KeyError, LookupError, RuntimeError, TypeError) as error:
            raise NotApplicable(f"is not written for this model ({type(error).__name__})") from None
        own = client_replay.own_names(self.prepared)
        tensors, honest_tensors = dict(crafted.named_parameters()), dict(model.named_parameters())
        changed = []
        for name in sorted(set(honest_tensors) - set(own.values())):
            if not torch.equal(tensors[name], honest_tensors[name]):
                changed.append(name)
        if changed:
            needed = _shortened(changed)
            raise NotApplicable(f"needs {needed}, which a site takes from its own copy: it cannot be sent")
        return torch.cat([tensors[name].detach().reshape(-1) for name in own.values()])

    def refusal(self, vector: Tensor) -> str:
        """Return why a site refuses a broadcast, nothing where it trains on it."""
        try:
            self.guard.accept(vector)
        except BroadcastRefused as refused:
            return _shortened(refused.reasons)
        return ""

    def _public(self) -> Mapping[str, Tensor]:
        rows = self.prepared.dataset.validation
        encoded = self.prepared.task.encode(rows.take(range(min(_PUBLIC, len(rows)))))
        return self.prepared.task.batch(encoded, range(len(encoded)), device="cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """What came of one crafted broadcast: a question to be judged, or what there is to say without one."""

    attack: Attack
    stage: ReplayedStep
    question: Question | None = None
    judgement: Judgement | None = None


def play(
    server: MaliciousServer, attacks: Sequence[Attack], stages: Sequence[ReplayedStep], purse: AuditBudget
) -> Iterator[Played]:
    """Put the crafted broadcast of every attack to a site, on the first step on which it works unguarded."""
    for attack in attacks:
        yield _played(server, attack, stages, purse)


def _played(
    server: MaliciousServer, attack: Attack, stages: Sequence[ReplayedStep], purse: AuditBudget
) -> Played:
    try:
        vector = server.craft(attack.name, stages[0].model)
    except NotApplicable as reason:
        judged = Judgement(verdict="not applicable", reason=f"a malicious server's broadcast {reason}")
        return Played(attack=attack, stage=stages[0], judgement=judged)
    stage, control = _unguarded(attack, stages, vector, purse)
    if control is None:
        return Played(attack=attack, stage=stage)
    refusal = server.refusal(vector)
    if refusal and control[1] is not None and control[1].proven:
        judged = Judgement(
            verdict="not leaked",
            measure=control[1].measure,
            baseline=control[1].baseline,
            control=control[1].value,
            reason=f"{REFUSED}: the site's guard stops the crafted broadcast before any training ({refusal})",
        )
        return Played(attack=attack, stage=stage, judgement=judged)
    if control[1] is None or not control[1].proven:
        return Played(
            attack=attack, stage=stage, question=Question(seen=control, control=control, never=UNCRAFTED)
        )
    answer = _answered(server, attack, stage, vector, purse)
    note = f"{SURVIVED} the guard: the site trained on the crafted broadcast"
    return Played(attack=attack, stage=stage, question=Question(seen=answer, control=control, notes=(note,)))


def _unguarded(
    attack: Attack, stages: Sequence[ReplayedStep], vector: Tensor, purse: AuditBudget
) -> tuple[ReplayedStep, Result | None]:
    """Return the first step on which an attack reads the bare answer to its broadcast, and its reading."""
    first: Result | None = None
    for stage in stages:
        budget = purse.budget(attack)
        if budget is None:
            break
        bare = stage.answer(vector, 0)
        control = tried(attack, bare.observation, stage.model, stage.prior, budget, bare.truth)
        if control[1] is not None and control[1].proven:
            return stage, control
        first = first or control
    return stages[0], first


def _answered(
    server: MaliciousServer, attack: Attack, stage: ReplayedStep, vector: Tensor, purse: AuditBudget
) -> Result:
    """Read what sites that trust the broadcast send back, as the server sees it, and the same in noise."""
    config = server.prepared.config
    point = client_replay.seen_by("server", config, stage.points)
    clients = 1
    if point == "aggregated":
        clients = client_replay.smallest_sum(config)
    answer = stage.answer(vector, clients)
    budget = purse.budget(attack)
    assert budget is not None, "the bare answer was read within the budget"
    reading, scored = tried(attack, answer.observation, stage.model, stage.prior, budget, answer.truth)
    if scored is None or scored.luck > LEVEL:
        return reading, scored
    shape = nulls.study(answer.observation)
    silent = []
    for number in range(null_runs(reading.steps, NULL_STEPS[purse.name])):
        noise = shape.draw(number, "moved")
        silent.append(tried(attack, noise, stage.model, stage.prior, budget, None)[0])
    return reading, against_noise(scored, noise_values(silent, scored, answer.truth))


def honest(attack: Attack) -> Judgement:
    """Judge an attack on crafted broadcasts for an observer who crafts none."""
    return Judgement(verdict="not applicable", reason=f"{UNCRAFTED}: {attack.name} takes a malicious server")
