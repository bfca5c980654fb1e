"""Scaling curves: the same attack on rehearsals that grow in one direction, so that a single point is not all
one knows.

Everything is invented data on the audited model: nothing private is read, and the truth is known by
  construction.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from attacks import steps
from attacks.contract import Attack, Budget, Prior
from attacks.observation import Knowledge, Observation
from attacks.rehearsal import rehearse
from attacks.scoring import Score, score
from attacks.truth import Truth

Axis = Literal["records", "tokens per width", "tokens per rank", "noise multiplier"]
Rehearsal = tuple[float, Observation, Truth]  # a place on the axis, what is seen there, the truth about it


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Hold what an attack scored at growing places of one axis; `reason` says why points are missing."""

    attack: str
    axis: Axis
    measure: str
    x: tuple[float, ...] = ()
    y: tuple[float, ...] = ()
    baseline: float | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Width:
    """Hold what the span laws count tokens against: the rank of LoRA factors where they are sent, else the
    width.
    """

    axis: Axis
    size: int


def width_of(observation: Observation, model: nn.Module) -> Width | None:
    """Return the dimension that tokens have to stay below, None where the model does not name one."""
    ranks = []
    for name, tensor in observation.tensors.items():
        if "lora_A" in name and tensor.ndim == 2:
            ranks.append(tensor.shape[0])
    if ranks:
        return Width(axis="tokens per rank", size=max(ranks))
    hidden = getattr(getattr(model, "config", None), "hidden_size", None)
    if hidden:
        return Width(axis="tokens per width", size=int(hidden))
    return None


def template(observation: Observation) -> Observation:
    """Return the observation as one client's, with nothing granted but the task, for rehearsals to fill."""
    metadata = {}
    for name, value in observation.metadata.items():
        if name != "summand":
            metadata[name] = value
    knowledge = Knowledge(task=observation.knowledge.task)
    return replace(
        observation, kind=observation.content, contributors=1, metadata=metadata, knowledge=knowledge
    )


def by_batch(
    observation: Observation, model: nn.Module, sizes: Iterable[int], *, length: int, seed: int = 0
) -> Iterator[Rehearsal]:
    """Yield rehearsals of one client's update on growing batches of invented records, undefended.

    `length` is the number of tokens of a text. Ends early where the model takes no batch that can be
    invented.
    """
    for size in sizes:
        rehearsed = _drawn(observation, model, size, length, seed)
        if rehearsed is None:
            return
        yield float(size), *rehearsed


def by_noise(
    observation: Observation, model: nn.Module, multipliers: Iterable[float], *, length: int, seed: int = 0
) -> Iterator[Rehearsal]:
    """Yield the update of one invented record, clipped at its own length, under growing Gaussian noise.

    One record is the worst case: more records in a batch do not make the noise on any one of them larger.
    """
    rehearsed = _drawn(observation, model, 1, length, seed)
    if rehearsed is None:
        return
    observed, truth = rehearsed
    norm = math.sqrt(sum(float(value.double().square().sum()) for value in observed.tensors.values()))
    for multiplier in multipliers:
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, value in observed.tensors.items():
            tensors[name] = value + multiplier * norm * torch.randn(value.shape, generator=generator).to(
                value.dtype
            )
        yield multiplier, observed.replace_tensors(tensors), truth


def _drawn(
    observation: Observation, model: nn.Module, size: int, length: int, seed: int
) -> tuple[Observation, Truth] | None:
    asked = template(observation)
    asked = asked.replace_tensors(asked.tensors, batch_size=size, sequence_length=length)
    rehearsed = rehearse(asked, model, seed=seed)
    if rehearsed is None:
        return None
    observed, truth = (
        rehearsed[0].replace_tensors(rehearsed[0].tensors, sequence_length=None),
        rehearsed[1],
    )  # the length is not told
    # the model itself says what it takes
    shape = None
    if truth.images is not None:
        shape = tuple(truth.images.shape[1:])
    return replace(observed, knowledge=replace(observed.knowledge, image_shape=shape)), truth


