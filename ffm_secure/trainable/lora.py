"""LoRA through PEFT, and the head alone in the same file format."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn

from ffm_secure.errors import ModelError
from ffm_secure.foreign import LibraryModel
from ffm_secure.models.backbone import Backbone
from ffm_secure.trainable.base import (
    OWN_TENSORS,
    Adapter,
    TrainableModel,
    read_tensors,
    sharing_copy,
    stored_tensors,
    write_own,
    write_peft,
)
from ffm_secure.trainable.batch_axis import restore_batch_axis
from ffm_secure.trainable.context import ClassResidual, attach_residual
from ffm_secure.trainable.targets import has_own_head, head_modules, is_conv1d, lora_targets, matches

TASK_TYPES = {
    "text_classification": TaskType.SEQ_CLS,
    "causal_lm": TaskType.CAUSAL_LM,
    "sequence_to_sequence": TaskType.SEQ_2_SEQ_LM,
}


def peft_task(backbone: Backbone) -> TaskType | None:
    """Return PEFT's word for a task; None where it has none, or where the head is no class that PEFT's users
    have.
    """
    if has_own_head(backbone):
        return None
    return TASK_TYPES.get(backbone.kind)


CORE = "lora_core.weight"
_NO_TARGETS = "dummy-target-modules"  # PEFT's own word for an adapter that only carries saved modules


class _Configured(TrainableModel):
    """A trained part that PEFT's own configuration describes."""

    def __init__(
        self,
        *,
        config: LoraConfig,
        backbone: Backbone,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        description: Iterable[str],
    ) -> None:
        super().__init__(backbone=backbone, model=model, parameters=parameters, description=description)
        self.config = config


class PeftAdapter(_Configured):
    """A trained part that PEFT loads back: names are those of PEFT's files."""

    def export(self, folder: Path, base_model_name: str) -> None:
        """Write `adapter_model.safetensors` and `adapter_config.json` for `PeftModel.from_pretrained`.

        Before a mean-pooling head they would load without an error on a head that answers something else: our
        own files.
        """
        if has_own_head(self.backbone):
            write_own(
                folder, {"kind": self.kind, "task": self.backbone.kind}, self.parameters, base_model_name
            )
            return
        write_peft(folder, self.config, self.parameters, base_model_name)

    def import_(self, folder: Path) -> None:
        """Read what `export` or PEFT wrote."""
        self.load_tensors(stored_tensors(folder))


class Lora(PeftAdapter):
    """Low-rank adapters beside frozen linear modules; the head is trained along."""

    kind = "lora"


class FoldedLora(TrainableModel):
    """LoRA beside weights that are owned and may be folded into; they travel with the global vector."""

    kind = "lora"

    def export(self, folder: Path, base_model_name: str) -> None:
        """Write factors and weights in our own files; PEFT's hold no changed weight."""
        table = {"kind": self.kind, "task": self.backbone.kind, "folded": True}
        write_own(folder, table, self.parameters, base_model_name)

    def import_(self, folder: Path) -> None:
        """Read what `export` wrote."""
        self.load_tensors(read_tensors(folder, OWN_TENSORS))


class LoraXs(_Configured):
    """A core of rank x rank numbers between two frozen factors of each weight; the head is trained along."""

    kind = "lora_xs"

    def export(self, folder: Path, base_model_name: str) -> None:
        """Write the cores in our own files, and B R beside A as a plain LoRA adapter for PEFT."""
        write_own(folder, {"kind": self.kind, "task": self.backbone.kind}, self.parameters, base_model_name)
        if has_own_head(self.backbone):
            return
        tensors = {name: p for name, p in self.parameters.items() if not name.endswith(CORE)}
        for path, layer in lora_layers(self.model):
            core, outer = layer.lora_B["default"]
            name = f"base_model.model.{path}"
            tensors[f"{name}.lora_A.weight"] = layer.lora_A["default"].weight
            tensors[f"{name}.lora_B.weight"] = outer.weight.detach() @ core.weight.detach()
        write_peft(folder, self.config, tensors, base_model_name)

    def import_(self, folder: Path) -> None:
        """Read the cores that `export` wrote."""
        self.load_tensors(read_tensors(folder, OWN_TENSORS))


class Head(PeftAdapter):
    """The classification head alone."""

    kind = "head"


