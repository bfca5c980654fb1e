"""Which modules a trainable kind touches: the head of a model, and where LoRA goes by architecture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ffm_secure.errors import ModelError
from ffm_secure.models.backbone import Backbone, body_name
from ffm_secure.models.builtin import MeanPoolClassifier

ALL_LINEAR = "all-linear"

# The query and value projections of each family, by transformers' model_type. One fused projection counts as
# both.
QUERY_VALUE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "albert"), ("query", "value")),
    **dict.fromkeys(
        ("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "opt"), ("q_proj", "v_proj")
    ),
    **dict.fromkeys(("gemma3_text", "stablelm", "gptj", "gpt_neo", "olmo2", "smollm3"), ("q_proj", "v_proj")),
    **dict.fromkeys(("vit", "bart", "dinov2", "dinov2_with_registers", "beit", "swin"), ("q_proj", "v_proj")),
    **dict.fromkeys(("clip", "siglip", "segformer"), ("q_proj", "v_proj")),
    **dict.fromkeys(("swinv2", "mobilevit", "pvt"), ("query", "value")),
    **dict.fromkeys(("convnext", "convnextv2"), ("pwconv1", "pwconv2")),
    "resnet": ("convolution",),
    "efficientnet": ("expand_conv", "project_conv"),
    **dict.fromkeys(
        ("llama4_text", "qwen3_5_text", "gemma3n_text", "gemma4_text", "phi", "mbart"), ("q_proj", "v_proj")
    ),
    **dict.fromkeys(
        ("starcoder2", "cohere", "cohere2", "bitnet", "granite", "nemotron", "qwen3_moe", "gpt_oss"),
        ("q_proj", "v_proj"),
    ),
    **dict.fromkeys(("xglm", "biogpt", "olmo", "glm", "m2m_100", "pegasus", "marian"), ("q_proj", "v_proj")),
    **dict.fromkeys(("data2vec-vision", "data2vec-text", "pvt_v2", "rembert", "ernie"), ("query", "value")),
    **dict.fromkeys(("gpt_bigcode", "openai-gpt"), ("c_attn",)),
    **dict.fromkeys(("mpt", "modernbert"), ("Wqkv",)),
    "codegen": ("qkv_proj",),
    **dict.fromkeys(("t5", "mt5"), ("q", "v")),
    **dict.fromkeys(("gpt_neox", "bloom", "falcon"), ("query_key_value",)),
    "distilbert": ("q_lin", "v_lin"),
    "deberta-v2": ("query_proj", "value_proj"),
    "mpnet": ("q", "v"),
    "gpt2": ("c_attn",),
    "phi3": ("qkv_proj",),
}


def head_modules(backbone: Backbone) -> tuple[str, ...]:
    """Name the modules that answer the task: the classification head, and whatever the checkpoint did not
    hold.

    A module that also holds a tensor of the checkpoint (a decoder tied to the input embeddings) is left out.
    """
    if backbone.kind.startswith("image_text"):  # the texts of the classes are the head
        return ()
    model, fresh = backbone.model, set(backbone.fresh)
    names: list[str] = []
    if backbone.kind.endswith("classification"):
        body = body_name(model)
        names = []
        for n, child in model.named_children():
            if n != body and any(True for _ in child.parameters()):
                names.append(n)
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in backbone.fresh):
        whole = all(
            f"{parent}.{inner}" in fresh for inner, _ in model.get_submodule(parent).named_parameters()
        )
        if whole and not any(parent == name or parent.startswith(f"{name}.") for name in names):
            names.append(parent)
    return tuple(names)


def has_own_head(backbone: Backbone) -> bool:
    """Tell whether the head is a class of this package, which stock libraries do not know."""
    return isinstance(backbone.model, MeanPoolClassifier)


def lora_targets(backbone: Backbone, wanted: Sequence[str], *, outside: Iterable[str]) -> tuple[str, ...]:
    """Choose the modules LoRA adapts: those asked for, every linear one, or query and value by architecture.

    Convolutions over all channels may be named too; networks without attention are adapted there by default.

    Raises:
      ModelError: for a name that fits nothing and for an unknown architecture; it lists the candidates.
    """
    linear = _linear_modules(backbone.model, outside=tuple(outside))
    if tuple(wanted) == (ALL_LINEAR,):
        return tuple(linear)
    model_type = str(backbone.config.model_type)
    chosen = tuple(wanted) or QUERY_VALUE.get(model_type, ())
    linear += _convolutions(backbone.model, outside=tuple(outside))
    chosen = tuple(dict.fromkeys(path for name in chosen for path in _written_out(name, linear)))
    missing = []
    for name in chosen:
        if not any(matches(path, name) for path in linear):
            missing.append(name)
    if missing or not chosen:
        if missing:
            what = f"{missing[0]!r} fits no linear module"
        else:
            what = f"nothing is chosen for {model_type!r} models"
        leaves = sorted({path.rpartition(".")[2] for path in linear})
        raise ModelError(
            f"model.trainable.target_modules: {what} of {backbone.architecture}; "
            f"use {[ALL_LINEAR]} or some of {', '.join(leaves) or 'none: it has no linear modules'}"
        )
    return chosen


def _written_out(target: str, paths: Sequence[str]) -> list[str]:
    """Return the paths a target with * means, as `vision_model.*.q_proj` does; any other is itself."""
    if "*" not in target:
        return [target]
    return [path for path in paths if fnmatchcase(path, target)] or [target]


def matches(path: str, target: str) -> bool:
    """Tell whether a module path is meant by a target name, by the rule PEFT uses."""
    return path == target or path.endswith(f".{target}")


def is_conv1d(model: nn.Module, targets: Sequence[str]) -> bool:
    """Tell whether the targets are GPT-2's transposed linear modules."""
    return any(
        isinstance(m, Conv1D) for path, m in model.named_modules() if any(matches(path, t) for t in targets)
    )


def _linear_modules(model: nn.Module, *, outside: tuple[str, ...]) -> list[str]:
    """List the paths of linear modules in the body of a model: not in its head, not its output embeddings."""
    output: object = None
    if isinstance(model, PreTrainedModel):
        output = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    linear_modules: list[str] = []
    for path, module in model.named_modules():
        if (
            isinstance(module, (nn.Linear, Conv1D))
            and module is not output
            and not any(path == name or path.startswith(f"{name}.") for name in outside)
        ):
            linear_modules.append(path)
    return linear_modules


def _convolutions(model: nn.Module, *, outside: tuple[str, ...]) -> list[str]:
    """List the paths of convolutions over all channels in the body of a model."""
    convolutions: list[str] = []
    for path, module in model.named_modules():
        if (
            isinstance(module, nn.Conv2d)
            and module.groups == 1
            and not any(path == name or path.startswith(f"{name}.") for name in outside)
        ):
            convolutions.append(path)
    return convolutions
