"""Prefixes: trained keys and values in front of every attention layer, a view per sample."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import PrefixTuningConfig
from torch import Tensor, nn
from transformers import DynamicCache

from defenses.dp.expanded import ExpandedParameter
from ffm_secure.errors import ModelError
from ffm_secure.foreign import Configuration, LibraryModel, ModelOutput
from ffm_secure.models.backbone import Backbone
from ffm_secure.trainable.base import stored_tensors, write_own
from ffm_secure.trainable.lora import peft_task
from ffm_secure.trainable.prompt import (
    PROMPT,
    PromptTrainable,
    checked_length,
    head_lines,
    head_parameters,
    peft_sizes,
    with_own_head,
)


class PrefixedModel(nn.Module):
    """Call a model as if `length` tokens had gone before:
    their keys and values are trained, layer by layer.
    """

    def __init__(self, model: LibraryModel, prefix: Tensor, *, heads: int, max_positions: int | None) -> None:
        super().__init__()
        self.model, self.heads, self.max_positions = model, heads, max_positions
        self.prefix = ExpandedParameter(prefix)
        self.config = model.config

    def forward(self, **batch: Tensor) -> ModelOutput:
        """Return the model's output for one batch; its logits are those of the real tokens."""
        tokens, mask = batch["input_ids"], batch["attention_mask"]
        count, length = tokens.shape[0], self.prefix.value.shape[0]
        if self.max_positions is not None and tokens.shape[1] + length > self.max_positions:
            raise ModelError(
                f"{tokens.shape[1]} tokens and {length} of the prefix exceed the {self.max_positions} "
                "positions of the model; lower task.max_length or model.trainable.length"
            )
        longer, cache = torch.cat((mask.new_ones(count, length), mask), dim=1), self.cache(count)

        def hand_over(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[Any, dict[str, Any]]:
            return args, {**kwargs, "attention_mask": longer, "past_key_values": cache}

        # The head never sees the prefix: classifiers that pool over the mask go on pooling over the real
        # tokens.
        handle = attending(self.model).register_forward_pre_hook(hand_over, with_kwargs=True)
        try:
            return self.model(**batch)
        finally:
            handle.remove()

    def cache(self, count: int) -> DynamicCache:
        """Return the prefix as the keys and values of every layer, [B, heads, length, width] each."""
        layers = self.config.num_hidden_layers
        whole = self.prefix(count).unflatten(-1, (2 * layers, self.heads, -1))
        parts = whole.permute(2, 0, 3, 1, 4)
        return DynamicCache([(parts[2 * layer], parts[2 * layer + 1]) for layer in range(layers)])


class Prefix(PromptTrainable):
    """Keys and values of virtual tokens, with the head trained along where there is one."""

    kind = "prefix"

    def export(self, folder: Path, base_model_name: str) -> None:
        """Write a PEFT PREFIX_TUNING adapter; for tasks PEFT has no prefixes for, our own versioned files."""
        task, heads, width = peft_task(self.backbone), *cache_shape(self.backbone)
        length = self.parameters[PROMPT].shape[0]
        if task is None:
            table = {"kind": self.kind, "task": self.backbone.kind, "length": length, "width": heads * width}
            write_own(folder, table, self.parameters, base_model_name)
            return
        sizes = {**peft_sizes(self.backbone, heads * width), "num_attention_heads": heads}
        config = PrefixTuningConfig(
            task_type=task, num_virtual_tokens=length, encoder_hidden_size=width, **sizes
        )
        self.write_prompt(folder, base_model_name, config, self.parameters[PROMPT])

    def import_(self, folder: Path) -> None:
        """Read what `export` wrote."""
        self.load_tensors(stored_tensors(folder))


def attending(model: LibraryModel) -> nn.Module:
    """Return the module that hands keys and values to the layers: OPT's language model calls the decoder in
    its base model itself.
    """
    body = cast(nn.Module, getattr(model, "base_model", model))
    inner: object = getattr(body, "decoder", None)
    if isinstance(inner, nn.Module) and not model.config.is_encoder_decoder:
        return inner
    return body


def cache_shape(backbone: Backbone) -> tuple[int, int]:
    """Return how many heads keys have, and how wide each is."""
    config: Configuration = backbone.model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if config.model_type == "falcon":  # the newer kind repeats shared keys before it keeps them
        if config.multi_query and not config.new_decoder_architecture:
            heads = 1
        else:
            heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(heads), int(width)


def attach_prefix(backbone: Backbone, spec: Mapping[str, Any], *, task_kind: str, seed: int) -> Prefix:
    """Train keys and values of `length` virtual tokens in every layer, without a reparametrisation.

    Source: Li and Liang 2021, arXiv:2101.00190, section 4.2.
    """
    if task_kind == "image_classification":
        raise ModelError(
            "model.trainable.kind = 'prefix': picture models keep no keys and values; use deep_prompt"
        )
    if backbone.config.is_encoder_decoder:
        raise ModelError(
            f"model.trainable.kind = 'prefix': {backbone.architecture} has an encoder beside its decoder, "
            "and its texts go into both; use lora"
        )
    if "past_key_values" not in inspect.signature(attending(backbone.model).forward).parameters:
        raise ModelError(
            f"model.trainable.kind = 'prefix': {backbone.architecture} keeps no "
            "keys and values; use deep_prompt"
        )
    length, model = checked_length(backbone, spec), with_own_head(backbone)
    heads, width = cache_shape(backbone)
    columns = 2 * int(backbone.config.num_hidden_layers) * heads * width
    stream = torch.Generator().manual_seed(seed)
    start = torch.randn((length, columns), generator=stream) * 0.02
    dtype = next(iter(backbone.model.parameters())).dtype
    wrapped = PrefixedModel(model, start.to(dtype), heads=heads, max_positions=backbone.max_positions)
    parameters = {PROMPT: wrapped.prefix.value, **head_parameters(backbone, model)}
    lines = [
        (
            f"prefix of {length} tokens in {backbone.config.num_hidden_layers} layers: "
            f"{length * columns:,} numbers"
        )
    ]
    return Prefix(
        backbone=backbone,
        model=wrapped,
        parameters=parameters,
        description=[*lines, *head_lines(backbone, parameters)],
    )
