"""The one shape every attack has: `run(observation, model, prior, budget, seed) -> Reconstruction`.

An attack is a pure function that either returns a `Finding` or raises `NotApplicable` with the reason;
`PlainAttack` wraps it into the contract: requirements are checked, time is measured, the knowledge that was
really read is recorded, and global random state is left alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from attacks import steps
from attacks.copies import sharing_copy
from attacks.observation import Knowledge, Observation

Family = Literal[
    "presence",
    "labels",
    "linear",
    "least squares",
    "span",
    "matching",
    "text search",
    "fedavg",
    "membership",
    "active",
    "aggregate",
    "learned",
]
ItemKind = Literal[
    "placed_tokens",
    "token_set",
    "token_counts",
    "sequence",
    "image",
    "inputs",
    "embedding",
    "label_counts",
    "labels",
    "scores",
]


class NotApplicable(Exception):
    """The attack cannot say anything about this observation; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Bound the effort of one attack: steps, iterations of its main loop, and restarts.

    Steps are counted from what is computed (`attacks.steps`), about a thousand to a second of a quiet core.

    Guarantee: an attack is deterministic by seed, whatever else the machine does; one stopped by `steps` says
    so in its reason.
    """

    steps: float
    iterations: int
    restarts: int
    name: str = "custom"

    def __post_init__(self) -> None:
        if self.steps <= 0 or self.iterations < 1 or self.restarts < 1:
            raise ValueError(
                f"steps {self.steps}, iterations {self.iterations}, restarts "
                f"{self.restarts}: all must be positive"
            )

    @staticmethod
    def quick() -> Budget:
        """Return the budget for a first look: seconds per attack."""
        return Budget(steps=20_000, iterations=400, restarts=1, name="quick")

    @staticmethod
    def standard() -> Budget:
        """Return the budget of an ordinary audit: minutes per attack."""
        return Budget(steps=180_000, iterations=2_000, restarts=4, name="standard")

    @staticmethod
    def exhaustive() -> Budget:
        """Return the budget of the strongest attacker we simulate: up to an hour per attack."""
        return Budget(steps=3_600_000, iterations=20_000, restarts=16, name="exhaustive")

    @staticmethod
    def named(name: str) -> Budget:
        """Return a preset by name.

        Raises: ValueError naming the presets.
        """
        presets = {"quick": Budget.quick, "standard": Budget.standard, "exhaustive": Budget.exhaustive}
        if name not in presets:
            raise ValueError(f"budget is {name!r}, must be one of {sorted(presets)}")
        return presets[name]()

    def start(self) -> Deadline:
        """Start counting the steps of this budget."""
        return Deadline(stop_at=steps.so_far() + self.steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadline:
    """The count of steps at which an attack has to stop."""

    stop_at: float

    @property
    def expired(self) -> bool:
        """Say whether the budget's steps are used up."""
        return steps.so_far() >= self.stop_at


