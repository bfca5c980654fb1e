"""Prompts that are more than one trained vector a token:
encoded, deep, and generated from the input itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PromptEncoderConfig
from torch import Tensor, nn

from defenses.dp.expanded import ExpandedParameter
from ffm_secure.errors import ModelError
from ffm_secure.foreign import LibraryModel, ModelOutput
from ffm_secure.models.backbone import Backbone
from ffm_secure.trainable.base import OWN_TENSORS, TrainableModel, read_tensors, write_own
from ffm_secure.trainable.lora import peft_task
from ffm_secure.trainable.prompt import (
    PromptedModel,
    PromptTrainable,
    checked_length,
    head_lines,
    head_parameters,
    peft_sizes,
    refuse_two_sided,
    start_prompt,
    with_own_head,
)


class OwnFormat(PromptTrainable):
    """A prompt PEFT has no type for: our own versioned files."""

    def export(self, folder: Path, base_model_name: str) -> None:
        """Write `trainable.safetensors` and `trainable.json`."""
        table = {
            "kind": self.kind,
            "task": self.backbone.kind,
            "shapes": {n: list(s) for n, s in self.layout},
        }
        write_own(folder, table, self.parameters, base_model_name)

    def import_(self, folder: Path) -> None:
        """Read what `export` wrote."""
        self.load_tensors(read_tensors(folder, OWN_TENSORS))


# --- p-tuning -----------------------------------------------------------------------------------------------


class EncodedPrompt(PromptedModel):
    """A prompt that a small network makes of trained inputs; every sample runs it for itself."""

    def __init__(
        self, model: LibraryModel, prompt: Tensor, *, hidden: int, kind: str, max_positions: int | None
    ) -> None:
        super().__init__(model, prompt, kind=kind, max_positions=max_positions)
        width = prompt.shape[1]
        layers = [
            nn.Linear(width, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, width),
        ]
        self.encoder = nn.Sequential(*layers)

    def virtual_tokens(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the encoded prompt, [B, length, d]; nothing in it depends on the sample."""
        encoded: Tensor = self.encoder(super().virtual_tokens(batch))
        return encoded


class PTuning(OwnFormat):
    """A prompt encoder; what the model needs afterwards is the encoded prompt alone."""

    kind = "p_tuning"

    def export(self, folder: Path, base_model_name: str) -> None:
        """Write the encoder in our own files and, where PEFT knows the task, the encoded prompt as a P_TUNING
        adapter.
        """
        super().export(folder, base_model_name)
        task = peft_task(self.backbone)
        if task is None:
            return
        model: LibraryModel = self.model
        with torch.no_grad():
            prompt = model.encoder(model.prompt.value)
        length, width = prompt.shape
        config = PromptEncoderConfig(
            task_type=task,
            num_virtual_tokens=length,
            encoder_hidden_size=model.encoder[0].out_features,
            **peft_sizes(self.backbone, width),
        )
        self.write_prompt(folder, base_model_name, config, prompt)


def attach_p_tuning(backbone: Backbone, spec: Mapping[str, Any], *, task_kind: str, seed: int) -> PTuning:
    """Train the inputs and the weights of a prompt encoder, the MLP form.

    Source: Liu et al. 2021, arXiv:2103.10385, section 3.2.
    """
    length, hidden = checked_length(backbone, spec), int(spec.get("hidden", 64))
    build = partial(EncodedPrompt, hidden=hidden, kind=task_kind, max_positions=backbone.max_positions)
    wrapped = _seeded(build, with_own_head(backbone), start_prompt(backbone, length, seed), seed=seed)
    own = {"prompt_encoder.embedding": wrapped.prompt.value, **_named(wrapped.encoder, "prompt_encoder")}
    line = f"prompt encoder for {length} tokens, {hidden} wide: {_count(own):,} numbers"
    trainable: PTuning = _finish(PTuning, backbone, wrapped, own, line)
    return trainable


# --- deep prompts -------------------------------------------------------------------------------------------