@steps.counted()
def curve(
    attack: Attack,
    model: nn.Module,
    axis: Axis,
    rehearsals: Iterable[Rehearsal],
    budget: Budget,
    *,
    scale: float = 1.0,
) -> Curve:
    """Run one attack along an axis until the budget's steps are spent; `scale` turns places into the axis'
    unit.

    Guarantee: a point whose attack may have run out of time is left out, never drawn as a failure. An attack
    that finds nothing to say at a place scores what guessing scores.
    """
    stop = steps.so_far() + budget.steps
    points: list[tuple[float, Score | None]] = []
    reason = ""
    for place, observed, truth in rehearsals:
        left = stop - steps.so_far()
        reconstruction = None
        if left > 0:
            reconstruction = attack.run(observed, model, Prior(), replace(budget, steps=left), 0)
        if reconstruction is None or steps.so_far() > stop:
            reason = f"stopped after {budget.steps:.0f} steps"
            break
        points.append((scale * place, score(reconstruction, truth) if reconstruction.applicable else None))
    known = []
    for _, scored in points:
        if scored is not None:
            known.append(scored)
    if not known:
        return Curve(attack=attack.name, axis=axis, measure="", reason=reason or "nothing could be rehearsed")
    guess = known[0].baseline
    return Curve(
        attack=attack.name,
        axis=axis,
        measure=known[0].measure,
        x=tuple(place for place, _ in points),
        y=tuple(guess if scored is None else scored.value for _, scored in points),
        baseline=guess,
        reason=reason,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Points:
    """Say how many points a set of curves may have and what all of them together may cost in steps."""

    steps: float
    sizes: tuple[int, ...]
    multipliers: tuple[float, ...]


POINTS = {
    "quick": Points(steps=8_000, sizes=(1, 2, 4, 8, 16), multipliers=(0.0, 1e-3, 1e-2, 0.1, 1.0)),
    "standard": Points(
        steps=120_000, sizes=(1, 2, 4, 8, 16, 32, 64), multipliers=(0.0, 1e-4, 1e-3, 1e-2, 0.1, 0.3, 1.0)
    ),
    "exhaustive": Points(
        steps=3_600_000,
        sizes=(1, 2, 4, 8, 16, 32, 64, 128, 256),
        multipliers=(0.0, 1e-4, 1e-3, 1e-2, 0.1, 0.3, 1.0),
    ),
}


def _against(attack: Attack, width: Width | None, length: int) -> tuple[Axis, float]:
    """Return what records are counted in: for the span family tokens over the dimension they have to stay
    below.
    """
    if attack.family != "span" or width is None:
        return "records", 1.0
    return width.axis, length / width.size


def draw(
    chosen: Sequence[tuple[Attack, float]],
    observation: Observation,
    model: nn.Module,
    *,
    length: int,
    name: str,
) -> Iterator[Curve]:
    """Yield a curve against the batch and one against noise for each attack, within the steps of budget
    `name`.

    `chosen` holds attacks with the steps one run of each has taken; one too dear for its share is
    skipped with that reason. `length` is the number of tokens of a text.
    """
    points, budget = POINTS[name], Budget.named("quick")
    stop, width = steps.so_far() + points.steps, width_of(observation, model)
    for place, (attack, cost) in enumerate(chosen):
        axes: tuple[tuple[Axis, float], ...] = (_against(attack, width, length), ("noise multiplier", 1.0))
        for half, (along, unit) in enumerate(axes):
            share = (stop - steps.so_far()) / (2 * (len(chosen) - place) - half)
            if share < cost:
                reason = f"one run takes {cost:.0f} steps, more than its share of the {name} budget"
                yield Curve(attack=attack.name, axis=along, measure="", reason=reason)
                continue
            if half:
                rehearsals = by_noise(observation, model, points.multipliers, length=length)
            else:
                rehearsals = by_batch(observation, model, points.sizes, length=length)
            allowed = replace(budget, steps=share)
            yield curve(attack, model, along, rehearsals, allowed, scale=unit)
