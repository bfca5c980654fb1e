"""What one observer really saw of one round, and what it is assumed to know beyond that.

An `Observation` holds the tensors that crossed the wire, the facts the protocol reveals (`metadata`) and the
model that was broadcast. `Knowledge` is the list of assumptions granted on top; every field left at None is
unknown to the attack. Ground truth lives in `attacks.truth`, which no attack imports.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from attacks.facts import COUNTS, RULES, is_text, plain, show
from attacks.foreign import StatedFact

FORMAT_VERSION = 1

Kind = Literal["gradient", "delta", "sum", "answers"]
Point = Literal["raw", "clipped", "noised", "aggregated"]
Fact = str | int | float | bool | None

_DESCRIPTION = "observation.json"
_TENSORS = "tensors.safetensors"
_BROADCAST = "broadcast.safetensors"
_FILES = (_DESCRIPTION, _TENSORS, _BROADCAST)


class ObservationError(ValueError):
    """An observation that contradicts itself, or a folder that does not hold one."""


def _knowledge_problems(knowledge: Mapping[str, object]) -> list[str]:
    unknown = sorted(set(knowledge) - set(RULES))
    if unknown:
        problems = [f"knowledge: unknown names {show(unknown)}, allowed are {sorted(RULES)}"]
    else:
        problems = []
    for name, value in knowledge.items():
        if name in RULES and value is not None:
            problems += RULES[name].problems(f"knowledge.{name}", value)
    return problems


@dataclass(frozen=True, slots=True, kw_only=True)
class Knowledge:
    """Declare what the attacker is assumed to know beyond the wire; None means unknown.

    Guarantee: attacks read assumptions only from here, and the run lists in `knowledge_used` which of them
    were read.

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
    momentum: float | None = None
    nesterov: bool | None = None
    schedule: str | None = None
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

    def __post_init__(self) -> None:
        # Read past any subclass that notes what is read: a check is no use of a fact.
        facts = {}
        for name in RULES:
            facts[name] = plain(object.__getattribute__(self, name))
        if problems := _knowledge_problems(facts):
            raise ObservationError("; ".join(problems))
        for name, value in facts.items():
            object.__setattr__(self, name, value)

    def granted(self) -> tuple[str, ...]:
        """Name the facts that are granted, in the order of the fields, for the knowledge ledger."""
        return tuple(entry.name for entry in fields(Knowledge) if getattr(self, entry.name) is not None)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Observation:
    """Hold exactly what crossed the wire for one observer in one round.

    `tensors` are named as in `model.named_parameters()`. A "gradient" is the mean gradient of a batch; a
    "delta" is new weights minus broadcast weights; "answers" are probabilities a model gives to known rows,
    [rows, classes] under that name, and of no update; a "sum" is the plain sum over `contributors` of either,
    and `metadata["summand"]` says which. `metadata` holds only what the protocol reveals: learning_rate,
    local_steps, optimiser, weight_decay, clip_norm, noise_multiplier, noise_deviation (of each entry as it
    crossed the wire; without it multiplier times bound), batch_size, point ("raw", "clipped", "noised",
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
        for name in COUNTS:
            object.__setattr__(self, name, plain(getattr(self, name)))
        if isinstance(self.metadata, Mapping):
            _freeze(self, "metadata", {name: plain(value) for name, value in self.metadata.items()})
        problems = _fact_problems({name: getattr(self, name) for name in _FACTS})
        problems += _tensor_problems("tensors", self.tensors)
        if self.broadcast is not None:
            problems += _tensor_problems("broadcast", self.broadcast)
        if not isinstance(self.knowledge, Knowledge):
            problems.append(f"knowledge is {show(self.knowledge)}, must be a Knowledge")
        if problems:
            raise ObservationError("; ".join(problems))
        _freeze(self, "tensors", {name: tensor.detach() for name, tensor in self.tensors.items()})
        if self.broadcast is not None:
            _freeze(self, "broadcast", {name: tensor.detach() for name, tensor in self.broadcast.items()})

    @property
    def content(self) -> Literal["gradient", "delta"]:
        """Say what one contribution is, whether seen alone or inside a sum."""
        return cast(
            Literal["gradient", "delta"], self.metadata["summand"] if self.kind == "sum" else self.kind
        )

    def known(self, fact: str) -> StatedFact:
        """Return a fact revealed by the protocol, else the declared assumption of that name, else None."""
        revealed = self.metadata.get(fact)
        if revealed is not None or fact not in {entry.name for entry in fields(Knowledge)}:
            return revealed
        return getattr(self.knowledge, fact)

    def gradient(self) -> GradientView:
        """Return the tensors oriented as a gradient (summed over contributors, as seen).

        Guarantee: for a gradient the scale is exact. A delta is negated, and divided by learning rate times
        steps when the client is known to run SGD with both known; otherwise only the direction is meaningful
        and `scaled` is False.
        """
        if self.content == "gradient":
            return GradientView(tensors=self.tensors, scaled=True, factor=1.0)
        rate, steps, optimiser = (
            self.known("learning_rate"),
            self.known("local_steps"),
            self.known("optimiser"),
        )
        scaled = bool(rate) and bool(steps) and str(optimiser).lower() == "sgd"
        factor = -1.0 / (float(rate) * int(steps)) if scaled else -1.0
        tensors = {}
        for name, tensor in self.tensors.items():
            tensors[name] = tensor * factor
        return GradientView(tensors=MappingProxyType(tensors), scaled=scaled, factor=factor)

    def replace_tensors(self, tensors: Mapping[str, Tensor], **facts: Fact) -> Observation:
        """Return the same observation with other tensors and amended metadata (for example after noise was
        added).
        """
        return replace(self, tensors=tensors, metadata={**self.metadata, **facts})

    def save(self, folder: str | Path) -> None:
        """Write the observation as `observation.json` and safetensors files; the folder is created when
        missing.
        """
        save_observation(self, Path(folder))


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientView:
    """Tensors in gradient orientation: those observed times `factor`; `scaled` says whether their length is
    meaningful.
    """

    tensors: Mapping[str, Tensor]
    scaled: bool
    factor: float


def save_observation(observation: Observation, folder: Path) -> None:
    """Write an observation to a folder, versioned, without pickle.

    Guarantee: everything is written and read back beside its place first. A new folder then appears whole; in
    an older one the files of an observation are exchanged, the description last, and after a failure the old
    ones are back. Other files in it stay. Killed within the exchange, the folder has no description and a
    hidden folder in it the old files.

    Raises: ObservationError when the observation cannot be stored, OSError when the disk refuses.
    """
    description, parts = _describe(observation)
    folder = Path(os.path.realpath(folder))
    for path in (folder / name for name in _FILES):
        if path.is_dir() and not path.is_symlink():
            raise ObservationError(f"{path} is a folder, there is no place for the file")
    if folder.exists() and not folder.is_dir():
        raise ObservationError(f"{folder} is not a folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh, mark = not folder.exists(), f"{secrets.token_hex(6)}.new"
    if fresh:
        stage = folder.with_name(f".{folder.name}.{mark}")
    else:
        stage = folder / f".observation.{mark}"
    stage.mkdir(mode=0o700)
    try:
        for name, tensors in parts.items():
            description["sha256"][name] = _write_tensors(stage / name, tensors)
        (stage / _DESCRIPTION).write_text(_as_json(description), encoding="utf-8")
        for path in stage.iterdir():
            path.chmod(0o600)
            _sync(path)
        _sync(stage)
        if fresh:
            os.rename(stage, folder)
        else:
            _exchange(stage, folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    _sync(folder)


def _describe(observation: Observation) -> tuple[dict[str, Any], dict[str, Mapping[str, Tensor]]]:
    parts = {_TENSORS: observation.tensors}
    if observation.broadcast is not None:
        parts[_BROADCAST] = observation.broadcast
    wrong = []
    for file, tensors in parts.items():
        for name, tensor in tensors.items():
            if (
                tensor.is_meta
                or tensor.is_nested
                or tensor.is_quantized
                or tensor.layout is not torch.strided
            ):
                wrong.append(
                    f"{file}: {show(name)} is on the meta device or not a dense "
                    "tensor, which cannot be stored"
                )
    if wrong:
        raise ObservationError("; ".join(wrong))
    description = {
        "format": FORMAT_VERSION,
        **{name: getattr(observation, name) for name in _FACTS},
        "metadata": dict(observation.metadata),
        "knowledge": {name: getattr(observation.knowledge, name) for name in observation.knowledge.granted()},
        "tensors": _inventory(observation.tensors),
        "broadcast": None if observation.broadcast is None else _inventory(observation.broadcast),
        "sha256": dict.fromkeys(parts, "0" * 64),
    }
    _as_json(description)  # refused before anything is written
    return description, parts


def _as_json(description: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(description, indent=2, allow_nan=False) + "\n"
    except (ValueError, TypeError) as error:
        raise ObservationError(f"metadata and knowledge must hold text and finite numbers: {error}") from None
    if len(text) > _LARGEST:
        raise ObservationError(f"{_DESCRIPTION} would be {len(text)} bytes long, must be {_LARGEST} at most")
    return text


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    try:
        save_file(_stored(tensors), str(path))
    except _UNREADABLE as error:
        raise ObservationError(f"{path.name} cannot be written, {type(error).__name__}: {error}") from None
    digest = _sha256(path)
    _read_tensors(path, _inventory(tensors), digest)
    return digest


def _exchange(stage: Path, folder: Path) -> None:
    """Put the files of the stage in the place of those in the folder, all of them or none."""
    previous = stage.with_suffix(".old")
    previous.mkdir(mode=0o700)
    old = [name for name in _FILES if os.path.lexists(folder / name)]
    try:
        for (
            name
        ) in old:  # the description goes first, so that it never stands beside the tensors of another one
            os.replace(folder / name, previous / name)
        for name in reversed(_FILES):
            if (stage / name).exists():
                os.replace(stage / name, folder / name)
    except BaseException:
        for name in reversed(_FILES):
            if os.path.lexists(previous / name):
                os.replace(previous / name, folder / name)
            elif name not in old:
                (folder / name).unlink(missing_ok=True)
        previous.rmdir()
        raise
    shutil.rmtree(previous, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_observation(folder: str | Path) -> Observation:
    """Read an observation folder strictly.

    Raises: ObservationError naming the file and all that is wrong with it: a missing file or a link, an
    unknown version or key, a fact of a wrong type or range, tensors that differ from the inventory or its
    SHA-256. Folders of earlier versions name no digest and are taken without.
    """
    folder = Path(folder)
    description = _read_description(folder / _DESCRIPTION)
    digests = description.get("sha256", {})
    tensors = _read_tensors(folder / _TENSORS, description["tensors"], digests.get(_TENSORS))
    broadcast = None
    if description["broadcast"] is not None:
        broadcast = _read_tensors(folder / _BROADCAST, description["broadcast"], digests.get(_BROADCAST))
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
        raise ObservationError(
            f"{path} is missing: an observation folder holds {_DESCRIPTION} and {_TENSORS}, as "
            "attacks.Observation(kind='gradient', tensors=UPDATE).save(FOLDER) writes them"
        )


def _read_description(path: Path) -> dict[str, Any]:
    description, repeated = _read_json(path)
    if not isinstance(description, dict):
        raise ObservationError(f"{path} must hold one JSON object")
    problems = []
    for name in repeated:
        problems.append(f"the key {show(name)} stands there more than once")
    version = description.get("format")
    if type(version) is not int or version != FORMAT_VERSION:
        problems.append(f"format is {show(version)}, this version reads format {FORMAT_VERSION}")
    else:
        problems += _description_problems(description)
    if problems:
        raise ObservationError(f"{path}: {'; '.join(problems)}")
    return description


def _read_json(path: Path) -> tuple[Any, list[str]]:
    """Return what a JSON file of bounded size and depth holds,
    and the keys that stand twice in one object.
    """
    _require_file(path)
    repeated: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) < len(pairs):
            repeated.extend(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        return members

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
    layer: list[Any] = [value] if isinstance(value, dict | list) else []
    for _ in range(levels):
        inside: list[Any] = []
        for outer in layer:
            inside.extend(outer.values() if isinstance(outer, dict) else outer)
        layer = inside
        layer = [inner for inner in layer if isinstance(inner, dict | list)]
    return bool(layer)


def _description_problems(description: Mapping[str, Any]) -> list[str]:
    missing = [key for key in _KEYS if key not in description]
    unknown = [key for key in description if key not in (*_KEYS, "sha256")]
    if missing or unknown:
        problems = [f"missing keys {missing}, unknown keys {show(unknown)}"]
    else:
        problems = []
    objects = {}
    for name in ("metadata", "knowledge", "tensors", "broadcast"):
        objects[name] = description.get(name, {})
    if objects["broadcast"] is None:
        del objects["broadcast"]
    wrong = []
    for name, value in objects.items():
        if not isinstance(value, dict):
            wrong.append(f"{name} is {show(value)}")
    if wrong:
        problems.append(f"{', '.join(wrong)}: these must be JSON objects")
    whole = {}
    for name, value in objects.items():
        if isinstance(value, dict):
            whole[name] = value
    facts = {}
    for name in _FACTS:
        if name in description:
            facts[name] = description[name]
    problems += _fact_problems({**facts, "metadata": whole.get("metadata", {})})
    problems += _knowledge_problems(
        {name: plain(value) for name, value in whole.get("knowledge", {}).items()}
    )
    for name in ("tensors", "broadcast"):
        problems += _inventory_problems(name, whole[name]) if name in whole else []
    if "sha256" in description:
        if description.get("broadcast") is None:
            files = {_TENSORS}
        else:
            files = {_TENSORS, _BROADCAST}
        digests = description["sha256"]
        if not isinstance(digests, dict) or set(digests) != files or not all(map(is_text, digests.values())):
            problems.append(f"sha256 is {show(digests)}, must give a digest for {sorted(files)}")
    return problems


def _inventory_problems(name: str, inventory: Mapping[str, Any]) -> list[str]:
    if name == "tensors" and not inventory:
        return ["tensors is empty"]
    wrong = []
    for key, entry in inventory.items():
        if not _is_entry(entry):
            wrong.append(key)
    if not wrong:
        return []
    shown = f"{name}[{show(wrong[0])}] is {show(inventory[wrong[0]])}"
    rest = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return [f"{shown}{rest}, must be a JSON object of shape, a list of whole numbers, and dtype, text"]


def _is_entry(entry: object) -> bool:
    if (
        not isinstance(entry, dict)
        or set(entry) != {"shape", "dtype"}
        or not isinstance(entry["shape"], list)
    ):
        return False
    return isinstance(entry["dtype"], str) and all(COUNTS["round"].fits(size) for size in entry["shape"])


# What reading a safetensors file that others wrote can raise: headers, types and sizes it does not know.
_UNREADABLE = (SafetensorError, OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError)


def _read_tensors(path: Path, inventory: Mapping[str, Any], digest: str | None) -> dict[str, Tensor]:
    _require_file(path)
    try:
        before = path.stat()
        tensors = load_file(str(path))
        content = None if digest is None else _sha256(path)
        after = path.stat()
    except _UNREADABLE as error:
        raise ObservationError(f"{path} is not a safetensors file: {error}") from None
    if any(getattr(before, name) != getattr(after, name) for name in ("st_ino", "st_size", "st_mtime_ns")):
        raise ObservationError(f"{path} changed while it was read")
    if content != digest:
        wanted = f"its SHA-256 is {content}, must be {show(digest)}"
        raise ObservationError(f"{path} is not the file that {_DESCRIPTION} describes: {wanted}")
    stored = _inventory(tensors)
    if stored != inventory:
        different = sorted(
            name for name in set(stored) | set(inventory) if stored.get(name) != inventory.get(name)
        )
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
        return [f"{field_name} is {show(tensors)}, must map names to tensors"]
    if field_name == "tensors" and not tensors:
        return ["tensors is empty"]
    return [
        f"{field_name}[{show(name)}] must map a name to a tensor"
        for name, tensor in tensors.items()
        if not is_text(name)
        or name == "__metadata__"
        or not isinstance(tensor, torch.Tensor)  # the format's own
    ]


def _fact_problems(facts: Mapping[str, Any]) -> list[str]:
    """Name what is wrong with the facts of an observation; those that are missing are not looked at."""
    problems = []
    kind, contributors, metadata = facts.get("kind"), facts.get("contributors"), facts.get("metadata", {})
    if "kind" in facts and (not isinstance(kind, str) or kind not in get_args(Kind)):
        problems.append(f"kind is {show(kind)}, must be one of {get_args(Kind)}")
    for name in [name for name in COUNTS if name in facts]:
        problems += COUNTS[name].problems(name, facts[name])
    several = COUNTS["contributors"].fits(contributors) and contributors != 1
    if several and kind in ("gradient", "delta", "answers"):
        problems.append(f"a {kind} has one contributor, not {contributors}: use kind 'sum'")
    if "observer" in facts and not (is_text(facts["observer"]) and facts["observer"]):
        shown = show(facts["observer"])
        problems.append(f"observer is {shown}, must name the row of the threat model, for example 'server'")
    if not isinstance(metadata, Mapping):
        return [*problems, f"metadata is {show(metadata)}, must map names to facts (in JSON an object)"]
    if kind == "sum" and metadata.get("summand") is None:
        problems.append("a sum needs metadata['summand'] = 'gradient' or 'delta'")
    for name, value in metadata.items():
        if value is not None:
            problems += _metadata_problems(name, value)
    return problems


def _metadata_problems(name: object, value: object) -> list[str]:
    label, choices = f"metadata[{show(name)}]", {"point": get_args(Point), "summand": ("gradient", "delta")}
    if not isinstance(name, str) or not is_text(name):
        return [f"{label} must have text as its name"]
    if name in choices:
        right = isinstance(value, str) and value in choices[name]
        if right:
            return []
        return [f"{label} is {show(value)}, must be one of {choices[name]}"]
    if name in RULES:
        if RULES[name].many:
            return [f"{label} is {show(value)}, but the protocol reveals no lists: grant it in knowledge"]
        return RULES[name].problems(label, value)
    if not isinstance(value, Fact) or (isinstance(value, float) and not math.isfinite(value)):
        return [f"{label} is {show(value)}, must be a finite number, text, truth value or None"]
    return []
