"""What one observer really saw of one round, and what it is assumed to know beyond that.

An `Observation` holds the tensors that crossed the wire, the facts the protocol reveals (`metadata`) and the model
that was broadcast. `Knowledge` is the list of assumptions granted on top; every field left at None is unknown to the
attack. Ground truth lives in `attacks.truth`, which no attack imports.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT_VERSION = 1

Kind = Literal["gradient", "delta", "sum"]
Point = Literal["raw", "clipped", "noised", "aggregated"]
Fact = str | int | float | bool | None

_DESCRIPTION = "observation.json"
_TENSORS = "tensors.safetensors"
_BROADCAST = "broadcast.safetensors"


class ObservationError(ValueError):
    """An observation that contradicts itself, or a folder that does not hold one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Knowledge:
    """Declare what the attacker is assumed to know beyond the wire; None means unknown.

    Guarantee: attacks read assumptions only from here, and the run lists in `knowledge_used` which of them were read.
    """

    labels: tuple[int, ...] | None = None
    label_counts: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    sequence_length: int | None = None
    batch_size: int | None = None
    local_steps: int | None = None
    local_epochs: int | None = None
    optimiser: str | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    dropout: float | None = None
    clip_norm: float | None = None
    noise_multiplier: float | None = None
    noise_deviation: float | None = None
    vocabulary_size: int | None = None
    special_tokens: tuple[int, ...] | None = None
    token_set: tuple[int, ...] | None = None
    image_shape: tuple[int, ...] | None = None
    task: str | None = None
    auxiliary_data: str | None = None
    batch_statistics: bool | None = None

    def granted(self) -> tuple[str, ...]:
        """Name the facts that are granted, in the order of the fields, for the knowledge ledger."""
        return tuple(entry.name for entry in fields(Knowledge) if getattr(self, entry.name) is not None)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Observation:
    """Hold exactly what crossed the wire for one observer in one round.

    `tensors` are named as in `model.named_parameters()`. A "gradient" is the mean gradient of a batch; a "delta" is
    new weights minus broadcast weights; a "sum" is the plain sum over `contributors` of either, and
    `metadata["summand"]` says which. `metadata` holds only what the protocol reveals: learning_rate, local_steps,
    optimiser, weight_decay, clip_norm, noise_multiplier, noise_deviation (of each entry as it crossed the wire; without it
    multiplier times bound), batch_size, point ("raw", "clipped", "noised",
    "aggregated").

    Raises: ObservationError when the parts contradict each other.
    """

    kind: Kind
    tensors: Mapping[str, Tensor] = field(repr=False)
    round: int = 0
    observer: str = "server"
    contributors: int = 1
    metadata: Mapping[str, Fact] = field(default_factory=dict)
    broadcast: Mapping[str, Tensor] | None = field(default=None, repr=False)
    knowledge: Knowledge = Knowledge()

    def __post_init__(self) -> None:
        problems = _problems(self)
        if problems:
            raise ObservationError("; ".join(problems))
        _freeze(self, "tensors", {name: tensor.detach() for name, tensor in self.tensors.items()})
        _freeze(self, "metadata", dict(self.metadata))
        if self.broadcast is not None:
            _freeze(self, "broadcast", {name: tensor.detach() for name, tensor in self.broadcast.items()})

    @property
    def content(self) -> Literal["gradient", "delta"]:
        """Say what one contribution is, whether seen alone or inside a sum."""
        return cast(Literal["gradient", "delta"], self.metadata["summand"] if self.kind == "sum" else self.kind)

    def known(self, fact: str) -> Any:
        """Return a fact revealed by the protocol, else the declared assumption of that name, else None."""
        revealed = self.metadata.get(fact)
        if revealed is not None or fact not in {entry.name for entry in fields(Knowledge)}:
            return revealed
        return getattr(self.knowledge, fact)

    def gradient(self) -> GradientView:
        """Return the tensors oriented as a gradient (summed over contributors, as seen).

        Guarantee: for a gradient the scale is exact. A delta is negated, and divided by learning rate times steps
        when the client is known to run SGD with both known; otherwise only the direction is meaningful and `scaled`
        is False.
        """
        if self.content == "gradient":
            return GradientView(tensors=self.tensors, scaled=True, factor=1.0)
        rate, steps, optimiser = self.known("learning_rate"), self.known("local_steps"), self.known("optimiser")
        scaled = bool(rate) and bool(steps) and str(optimiser).lower() == "sgd"
        factor = -1.0 / (float(rate) * int(steps)) if scaled else -1.0
        tensors = {name: tensor * factor for name, tensor in self.tensors.items()}
        return GradientView(tensors=MappingProxyType(tensors), scaled=scaled, factor=factor)

    def replace_tensors(self, tensors: Mapping[str, Tensor], **facts: Fact) -> Observation:
        """Return the same observation with other tensors and amended metadata (for example after noise was added)."""
        return Observation(
            kind=self.kind,
            tensors=tensors,
            round=self.round,
            observer=self.observer,
            contributors=self.contributors,
            metadata={**self.metadata, **facts},
            broadcast=self.broadcast,
            knowledge=self.knowledge,
        )

    def save(self, folder: str | Path) -> None:
        """Write the observation as `observation.json` and safetensors files; the folder is created when missing."""
        save_observation(self, Path(folder))


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientView:
    """Tensors in gradient orientation: those observed times `factor`; `scaled` says whether their length is meaningful."""

    tensors: Mapping[str, Tensor]
    scaled: bool
    factor: float


