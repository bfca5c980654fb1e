"""What one observer really saw of one round, and what it is assumed to know beyond that.

An `Observation` holds the tensors that crossed the wire, the facts the protocol reveals (`metadata`) and the model
that was broadcast. `Knowledge` is the list of assumptions granted on top; every field left at None is unknown to the
attack. Ground truth lives in `attacks.truth`, which no attack imports.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast, get_args

import numpy as np
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


@dataclass(frozen=True, slots=True)
class _Rule:
    """Say what a fact may be: a kind of value, for numbers from `least` and below `below`, one or `many`."""

    kind: Literal["whole", "real", "text", "truth"]
    least: int = 0
    below: float = math.inf
    many: bool = False
    shortest: int = 0

    def wanted(self) -> str:
        """Word the rule."""
        if self.kind in ("text", "truth"):
            return "text" if self.kind == "text" else "true or false"
        below = f" and below {self.below:g}" if math.isfinite(self.below) else ""
        numbers = "whole numbers" if self.kind == "whole" else "finite numbers"
        one = f"a {numbers.removesuffix('s')}" if not self.many else f"a list of {numbers}"
        return f"{one} from {self.least}{below}" + (f", {self.shortest} at least" if self.shortest else "")

    def fits(self, value: object) -> bool:
        """Say whether a single value keeps the rule."""
        if self.kind == "truth":
            return isinstance(value, bool)
        if self.kind == "text":
            return _is_text(value)
        if isinstance(value, bool) or not isinstance(value, int if self.kind == "whole" else int | float):
            return False
        # 64 bits bound every whole number: more fits no tensor. NaN fails every comparison.
        return self.least <= value < min(self.below, 2**63) and math.isfinite(value)

    def problems(self, name: str, value: object) -> list[str]:
        """Name what breaks the rule; of many wrong entries the first and their number."""
        if not self.many:
            return [] if self.fits(value) else [f"{name} is {_show(value)}, must be {self.wanted()}"]
        if not isinstance(value, tuple) or len(value) < self.shortest:
            return [f"{name} is {_show(value)}, must be {self.wanted()}"]
        wrong = [place for place, entry in enumerate(value) if not self.fits(entry)]
        if not wrong:
            return []
        rest = f" (and {len(wrong) - 1} more entries)" if len(wrong) > 1 else ""
        return [f"{name}[{wrong[0]}] is {_show(value[wrong[0]])}{rest}, must be {self.wanted()}"]


_RULES: Mapping[str, _Rule] = {
    "labels": _Rule("whole", many=True),
    "label_counts": _Rule("whole", many=True),
    "lengths": _Rule("whole", many=True),
    "sequence_length": _Rule("whole", least=1),
    "batch_size": _Rule("whole", least=1),
    "local_steps": _Rule("whole", least=1),
    "local_epochs": _Rule("whole", least=1),
    "optimiser": _Rule("text"),
    "learning_rate": _Rule("real"),
    "weight_decay": _Rule("real"),
    "dropout": _Rule("real", below=1.0),
    "clip_norm": _Rule("real"),
    "noise_multiplier": _Rule("real"),
    "vocabulary_size": _Rule("whole", least=1),
    "special_tokens": _Rule("whole", many=True),
    "token_set": _Rule("whole", many=True),
    "image_shape": _Rule("whole", least=1, many=True, shortest=1),
    "task": _Rule("text"),
    "auxiliary_data": _Rule("text"),
    "batch_statistics": _Rule("truth"),
}
_ROUND, _CONTRIBUTORS = _Rule("whole"), _Rule("whole", least=1)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _show(value: object) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # a number of thousands of digits
        return f"a huge {type(value).__name__}"


def _plain(value: Any) -> Any:
    """Turn NumPy's numbers into plain ones and a list into a tuple; anything else stays what it is."""
    return tuple(map(_plain_number, value)) if isinstance(value, list | tuple) else _plain_number(value)


def _plain_number(value: Any) -> Any:
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, np.integer):
        return int(value)
    return float(value) if isinstance(value, np.floating) else value


