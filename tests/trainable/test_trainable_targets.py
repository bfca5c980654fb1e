"""Where LoRA goes: every family named in the table is checked on a random model of that family."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf

from ffm_secure.errors import ModelError
from ffm_secure.models.backbone import Backbone, load_backbone
from ffm_secure.trainable import attach
from ffm_secure.trainable.targets import QUERY_VALUE, head_modules, lora_targets, matches

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 40,
}
DECODER = SMALL | {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32, "pad_token_id": 0}
PER_LAYER = DECODER | {
    "vocab_size_per_layer_input": 40,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "layer_types": ["full_attention"],
}
BOTH_WAYS = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "vocab_size": 40,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
}
PATCHES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 8,
    "patch_size": 4,
}
TWO_TOWERS = {"text_config": SMALL | {"bos_token_id": 1, "eos_token_id": 2}, "vision_config": PATCHES}
WINDOWS = {
    "image_size": 16,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [1],
    "num_heads": [2],
    "window_size": 4,
}
STAGES = {"hidden_sizes": [16], "depths": [1]}
PYRAMID = STAGES | {
    "num_encoder_blocks": 1,
    "patch_sizes": [3],
    "strides": [2],
    "num_attention_heads": [2],
    "mlp_ratios": [1],
}
NARROW = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40}
FAMILIES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "mpnet"), SMALL),
    "albert": SMALL | {"embedding_size": 16},
    "deberta-v2": SMALL,
    "distilbert": {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16, "vocab_size": 40},
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "stablelm", "olmo2", "smollm3"), DECODER
    ),
    "mixtral": DECODER | {"num_local_experts": 2},
    "gemma3_text": DECODER,
    **dict.fromkeys(("phi", "phi3"), DECODER),
    "llama4_text": DECODER | {"num_local_experts": 2, "intermediate_size_mlp": 16},
    "qwen3_5_text": DECODER | {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
    "gemma3n_text": PER_LAYER | {"laurel_rank": 4},
    "gemma4_text": PER_LAYER | {"global_head_dim": 8},
    "gptj": {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40, "rotary_dim": 4, "n_positions": 32},
    "gpt_neo": {
        "hidden_size": 16,
        "num_layers": 1,
        "num_heads": 2,
        "attention_types": [[["global"], 1]],
        "vocab_size": 40,
    },
    **dict.fromkeys(("starcoder2", "cohere", "cohere2", "bitnet", "granite", "nemotron", "olmo"), DECODER),
    "glm": DECODER | {"attention_bias": True},
    **dict.fromkeys(
        ("qwen3_moe", "gpt_oss"),
        DECODER | {"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "xglm": {"d_model": 16, "num_layers": 1, "attention_heads": 2, "ffn_dim": 16, "vocab_size": 40},
    **dict.fromkeys(
        ("biogpt", "rembert", "ernie", "data2vec-text", "modernbert"), SMALL | {"pad_token_id": 0}
    ),
    "codegen": {"n_embd": 64, "n_layer": 1, "n_head": 4, "rotary_dim": 4, "vocab_size": 40},
    "mpt": {"d_model": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 40},
    **dict.fromkeys(("m2m_100", "pegasus", "marian"), BOTH_WAYS | {"pad_token_id": 0}),
    "data2vec-vision": PATCHES | {"use_auxiliary_head": False},
    "pvt_v2": {
        "hidden_sizes": [16],
        "depths": [1],
        "num_encoder_blocks": 1,
        "patch_sizes": [3],
        "strides": [2],
        "num_attention_heads": [2],
        "mlp_ratios": [1],
        "sr_ratios": [2],
        "image_size": 16,
    },
    **{
        key: {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40}
        for key in ("gpt2", "gpt_bigcode", "openai-gpt")
    },
    "gpt_neox": SMALL,
    "bloom": {"hidden_size": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40},
    "falcon": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40},
    "opt": SMALL | {"ffn_dim": 16, "word_embed_proj_dim": 16},
    "t5": {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 16, "d_kv": 8, "vocab_size": 40},
    "mt5": {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 16, "d_kv": 8, "vocab_size": 40},
    **dict.fromkeys(("bart", "mbart"), BOTH_WAYS),
    **dict.fromkeys(("vit", "dinov2", "dinov2_with_registers", "beit"), PATCHES),
    **dict.fromkeys(("clip", "siglip"), TWO_TOWERS),
    **dict.fromkeys(("swin", "swinv2"), WINDOWS),
    **dict.fromkeys(("convnext", "convnextv2"), STAGES | {"num_stages": 1}),
    "resnet": STAGES | {"embedding_size": 16, "layer_type": "basic"},
    "efficientnet": {"image_size": 32, "width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128},
    "segformer": PYRAMID | {"sr_ratios": [2]},
    "pvt": PYRAMID | {"image_size": 16, "sequence_reduction_ratios": [2]},
    "mobilevit": {
        "hidden_sizes": [16] * 3,
        "neck_hidden_sizes": [16] * 7,
        "num_attention_heads": 2,
        "image_size": 32,
    },
}


def body(model_type: str) -> Backbone:
    """Build what a task loads; of a model for texts and pictures a classifier of pictures keeps one tower."""
    config = tf.AutoConfig.for_model(model_type, **FAMILIES[model_type])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pictures = type(config) in tf.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
        kind = "image_classification" if pictures else "causal_lm"
        model = (tf.AutoModelForImageClassification if pictures else tf.AutoModel).from_config(config)
    return SimpleNamespace(
        model=model, config=model.config, architecture=type(model).__name__, kind=kind, fresh=()
    )


def test_the_table_names_no_family_that_is_not_checked() -> None:
    assert set(QUERY_VALUE) == set(FAMILIES)


@pytest.mark.parametrize("model_type", sorted(QUERY_VALUE))
def test_default_targets_exist_in_every_layer(model_type: str) -> None:
    backbone = body(model_type)
    targets = lora_targets(backbone, (), outside=())
    assert targets == QUERY_VALUE[model_type]
    for target in targets:
        assert any(matches(path, target) for path, _ in backbone.model.named_modules())


def test_an_unknown_family_lists_the_candidates() -> None:
    backbone = load_backbone("builtin:tiny-bert", kind="text_classification", labels=2, base=Path(), seed=1)
    backbone.config.model_type = "unheard-of"
    with pytest.raises(
        ModelError, match=r"nothing is chosen for 'unheard-of'.*all-linear.*dense, key, query, value"
    ):
        attach(backbone, {"kind": "lora"}, task_kind="text_classification", seed=1)
    assert (
        attach(
            backbone, {"kind": "lora", "target_modules": ["key"]}, task_kind="text_classification", seed=1
        ).size
        > 0
    )


def test_all_linear_leaves_out_the_head_and_the_output_embedding() -> None:
    for name, kind in (
        ("tiny-bert", "text_classification"),
        ("tiny-llama", "causal_lm"),
        ("tiny-gpt2", "causal_lm"),
    ):
        backbone = load_backbone(f"builtin:{name}", kind=kind, labels=2, base=Path(), seed=1)
        chosen = lora_targets(backbone, ("all-linear",), outside=head_modules(backbone))
        assert chosen
        assert not any(path.split(".")[0] in ("classifier", "lm_head", "score") for path in chosen)


def test_the_plan_hears_what_was_chosen() -> None:
    backbone = load_backbone("builtin:tiny-bert", kind="text_classification", labels=2, base=Path(), seed=1)
    trainable = attach(backbone, {"kind": "lora", "rank": 4}, task_kind="text_classification", seed=1)
    assert trainable.description == (
        "LoRA rank 4, alpha 16 on query, value: 4 modules, 2,048 numbers",
        "the head is trained along: classifier, 130 numbers",
    )
    assert trainable.size == 2048 + 130


@pytest.mark.parametrize("model_type", ["distilbert", "roberta", "electra"])
def test_heads_of_several_modules_are_trained_whole(model_type: str, tmp_path: Path) -> None:
    """Heads whose module names end alike (pre_classifier, classifier) are each trained once."""
    config = tf.AutoConfig.for_model(model_type, **FAMILIES[model_type], num_labels=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = tf.AutoModelForSequenceClassification.from_config(config)
    backbone = Backbone(
        model=model.requires_grad_(False),
        architecture="x",
        total_parameters=1,
        source="x",
        hidden_size=16,
        kind="text_classification",
    )
    head = attach(backbone, {"kind": "head"}, task_kind="text_classification", seed=1)
    lora = attach(backbone, {"kind": "lora"}, task_kind="text_classification", seed=1)
    prefix = f"base_model.model.{model.base_model_prefix}."
    outside = {
        f"base_model.model.{n}"
        for n, _ in model.named_parameters()
        if f"base_model.model.{n}".startswith(prefix) is False
    }
    assert set(head.parameters) == outside
    assert {n for n in lora.parameters if ".lora_" not in n} == outside