def save_observation(observation: Observation, folder: Path) -> None:
    """Write an observation to a folder, versioned, without pickle.

    Raises: ObservationError when a number is not finite and therefore cannot be written as JSON.
    """
    folder.mkdir(parents=True, exist_ok=True)
    description = {
        "format": FORMAT_VERSION,
        "kind": observation.kind,
        "round": observation.round,
        "observer": observation.observer,
        "contributors": observation.contributors,
        "metadata": dict(observation.metadata),
        "knowledge": {name: getattr(observation.knowledge, name) for name in observation.knowledge.granted()},
        "tensors": _inventory(observation.tensors),
        "broadcast": None if observation.broadcast is None else _inventory(observation.broadcast),
    }
    try:
        text = json.dumps(description, indent=2, allow_nan=False)
    except ValueError as error:
        raise ObservationError(f"metadata and knowledge must hold finite numbers: {error}") from None
    save_file(_plain(observation.tensors), str(folder / _TENSORS))
    if observation.broadcast is not None:
        save_file(_plain(observation.broadcast), str(folder / _BROADCAST))
    (folder / _DESCRIPTION).write_text(text + "\n", encoding="utf-8")


def load_observation(folder: str | Path) -> Observation:
    """Read an observation folder strictly.

    Raises: ObservationError naming the file and what is wrong: a missing file, an unknown version or key, tensors
    that differ from the inventory.
    """
    folder = Path(folder)
    description = _read_description(folder / _DESCRIPTION)
    tensors = _read_tensors(folder / _TENSORS, description["tensors"])
    broadcast = None
    if description["broadcast"] is not None:
        broadcast = _read_tensors(folder / _BROADCAST, description["broadcast"])
    return Observation(
        kind=description["kind"],
        tensors=tensors,
        round=description["round"],
        observer=description["observer"],
        contributors=description["contributors"],
        metadata=description["metadata"],
        broadcast=broadcast,
        knowledge=_read_knowledge(description["knowledge"]),
    )


_KEYS = ("format", "kind", "round", "observer", "contributors", "metadata", "knowledge", "tensors", "broadcast")


def _read_description(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ObservationError(f"{path} is missing: an observation folder holds {_DESCRIPTION} and {_TENSORS}")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ObservationError(f"{path} is not JSON: {error}") from None
    if not isinstance(description, dict):
        raise ObservationError(f"{path} must hold one JSON object")
    version = description.get("format")
    if version != FORMAT_VERSION:
        raise ObservationError(f"{path}: format is {version!r}, this version reads format {FORMAT_VERSION}")
    missing = [key for key in _KEYS if key not in description]
    unknown = [key for key in description if key not in _KEYS]
    if missing or unknown:
        raise ObservationError(f"{path}: missing keys {missing}, unknown keys {unknown}")
    wrong = [key for key in ("metadata", "knowledge", "tensors") if not isinstance(description[key], dict)]
    if wrong:
        raise ObservationError(f"{path}: {', '.join(wrong)} must be JSON objects")
    return description


def _read_tensors(path: Path, inventory: Mapping[str, Any]) -> dict[str, Tensor]:
    if not path.is_file():
        raise ObservationError(f"{path} is missing")
    try:
        tensors = load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise ObservationError(f"{path} is not a safetensors file: {error}") from None
    if _inventory(tensors) != inventory:
        found = _inventory(tensors)
        different = sorted(name for name in set(found) | set(inventory) if found.get(name) != inventory.get(name))
        raise ObservationError(f"{path} differs from {_DESCRIPTION} at {different[:5]}")
    return tensors


def _read_knowledge(entries: Mapping[str, Any]) -> Knowledge:
    names = {entry.name for entry in fields(Knowledge)}
    unknown = sorted(set(entries) - names)
    if unknown:
        raise ObservationError(f"knowledge: unknown names {unknown}, allowed are {sorted(names)}")
    granted: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in entries.items()
    }
    return Knowledge(**granted)


def _inventory(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        for name, tensor in tensors.items()
    }


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # Tied weights share storage, which the file format refuses; a copy of each is what was sent anyway.
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}


def _freeze(observation: Observation, name: str, value: dict[str, Any]) -> None:
    object.__setattr__(observation, name, MappingProxyType(value))


def _problems(observation: Observation) -> list[str]:
    problems = []
    if observation.kind not in get_args(Kind):
        problems.append(f"kind is {observation.kind!r}, must be one of {get_args(Kind)}")
    if not isinstance(observation.round, int) or observation.round < 0:
        problems.append(f"round is {observation.round!r}, must be a whole number from 0")
    if not isinstance(observation.contributors, int) or observation.contributors < 1:
        problems.append(f"contributors is {observation.contributors!r}, must be a whole number from 1")
    elif observation.kind != "sum" and observation.contributors != 1:
        problems.append(f"a {observation.kind} has one contributor, not {observation.contributors}: use kind 'sum'")
    if not observation.observer:
        problems.append("observer is empty, name the row of the threat model, for example 'server'")
    if not observation.tensors:
        problems.append("tensors is empty")
    for name, tensor in observation.tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            problems.append(f"tensors[{name!r}] must map a name to a tensor")
    if observation.kind == "sum" and observation.metadata.get("summand") not in ("gradient", "delta"):
        problems.append("a sum needs metadata['summand'] = 'gradient' or 'delta'")
    point = observation.metadata.get("point")
    if point is not None and point not in get_args(Point):
        problems.append(f"metadata['point'] is {point!r}, must be one of {get_args(Point)}")
    for name, value in observation.metadata.items():
        if not isinstance(value, Fact) or (isinstance(value, float) and not math.isfinite(value)):
            problems.append(f"metadata[{name!r}] must be a finite number, text, truth value or None")
    return problems
