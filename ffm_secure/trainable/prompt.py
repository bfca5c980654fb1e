"""Soft prompts: trained vectors in front of every input,
a view per sample so that each has its own gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PromptTuningConfig
from torch import Tensor, nn

from defenses.dp.expanded import ExpandedParameter
from ffm_secure.errors import ModelError
from ffm_secure.foreign import Configuration, LibraryModel, ModelOutput
from ffm_secure.models.backbone import Backbone
from ffm_secure.trainable.base import (
    TrainableModel,
    sharing_copy,
    stored_tensors,
    write_own,
    write_peft,
)
from ffm_secure.trainable.lora import named_inside, peft_task
from ffm_secure.trainable.targets import head_modules

PROMPT = "prompt_embeddings"


class PromptedModel(nn.Module):
    """Put a soft prompt in front of the input and call the model; its logits are those of the real tokens
    alone.

    Text goes through `inputs_embeds` with the attention mask extended; pictures get the prompt between the
    class token and the patches (Jia et al. 2022, arXiv:2203.12119, the shallow form).
    """

    def __init__(self, model: LibraryModel, prompt: Tensor, *, kind: str, max_positions: int | None) -> None:
        super().__init__()
        self.model, self.kind, self.max_positions = model, kind, max_positions
        self.prompt = ExpandedParameter(prompt)
        self.config = model.config

    @property
    def length(self) -> int:
        """Return the number of virtual tokens."""
        return int(self.prompt.value.shape[0])

    def virtual_tokens(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the virtual tokens of every sample, [B, length, d];
        other kinds of prompt compute them here.
        """
        tokens: Tensor = self.prompt(len(next(iter(batch.values()))))
        return tokens

    def forward(self, **batch: Tensor) -> ModelOutput:
        """Return the model's output for one batch."""
        if self.kind == "image_classification":
            return self._pictures(batch["pixel_values"])
        tokens, mask = batch["input_ids"], batch["attention_mask"]
        count, length = tokens.shape[0], self.length
        if self.max_positions is not None and tokens.shape[1] + length > self.max_positions:
            raise ModelError(
                f"{tokens.shape[1]} tokens and {length} of the soft prompt exceed the {self.max_positions} "
                "positions of the model; lower task.max_length or model.trainable.length"
            )
        words = self.model.get_input_embeddings()(tokens)
        inputs: dict[str, Any] = {
            "inputs_embeds": torch.cat((self.virtual_tokens(batch).to(words.dtype), words), dim=1),
            "attention_mask": torch.cat((mask.new_ones(count, length), mask), dim=1),
        }
        if batch.get("token_type_ids") is not None:
            segments = batch["token_type_ids"]
            inputs["token_type_ids"] = torch.cat((segments.new_zeros(count, length), segments), dim=1)
        if self.kind == "text_classification" and hasattr(self.model, "score"):
            return self._last_token(inputs)
        if self.kind == "sequence_to_sequence":  # the prompt stands before what is read
            sides = ("decoder_input_ids", "decoder_attention_mask")
            return self.model(**inputs, **{name: batch[name] for name in sides if name in batch})
        out = self.model(**inputs)
        if self.kind != "text_classification":
            out.logits = out.logits[:, length:]
        return out

    def _last_token(self, inputs: dict[str, Any]) -> ModelOutput:
        """Classify from the last real token. Given embeddings, decoders would take the last padded place
        instead.
        """
        out = self.model.base_model(**inputs)
        mask = inputs["attention_mask"]
        places = torch.arange(mask.shape[1], device=mask.device)
        last = (mask * places).argmax(dim=1)
        hidden = out.last_hidden_state[torch.arange(len(last), device=mask.device), last]
        return _Logits(self.model.score(hidden))

    def _pictures(self, pixels: Tensor) -> ModelOutput:
        prompt = self.virtual_tokens({"pixel_values": pixels})

        def insert(module: nn.Module, args: tuple[Any, ...], tokens: Tensor) -> Tensor:
            return torch.cat((tokens[:, :1], prompt.to(tokens.dtype), tokens[:, 1:]), dim=1)

        handle = self.model.vit.embeddings.register_forward_hook(insert)
        try:
            return self.model(pixel_values=pixels)
        finally:
            handle.remove()


