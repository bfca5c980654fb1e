"""Attack what really crossed the wire: recorded observations, scored by what the sites kept. No data folder
is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.numpy
import torch
from torch import Tensor

from attacks.contract import Attack
from attacks.examine import Examined, examine, study
from attacks.rehearsal import Rehearsals
from attacks.observation import Fact, Knowledge, Observation
from attacks.truth import Truth, load_truth
from ffm_secure.auditing.budget import NULL_STEPS, AuditBudget, not_run
from ffm_secure.auditing.findings import finding_of
from ffm_secure.auditing.replayed import attackable, noise_facts, own_names, unflatten, wire_facts
from ffm_secure.auditing.wording import Decode
from ffm_secure.agreed.loaded_model import LoadedModel
from ffm_secure.records import AuditFinding, RecordedObservation
from ffm_secure.site.truth import truth_path, update_path
from ffm_secure.storage.observations import read_observations


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """One recorded observation, what attacks get of it, and apart from it the truth."""

    description: RecordedObservation
    observation: Observation
    truth: Truth | None


def recorded(model: LoadedModel, folder: Path) -> Iterator[Recorded]:
    """Yield the observations of a run directory that are changes of named tensors.

    Raises:
      StoreError: one of them is damaged.
    """
    if not model.spec.learns:
        return  # what was opened answers a query: it is no change that steps have made
    for description, tensors in read_observations(folder / "observations"):
        if not description.named:
            continue
        values = tensors["values"].double() * description.scale
        if description.observer == "colluding_server" and description.own < 0:
            values, description = _without_colluders(model, folder, description, values)
        yield Recorded(
            description=description,
            observation=_observation(model, description, values.float(), tensors.get("broadcast")),
            truth=_truth(model, folder, description),
        )


def _without_colluders(
    model: LoadedModel, folder: Path, description: RecordedObservation, values: Tensor
) -> tuple[Tensor, RecordedObservation]:
    """Take off a sum what the colluders in it tell the server."""
    honest = []
    for site in description.sites:
        path = update_path(folder / "home", model.spec.owners[site], description.round)
        if path.is_file():
            values = values - torch.from_numpy(safetensors.numpy.load_file(path)["values"])
        else:
            honest.append(site)
    own = -1
    if len(honest) == 1:
        own = honest[0]
    return values, replace(description, sites=tuple(honest), own=own)


def _observation(
    model: LoadedModel, description: RecordedObservation, values: Tensor, broadcast: Tensor | None
) -> Observation:
    spec, trained = model.spec, model.trainable
    names = own_names(model)
    sent = spec.strategy.sends(description.step) or tuple(trained.parameters)
    if description.observer in ("client", "public"):
        sent = tuple(trained.parameters)
    like = {}
    for name in sent:
        like[name] = trained.parameters[name]
    length = sum(parameter.numel() for parameter in like.values())
    tensors = unflatten(values[:length], like)
    clients = max(1, len(description.sites))
    facts: dict[str, Fact] = {"point": description.point, **wire_facts(model, spec.public_client_size)}
    facts |= noise_facts(model, description.point, clients, steps=int(facts["local_steps"] or 0))
    facts |= _spread_noise(model, facts)
    if clients > 1:
        facts["summand"] = "delta"
    start = None
    if broadcast is not None:
        whole = unflatten(broadcast, trained.parameters)
        start = {}
        for name, tensor in whole.items():
            start[names[name]] = tensor
    return Observation(
        kind="sum" if clients > 1 else "delta",
        tensors={names[name]: tensor for name, tensor in tensors.items()},
        round=description.round,
        observer=description.observer,
        contributors=clients,
        metadata=facts,
        broadcast=start,
        knowledge=Knowledge(task=spec.config.task.kind),
    )


def _spread_noise(model: LoadedModel, facts: dict[str, Fact]) -> dict[str, Fact]:
    """Return the deviation of the noise in one number of an update that was restored from fewer of them."""
    deviation = facts.get("noise_deviation")
    if not isinstance(deviation, float):
        return {}
    return {"noise_deviation": deviation * math.sqrt(model.spec.compression.noise_share)}


def _truth(model: LoadedModel, folder: Path, description: RecordedObservation) -> Truth | None:
    """Put together what the sites in an observation kept of that round; nothing where one of them kept
    nothing.
    """
    parts = []
    for site in description.sites:
        path = truth_path(folder / "home", model.spec.owners[site], description.round)
        if path.is_file():
            parts.append(load_truth(path))
    if not parts or (description.observer == "public" and model.spec.config.federation.rounds > 1):
        return None
    images = []
    for part in parts:
        if part.images is not None:
            images.append(part.images)
    sequences = []
    for part in parts:
        for text in part.sequences or ():
            sequences.append(text)
    labels = []
    for part in parts:
        for label in part.labels or ():
            labels.append(label)
    return Truth(
        sequences=tuple(sequences) or None,
        images=torch.cat(images) if images else None,
        labels=tuple(labels) or None,
        classes=model.facts.classes,
    )


def audit_recorded(
    model: LoadedModel, folder: Path, budget: AuditBudget, attacks: Sequence[Attack], decode: Decode
) -> Iterator[AuditFinding]:
    """Run attacks on every recorded observation;
    of many clients in the clear the first one stands for all.
    """
    attacker_model = attackable(model)
    stages = Rehearsals(model=attacker_model)  # of one round, for all its observers
    asked: set[tuple[str, int]] = set()
    for one in recorded(model, folder):
        description = one.description
        place = (description.observer, description.round)
        if place in asked:
            continue
        asked.add(place)
        start = model.trainable.flatten()
        scene = study(
            one.observation, attacker_model, one.truth, stages=stages, null_steps=NULL_STEPS[budget.name]
        )
        for result in examine(scene, budget.budget, budget.refusal, attacks):
            yield replace(_finding(result, description, decode), source="recorded", round=description.round)
        model.trainable.load_vector(start)


def _finding(result: Examined, description: RecordedObservation, decode: Decode) -> AuditFinding:
    observer, point = description.observer, description.point
    if result.seen is None or result.judgement is None:
        return not_run(observer, result.attack, point, result.refused)
    return finding_of(observer, point, result.seen, result.judgement, decode)
