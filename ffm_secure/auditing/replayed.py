"""Replay what one client sends: one step at every point of its way, or the run's own local steps as they
cross the wire.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attacks.answering import answer_itself
from defenses.dp import ClippedSum, Clipping, PerSampleEngine
from defenses.errors import NotPrivateError
from defenses.random_source import RandomSource
from defenses.secagg import ring
from ffm_secure.config import compatibility
from ffm_secure.config.run_file import RunConfig
from ffm_secure.engines import simulation
from ffm_secure.agreed.loaded_model import LoadedModel
from ffm_secure.foreign import ModelOutput
from ffm_secure.privacy.mechanism import Mechanism
from ffm_secure.records import Observer, Point, RoundPlan, RoundRecord
from ffm_secure.registry import TASKS
from ffm_secure.site.client_state import ClientStateStore
from ffm_secure.site.trainer import SiteData, SiteTrainer
from ffm_secure.strategies import ServerState
from ffm_secure.tasks.encoded import Encoded

Ints = NDArray[np.int64]
_STRANGERS = 8  # records of each other client that guessing may go by
_PASS = 32  # records of several clients in one pass of the model


def largest(prepared: simulation.Prepared) -> int:
    """Return the client with most records."""
    return max(range(len(prepared.parts)), key=lambda index: len(prepared.parts[index]))


def next_start(
    prepared: simulation.Prepared,
    folder: Path,
    state: ServerState,
    records: Sequence[RoundRecord],
    run_id: bytes,
) -> Tensor:
    """Return the vector from which the largest client would learn next: the global one, and what it keeps at
    home.

    Whoever attacks that client is granted what it keeps, though nobody else ever sees it.
    """
    home = ClientStateStore(folder=folder / "home", owners=prepared.owners, places=prepared.strategy.home)
    return home.load(largest(prepared), state.vector, run_id=run_id, before=len(records) + 1)


def gradients(
    prepared: simulation.Prepared,
    batch: Mapping[str, Tensor],
    *,
    sent_only: bool = False,
    source: RandomSource | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Return one step's update at each point: raw, and under record-level privacy clipped and noised by the
    run's mechanism.

    Only what the run's strategy trains in a first step is clipped and noised, and only what it sends is
    returned. Where products are sent, their factors are returned: products are a function of them, so an
    observer is given no less. With `sent_only` the raw step is left out where a clipped and noised one is
    sent. Noise comes from `source`, the system's where it is None.
    """
    return released(
        prepared, step_sums(prepared, batch, sent_only=sent_only), source or RandomSource.system()
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSums:
    """Hold what the records of one client's step add up to before any noise.

    `raw` is the gradient of their mean loss, `clipped` the sum of their bounded gradients where the run
    bounds records.
    """

    raw: dict[str, Tensor] | None
    clipped: ClippedSum | None


def step_sums(prepared: simulation.Prepared, batch: Mapping[str, Tensor], *, sent_only: bool) -> StepSums:
    """Add up a batch; with `sent_only` the raw gradient is left out where a noised one is sent."""
    trained, task, clipping = prepared.trainable, prepared.task, _clipping(prepared)
    if clipping is not None and not sent_only:  # both from one pass
        everybody = torch.ones(1, len(next(iter(batch.values()))), dtype=torch.bool)
        (both,) = regrouped(prepared, batch, everybody)
        return both
    with trained.training_only(prepared.strategy.trains(0)):
        active = trained.active
        if clipping is not None:
            with PerSampleEngine(trained.model, parameters=active) as engine:
                clipped = engine.clipped_sum(lambda: task.losses(trained.model, batch), clip=clipping)
            return StepSums(raw=None, clipped=clipped)
        losses = task.losses(trained.model, batch)
        slopes = torch.autograd.grad(losses.mean(), list(active.values()), allow_unused=True)
    pairs = zip(active.items(), slopes, strict=True)
    raw = {name: torch.zeros_like(p) if g is None else g for (name, p), g in pairs}
    return StepSums(raw=raw, clipped=None)


def regrouped(
    prepared: simulation.Prepared, batch: Mapping[str, Tensor], groups: Tensor
) -> tuple[StepSums, ...]:
    """Add up several groups of one batch's records (boolean [groups, records]) in one pass over the model.

    Nothing is returned where the model's gradients cannot be told apart by record and the run need not.
    Raises: NotPrivateError where the run bounds records, and so has to.
    """
    trained, task = prepared.trainable, prepared.task
    clipping = _clipping(prepared)
    try:
        with (
            trained.training_only(prepared.strategy.trains(0)),
            PerSampleEngine(trained.model, parameters=trained.active) as engine,
        ):
            sums = engine.group_sums(
                lambda: task.losses(trained.model, batch),
                clip=clipping or Clipping(clip_norm=1.0),
                groups=groups,
            )
            kinds = {name: value.dtype for name, value in trained.active.items()}
    except NotPrivateError:
        if clipping is not None:
            raise
        return ()
    steps = []
    for group, one in zip(groups, sums, strict=True):
        raw = {name: (value / int(group.sum())).to(kinds[name]) for name, value in one.plain.items()}
        steps.append(StepSums(raw=raw, clipped=one.clipped if clipping is not None else None))
    return tuple(steps)


def _clipping(prepared: simulation.Prepared) -> Clipping | None:
    """Return how the run bounds each record's gradient, None where it does not."""
    record_level, shared = prepared.mechanism.record_level, prepared.mechanism.sum_level
    if record_level is not None:
        return Clipping(kind=prepared.config.privacy.clipping, clip_norm=record_level.clip_norm)
    if shared is not None:
        return shared.clipping
    return None


def released(
    prepared: simulation.Prepared, sums: StepSums, source: RandomSource
) -> dict[str, dict[str, Tensor]]:
    """Return a step at each point of its way, with fresh noise; of what the run's strategy sends."""
    with prepared.trainable.training_only(prepared.strategy.trains(0)):
        points = _points(prepared, sums, source)
    return {point: sent_by(prepared, tensors) for point, tensors in points.items()}


def sent_by(prepared: simulation.Prepared, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return those of a first step's tensors that the run's strategy sends."""
    sent = prepared.strategy.sends(0)
    return {name: value for name, value in tensors.items() if sent is None or name in sent}


def _points(
    prepared: simulation.Prepared, sums: StepSums, source: RandomSource
) -> dict[str, dict[str, Tensor]]:
    record_level, client_level = prepared.mechanism.record_level, prepared.mechanism.client_level
    shared, active = prepared.mechanism.sum_level, prepared.trainable.active
    points = {} if sums.raw is None else {"raw": sums.raw}
    if record_level is not None and sums.clipped is not None:
        points["clipped"] = _mean(sums.clipped, record_level.expected_batch_size)
        points["noised"] = record_level.privatise(sums.clipped, source)
    if shared is not None and sums.clipped is not None:
        points["clipped"] = _mean(sums.clipped, shared.expected_batch_size)
        clipped = sums.clipped.gradients
        flat = torch.cat([clipped[name].reshape(-1).cpu().double() for name in active])
        inner = replace(shared.inner, dimension=len(flat))
        levels = inner.share(shared.update_of(flat).numpy(), source)
        step = torch.from_numpy(levels / (-inner.scale * shared.learning_rate)).float()
        points["noised"] = unflatten(step, {name: clipped[name] for name in active})
    if client_level is not None:
        vector = torch.cat([value.reshape(-1) for value in points["raw"].values()])
        points["clipped"] = unflatten(client_level.inner.clip(vector.cpu()), points["raw"])
        share = client_level.noisy_integers(vector, source) / client_level.scale
        points["noised"] = unflatten(torch.from_numpy(share).float(), points["raw"])
    return points


def _mean(clipped: ClippedSum, expected: float) -> dict[str, Tensor]:
    """Return a sum over records divided by their expected number."""
    return {name: value / expected for name, value in clipped.gradients.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Companion:
    """Name records of another client of a cohort by their places among its own: those of a step, and some it
    leaves out.
    """

    client: int
    rows: Ints
    unused: Ints


def companions(
    prepared: simulation.Prepared, client: int, *, clients: int, records: int, seed: int
) -> tuple[Companion, ...]:
    """Draw what the others of a cohort of `clients` learn from beside `client`, as many records each as it
    does.
    """
    order = np.random.default_rng(seed + 1)
    chosen = []
    for index in _others(prepared, client)[: clients - 1]:
        rows = order.permutation(len(prepared.parts[index]))
        chosen.append(
            Companion(client=index, rows=rows[:records], unused=rows[records : records + _STRANGERS])
        )
    return tuple(chosen)


def records_of(prepared: simulation.Prepared, client: int, rows: Ints) -> dict[str, Tensor]:
    """Return records of a client, by their places among its own, as a batch on the CPU."""
    encoded = prepared.task.encode(prepared.data.rows(client).take(rows))
    return dict(prepared.task.batch(encoded, np.arange(len(rows)), device="cpu"))


def companion_sums(
    prepared: simulation.Prepared, others: Sequence[Companion]
) -> tuple[tuple[Companion, StepSums], ...]:
    """Add up what the other clients of a cohort learn from in the same step, before their noise.

    Clients of few records share a pass of the model, where the run tells its records apart anyway.
    """
    sums: dict[int, StepSums] = {}
    for batches in _together(prepared, others):
        if len(batches) == 1:
            ((client, batch),) = batches.items()
            sums[client] = step_sums(prepared, batch, sent_only=True)
            continue
        owners = torch.cat([torch.full((_records(one),), client) for client, one in batches.items()])
        whole = {}
        for name in next(iter(batches.values())):
            whole[name] = torch.cat([one[name] for one in batches.values()])
        groups = owners == torch.tensor(list(batches))[:, None]
        for client, one in zip(batches, regrouped(prepared, whole, groups), strict=True):
            sums[client] = replace(one, raw=None)
    return tuple((other, sums[other.client]) for other in others)


def _together(
    prepared: simulation.Prepared, others: Sequence[Companion]
) -> list[dict[int, dict[str, Tensor]]]:
    """Return the batches of clients in groups of equal shapes, as many as one pass should hold."""
    groups: list[dict[int, dict[str, Tensor]]] = []
    last: dict[tuple[torch.Size, ...], dict[int, dict[str, Tensor]]] = {}
    for other in others:
        batch = {}
        for name, value in records_of(prepared, other.client, other.rows).items():
            batch[name] = value.to(prepared.device)
        shape = tuple(value.shape[1:] for value in batch.values())
        group = last.get(shape, {})
        size = sum(map(_records, group.values())) + _records(batch)
        if not group or size > _PASS or _clipping(prepared) is None:
            group = last[shape] = {}
            groups.append(group)
        group[other.client] = batch
    return groups


def _records(batch: Mapping[str, Tensor]) -> int:
    return len(next(iter(batch.values())))


def aggregate(
    prepared: simulation.Prepared,
    points: Mapping[str, Mapping[str, Tensor]],
    others: Sequence[tuple[Companion, StepSums]],
    source: RandomSource,
) -> dict[str, Tensor]:
    """Add what the other clients of a cohort send in the same step, each with its own noise."""
    own = points.get("noised", points["raw"])
    total = {}
    for name, value in own.items():
        total[name] = value.clone()
    for other, sums in others:
        sent = released(prepared, sums, source.derive("companion", other.client))
        for name, value in (sent.get("noised") or sent["raw"]).items():
            total[name] += value
    return total


def smallest_sum(config: RunConfig) -> int:
    """Return how many clients stand behind the smallest sum an observer may be left with: the threshold, less
    colluders.
    """
    return max(1, compatibility.minimum_survivors(config) - config.protection.colluding)


def seen_by(observer: Observer, config: RunConfig, points: Collection[Point]) -> Point:
    """Return at which point of its way an observer sees an update; seeded noise hides nothing, so it is taken
    off.
    """
    alone: Point = "noised"
    if config.privacy.noise == "seeded":
        alone = "clipped"
    single: Point = "raw"
    if alone in points:
        single = alone
    if observer == "server" and config.protection.kind == "none":
        return single
    if observer == "colluding_server" and config.protection.kind != "secagg":
        return single
    if config.privacy.noise == "seeded":
        return single
    return "aggregated"


def wire_change(
    prepared: simulation.Prepared,
    vector: Tensor,
    members: Encoded,
    client: int,
    others: Sequence[Companion] = (),
    source: RandomSource | None = None,
) -> dict[str, Tensor]:
    """Return the opened sum of what a cohort really sends in one round; its first client has nothing but
    `members`.

    Local steps, optimiser, bound, noise and rounding are the run's own.

    Raises:
      ValueError: what is sent is no change of the trained tensors themselves.
    """
    if prepared.strategy.merges_into_base:
        raise ValueError("products are sent, not the change of the trained tensors themselves")
    rows = {}
    for other in others:
        rows[other.client] = other.rows
    chosen = [client, *rows]
    trainer = SiteTrainer(spec=prepared.spec, trainable=prepared.trainable, task=prepared.task)
    plan = RoundPlan(run_id=bytes(16), round=1, cohort=tuple(chosen), fingerprint="", mechanism="")
    total, source = None, source or RandomSource.system()
    for index in chosen:
        own = index == client
        if own:
            examples = members
        else:
            examples = prepared.task.encode(prepared.data.rows(index).take(rows[index]))
        data = SiteData(index=index, name="", examples=examples)
        sent = trainer.run_round(data, plan, vector.to(prepared.device), source.derive("site", index))
        if total is None:
            total = sent
        else:
            ring.add_into(total, sent)
    assert total is not None, "no client takes part"
    total = ring.reduce(total, prepared.codec.modulus_bits)
    prepared.trainable.load_vector(vector)
    opened = prepared.codec.open(total, round=1, survivors=chosen)
    values = torch.from_numpy(prepared.spec.restored(opened, plan, vector).values).float()
    parameters = prepared.trainable.parameters
    like = {}
    for name in prepared.strategy.sends(plan.step) or parameters:
        like[name] = parameters[name]
    return unflatten(values[: sum(p.numel() for p in like.values())], like)  # half a vector is padded


def wire_facts(prepared: LoadedModel, records: int) -> dict[str, Any]:
    """Return what every party of a run knows of an update: the run file says it. Momentum makes SGD another
    optimiser.
    """
    spec = prepared.config.federation.lifecycle
    size = min(spec.batch_size, records)
    plain = spec.optimizer == "sgd" and not spec.momentum
    return {
        "batch_size": size,
        "local_steps": spec.local_steps or spec.local_epochs * -(-records // size),
        "learning_rate": spec.learning_rate,
        "optimiser": "sgd" if plain else "sgd with momentum" if spec.optimizer == "sgd" else spec.optimizer,
        "weight_decay": spec.weight_decay,
    }


def noise_facts(prepared: LoadedModel, point: Point, clients: int, *, steps: int = 0) -> dict[str, Any]:
    """Return what the run file tells everyone of the bound and the noise in an update, or in a sum of
    `clients` of them.

    `steps` is how many local steps stand behind a delta, 0 for the gradient of one step. The deviation is
    left out where an optimiser mixes the noise of several steps.
    """
    mechanism = prepared.mechanism
    if mechanism.noise_multiplier == 0.0 or point == "raw" or prepared.config.privacy.noise == "seeded":
        return {}
    facts: dict[str, Any] = {"clip_norm": mechanism.clip_norm}
    if point == "clipped":
        return facts
    client_level = mechanism.client_level
    if client_level is not None:
        deviation = client_level.share_deviation
    else:
        deviation = _step_deviation(mechanism)
        spec = prepared.config.federation.lifecycle
        if steps and (spec.optimizer != "sgd" or spec.momentum):
            return facts
        deviation *= spec.learning_rate * steps**0.5 if steps else 1.0
    return {**facts, "noise_deviation": deviation * clients**0.5}


def _step_deviation(mechanism: Mechanism) -> float:
    """Return the deviation of the noise on one coordinate of one site's gradient step."""
    shared, record_level = mechanism.sum_level, mechanism.record_level
    if shared is not None:
        return shared.share_deviation / shared.learning_rate
    assert record_level is not None
    return record_level.noise_multiplier * record_level.clip_norm / record_level.expected_batch_size


def _others(prepared: simulation.Prepared, client: int) -> list[int]:
    others: list[int] = []
    for index in range(len(prepared.parts)):
        if index != client and len(prepared.parts[index]):
            others.append(index)
    return others


def unflatten(vector: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts = torch.split(vector, [value.numel() for value in like.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(like.items(), parts, strict=True)}


def own_names(prepared: LoadedModel) -> dict[str, str]:
    """Map the canonical names of what is trained to the names the model itself uses."""
    own = {}
    for name, parameter in prepared.trainable.model.named_parameters():
        own[id(parameter)] = name
    own_names: dict[str, str] = {}
    for name, parameter in prepared.trainable.parameters.items():
        own_names[name] = own[id(parameter)]
    return own_names


def named(prepared: LoadedModel, vector: Tensor) -> dict[str, Tensor]:
    """Return a broadcast vector [d] as tensors by the names the model itself uses."""
    names = own_names(prepared)
    tensors = unflatten(vector.detach().cpu(), prepared.trainable.parameters)
    return {names[name]: tensor for name, tensor in tensors.items()}


def attackable(prepared: LoadedModel) -> nn.Module:
    """Copy the model for the attacker: eager attention, and padding read from the ids, as a client's own
    batches have it.
    """
    model = copy.deepcopy(prepared.trainable.model).cpu()
    pad = getattr(prepared.backbone.tokenizer, "pad_token_id", None)
    if TASKS.has(prepared.config.task.kind, "answers"):
        model = answer_itself(model)
    if pad is None or prepared.config.task.kind.startswith("image"):
        return model
    kind = type(model)

    def forward(self: nn.Module, input_ids: Tensor, **rest: object) -> ModelOutput:
        mask = rest.pop("attention_mask", (input_ids != pad).long())
        return kind.forward(self, input_ids=input_ids, attention_mask=mask, **rest)

    model.__class__ = type("Padded" + kind.__name__, (kind,), {"forward": forward})
    return model