class _Logits:
    """The one field of a model output that tasks read."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class PromptTrainable(TrainableModel):
    """What every kind of prompt shares: the head is trained along where there is one."""

    def write_prompt(self, folder: Path, base_model_name: str, config: Configuration, prompt: Tensor) -> None:
        """Write a PEFT prompt of one tensor, with the head."""
        heads = head_modules(self.backbone)
        if heads:
            config.modules_to_save = list(heads)
        inside = {}
        for name, p in self.parameters.items():
            if name.startswith("base_model."):
                inside[name] = p
        write_peft(folder, config, {PROMPT: prompt, **inside}, base_model_name)


class Prompt(PromptTrainable):
    """A soft prompt, with the head trained along where there is one."""

    kind = "prompt"

    def export(self, folder: Path, base_model_name: str) -> None:
        """Write a PEFT PROMPT_TUNING adapter; for tasks PEFT has no prompts for, our own versioned files."""
        task = peft_task(self.backbone)
        length, width = self.parameters[PROMPT].shape
        if task is None:
            table = {"kind": self.kind, "task": self.backbone.kind, "length": length, "width": width}
            write_own(folder, table, self.parameters, base_model_name)
            return
        peft = PromptTuningConfig(
            task_type=task, num_virtual_tokens=length, **peft_sizes(self.backbone, width)
        )
        self.write_prompt(folder, base_model_name, peft, self.parameters[PROMPT])

    def import_(self, folder: Path) -> None:
        """Read what `export` wrote."""
        self.load_tensors(stored_tensors(folder))


def peft_sizes(backbone: Backbone, width: int) -> dict[str, Any]:
    """Return what PEFT wants to know of the model behind a prompt of `width` numbers a token."""
    config: Configuration = backbone.model.config
    return {
        "token_dim": width,
        "num_transformer_submodules": 1,
        "num_attention_heads": config.num_attention_heads,
        "num_layers": config.num_hidden_layers,
    }


def attach_prompt(backbone: Backbone, spec: Mapping[str, Any], *, task_kind: str, seed: int) -> Prompt:
    """Put `length` trained vectors in front of every input; they start as random words of the vocabulary.

    Source: Lester et al. 2021, arXiv:2104.08691, section 2.1.
    """
    length, model = checked_length(backbone, spec), with_own_head(backbone)
    wrapped = PromptedModel(
        model, start_prompt(backbone, length, seed), kind=task_kind, max_positions=backbone.max_positions
    )
    parameters = {PROMPT: wrapped.prompt.value, **head_parameters(backbone, model)}
    lines = [
        f"soft prompt of {length} tokens x {backbone.hidden_size}: {parameters[PROMPT].numel():,} numbers"
    ]
    return Prompt(
        backbone=backbone,
        model=wrapped,
        parameters=parameters,
        description=[*lines, *head_lines(backbone, parameters)],
    )


def refuse_two_sided(backbone: Backbone, kind: str) -> None:
    """Refuse what stands in front of one text where a model reads one and writes another.

    Raises:
      ModelError: with what to use instead.
    """
    if backbone.kind == "sequence_to_sequence":
        raise ModelError(
            f"model.trainable.kind = {kind!r}: {backbone.architecture} reads one text and writes another; "
            "use prompt, p_tuning or lora"
        )


def checked_length(backbone: Backbone, spec: Mapping[str, Any]) -> int:
    """Return the number of virtual tokens, checked against the positions of the model."""
    length, limit = int(spec.get("length", 16)), backbone.max_positions
    if length < 1 or (limit is not None and length >= limit):
        raise ModelError(
            f"model.trainable.length = {length}: must be from 1 to below {limit}, the model's positions"
        )
    return length


def with_own_head(backbone: Backbone) -> LibraryModel:
    """Copy the model so that only its head is owned; the frozen rest stays shared."""
    owned = []
    for _, p in named_inside(backbone.model, head_modules(backbone)):
        owned.append(p)
    return sharing_copy(backbone.model, own=owned)


def head_parameters(backbone: Backbone, model: LibraryModel) -> dict[str, nn.Parameter]:
    """Name the parameters of the head as PEFT's files do."""
    head_parameters: dict[str, nn.Parameter] = {}
    for name, p in named_inside(model, head_modules(backbone)):
        head_parameters[f"base_model.{name}"] = p
    return head_parameters


def head_lines(backbone: Backbone, parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """Say that the head is trained along, where there is one."""
    heads = head_modules(backbone)
    rest = sum(p.numel() for name, p in parameters.items() if name.startswith("base_model."))
    if heads:
        return [f"the head is trained along: {', '.join(heads)}, {rest:,} numbers"]
    return []


def start_prompt(backbone: Backbone, length: int, seed: int) -> Tensor:
    """Draw where the prompt starts: rows of the vocabulary, or small numbers for pictures."""
    model: LibraryModel = backbone.model
    stream = torch.Generator().manual_seed(seed)
    if backbone.kind == "image_classification":
        if model.config.model_type != "vit":
            raise ModelError(
                f"model.trainable.kind: pictures with a prompt need a ViT, this is {backbone.architecture}"
            )
        return torch.randn((length, backbone.hidden_size), generator=stream) * float(
            model.config.initializer_range
        )
    words: Tensor = model.get_input_embeddings().weight.detach()
    return words[torch.randint(len(words), (length,), generator=stream)].float().clone()
