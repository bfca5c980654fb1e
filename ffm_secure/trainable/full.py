"""Training every number of a model, in a shape that gives per-sample gradients for all of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from defenses.dp.expanded import ExpandedParameter
from ffm_secure.errors import ModelError
from ffm_secure.models import Backbone
from ffm_secure.trainable.base import TrainableModel, sharing_copy

# Families that look positions up with a batch of one, which would hide whose gradient is whose.
_LEARNED_POSITIONS = {"bert", "gpt2", "electra", "distilbert", "albert"}


class Full(TrainableModel):
    """Every parameter of the model is trained."""

    kind = "full"

    def export(self, folder: Path, base_model_name: str) -> None:
        """Write a complete transformers folder: config.json, model.safetensors, the tokenizer where there is one."""
        plain = copy.deepcopy(self.backbone.model)
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                parameter.copy_(self.parameters[name])
        folder.mkdir(parents=True, exist_ok=True)
        plain.save_pretrained(folder)  # type: ignore[operator]
        if self.backbone.tokenizer is not None:
            self.backbone.tokenizer.save_pretrained(folder)

    def import_(self, folder: Path) -> None:
        """Read a transformers folder of the same architecture."""
        try:
            other = type(self.backbone.model).from_pretrained(  # type: ignore[attr-defined]
                folder, use_safetensors=True, local_files_only=True, dtype=next(iter(self.parameters.values())).dtype
            )
        except Exception as error:  # whatever a damaged folder makes the library throw becomes one error of ours
            raise ModelError(f"{folder}: cannot be read as {self.backbone.architecture} ({error})") from error
        self.load_tensors({name: p.detach() for name, p in other.named_parameters()})


def attach_full(backbone: Backbone, spec: Mapping[str, Any], *, task_kind: str, seed: int) -> Full:
    """Train everything; a parameter that is fed once for the whole batch is expanded to a view per sample."""
    model = sharing_copy(backbone.model, own=list(backbone.model.parameters()))
    config: Any = model.config
    if config.model_type == "vit":
        model.vit.embeddings = PerSampleViTEmbeddings(model.vit.embeddings)
    if config.model_type in _LEARNED_POSITIONS:
        model.register_forward_pre_hook(give_positions, with_kwargs=True)
    parameters = {name.removesuffix(".value"): p for name, p in model.named_parameters()}
    order = [name for name, _ in backbone.model.named_parameters()]
    parameters = {name: parameters[name] for name in order}
    total = sum(p.numel() for p in parameters.values())
    return Full(
        backbone=backbone, model=model, parameters=parameters, description=[f"every parameter: {total:,} numbers"]
    )


def give_positions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Hand a model its positions once per sample instead of once per batch."""
    tokens: Tensor | None = kwargs.get("input_ids")
    if tokens is None or kwargs.get("position_ids") is not None:
        return args, kwargs
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    return args, {**kwargs, "position_ids": positions}


class PerSampleViTEmbeddings(nn.Module):
    """The patch, class-token and position embeddings of a ViT with the last two expanded per sample."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.patch_embeddings = inner.patch_embeddings
        self.cls_token = ExpandedParameter(inner.cls_token)
        self.position_embeddings = ExpandedParameter(inner.position_embeddings)

    def forward(self, pixel_values: Tensor, **unused: Any) -> Tensor:
        """Return token embeddings [B, 1 + patches, d]."""
        count = pixel_values.shape[0]
        patches = self.patch_embeddings(pixel_values)
        tokens = torch.cat((self.cls_token(count).flatten(1, 2), patches), dim=1)
        positions: Tensor = self.position_embeddings(count).flatten(1, 2)
        return tokens + positions