@dataclass(frozen=True, slots=True, kw_only=True)
class Prior:
    """Hold what an attacker may bring along that is not about this client; every part is optional.

    `token_frequencies` has one non-negative entry per vocabulary entry. `examples` are public data, for
    example {"images": (n, c, h, w), "labels": (n,), "token_ids": (n, t)}. `language_model` maps token ids (n,
    t) to next- token log-probabilities (n, t, vocabulary). `reference_models` are models trained without the
    target (membership). `client` simulates the client's exact pipeline: a batch of examples and a seed in,
    the tensors it would send out (learned inversion).
    """

    token_frequencies: Tensor | None = None
    examples: Mapping[str, Tensor] | None = None
    language_model: Callable[[Tensor], Tensor] | None = None
    reference_models: tuple[nn.Module, ...] | None = None
    candidates: Mapping[str, Tensor] | None = None
    client: Callable[[Mapping[str, Tensor], int], Mapping[str, Tensor]] | None = None
    image_mean: Tensor | None = None
    image_std: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Item:
    """Hold one recovered thing and how sure the attack is of it (0 to 1).

    `value` by kind: token_set (k,) ids; token_counts (vocabulary,); sequence (t,) ids with -1 for an unknown
    position; image (c, h, w); inputs (features,); embedding (t, d); label_counts (classes,); labels (n,);
    scores (candidates,).
    """

    kind: ItemKind
    value: Tensor
    confidence: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "confidence", _share(self.confidence))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Finding:
    """Hold what an attack function returns before the contract adds time and knowledge."""

    items: tuple[Item, ...] = ()
    confidence: float = 0.0
    reason: str = ""
    details: Mapping[str, float | int | str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reconstruction:
    """Report one run of one attack.

    Guarantee: `confidence` is the attack's own estimate in [0, 1], made without the truth; `knowledge_used`
    names the assumptions and priors that were read; `applicable=False` always comes with a reason and without
    items. `steps` depends on the attack and what it was given alone, `seconds` on the machine as well.
    """

    attack: str
    items: tuple[Item, ...]
    confidence: float
    seconds: float
    knowledge_used: tuple[str, ...]
    applicable: bool
    reason: str = ""
    details: Mapping[str, float | int | str] = field(default_factory=dict)
    steps: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.confidence <= 1.0:
            raise ValueError(f"{self.attack}: confidence is {self.confidence}, must lie in [0, 1]")
        if not self.applicable and (self.items or not self.reason):
            raise ValueError(f"{self.attack}: a result that is not applicable has a reason and no items")
        object.__setattr__(self, "details", MappingProxyType(dict(self.details)))

    def of(self, kind: ItemKind) -> tuple[Tensor, ...]:
        """Return the values of one kind of item, in order."""
        return tuple(item.value for item in self.items if item.kind == kind)


@runtime_checkable
class Attack(Protocol):
    """What the audit and the contract suite call."""

    @property
    def name(self) -> str: ...
    @property
    def family(self) -> Family: ...
    @property
    def requires(self) -> tuple[str, ...]: ...

    def run(
        self, observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
    ) -> Reconstruction: ...


Attempt = Callable[[Observation, "nn.Module | None", Prior, Budget, int], Finding]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainAttack:
    """Wrap an attack function into the contract.

    `requires` names facts that must be known (from the protocol or granted), "model", or "prior.<field>";
    when one is missing the result is not applicable and names it. One that `reads` answers fits no update,
    and the other way round.
    """

    name: str
    family: Family
    attempt: Attempt
    requires: tuple[str, ...] = ()
    summary: str = ""
    reads: Literal["updates", "answers"] = "updates"

    def run(
        self, observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
    ) -> Reconstruction:
        """Run the attack; never raises for an observation it does not fit."""
        with steps.counted():
            began = steps.so_far()
            return replace(self._run(observation, model, prior, budget, seed), steps=steps.so_far() - began)

    def _run(
        self, observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
    ) -> Reconstruction:
        started = time.process_time()
        read: set[str] = set()
        watched, watched_prior = _watch(observation, prior, read)
        try:
            if (observation.kind == "answers") != (self.reads == "answers"):
                raise NotApplicable(f"the attack reads {self.reads}, what was observed is {observation.kind}")
            _require(self.requires, watched, model, watched_prior)
            _readable(watched, model)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                finding = self.attempt(watched, model, watched_prior, budget, seed)
        except NotApplicable as refusal:
            missing = not_applicable(str(refusal), attack=self.name)
            return replace(missing, seconds=time.process_time() - started, knowledge_used=tuple(sorted(read)))
        items = tuple(item for item in finding.items if bool(torch.isfinite(item.value).all()))
        lost = len(finding.items) - len(items)
        return Reconstruction(
            attack=self.name,
            items=items,
            confidence=_share(finding.confidence) if items or not lost else 0.0,
            seconds=time.process_time() - started,
            knowledge_used=tuple(sorted(read)),
            applicable=True,
            reason="; ".join(
                filter(None, (finding.reason, f"{lost} items held values that are no numbers" * bool(lost)))
            ),
            details=finding.details,
        )


def _share(confidence: float) -> float:
    """Return a confidence inside [0, 1]; one that is no number is none."""
    if math.isfinite(confidence):
        return min(1.0, max(0.0, confidence))
    return 0.0


def _readable(observation: Observation, model: nn.Module | None) -> None:
    """Refuse tensors that hold no finite real numbers, or do not have the shape of the model's parameter of
    their name.
    """
    broken = [
        name
        for name, tensor in observation.tensors.items()
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all())
    ]
    if broken:
        raise NotApplicable(f"{', '.join(sorted(broken)[:3])}: holds values that are no finite real numbers")
    if model is not None:
        own = dict(model.named_parameters())
    else:
        own = {}
    other = []
    for n, t in observation.tensors.items():
        if n in own and own[n].shape != t.shape:
            other.append(n)
    if other:
        name = min(other)
        observed, held = tuple(observation.tensors[name].shape), tuple(own[name].shape)
        raise NotApplicable(
            f"{name} was observed as {observed}, the model holds it as {held}: another model was trained"
        )