def attach_lora(
    backbone: Backbone, spec: Mapping[str, Any], *, task_kind: str, seed: int
) -> Lora | FoldedLora:
    """Put LoRA adapters of `rank` beside the chosen modules; B starts at zero, so the model starts unchanged.

    With `folded` the weights of these modules are owned and belong to the vector, for rules that fold into
    them; with `ranks` clients use different ranks, and `rank` is the largest of them.
    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1.
    """
    ranks = tuple(int(rank) for rank in spec.get("ranks") or ())
    if ranks:
        spec = {**spec, "rank": max(ranks)}
    folded = bool(spec.get("folded"))
    wrapped, config, lines = _wrap(backbone, spec, task_kind=task_kind, seed=seed, folded=folded)
    model = wrapped.get_base_model()
    parameters = {}
    for name, p in wrapped.named_parameters():
        if p.requires_grad:
            parameters[_peft_name(name)] = p
    layers = lora_layers(model)
    flat = all(
        layer.get_base_layer().weight.ndim == 2 for _, layer in layers
    )  # rules multiply factors as matrices
    if folded and not flat:
        raise ModelError(
            "federation.strategy changes the weights beside the factors, and those of "
            f"{backbone.architecture} are convolutions; use federation.strategy.kind = 'average'"
        )
    if flat:
        adapters = tuple(_adapter(path, layer, folded) for path, layer in layers)
    else:
        adapters = ()
    common: dict[str, Any] = {
        "backbone": backbone,
        "model": model,
        "parameters": parameters,
        "description": lines,
    }
    if folded:
        trainable: Lora | FoldedLora = FoldedLora(**common)
    else:
        trainable = Lora(config=config, **common)
    trainable.adapters, trainable.ranks = adapters, ranks
    return trainable


def attach_lora_xs(backbone: Backbone, spec: Mapping[str, Any], *, task_kind: str, seed: int) -> LoraXs:
    """Train a core R of rank x rank between B = U S and A = V^T of each weight's singular value
    decomposition.

    R starts at zero. B and A are the same for everyone, so the mean of the cores is exact, and rank^2 numbers
    a module travel.
    Source: Balazy et al. 2024, arXiv:2405.17604, section 3; Singhal et al. 2025, arXiv:2502.15436, for the
    federated form.
    """
    wrapped, config, lines = _wrap(backbone, spec, task_kind=task_kind, seed=seed, folded=False)
    model = wrapped.get_base_model()
    cores: dict[str, nn.Parameter] = {}
    for path, layer in lora_layers(model):
        cores[f"base_model.model.{path}.{CORE}"] = _put_core(path, layer)
    heads = {}
    for name, p in wrapped.named_parameters():
        if p.requires_grad and ".lora_" not in name:
            heads[_peft_name(name)] = p
    size = sum(p.numel() for p in cores.values())
    lines = [
        f"cores of {config.r} x {config.r} between frozen factors of {len(cores)} modules: {size:,} numbers",
        *lines[1:],
    ]
    return LoraXs(
        config=config, backbone=backbone, model=model, parameters={**cores, **heads}, description=lines
    )


def lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """List the adapted modules with their paths, in model order."""
    lora_layers: list[tuple[str, Any]] = []
    for path, m in model.named_modules():
        if "default" in getattr(m, "lora_A", {}):
            lora_layers.append((path, m))
    return lora_layers


def _adapter(path: str, layer: LibraryModel, folded: bool) -> Adapter:
    name = f"base_model.model.{path}"
    return Adapter(
        a=f"{name}.lora_A.weight",
        b=f"{name}.lora_B.weight",
        weight=f"{name}.base_layer.weight" if folded else "",
        scaling=float(layer.scaling["default"]),
        transposed=bool(getattr(layer, "fan_in_fan_out", False)),
    )


def _put_core(path: str, layer: LibraryModel) -> nn.Parameter:
    """Set A and B from the weight and put a core of zeros between them."""
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    rank, weight = a.weight.shape[0], layer.get_base_layer().weight.detach().float()
    if weight.ndim != 2:
        raise ModelError(f"model.trainable.kind = 'lora_xs': {path} is a convolution; use lora or head")
    if rank > min(weight.shape):
        raise ModelError(f"model.trainable.rank = {rank}: {path} has rank {min(weight.shape)} at most")
    u, s, vt = torch.linalg.svd(weight.t() if layer.fan_in_fan_out else weight, full_matrices=False)
    sign = torch.sign(u[u.abs().argmax(dim=0), torch.arange(u.shape[1])])[
        :rank
    ]  # the same signs on every machine
    with torch.no_grad():
        a.weight.copy_(vt[:rank] * sign[:, None])
        b.weight.copy_(u[:, :rank] * (s[:rank] * sign))
    core = nn.Linear(rank, rank, bias=False, dtype=b.weight.dtype)
    nn.init.zeros_(core.weight)
    layer.lora_B["default"] = nn.Sequential(core, b)
    return cast(nn.Parameter, core.weight)


