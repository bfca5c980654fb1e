"""Replay one local step of a client: the worst case, at every point of its way and as it crosses the wire."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from attacks.contract import Prior
from attacks.membership import Candidates
from attacks.foreign import StatedFact
from attacks.inversion.tokens import vocabulary_of
from attacks.observation import Knowledge, Observation
from attacks.truth import Truth
from defenses.random_source import RandomSource
from ffm_secure.auditing import replayed as client_replay
from ffm_secure.engines import simulation
from ffm_secure.records import (
    Point,
)
from ffm_secure.tasks.encoded import Encoded

CANDIDATES = 32  # members and as many outsiders in a membership test
REGROUPED = 32  # memberships among the same candidates; each costs the noise of a step, no pass of the model
_DRAWS_OF_A_SEED = 1_000
_REGROUPING = 40_213_001
_GROUPABLE = 1_000_000  # trained numbers up to which the sums of all memberships are held at once


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservationPoint:
    """One update on its way from a client to an observer, and apart from it the truth about it."""

    point: Point
    observation: Observation
    truth: Truth


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayedStep:
    """What all scenes share: the model as broadcast, what an attacker may bring along, and the scenes
    themselves.
    """

    records: int
    model: nn.Module
    prior: Prior
    points: frozenset[Point]  # of one client's update
    at: Callable[[Point], ObservationPoint]
    wire: Callable[[int], ObservationPoint]  # what that many clients really send in a round, nothing granted
    answer: Callable[[Tensor, int], ObservationPoint]  # the same to another broadcast; 0: one undefended step
    # The same candidates, of whom others were members, and fresh noise; None where there are no more.
    regroup: Callable[[Point, int], ObservationPoint | None]
    again: Callable[[int], ReplayedStep] | None = (
        None  # the same step with other records and other noise, by number
    )

    @property
    def control(self) -> ObservationPoint:
        """Return the undefended update."""
        return self.at("raw")


def _some_rows(prepared: simulation.Prepared, client: int, rows: np.random.Generator) -> Encoded:
    """Encode as many of a client's records as a step draws from; a large client has more."""
    own = prepared.data.rows(client)
    chosen = np.sort(rows.permutation(len(own))[: 4 * CANDIDATES])
    return prepared.task.encode(own.take(chosen))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scenes:
    """Turn tensors on their way into what an observer has, with the facts it is told of them."""

    prepared: simulation.Prepared
    truth: Truth
    records: int

    def scene(
        self,
        point: Point,
        tensors: Mapping[str, Tensor],
        clients: int = 1,
        *,
        content: str = "gradient",
        whole: Truth | None = None,
        **known_facts: StatedFact,
    ) -> ObservationPoint:
        """Return what is seen at a point; `known_facts` are those of a whole round, nothing of one step."""
        config, names = self.prepared.config, client_replay.own_names(self.prepared)
        facts = known_facts or {"learning_rate": config.federation.lifecycle.learning_rate}
        public, knowledge = _assumed(config.task.kind, self.truth, self.records)
        summed = {"summand": content} if clients > 1 else {}
        hidden = client_replay.noise_facts(
            self.prepared, point, clients, steps=known_facts.get("local_steps", 0)
        )
        observation = Observation(
            kind="sum" if clients > 1 else cast(Literal["gradient", "delta"], content),
            tensors={names[name]: tensor.detach().cpu() for name, tensor in tensors.items()},
            contributors=clients,
            metadata={"point": point, **facts, **summed, **hidden},
            knowledge=public if known_facts else knowledge,
        )
        return ObservationPoint(point=point, observation=observation, truth=whole or self.truth)


