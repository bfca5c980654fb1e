"""LoRA through PEFT, and the head alone in the same file format."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn

from ffm_secure.errors import ModelError
from ffm_secure.models import Backbone
from ffm_secure.trainable.base import PEFT_TENSORS, TrainableModel, read_tensors, sharing_copy, write_peft
from ffm_secure.trainable.targets import head_modules, is_conv1d, lora_targets

TASK_TYPES = {"text_classification": TaskType.SEQ_CLS, "causal_lm": TaskType.CAUSAL_LM}
_NO_TARGETS = "dummy-target-modules"  # PEFT's own word for an adapter that only carries saved modules


class PeftAdapter(TrainableModel):
    """A trained part that PEFT loads back: names are those of PEFT's files."""

    def __init__(self, *, config: LoraConfig, **rest: Any) -> None:
        super().__init__(**rest)
        self.config = config

    def export(self, folder: Path, base_model_name: str) -> None:
        """Write `adapter_model.safetensors` and `adapter_config.json` for `PeftModel.from_pretrained`."""
        write_peft(folder, self.config, self.parameters, base_model_name)

    def import_(self, folder: Path) -> None:
        """Read what `export` or PEFT wrote."""
        self.load_tensors(read_tensors(folder, PEFT_TENSORS))


class Lora(PeftAdapter):
    """Low-rank adapters beside frozen linear modules; the head is trained along."""

    kind = "lora"


class Head(PeftAdapter):
    """The classification head alone."""

    kind = "head"


def attach_lora(backbone: Backbone, spec: Mapping[str, Any], *, task_kind: str, seed: int) -> Lora:
    """Put LoRA adapters of `rank` beside the chosen modules; B starts at zero, so the model starts unchanged.

    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1.
    """
    rank, alpha = int(spec.get("rank", 8)), float(spec.get("alpha", 16.0))
    if rank < 1:
        raise ModelError(f"model.trainable.rank = {rank}: must be at least 1")
    heads = head_modules(backbone)
    wanted = spec.get("target_modules") or ()
    wanted = (wanted,) if isinstance(wanted, str) else tuple(wanted)
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
        wrapped = get_peft_model(sharing_copy(backbone.model), config)
    parameters = {_peft_name(name): p for name, p in wrapped.named_parameters() if p.requires_grad}
    return Lora(
        config=config,
        backbone=backbone,
        model=wrapped.get_base_model(),
        parameters=parameters,
        description=_describe(rank, alpha, targets, heads, parameters),
    )


def attach_head(backbone: Backbone, spec: Mapping[str, Any], *, task_kind: str, seed: int) -> Head:
    """Train the classification head and nothing else."""
    if not task_kind.endswith("classification"):
        raise ModelError(f"model.trainable.kind = 'head': {task_kind} has no head of its own; use lora, prompt or full")
    heads = head_modules(backbone)
    inside = {id(p) for name in heads for p in backbone.model.get_submodule(name).parameters()}
    model = sharing_copy(backbone.model, own=[p for p in backbone.model.parameters() if id(p) in inside])
    parameters = {f"base_model.model.{name}": p for name, p in named_inside(model, heads)}
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
    rank: int, alpha: float, targets: tuple[str, ...], heads: tuple[str, ...], parameters: Mapping[str, nn.Parameter]
) -> list[str]:
    adapters = {name: p for name, p in parameters.items() if ".lora_" in name}
    leaves = sorted({target.rpartition(".")[2] for target in targets})
    size = f"{len(adapters) // 2} modules, {_count(adapters):,} numbers"
    lines = [f"LoRA rank {rank}, alpha {alpha:g} on {', '.join(leaves)}: {size}"]
    if heads:
        rest = _count(parameters) - _count(adapters)
        lines.append(f"the head is trained along: {', '.join(heads)}, {rest:,} numbers")
    return lines


def _count(parameters: Mapping[str, nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters.values())