def _wrap(
    backbone: Backbone, spec: Mapping[str, Any], *, task_kind: str, seed: int, folded: bool
) -> tuple[Any, LoraConfig, list[str]]:
    """Put adapters on a copy of the model that shares the frozen tensors."""
    rank, alpha = int(spec.get("rank", 8)), float(spec.get("alpha", 16.0))
    if rank < 1:
        raise ModelError(f"model.trainable.rank = {rank}: must be at least 1")
    heads = head_modules(backbone)
    wanted = spec.get("target_modules") or ()
    if isinstance(wanted, str):
        wanted = (wanted,)
    else:
        wanted = tuple(wanted)
    targets = lora_targets(backbone, wanted, outside=heads)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=float(spec.get("dropout", 0.0)),
        target_modules=list(targets),
        modules_to_save=list(heads) or None,
        fan_in_fan_out=is_conv1d(backbone.model, targets),
        task_type=TASK_TYPES.get(task_kind),
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT advises on tied embeddings, which LoRA leaves alone here
        torch.manual_seed(seed)
        try:
            wrapped = get_peft_model(_copy_for(backbone, targets, heads, folded), config)
        except (
            ValueError,
            NotImplementedError,
        ) as error:  # what PEFT refuses for an architecture is one error of ours
            reason = (str(error).strip().splitlines() or ["no reason"])[0][:300]
            raise ModelError(f"model.trainable.target_modules: {backbone.architecture}: {reason}") from error
    restore_batch_axis(wrapped.get_base_model())
    parameters = {}
    for name, p in wrapped.named_parameters():
        if p.requires_grad:
            parameters[_peft_name(name)] = p
    lines = _describe(rank, alpha, targets, heads, parameters)
    for _, layer in lora_layers(wrapped.get_base_model()) if folded else ():
        layer.get_base_layer().weight.requires_grad_(True)
    return wrapped, config, lines


def _copy_for(
    backbone: Backbone, targets: tuple[str, ...], heads: tuple[str, ...], folded: bool
) -> LibraryModel:
    """Copy the model; with `folded` the weights of the adapted modules are its own."""
    model = backbone.model
    if not folded:
        return sharing_copy(model)
    chosen = []
    for path, m in model.named_modules():
        if any(matches(path, target) for target in targets):
            chosen.append(m)
    return sharing_copy(model, own=[m.weight for m in chosen if isinstance(m.weight, nn.Parameter)])


def attach_head(
    backbone: Backbone, spec: Mapping[str, Any], *, task_kind: str, seed: int
) -> Head | ClassResidual:
    """Train the classification head and nothing else."""
    if task_kind.startswith("image_text"):
        return attach_residual(backbone)
    if not task_kind.endswith("classification"):
        raise ModelError(
            f"model.trainable.kind = 'head': {task_kind} has no head of its own; use lora, prompt or full"
        )
    heads = head_modules(backbone)
    inside = set()
    for name in heads:
        for p in backbone.model.get_submodule(name).parameters():
            inside.add(id(p))
    model = sharing_copy(backbone.model, own=[p for p in backbone.model.parameters() if id(p) in inside])
    parameters = {}
    for name, p in named_inside(model, heads):
        parameters[f"base_model.model.{name}"] = p
    config = LoraConfig(
        r=1, target_modules=_NO_TARGETS, modules_to_save=list(heads), task_type=TASK_TYPES.get(task_kind)
    )
    lines = [f"the head: {', '.join(heads)}, {_count(parameters):,} numbers"]
    return Head(config=config, backbone=backbone, model=model, parameters=parameters, description=lines)


def named_inside(model: nn.Module, modules: tuple[str, ...]) -> list[tuple[str, nn.Parameter]]:
    """List the parameters inside some modules, in model order."""
    return [(n, p) for n, p in model.named_parameters() if any(n.startswith(f"{m}.") for m in modules)]


def _peft_name(name: str) -> str:
    """Return the name PEFT gives a parameter in its files."""
    return name.replace(".modules_to_save.default.", ".").replace(".default.", ".")


def _describe(
    rank: int,
    alpha: float,
    targets: tuple[str, ...],
    heads: tuple[str, ...],
    parameters: Mapping[str, nn.Parameter],
) -> list[str]:
    adapters = {}
    for name, p in parameters.items():
        if ".lora_" in name:
            adapters[name] = p
    leaves = sorted({target.rpartition(".")[2] for target in targets})
    size = f"{len(adapters) // 2} modules, {_count(adapters):,} numbers"
    lines = [f"LoRA rank {rank}, alpha {alpha:g} on {', '.join(leaves)}: {size}"]
    if heads:
        rest = _count(parameters) - _count(adapters)
        lines.append(f"the head is trained along: {', '.join(heads)}, {rest:,} numbers")
    return lines


def _count(parameters: Mapping[str, nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters.values())
