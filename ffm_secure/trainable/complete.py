"""One whole model of transformers that answers as a trained model does, where an adapter on the base would
not.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer
from torch import Tensor, nn
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    PreTrainedTokenizerFast,
)

from ffm_secure.errors import ModelError
from ffm_secure.foreign import JsonValue, LibraryModel, ModelTokenizer
from ffm_secure.models.backbone import Backbone
from ffm_secure.models.builtin import MeanPoolClassifier
from ffm_secure.models.stock_mean import as_stock_classifier
from ffm_secure.trainable.base import TrainableModel
from ffm_secure.trainable.lora import lora_layers
from ffm_secure.trainable.prompt import PromptedModel

OUTSIDE = ("prefix", "deep_prompt", "prompt_generator")  # what no single model of transformers computes
SOFT = (
    "prompt",
    "p_tuning",
)  # prompts that are the same for every text and stand in front of it as words would


def complete_model(trainable: TrainableModel) -> LibraryModel:
    """Build the transformers model that computes what `trainable` computes, with everything trained inside.

    A soft prompt becomes words of the vocabulary (see `with_prompt_words` for the tokenizer) or, for a ViT,
    the registers of a DINOv2, which is a ViT with room for them.

    Guarantee: in float32 its logits are those of `trainable` up to rounding; `trainable` is left as it is.
    Raises:
      ModelError: no class of transformers computes this kind of prompt.
    """
    plain: LibraryModel = copy.deepcopy(trainable.backbone.model)
    with torch.no_grad():
        _put_trained(trainable, plain)
        _merge_products(trainable, plain)
        if trainable.kind in SOFT:
            prompt = soft_prompt(trainable)
            if trainable.backbone.kind == "image_classification":
                return _vit_with_registers(plain, prompt)
            _add_words(plain, prompt, first=words_known(trainable.backbone))
        elif trainable.kind in OUTSIDE:
            raise ModelError(
                f"model.trainable.kind = {trainable.kind!r}: no single model of transformers computes it"
            )
    if isinstance(plain, MeanPoolClassifier):
        return as_stock_classifier(plain)
    return plain.eval()


def soft_prompt(trainable: TrainableModel) -> Tensor:
    """Return the virtual tokens [length, d] of a prompt that does not depend on the text."""
    model: PromptedModel = trainable.model  # type: ignore[assignment]
    with torch.no_grad():
        tokens = model.virtual_tokens({"input_ids": torch.zeros((1, 1), dtype=torch.long)})
    return tokens[0].detach().clone()


def with_prompt_words(tokenizer: ModelTokenizer, length: int) -> ModelTokenizer:
    """Copy a tokenizer so that it puts `length` prompt words in front of every text; their numbers follow its
    own.

    Raises:
      ModelError: this kind of tokenizer cannot be changed so.
    """
    first = len(tokenizer)
    words = []
    for number in range(length):
        words.append(f"<prompt-{number}>")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"{type(tokenizer).__name__} cannot put a prompt in front of a text")
    table = json.loads(backend.to_str())
    table["post_processor"] = _in_front(table["post_processor"], words, first)
    prompted = Tokenizer.from_str(json.dumps(table))
    prompted.add_special_tokens([AddedToken(word, special=True) for word in words])
    named = {}
    for name, value in tokenizer.special_tokens_map.items():
        if isinstance(value, str):
            named[name] = str(value)
    extended = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=prompted,
        model_input_names=list(tokenizer.model_input_names),
        padding_side="right",
        **named,
    )
    if extended("a")["input_ids"] != [*range(first, first + length), *tokenizer("a")["input_ids"]]:
        raise ModelError(f"{type(tokenizer).__name__} does not put a prompt in front of a text")
    return extended


def _in_front(processor: ModelTokenizer, words: Sequence[str], first: int) -> dict[str, Any]:
    """Return a post-processor, as tokenizers writes it down, that also puts words in front."""
    kind = ""
    if processor is not None:
        kind = processor["type"]
    if kind == "Sequence":
        *before, last = processor["processors"]
        if last["type"] in ("TemplateProcessing", "BertProcessing", "RobertaProcessing"):
            return {**processor, "processors": [*before, _in_front(last, words, first)]}
        return {**processor, "processors": [*before, last, _in_front(None, words, first)]}
    if kind == "TemplateProcessing":
        return _template_in_front(processor, words, first)
    if kind in ("BertProcessing", "RobertaProcessing"):
        return _template_in_front(_as_template(processor), words, first)
    template = _template_in_front(_template([_text("A")], [_text("A"), _text("B", 1)], {}), words, first)
    if processor is None:
        return template
    return {"type": "Sequence", "processors": [processor, template]}


def _template_in_front(template: JsonValue, words: Sequence[str], first: int) -> dict[str, Any]:
    front = []
    for word in words:
        front.append(_special(word))
    known = {}
    for number, word in enumerate(words):
        known[word] = {"id": word, "ids": [first + number], "tokens": [word]}
    return _template(
        [*front, *template["single"]], [*front, *template["pair"]], {**template["special_tokens"], **known}
    )


def _as_template(processor: ModelTokenizer) -> dict[str, Any]:
    """Write the fixed forms of BERT and RoBERTa as templates."""
    begin, end = processor["cls"], processor["sep"]
    if processor["type"] == "RobertaProcessing":
        double = [_special(end[0])]
    else:
        double = []
    second = 1
    if double:
        second = 0
    single = [_special(begin[0]), _text("A"), _special(end[0])]
    known = {}
    for word, number in (begin, end):
        known[word] = {"id": word, "ids": [number], "tokens": [word]}
    return _template(single, [*single, *double, _text("B", second), _special(end[0], second)], known)


def _template(single: list[Any], pair: list[Any], known: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": dict(known)}


def _special(word: str, segment: int = 0) -> dict[str, Any]:
    return {"SpecialToken": {"id": word, "type_id": segment}}


def _text(name: str, segment: int = 0) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": segment}}


def plain_name(name: str) -> str:
    """Return the name a trained tensor has in the base model."""
    return name.removeprefix("base_model.model.").removeprefix("base_model.")


def head_tensors(trainable: TrainableModel) -> Mapping[str, Tensor]:
    """Return the trained tensors that the base model has too, under its names."""
    own = dict(trainable.backbone.model.named_parameters())
    named = ((plain_name(name), parameter) for name, parameter in trainable.parameters.items())
    return {name: parameter for name, parameter in named if name in own}


def _put_trained(trainable: TrainableModel, plain: LibraryModel) -> None:
    target = dict(plain.named_parameters())
    for name, value in head_tensors(trainable).items():
        target[name].copy_(value)


def _merge_products(trainable: TrainableModel, plain: LibraryModel) -> None:
    """Add each product of LoRA factors to the weight beside it."""
    for path, layer in lora_layers(trainable.model):
        weight = plain.get_submodule(path).weight
        inner, outer = layer.lora_A["default"].weight, _outer(layer.lora_B["default"])
        product = (outer.float() @ inner.float()) * float(layer.scaling["default"])
        base = layer.get_base_layer().weight.float()
        weight.copy_(base + (product.t() if layer.fan_in_fan_out else product))


def _outer(module: nn.Module) -> Tensor:
    """Return the outer factor [out, r]; LoRA-XS keeps a core before it."""
    if isinstance(module, nn.Sequential):
        core, outer = module
        return outer.weight @ core.weight  # type: ignore[operator]
    return module.weight  # type: ignore[return-value]


def _add_words(plain: LibraryModel, prompt: Tensor, *, first: int) -> None:
    """Put a prompt behind the words the tokenizer knows; rows of the table beyond them are used first."""
    table: nn.Embedding = plain.get_input_embeddings()
    rows = max(table.weight.shape[0], first + len(prompt))
    values = table.weight.new_zeros(rows, table.weight.shape[1])
    values[: table.weight.shape[0]] = table.weight
    values[first : first + len(prompt)] = prompt / _scale(table)
    table.weight = nn.Parameter(values, requires_grad=False)
    table.num_embeddings = plain.config.vocab_size = rows


def _scale(table: nn.Embedding) -> float:
    """Return what a scaled embedding multiplies its rows by; 1 for a plain one."""
    return float(getattr(table, "scalar_embed_scale", getattr(table, "embed_scale", 1.0)))


def _vit_with_registers(vit: LibraryModel, prompt: Tensor) -> Dinov2WithRegistersForImageClassification:
    """Write a ViT with virtual tokens behind its class token as a DINOv2: those are its registers, placed the
    same way.
    """
    config = vit.config
    ratio = math.ceil(config.intermediate_size / config.hidden_size)
    shared = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "hidden_act",
        "layer_norm_eps",
        "image_size",
        "patch_size",
        "num_channels",
        "qkv_bias",
        "id2label",
        "label2id",
    )
    wide = Dinov2WithRegistersForImageClassification(
        Dinov2WithRegistersConfig(
            mlp_ratio=ratio,
            num_register_tokens=len(prompt),
            **{name: getattr(config, name) for name in shared},
        )
    )
    wide.train(False)
    target = dict(wide.named_parameters())
    for parameter in wide.parameters():
        parameter.requires_grad_(False).zero_()
    for name, value in vit.named_parameters():
        place = target[_dino_name(name)]
        place[tuple(slice(0, size) for size in value.shape)].copy_(value)
    target["dinov2_with_registers.embeddings.register_tokens"].copy_(prompt[None])
    for name, place in target.items():
        if name.endswith("lambda1"):
            place.fill_(1.0)
    return wide


_DINO = {
    "vit.layers.": "vit.encoder.layer.",
    "vit.": "dinov2_with_registers.",
    "layernorm_before.": "norm1.",
    "layernorm_after.": "norm2.",
}


def _dino_name(name: str) -> str:
    for ours, theirs in _DINO.items():
        name = name.replace(ours, theirs)
    return name


def words_known(backbone: Backbone) -> int:
    """Return the number of the first word that the tokenizer does not know yet."""
    if backbone.tokenizer is not None:
        return len(backbone.tokenizer)
    return int(backbone.config.vocab_size)