def _knowledge_problems(knowledge: Mapping[str, object]) -> list[str]:
    unknown = sorted(set(knowledge) - set(_RULES))
    problems = [f"knowledge: unknown names {_show(unknown)}, allowed are {sorted(_RULES)}"] if unknown else []
    for name, value in knowledge.items():
        if name in _RULES and value is not None:
            problems += _RULES[name].problems(f"knowledge.{name}", value)
    return problems


@dataclass(frozen=True, slots=True, kw_only=True)
class Knowledge:
    """Declare what the attacker is assumed to know beyond the wire; None means unknown.

    Guarantee: attacks read assumptions only from here, and the run lists in `knowledge_used` which of them were read.

    Raises: ObservationError naming every fact of a wrong type or range.
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
    vocabulary_size: int | None = None
    special_tokens: tuple[int, ...] | None = None
    token_set: tuple[int, ...] | None = None
    image_shape: tuple[int, ...] | None = None
    task: str | None = None
    auxiliary_data: str | None = None
    batch_statistics: bool | None = None

    def __post_init__(self) -> None:
        # Read past any subclass that notes what is read: a check is no use of a fact.
        found = {name: _plain(object.__getattribute__(self, name)) for name in _RULES}
        if problems := _knowledge_problems(found):
            raise ObservationError("; ".join(problems))
        for name, value in found.items():
            object.__setattr__(self, name, value)

    def granted(self) -> tuple[str, ...]:
        """Name the facts that are granted, in the order of the fields, for the knowledge ledger."""
        return tuple(entry.name for entry in fields(Knowledge) if getattr(self, entry.name) is not None)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Observation:
    """Hold exactly what crossed the wire for one observer in one round.

    `tensors` are named as in `model.named_parameters()`. A "gradient" is the mean gradient of a batch; a "delta" is
    new weights minus broadcast weights; a "sum" is the plain sum over `contributors` of either, and
    `metadata["summand"]` says which. `metadata` holds only what the protocol reveals: learning_rate, local_steps,
    optimiser, weight_decay, clip_norm, noise_multiplier, batch_size, point ("raw", "clipped", "noised",
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
        for name in ("round", "contributors"):
            object.__setattr__(self, name, _plain(getattr(self, name)))
        if isinstance(self.metadata, Mapping):
            _freeze(self, "metadata", {name: _plain(value) for name, value in self.metadata.items()})
        problems = _fact_problems({name: getattr(self, name) for name in _FACTS})
        problems += _tensor_problems("tensors", self.tensors)
        if self.broadcast is not None:
            problems += _tensor_problems("broadcast", self.broadcast)
        if not isinstance(self.knowledge, Knowledge):
            problems.append(f"knowledge is {_show(self.knowledge)}, must be a Knowledge")
        if problems:
            raise ObservationError("; ".join(problems))
        _freeze(self, "tensors", {name: tensor.detach() for name, tensor in self.tensors.items()})
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
            return GradientView(tensors=self.tensors, scaled=True)
        rate, steps, optimiser = self.known("learning_rate"), self.known("local_steps"), self.known("optimiser")
        scaled = bool(rate) and bool(steps) and str(optimiser).lower() == "sgd"
        factor = -1.0 / (float(rate) * int(steps)) if scaled else -1.0
        tensors = {name: tensor * factor for name, tensor in self.tensors.items()}
        return GradientView(tensors=MappingProxyType(tensors), scaled=scaled)

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
    """Tensors in gradient orientation; `scaled` says whether their length is meaningful or only their direction."""

    tensors: Mapping[str, Tensor]
    scaled: bool


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
    save_file(_stored(observation.tensors), str(folder / _TENSORS))
    if observation.broadcast is not None:
        save_file(_stored(observation.broadcast), str(folder / _BROADCAST))
    (folder / _DESCRIPTION).write_text(text + "\n", encoding="utf-8")


def load_observation(folder: str | Path) -> Observation:
    """Read an observation folder strictly.

    Raises: ObservationError naming the file and all that is wrong with it: a missing file or a link, an unknown version
    or key, a fact of a wrong type or range, tensors that differ from the inventory.
    """
    folder = Path(folder)
    description = _read_description(folder / _DESCRIPTION)
    tensors = _read_tensors(folder / _TENSORS, description["tensors"])
    broadcast = None
    if description["broadcast"] is not None:
        broadcast = _read_tensors(folder / _BROADCAST, description["broadcast"])
    facts = {name: description[name] for name in _FACTS}
    knowledge = Knowledge(**description["knowledge"])
    return Observation(**facts, tensors=tensors, broadcast=broadcast, knowledge=knowledge)


_FACTS = ("kind", "round", "observer", "contributors", "metadata")
_KEYS = ("format", *_FACTS, "knowledge", "tensors", "broadcast")
_LARGEST = 64 * 2**20  # bytes of observation.json: the labels of some millions of records
_DEEPEST = 8  # brackets within brackets; the format itself needs four


def _require_file(path: Path) -> None:
    if path.is_symlink():
        raise ObservationError(f"{path} is a link: an observation folder holds its own files")
    if not path.is_file():
        raise ObservationError(f"{path} is missing: an observation folder holds {_DESCRIPTION} and {_TENSORS}")


def _read_description(path: Path) -> dict[str, Any]:
    description, repeated = _read_json(path)
    if not isinstance(description, dict):
        raise ObservationError(f"{path} must hold one JSON object")
    problems = [f"the key {_show(name)} stands there more than once" for name in repeated]
    version = description.get("format")
    if type(version) is not int or version != FORMAT_VERSION:
        problems.append(f"format is {_show(version)}, this version reads format {FORMAT_VERSION}")
    else:
        problems += _description_problems(description)
    if problems:
        raise ObservationError(f"{path}: {'; '.join(problems)}")
    return description


def _read_json(path: Path) -> tuple[Any, list[str]]:
    """Return what a JSON file of bounded size and depth holds, and the keys that stand twice in one object."""
    _require_file(path)
    repeated: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            repeated.extend(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        return found

    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
    except OSError as error:
        raise ObservationError(f"{path} cannot be read: {error}") from None
    if len(content) > _LARGEST:
        raise ObservationError(f"{path} is longer than {_LARGEST} bytes")
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=unique)
        deep = _deeper(value, _DEEPEST)
    except ValueError as error:
        raise ObservationError(f"{path} is not JSON: {error}") from None
    except RecursionError:
        deep = True
    if deep:
        raise ObservationError(f"{path} is nested deeper than {_DEEPEST} levels")
    return value, repeated


def _deeper(value: object, levels: int) -> bool:
    """Say whether a JSON value nests deeper than that, without recursion."""
    layer = [value]
    for _ in range(levels):
        layer = [inner for outer in layer if isinstance(outer, dict | list) for inner in _inside(outer)]
    return any(isinstance(outer, dict | list) for outer in layer)


def _inside(outer: dict[str, Any] | list[Any]) -> list[Any]:
    return list(outer.values()) if isinstance(outer, dict) else outer


def _description_problems(description: Mapping[str, Any]) -> list[str]:
    missing = [key for key in _KEYS if key not in description]
    unknown = [key for key in description if key not in _KEYS]
    problems = [f"missing keys {missing}, unknown keys {_show(unknown)}"] if missing or unknown else []
    objects = {name: description.get(name, {}) for name in ("metadata", "knowledge", "tensors", "broadcast")}
    if objects["broadcast"] is None:
        del objects["broadcast"]
    wrong = [f"{name} is {_show(value)}" for name, value in objects.items() if not isinstance(value, dict)]
    if wrong:
        problems.append(f"{', '.join(wrong)}: these must be JSON objects")
    whole = {name: value for name, value in objects.items() if isinstance(value, dict)}
    facts = {name: description[name] for name in _FACTS if name in description}
    problems += _fact_problems({**facts, "metadata": whole.get("metadata", {})})
    problems += _knowledge_problems({name: _plain(value) for name, value in whole.get("knowledge", {}).items()})
    for name in ("tensors", "broadcast"):
        problems += _inventory_problems(name, whole[name]) if name in whole else []
    return problems


def _inventory_problems(name: str, inventory: Mapping[str, Any]) -> list[str]:
    if name == "tensors" and not inventory:
        return ["tensors is empty"]
    wrong = [key for key, entry in inventory.items() if not _is_entry(entry)]
    if not wrong:
        return []
    shown = f"{name}[{_show(wrong[0])}] is {_show(inventory[wrong[0]])}"
    rest = f" (and {len(wrong) - 1} more entries)" if len(wrong) > 1 else ""
    return [f"{shown}{rest}, must be a JSON object of shape, a list of whole numbers, and dtype, text"]


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, dict) or set(entry) != {"shape", "dtype"} or not isinstance(entry["shape"], list):
        return False
    return isinstance(entry["dtype"], str) and all(_ROUND.fits(size) for size in entry["shape"])