def build_stage(
    prepared: simulation.Prepared,
    vector: Tensor,
    *,
    seed: int = 0,
    records: int = CANDIDATES,
    model: nn.Module | None = None,
    source: RandomSource | None = None,
) -> ReplayedStep:
    """Replay one local step of a client from the broadcast model with known records, at every point of its
    way.

    One step is the worst case for the client; what a run sends after many steps tells an attacker less. A
    step on one record is the worst case of all: its length, label and the shape of a picture are granted as
    well. `model` is the attacker's copy where there is one already. Noise comes from `source`, the system's
    where it is None.
    """
    config, trained, noise = prepared.config, prepared.trainable, source or RandomSource.system()
    trained.load_vector(vector)
    rows = np.random.default_rng(seed)
    client = client_replay.largest(prepared)
    encoded = _some_rows(prepared, client, rows)
    size = min(records, len(encoded) // 2)
    order = rows.permutation(len(encoded))
    members, pool = order[:size], order[: 2 * size]
    model = client_replay.attackable(prepared) if model is None else model
    batch = prepared.task.batch(encoded, members, device=prepared.device)
    points = client_replay.gradients(prepared, batch, source=noise.derive("step"))
    # What guessing goes by.
    strangers = prepared.task.batch(encoded, order[size : size + CANDIDATES], device="cpu")
    truth = _truth(batch, members=size, strangers=strangers, vocabulary=vocabulary_of(model))
    prior = Prior(candidates=Candidates(_candidates(prepared, encoded, pool.tolist())), **_pixels(prepared))
    scene = _Scenes(prepared=prepared, truth=truth, records=size).scene

    @cache
    def cohort(clients: int) -> tuple[tuple[client_replay.Companion, ...], Truth]:
        others = client_replay.companions(prepared, client, clients=clients, records=size, seed=seed)
        return others, _cohort_truth(prepared, truth, others)

    def sent_from(start: Tensor, clients: int) -> ObservationPoint:
        others, whole = cohort(clients)
        sent = client_replay.wire_change(
            prepared, start, encoded.take(members), client, others, noise.derive("wire")
        )
        facts = client_replay.wire_facts(prepared, size)
        return scene(_crossed(prepared, clients), sent, clients, content="delta", whole=whole, **facts)

    def answer(start: Tensor, clients: int) -> ObservationPoint:
        trained.load_vector(start)
        if clients:
            view = sent_from(start, clients)
        else:
            bare = client_replay.gradients(prepared, batch, source=noise.derive("answer"))
            view = scene("raw", bare["raw"])
        trained.load_vector(vector)
        crafted = client_replay.named(prepared, start)
        return replace(view, observation=replace(view.observation, broadcast=crafted))

    @cache
    def at(point: Point) -> ObservationPoint:
        if point != "aggregated":
            return scene(point, points[point])
        clients = client_replay.smallest_sum(config)
        total = client_replay.aggregate(prepared, points, beside(clients), noise.derive("sum"))
        return scene("aggregated", total, clients, whole=cohort(clients)[1])

    @cache
    def beside(clients: int) -> tuple[tuple[client_replay.Companion, client_replay.StepSums], ...]:
        trained.load_vector(vector)
        return client_replay.companion_sums(prepared, cohort(clients)[0])

    def sums() -> tuple[client_replay.StepSums, ...]:
        trained.load_vector(vector)
        both = prepared.task.batch(encoded, pool, device=prepared.device)
        return client_replay.regrouped(prepared, both, _memberships(len(pool), seed))

    return ReplayedStep(
        records=size,
        model=model,
        prior=prior,
        points=frozenset(cast("Collection[Point]", points)),
        at=at,
        wire=cache(partial(sent_from, vector)),
        answer=answer,
        regroup=_regrouping(prepared, scene, sums, beside, noise, _memberships(len(pool), seed)),
    )


def _crossed(prepared: simulation.Prepared, clients: int) -> Point:
    """Return the point at which an update of one client, or a sum, crosses the wire."""
    if clients > 1:
        return "aggregated"
    return "noised" if prepared.mechanism.noise_multiplier else "raw"


def _regrouping(
    prepared: simulation.Prepared,
    scene: Callable[..., ObservationPoint],
    sums: Callable[[], tuple[client_replay.StepSums, ...]],
    beside: Callable[[int], Sequence[tuple[client_replay.Companion, client_replay.StepSums]]],
    noise: RandomSource,
    inside: Tensor,
) -> Callable[[Point, int], ObservationPoint | None]:
    """Return what is seen of a step had the candidates marked in `inside` [times, candidates] been in it.

    The others of a cohort stay the same; all noise is fresh every time.
    """

    @cache
    def held() -> tuple[client_replay.StepSums, ...]:
        trained = sum(value.numel() for value in prepared.trainable.parameters.values())
        return sums() if trained <= _GROUPABLE else ()

    @cache
    def regroup(point: Point, number: int) -> ObservationPoint | None:
        if number >= len(held()):
            return None
        own, fresh = held()[number], noise.derive("regrouped", number)
        known = Truth(members=tuple(inside[number].tolist()))
        if point == "raw" and own.raw is not None:  # no noise need be drawn
            return scene(point, client_replay.sent_by(prepared, own.raw), whole=known)
        sent = client_replay.released(prepared, own, fresh)
        if point != "aggregated":
            return scene(point, sent[point], whole=known)
        clients = client_replay.smallest_sum(prepared.config)
        total = client_replay.aggregate(prepared, sent, beside(clients), fresh)
        return scene(point, total, clients, whole=known)

    return regroup


def _memberships(candidates: int, seed: int) -> Tensor:
    """Return which candidates are members, half of them each time, at random: bool [times, candidates]."""
    generator = torch.Generator().manual_seed(_REGROUPING + seed)
    inside = torch.zeros(REGROUPED, candidates, dtype=torch.bool)
    for row in inside:
        row[torch.randperm(candidates, generator=generator)[: candidates // 2]] = True
    return inside


def with_draws(
    prepared: simulation.Prepared,
    vector: Tensor,
    records: int,
    *,
    seed: int = 0,
    model: nn.Module | None = None,
) -> ReplayedStep:
    """Build a stage that can be drawn anew; records and noise are the same for the same `seed`.

    The noise of an audit hides nothing from the auditor, who holds the records: it may be replayed.
    """
    source = RandomSource.seeded(seed).derive("audit", records)

    def drawn(number: int, copy: nn.Module | None) -> ReplayedStep:
        return build_stage(
            prepared,
            vector,
            seed=_DRAWS_OF_A_SEED * seed + number,
            records=records,
            model=copy,
            source=source.derive(number),
        )

    first = drawn(0, model)
    return replace(first, again=cache(lambda number: drawn(number, first.model)))


def _candidates(prepared: simulation.Prepared, encoded: Encoded, rows: list[int]) -> dict[str, Tensor]:
    batch = prepared.task.batch(encoded, np.asarray(rows), device="cpu")
    renamed = {"input_ids": "token_ids", "pixel_values": "images", "labels": "labels"}
    candidates = {}
    for name, value in batch.items():
        if name in renamed:
            candidates[renamed[name]] = value
    if prepared.config.task.kind in ("causal_lm", "masked_lm"):
        candidates.pop("labels", None)
    return candidates


def _assumed(task: str, truth: Truth, records: int) -> tuple[Knowledge, Knowledge]:
    """Return what everyone knows of a round's update,
    and what the observer of one step is granted at worst.
    """
    # the model itself says what it takes
    shape = None
    if truth.images is not None:
        shape = tuple(truth.images.shape[1:])
    public = Knowledge(task=task, image_shape=shape)
    if records == 1:
        granted = _granted(truth)
    else:
        granted = {}
    return public, replace(public, batch_size=records, local_steps=1, **granted)


def _granted(truth: Truth) -> dict[str, Any]:
    """Return what the strongest observer of one record is assumed to know besides the update."""
    granted: dict[str, Any] = {"labels": truth.labels}
    if truth.sequences is not None:
        granted["lengths"] = tuple(map(len, truth.sequences))
    return granted


def _pixels(prepared: simulation.Prepared) -> dict[str, Any]:
    """Return the public normalisation of pictures."""
    mean, std = getattr(prepared.task, "mean", None), getattr(prepared.task, "std", None)
    if mean is None or std is None:
        return {}
    return {"image_mean": mean.flatten(), "image_std": std.flatten()}


def _truth(
    batch: Mapping[str, Tensor], *, members: int, strangers: Mapping[str, Tensor], vocabulary: int | None
) -> Truth:
    """Return what the client trained on, and the texts of the same kind that guessing may go by."""
    return Truth(
        sequences=tokens_of(batch) or None,
        images=batch.get("pixel_values"),
        labels=_flat(batch) or None,
        members=(True,) * members + (False,) * members,
        vocabulary=vocabulary,
        others=tokens_of(strangers),
        other_labels=_flat(strangers),
    )


def _cohort_truth(
    prepared: simulation.Prepared, own: Truth, others: Sequence[client_replay.Companion]
) -> Truth:
    """Return what a whole cohort trained on: an observer of its sum learns that, not what one client of it
    holds.
    """
    batches = []
    for other in others:
        batches.append(client_replay.records_of(prepared, other.client, other.rows))
    strangers = []
    for other in others:
        if len(other.unused):
            strangers.append(client_replay.records_of(prepared, other.client, other.unused))
    images = []
    for batch in batches:
        if "pixel_values" in batch:
            images.append(batch["pixel_values"])
    return replace(
        own,
        sequences=(*(own.sequences or ()), *(text for batch in batches for text in tokens_of(batch))) or None,
        labels=None
        if own.labels is None
        else (*own.labels, *(one for batch in batches for one in _flat(batch))),
        images=None if own.images is None else torch.cat([own.images.cpu(), *images]),
        others=(*own.others, *(text for batch in strangers for text in tokens_of(batch))),
        other_labels=(*own.other_labels, *(one for batch in strangers for one in _flat(batch))),
    )


def _flat(batch: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Return the labels of whole records."""
    labels = batch.get("labels")
    if labels is not None and labels.dim() == 1:
        return tuple(labels.tolist())
    return ()


def tokens_of(batch: Mapping[str, Tensor]) -> tuple[tuple[int, ...], ...]:
    """Return the texts of a batch without padding."""
    if "input_ids" not in batch:
        return ()
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    return tuple(tuple(ids[keep.bool()].tolist()) for ids, keep in zip(batch["input_ids"], mask, strict=True))