def not_applicable(reason: str, *, attack: str = "") -> Reconstruction:
    """Return the honest answer of an attack that does not fit this observation."""
    return Reconstruction(
        attack=attack,
        items=(),
        confidence=0.0,
        seconds=0.0,
        knowledge_used=(),
        applicable=False,
        reason=reason,
    )


def working_copy(model: nn.Module | None, observation: Observation) -> nn.Module:
    """Return a private copy of the model in evaluation mode, holding the broadcast weights when they were
    observed.

    Guarantee: the caller's model is not touched. Assumes: attacks write into no parameter of the copy, whose
    numbers are those of the model and of the broadcast. Raises: NotApplicable when there is no model or the
    broadcast does not fit it.
    """
    if model is None:
        raise NotApplicable("the attack needs the broadcast model")
    private = sharing_copy(model).eval()
    if observation.broadcast is not None:
        parameters, buffers = dict(private.named_parameters()), dict(private.named_buffers())
        for name, value in observation.broadcast.items():
            own = parameters.get(name, buffers.get(name))
            if own is None or own.shape != value.shape:
                raise NotApplicable(
                    f"the broadcast holds {name!r}, which the model does not have in that shape"
                )
            if name in parameters:
                own.data = value.detach().to(own)
            else:
                own.copy_(value)  # an attack may correct a running statistic
    return private


class _WatchedKnowledge(Knowledge):
    """Knowledge that notes which granted facts are read, so that the ledger cannot forget one."""

    def __getattribute__(self, name: str) -> object:
        value = object.__getattribute__(self, name)
        if value is not None and name in _KNOWLEDGE_FIELDS:
            object.__getattribute__(self, "read").add(name)
        return value


class _WatchedPrior(Prior):
    """Prior that notes which of its parts are read."""

    def __getattribute__(self, name: str) -> object:
        value = object.__getattribute__(self, name)
        if value is not None and name in _PRIOR_FIELDS:
            object.__getattribute__(self, "read").add(f"prior.{name}")
        return value


_KNOWLEDGE_FIELDS = frozenset(entry.name for entry in fields(Knowledge))
_PRIOR_FIELDS = frozenset(entry.name for entry in fields(Prior))


def _watch(observation: Observation, prior: Prior, read: set[str]) -> tuple[Observation, Prior]:
    knowledge = _WatchedKnowledge(
        **{name: getattr(observation.knowledge, name) for name in _KNOWLEDGE_FIELDS}
    )
    watched_prior = _WatchedPrior(**{name: getattr(prior, name) for name in _PRIOR_FIELDS})
    object.__setattr__(knowledge, "read", read)
    object.__setattr__(watched_prior, "read", read)
    return replace(observation, knowledge=knowledge), watched_prior


def _require(
    requires: Iterable[str], observation: Observation, model: nn.Module | None, prior: Prior
) -> None:
    missing = []
    for fact in requires:
        if fact == "model":
            present = model is not None
        elif fact.startswith("prior."):
            present = getattr(prior, fact.removeprefix("prior.")) is not None
        else:
            present = observation.known(fact) is not None
        if not present:
            missing.append(fact)
    if missing:
        raise NotApplicable(f"not known to this observer: {', '.join(missing)}")
