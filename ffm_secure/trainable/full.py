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
from ffm_secure.foreign import Configuration, LibraryModel
from ffm_secure.models.backbone import Backbone, quiet
from ffm_secure.trainable.base import TrainableModel, sharing_copy
from ffm_secure.trainable.batch_axis import restore_batch_axis

# Families that look positions up with a batch of one, which would hide whose gradient is whose.
_LEARNED_POSITIONS = {"bert", "gpt2", "electra", "distilbert", "albert"}


class Full(TrainableModel):
    """Every parameter of the model is trained."""

    kind = "full"

    def export(self, folder: Path, base_model_name: str) -> None:
        """Write a complete transformers folder: config.json, model.safetensors, the tokenizer where there is
        one.
        """
        plain = copy.deepcopy(self.backbone.model)
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                parameter.copy_(self.parameters[name])
        folder.mkdir(parents=True, exist_ok=True)
        with quiet():
            plain.save_pretrained(folder)  # type: ignore[operator]
        if self.backbone.tokenizer is not None:
            self.backbone.tokenizer.save_pretrained(folder)

    def import_(self, folder: Path) -> None:
        """Read a transformers folder of the same architecture."""
        kind: LibraryModel = type(self.backbone.model)
        try:
            with quiet():
                other, report = kind.from_pretrained(
                    folder,
                    use_safetensors=True,
                    local_files_only=True,
                    dtype=next(iter(self.parameters.values())).dtype,
                    output_loading_info=True,
                )
        except (
            Exception
        ) as error:  # whatever a damaged folder makes the library throw becomes one error of ours
            raise ModelError(f"{folder}: cannot be read as {self.backbone.architecture} ({error})") from error
        if report["missing_keys"] or report["unexpected_keys"]:
            raise ModelError(f"{folder}: does not hold the tensors of {self.backbone.architecture}")
        self.load_tensors({name: p.detach() for name, p in other.named_parameters()})


def attach_full(backbone: Backbone, spec: Mapping[str, Any], *, task_kind: str, seed: int) -> Full:
    """Train everything; a parameter that is fed once for the whole batch is expanded to a view per sample."""
    model = sharing_copy(backbone.model, own=list(backbone.model.parameters()))
    parameters = dict(model.named_parameters())
    config: Configuration = model.config
    if config.model_type == "vit":
        model.vit.embeddings = PerSampleViTEmbeddings(model.vit.embeddings)
    if config.model_type in _LEARNED_POSITIONS:
        model.register_forward_pre_hook(give_positions, with_kwargs=True)
    _leave_to_linear(model)
    restore_batch_axis(model)
    total = sum(p.numel() for p in parameters.values())
    return Full(
        backbone=backbone,
        model=model,
        parameters=parameters,
        description=[f"every parameter: {total:,} numbers"],
    )


def _leave_to_linear(model: nn.Module) -> None:
    """Let a parameter that a linear module uses belong to it alone; masked-LM heads register their bias a
    second time.
    """
    used = set()
    for m in model.modules():
        if isinstance(m, nn.Linear):
            for p in m.parameters(recurse=False):
                used.add(id(p))
    for module in model.modules():
        if not isinstance(module, nn.Linear) and any(True for _ in module.children()):
            for name, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) in used:
                    delattr(module, name)


def give_positions(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Hand a model its positions once per sample instead of once per batch."""
    tokens: Tensor | None = kwargs.get("input_ids")
    if tokens is None or kwargs.get("position_ids") is not None:
        return args, kwargs
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    return args, {**kwargs, "position_ids": positions}


class PerSampleViTEmbeddings(nn.Module):
    """The patch, class-token and position embeddings of a ViT with the last two expanded per sample."""

    def __init__(self, inner: LibraryModel) -> None:
        super().__init__()
        self.patch_embeddings = inner.patch_embeddings
        self.cls_token = _expanded(inner.cls_token)
        self.position_embeddings = _expanded(inner.position_embeddings)

    def forward(self, pixel_values: Tensor, **unused: object) -> Tensor:
        """Return token embeddings [B, 1 + patches, d]."""
        count = pixel_values.shape[0]
        patches = self.patch_embeddings(pixel_values)
        tokens = torch.cat((self.cls_token(count).flatten(1, 2), patches), dim=1)
        positions: Tensor = self.position_embeddings(count).flatten(1, 2)
        return tokens + positions


def _expanded(parameter: nn.Parameter) -> ExpandedParameter:
    """Wrap a parameter so that it keeps its identity."""
    module = ExpandedParameter(parameter.detach())
    module.value = parameter
    return module
