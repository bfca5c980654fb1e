"""The trained part of a model as named tensors, as one vector, and as files."""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ffm_secure.errors import ModelError
from ffm_secure.foreign import Configuration, LibraryModel
from ffm_secure.record_codec import read_json
from ffm_secure.models.backbone import Backbone
from ffm_secure.record_codec import require_regular

FORMAT_VERSION = 1
OWN_TENSORS, OWN_CONFIG = "trainable.safetensors", "trainable.json"
PEFT_TENSORS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """Name the tensors of one adapted module:
    its product is `scaling * B A`, and the weight it is added to.
    """

    a: str
    b: str
    weight: str = ""  # the owned weight a rule folds into; empty where the backbone stays shared
    scaling: float
    transposed: bool = False  # the weight is stored [in, out]


class TrainableModel(ABC):
    """A model of which only `parameters` are trained and sent; everything else is frozen and may be shared.

    `parameters` has the canonical order and names, which the vector, the layout and the fingerprint follow.

    Guarantee: exactly the tensors in `parameters` require a gradient; `load_vector(flatten())` changes no
    float32 bit.
    """

    kind: ClassVar[str]

    def __init__(
        self,
        *,
        backbone: Backbone,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        description: Iterable[str],
    ) -> None:
        self.backbone, self.model, self.parameters = backbone, model, parameters
        self.description = tuple(description)
        self.adapters: tuple[Adapter, ...] = ()  # where factors are trained
        self.ranks: tuple[int, ...] = ()  # ranks dealt to the clients in turn, where they differ
        model.eval().requires_grad_(False)
        for parameter in parameters.values():
            parameter.requires_grad_(True)

    @cached_property
    def layout(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Name and shape of every trained tensor, in the order of the vector."""
        return tuple((name, tuple(p.shape)) for name, p in self.parameters.items())

    @cached_property
    def size(self) -> int:
        """Count the trained numbers."""
        return sum(p.numel() for p in self.parameters.values())

    @property
    def active(self) -> dict[str, nn.Parameter]:
        """Return what gets gradients now, in canonical order: everything, but inside `training_only`."""
        return {name: p for name, p in self.parameters.items() if p.requires_grad}

    @contextmanager
    def training_only(self, names: Iterable[str] | None) -> Iterator[None]:
        """Let only the named tensors get gradients for a while; None for all."""
        if names is None:
            yield
            return
        chosen = set(names)
        try:
            for name, parameter in self.parameters.items():
                parameter.requires_grad_(name in chosen)
            yield
        finally:
            for parameter in self.parameters.values():
                parameter.requires_grad_(True)

    def flatten(self) -> Tensor:
        """Return all trained numbers as one new float32 vector [d]."""
        return torch.cat([p.detach().reshape(-1).float() for p in self.parameters.values()])

    def load_vector(self, vector: Tensor) -> None:
        """Set all trained numbers from a vector [d] in the order of `layout`."""
        if tuple(vector.shape) != (self.size,):
            raise ModelError(
                f"vector of shape {list(vector.shape)} does not fit: the model trains {self.size} numbers"
            )
        start = 0
        with torch.no_grad():
            for parameter in self.parameters.values():
                stop = start + parameter.numel()
                parameter.copy_(vector[start:stop].view(parameter.shape))
                start = stop

    def tensors(self) -> dict[str, Tensor]:
        """Copy the trained tensors, by name."""
        tensors: dict[str, Tensor] = {}
        for name, p in self.parameters.items():
            tensors[name] = p.detach().clone()
        return tensors

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the trained tensors by name; names and shapes must be exactly those of `layout`."""
        wrong = []
        for n, shape in self.layout:
            if n not in tensors or tuple(tensors[n].shape) != shape:
                wrong.append(n)
        for name in tensors:
            if name not in self.parameters:
                wrong.append(name)
        if wrong:
            raise ModelError(f"{len(wrong)} tensors do not fit this model (first: {wrong[0]})")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[name])

    def to(self, device: str) -> None:
        """Move the whole model; the parameters keep their identity."""
        self.model.to(device)

    @abstractmethod
    def export(self, folder: Path, base_model_name: str) -> None:
        """Write files that PEFT or transformers load back on the base model (see docs/models.md for each
        kind).
        """

    @abstractmethod
    def import_(self, folder: Path) -> None:
        """Set the trained tensors from files that `export` wrote."""


def replicate(trainable: TrainableModel) -> TrainableModel:
    """Copy a trainable model for another thread: own trained tensors and modules, shared frozen storage.

    Assumes: no gradient hooks hang on the original; a copy would carry them along.
    """
    memo: dict[int, Any] = {id(trainable.backbone): trainable.backbone}
    frozen = (p for p in trainable.model.parameters() if not p.requires_grad)
    for tensor in (*frozen, *trainable.model.buffers()):
        memo[id(tensor)] = tensor
    return copy.deepcopy(trainable, memo)


def sharing_copy(model: nn.Module, *, own: Iterable[nn.Parameter] = ()) -> LibraryModel:
    """Copy a model's modules but share its tensors, except for the parameters in `own`, which are copied."""
    mine = set()
    for parameter in own:
        mine.add(id(parameter))
    shared = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared if id(tensor) not in mine})


def write_peft(
    folder: Path, config: Configuration, tensors: Mapping[str, Tensor], base_model_name: str
) -> None:
    """Write an adapter in PEFT's own two files."""
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.copy(config)
    config.base_model_name_or_path, config.inference_mode = base_model_name, True
    config.save_pretrained(str(folder))
    save_file(_plain(tensors), folder / PEFT_TENSORS, metadata={"format": "pt"})


def write_own(
    folder: Path, table: Mapping[str, Any], tensors: Mapping[str, Tensor], base_model_name: str
) -> None:
    """Write tensors and a small table in our own versioned format, for what PEFT has no type for."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {"format": FORMAT_VERSION, "base_model": base_model_name, **table}
    (folder / OWN_CONFIG).write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n")
    save_file(
        _plain(tensors), folder / OWN_TENSORS, metadata={"format": "pt", "ffm_secure": str(FORMAT_VERSION)}
    )


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """Read a safetensors file of an export."""
    if name == OWN_TENSORS:
        _check_version(folder)
    try:
        require_regular(folder / name)
        return dict(load_file(folder / name))
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder / name}: cannot be read ({error}); export it again") from error


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Read the trained tensors of an export: our own files where there are any, else those of PEFT."""
    own = (folder / OWN_TENSORS).is_file()
    return read_tensors(folder, OWN_TENSORS if own else PEFT_TENSORS)


def _check_version(folder: Path) -> None:
    path = folder / OWN_CONFIG
    try:
        version = read_json(path).get("format")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{path}: cannot be read; export it again") from error
    if version != FORMAT_VERSION:
        raise ModelError(f"{path}: format = {version!r}; this version reads {FORMAT_VERSION}")


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