# What reading a safetensors file that others wrote can raise: headers, types and sizes it does not know.
_UNREADABLE = (SafetensorError, OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError)


def _read_tensors(path: Path, inventory: Mapping[str, Any]) -> dict[str, Tensor]:
    _require_file(path)
    try:
        tensors = load_file(str(path))
    except _UNREADABLE as error:
        raise ObservationError(f"{path} is not a safetensors file: {error}") from None
    found = _inventory(tensors)
    if found != inventory:
        different = sorted(name for name in set(found) | set(inventory) if found.get(name) != inventory.get(name))
        raise ObservationError(f"{path} differs from {_DESCRIPTION} at {different[:5]}")
    return tensors


def _inventory(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        for name, tensor in tensors.items()
    }


def _stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # Tied weights share storage, which the file format refuses; a copy of each is what was sent anyway.
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}


def _freeze(observation: Observation, name: str, value: dict[str, Any]) -> None:
    object.__setattr__(observation, name, MappingProxyType(value))


def _tensor_problems(field_name: str, tensors: object) -> list[str]:
    if not isinstance(tensors, Mapping):
        return [f"{field_name} is {_show(tensors)}, must map names to tensors"]
    if field_name == "tensors" and not tensors:
        return ["tensors is empty"]
    return [
        f"{field_name}[{_show(name)}] must map a name to a tensor"
        for name, tensor in tensors.items()
        if not _is_text(name) or not isinstance(tensor, torch.Tensor)
    ]