class DeepPromptedModel(PromptedModel):
    """A prompt of its own for every layer: what a layer made of its virtual tokens is replaced before the
    next.
    """

    def __init__(
        self, model: LibraryModel, prompt: Tensor, deeper: Tensor, *, kind: str, max_positions: int | None
    ) -> None:
        super().__init__(model, prompt, kind=kind, max_positions=max_positions)
        self.deeper = ExpandedParameter(deeper)

    def forward(self, **batch: Tensor) -> ModelOutput:
        """Return the model's output for one batch."""
        later = self.deeper(len(next(iter(batch.values()))))  # [B, layers - 1, length, d]
        first = 0
        if self.kind == "image_classification":
            first = 1
        with ExitStack() as hooks:
            for number, layer in enumerate(layers_of(self.model)[1:]):
                hook = partial(_replace, first, later[:, number])
                hooks.callback(layer.register_forward_pre_hook(hook).remove)
            return super().forward(**batch)


def _replace(first: int, prompt: Tensor, layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    hidden = inputs[0]
    rest = hidden[:, first + prompt.shape[1] :]
    return (torch.cat((hidden[:, :first], prompt.to(hidden.dtype), rest), dim=1), *inputs[1:])


def layers_of(model: LibraryModel) -> list[nn.Module]:
    """Return the transformer layers of a model, in order.

    Raises:
      ModelError: the model keeps them in no single list.
    """
    count = int(getattr(model.config, "num_hidden_layers", 0))
    lists = []
    for m in model.base_model.modules():
        if count and isinstance(m, nn.ModuleList) and len(m) == count:
            lists.append(m)
    if not lists:
        raise ModelError(
            f"model.trainable.kind = 'deep_prompt': {type(model).__name__} keeps its layers in no single "
            "list; use lora or head"
        )
    return list(lists[0])


class DeepPrompt(OwnFormat):
    """A prompt in front of every layer."""

    kind = "deep_prompt"


def attach_deep_prompt(
    backbone: Backbone, spec: Mapping[str, Any], *, task_kind: str, seed: int
) -> DeepPrompt:
    """Train `length` virtual tokens for every layer; those of later layers start small.

    Source: Jia et al. 2022, arXiv:2203.12119, section 3.2 (deep form); Liu et al. 2022, arXiv:2110.07602, for
    text.
    """
    refuse_two_sided(backbone, "deep_prompt")
    length, model = checked_length(backbone, spec), with_own_head(backbone)
    count = len(layers_of(model))
    stream = torch.Generator().manual_seed(seed + 1)
    later = torch.randn((count - 1, length, backbone.hidden_size), generator=stream) * 0.02
    wrapped = DeepPromptedModel(
        model,
        start_prompt(backbone, length, seed),
        later,
        kind=task_kind,
        max_positions=backbone.max_positions,
    )
    own = {"prompts.first": wrapped.prompt.value, "prompts.later": wrapped.deeper.value}
    line = f"deep prompt of {length} tokens for each of {count} layers: {_count(own):,} numbers"
    trainable: DeepPrompt = _finish(DeepPrompt, backbone, wrapped, own, line)
    return trainable


# --- the prompt generator -----------------------------------------------------------------------------------


class GeneratedPrompt(PromptedModel):
    """A prompt made for each input from the input's own frozen representation r: base + U (code * tanh(V
    norm(r))).

    All virtual tokens share V [hidden, d] and U [d, hidden]; each has a base [d] and a code [hidden] of its
    own, so the weights that travel grow with 2 d hidden + length (d + hidden).
    """

    def __init__(
        self,
        model: LibraryModel,
        prompt: Tensor,
        *,
        hidden: int,
        representation: str,
        kind: str,
        max_positions: int | None,
        input_width: int,
    ) -> None:
        super().__init__(model, prompt, kind=kind, max_positions=max_positions)
        length, width = prompt.shape
        self.representation = representation
        self.code = ExpandedParameter(torch.randn(length, hidden))
        self.down = nn.Linear(input_width, hidden)  # some families have embeddings narrower than the model
        self.up = nn.Linear(hidden, width, bias=False)
        nn.init.zeros_(self.up.weight)  # the first prompt is the base alone

    def virtual_tokens(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return a prompt of its own for every sample, [B, length, d]."""
        base, count = super().virtual_tokens(batch), len(next(iter(batch.values())))
        representation = self.frozen_representation(batch).float()
        inner = torch.tanh(self.down(F.layer_norm(representation, representation.shape[1:]).to(base.dtype)))
        prompt: Tensor = self.up(self.code(count) * inner.unsqueeze(1))
        return base + prompt

    @torch.no_grad()
    def frozen_representation(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return [B, d], computed without the prompt and without a gradient: of the whole model, or of its
        first layer.
        """
        if self.kind == "image_classification":
            if self.representation == "model":
                body = self.model.vit
            else:
                body = self.model.vit.embeddings
            out = body(pixel_values=batch["pixel_values"])
            if self.representation == "model":
                hidden: Tensor = out.last_hidden_state
            else:
                hidden = out
            return hidden.mean(dim=1)
        mask = batch["attention_mask"]
        if self.representation == "model":
            names = ("input_ids", "attention_mask", "token_type_ids")
            inputs = {}
            for name in names:
                if batch.get(name) is not None:
                    inputs[name] = batch[name]
            hidden = self.model.base_model(**inputs).last_hidden_state
        else:
            hidden = self.model.get_input_embeddings()(batch["input_ids"])
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1.0)


class PromptGenerator(OwnFormat):
    """A small network that makes a prompt for each input; only its weights travel."""

    kind = "prompt_generator"


def attach_prompt_generator(
    backbone: Backbone, spec: Mapping[str, Any], *, task_kind: str, seed: int
) -> PromptGenerator:
    """Train a network that conditions the prompt on the input; it starts as a plain soft prompt.

    Source: Wu et al. 2022, arXiv:2204.04497, section 3 (instance-dependent prompts from a frozen
    representation); the tokens share one up-projection here, to keep what travels small.
    """
    refuse_two_sided(backbone, "prompt_generator")
    if task_kind == "causal_lm":
        raise ModelError(
            "model.trainable.kind = 'prompt_generator': its prompt is made of the whole text, so a causal "
            "language model would be told the words it has to predict; use prompt, "
            "p_tuning, prefix or deep_prompt"
        )
    length, hidden = checked_length(backbone, spec), int(spec.get("hidden", 64))
    representation = str(spec.get("representation", "model"))
    start = start_prompt(backbone, length, seed)
    build = partial(
        GeneratedPrompt,
        hidden=hidden,
        representation=representation,
        kind=task_kind,
        max_positions=backbone.max_positions,
        input_width=backbone.hidden_size if representation == "model" else start.shape[1],
    )
    wrapped = _seeded(build, with_own_head(backbone), start, seed=seed)
    own = {
        "generator.base": wrapped.prompt.value,
        "generator.code": wrapped.code.value,
        **_named(wrapped.down, "generator.down"),
        **_named(wrapped.up, "generator.up"),
    }
    source = "the input's embeddings"
    if representation == "model":
        source = "the frozen model's view of the input"
    line = f"prompt generator for {length} tokens from {source}, {hidden} wide: {_count(own):,} numbers"
    trainable: PromptGenerator = _finish(PromptGenerator, backbone, wrapped, own, line)
    return trainable


def _finish(
    kind: Callable[..., Any],
    backbone: Backbone,
    wrapped: LibraryModel,
    own: dict[str, nn.Parameter],
    line: str,
) -> LibraryModel:
    parameters = {**own, **head_parameters(backbone, wrapped.model)}
    wrapped.to(next(iter(backbone.model.parameters())).dtype)
    lines = [line, *head_lines(backbone, parameters)]
    trainable: TrainableModel = kind(
        backbone=backbone, model=wrapped, parameters=parameters, description=lines
    )
    return trainable


def _seeded(build: Callable[..., Any], *inputs: object, seed: int) -> LibraryModel:
    """Build a module whose random start depends on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(*inputs)


def _named(module: nn.Module, name: str) -> dict[str, nn.Parameter]:
    return {f"{name}.{inner}": p for inner, p in module.named_parameters()}


def _count(parameters: Mapping[str, nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters.values())
