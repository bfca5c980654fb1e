"""Bring an observation of any library under the names of a model, or say exactly why that cannot be done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from attacks.names import SHOWN, Matching, Mismatch, ModelNames, match_names
from attacks.observation import Observation, ObservationError

_SAME = 1e-6  # relative difference of the two copies of a tied tensor that rounding leaves


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fitted:
    """Hold an observation under the model's names, and in words what had to be done to it."""

    observation: Observation
    notes: tuple[str, ...] = ()


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tensors.items()}


def names_of(model: nn.Module) -> ModelNames:
    """Return the names and shapes of a model's parameters and buffers, and which parameters share their
    storage.
    """
    parameters = dict(model.named_parameters())
    first = {}
    for name, value in parameters.items():
        first[id(value)] = name
    stored = model.state_dict(keep_vars=True)
    every = dict(model.named_parameters(remove_duplicate=False)) | {
        name: value for name, value in stored.items() if isinstance(value, nn.Parameter)
    }
    tied = {}
    for name, value in every.items():
        if name not in parameters and id(value) in first:
            tied[name] = first[id(value)]
    return ModelNames(
        parameters=_shapes(parameters),
        buffers=_shapes(dict(model.named_buffers())),
        tied=tied,
        stored=tuple(name for name, value in stored.items() if isinstance(value, Tensor)),
        trained=tuple(name for name, value in parameters.items() if value.requires_grad),
    )


def fit(observation: Observation, model: nn.Module | None) -> Fitted:
    """Return the observation under the model's names: prefixes read past, lists named, transposed matrices
    turned.

    Guarantee: afterwards every tensor is finite and has the shape of the model's tensor of its name. Buffers
    of whole numbers, such as counters of a normalisation, are left out.

    Raises: ObservationError naming every reason: names, prefix, shapes, values that are no finite numbers.
    """
    observation = _widened(observation)
    if model is not None:
        observation, notes = _without_strangers(observation, names_of(model))
    else:
        notes = []
    problems = _unreadable(observation)
    if model is None:
        if problems:
            raise ObservationError("; ".join(problems))
        return Fitted(observation=observation)
    names = names_of(model)
    fitted: dict[str, dict[str, Tensor]] = {}
    parts = {"tensors": observation.tensors}
    if observation.broadcast is not None:
        parts["broadcast"] = observation.broadcast
    for label, tensors in parts.items():
        matching = match_names({name: tuple(value.shape) for name, value in tensors.items()}, names)
        if isinstance(matching, Mismatch):
            problems.append(f"{label}: {'; '.join(matching.reasons)}")
            continue
        for note in matching.notes:
            notes.append(f"{label}: {note}")
        fitted[label], conflicts = _placed(tensors, matching)
        conflicts += _rounded(fitted[label], names)
        for conflict in conflicts:
            problems.append(f"{label}: {conflict}")
    if problems:
        raise ObservationError("; ".join(problems))
    floating, cast = {}, set()
    kinds = {name: value.dtype for name, value in model.named_parameters()}
    for name, value in fitted["tensors"].items():
        if value.is_floating_point():
            floating[name] = value.to(kinds.get(name, torch.float32))
            cast |= {value.dtype} - {floating[name].dtype}
    if cast:
        stored = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in cast))
        notes.append(f"tensors: stored as {stored}, read in the precision of the model")
    left_out = sorted(set(fitted["tensors"]) - set(floating))
    if left_out:
        notes.append(f"tensors: {_list(left_out)} hold whole numbers and were left out")
    if not floating:
        raise ObservationError("tensors: all hold whole numbers, there is no update to read")
    changed = replace(observation, tensors=floating, broadcast=fitted.get("broadcast"))
    return Fitted(observation=changed, notes=tuple(notes))


def _widened(observation: Observation) -> Observation:
    """Read numbers of eight bits as those of 32: nothing is computed with the former."""
    narrow = {}
    for name, value in observation.tensors.items():
        if value.is_floating_point() and value.element_size() == 1:
            narrow[name] = value.float()
    if not narrow:
        return observation
    return replace(observation, tensors={**observation.tensors, **narrow})


def _without_strangers(observation: Observation, names: ModelNames) -> tuple[Observation, list[str]]:
    """Leave out whole numbers and truth values that have no place in the model: masks and places of words,
    which older versions of a library kept beside the weights.
    """
    shapes = _shapes(observation.tensors)
    if isinstance(match_names(shapes, names), Matching):
        return observation, []
    real = {name: shapes[name] for name, value in observation.tensors.items() if value.is_floating_point()}
    strangers = []
    for name in sorted(set(shapes) - set(real)):
        if not isinstance(match_names({**real, name: shapes[name]}, names), Matching):
            strangers.append(name)
    if not real or not strangers or isinstance(match_names(real, names), Mismatch):
        return observation, []
    stay = {name: value for name, value in observation.tensors.items() if name not in strangers}
    verbs = "holds no real numbers, has" if len(strangers) == 1 else "hold no real numbers, have"
    note = f"tensors: {_list(strangers)} {verbs} no place in the model and was left out"
    if len(strangers) > 1:
        note = note.replace(" was left", " were left")
    return replace(observation, tensors=stay), [note]


def _rounded(placed: Mapping[str, Tensor], names: ModelNames) -> list[str]:
    """Name the parameters that were observed as whole numbers: an update that was quantised and not turned
    back.
    """
    whole = sorted(
        name for name, value in placed.items() if name in names.parameters and not value.is_floating_point()
    )
    if not whole:
        return []
    return [
        f"{_list(whole)}: {len(whole)} of {len(placed)} hold whole numbers where the model has real ones; "
        "turn a quantised update back (its numbers times their scale) and record it again"
    ]


def _unreadable(observation: Observation) -> list[str]:
    """Name the tensors that hold values no attack can read."""
    broken = []
    for name, value in observation.tensors.items():
        if not bool(torch.isfinite(value).all()):
            broken.append(name)
    odd = []
    for name, value in observation.tensors.items():
        if value.is_complex() or value.dtype is torch.bool:
            odd.append(name)
    problems = []
    if broken:
        problems.append(
            f"tensors: {_list(sorted(broken))}: {len(broken)} of {len(observation.tensors)} hold NaN or "
            "infinity; record the update again, before the step that broke it"
        )
    if observation.tensors and not any(bool(value.any()) for value in observation.tensors.values()):
        problems.append(
            f"tensors: all of {len(observation.tensors)} are zero: nothing was learned, or nothing recorded; "
            "record it after the backward pass and before zero_grad"
        )
    if odd:
        problems.append(f"tensors: {_list(sorted(odd))} hold no real numbers; record the update itself")
    return problems


def _placed(tensors: Mapping[str, Tensor], matching: Matching) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors under their new names, and the names of tied ones that differ."""
    placed: dict[str, Tensor] = {}
    conflicts = []
    for name, value in tensors.items():
        place = matching.places[name]
        if place.transposed:
            turned = value.T
        else:
            turned = value
        if place.name in placed and not _same(placed[place.name], turned):
            conflicts.append(
                f"{name} and {place.name} are one tensor in the model, but were observed to differ"
            )
        placed.setdefault(place.name, turned)
    return placed, conflicts


def _same(first: Tensor, second: Tensor) -> bool:
    scale = 0.0
    if first.numel():
        scale = float(first.double().abs().max())
    return first.shape == second.shape and torch.allclose(
        first.double(), second.double(), rtol=0.0, atol=_SAME * scale
    )


def _list(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