def _fact_problems(facts: Mapping[str, Any]) -> list[str]:
    """Name what is wrong with the facts of an observation; those that are missing are not looked at."""
    problems = []
    kind, contributors, metadata = facts.get("kind"), facts.get("contributors"), facts.get("metadata", {})
    if "kind" in facts and (not isinstance(kind, str) or kind not in get_args(Kind)):
        problems.append(f"kind is {_show(kind)}, must be one of {get_args(Kind)}")
    if "round" in facts:
        problems += _ROUND.problems("round", facts["round"])
    if "contributors" in facts:
        wrong = _CONTRIBUTORS.problems("contributors", contributors)
        problems += wrong
        if not wrong and kind in ("gradient", "delta") and contributors != 1:
            problems.append(f"a {kind} has one contributor, not {contributors}: use kind 'sum'")
    if "observer" in facts and not (_is_text(facts["observer"]) and facts["observer"]):
        shown = _show(facts["observer"])
        problems.append(f"observer is {shown}, must name the row of the threat model, for example 'server'")
    if not isinstance(metadata, Mapping):
        return [*problems, f"metadata is {_show(metadata)}, must map names to facts (in JSON an object)"]
    if kind == "sum" and metadata.get("summand") is None:
        problems.append("a sum needs metadata['summand'] = 'gradient' or 'delta'")
    for name, value in metadata.items():
        if value is not None:
            problems += _metadata_problems(name, value)
    return problems


def _metadata_problems(name: object, value: object) -> list[str]:
    label, choices = f"metadata[{_show(name)}]", {"point": get_args(Point), "summand": ("gradient", "delta")}
    if not isinstance(name, str) or not _is_text(name):
        return [f"{label} must have text as its name"]
    if name in choices:
        right = isinstance(value, str) and value in choices[name]
        return [] if right else [f"{label} is {_show(value)}, must be one of {choices[name]}"]
    if name in _RULES:
        if _RULES[name].many:
            return [f"{label} is {_show(value)}, but the protocol reveals no lists: grant it in knowledge"]
        return _RULES[name].problems(label, value)
    if not isinstance(value, Fact) or (isinstance(value, float) and not math.isfinite(value)):
        return [f"{label} is {_show(value)}, must be a finite number, text, truth value or None"]
    return []
