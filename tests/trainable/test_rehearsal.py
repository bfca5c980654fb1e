"""What is trained takes part in what the model answers, or is refused at once with what to use instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from ffm_secure.engines.simulation import Prepared
from ffm_secure.errors import ModelError
from ffm_secure.models.backbone import Backbone, load_backbone
from ffm_secure.models.builtin import tiny_tokenizer
from ffm_secure.trainable import attach, prefix, rehearse_per_sample
from tests.federation.helpers import CLIENT, RECORD, SECAGG, make, prepared

SMALL = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
    "num_labels": 3,
    "pad_token_id": 0,
}
OPT = SMALL | {"ffn_dim": 32, "word_embed_proj_dim": 16}
BART = {
    **{
        f"{part}_{what}": number
        for part in ("encoder", "decoder")
        for what, number in (("layers", 2), ("attention_heads", 4))
    },
    **{"d_model": 16, "vocab_size": 60, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "pad_token_id": 0},
}
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
CLASSES: dict[str, Any] = {
    "text_classification": tf.AutoModelForSequenceClassification,
    "causal_lm": tf.AutoModelForCausalLM,
    "masked_lm": tf.AutoModelForMaskedLM,
}


def backbone_of(model_type: str, kind: str, **options: Any) -> Backbone:
    config = tf.AutoConfig.for_model(model_type, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLASSES[kind].from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    inside = f"{model.base_model_prefix}."
    return Backbone(
        model=model.requires_grad_(False),
        architecture=type(model).__name__,
        total_parameters=1,
        source="test",
        hidden_size=16,
        max_positions=36,
        kind=kind,
        fresh=()
        if kind == "causal_lm"
        else tuple(n for n, _ in model.named_parameters() if not n.startswith(inside)),
    )


# --- prefixes are part of the forward pass ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("opt", OPT),
        ("falcon", SMALL),  # one head of keys for all
        ("falcon", SMALL | {"multi_query": False}),
        ("falcon", SMALL | {"new_decoder_architecture": True, "num_kv_heads": 2}),
        ("llama", SMALL | {"num_key_value_heads": 2}),
        ("gpt2", {"vocab_size": 60, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 40}),
    ],
)
def test_a_prefix_made_of_words_answers_as_if_the_words_stood_in_front(
    model_type: str, options: dict[str, Any]
) -> None:
    backbone: Any = backbone_of(model_type, "causal_lm", **options)
    before, after = torch.tensor([[11, 12, 13, 14]] * 2), torch.tensor([[21, 22, 23], [31, 32, 33]])
    with torch.no_grad():
        wanted = backbone.model(input_ids=torch.cat((before, after), dim=1)).logits[:, before.shape[1] :]
        kept = backbone.model(input_ids=before[:1], use_cache=True).past_key_values
        alone = backbone.model(input_ids=after).logits
    parts = [part[0].transpose(0, 1) for layer in kept.layers for part in (layer.keys, layer.values)]
    trainable = attach(backbone, {"kind": "prefix", "length": 4}, task_kind="causal_lm", seed=1)
    trainable.load_vector(torch.stack(parts, dim=1).reshape(-1))
    with torch.no_grad():
        found = trainable.model(input_ids=after, attention_mask=torch.ones_like(after)).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert (alone - wanted).abs().max() > 1e-3, "the words in front matter"


def test_a_prefix_that_no_layer_reads_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: hooked where the language model of OPT does not pass, the prefix is nobody's input."""
    backbone = backbone_of("opt", "causal_lm", **OPT)
    monkeypatch.setattr(prefix, "attending", lambda model: model.base_model)
    words = (
        "'prefix': OPTForCausalLM does not use it: no gradient reaches "
        "prompt_embeddings; use prompt, p_tuning or lora"
    )
    with pytest.raises(ModelError, match=words):
        attach(backbone, {"kind": "prefix", "length": 3}, task_kind="causal_lm", seed=1)


def test_a_prefix_of_the_wrong_shape_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = backbone_of("falcon", "text_classification", **SMALL)
    monkeypatch.setattr(prefix, "cache_shape", lambda backbone: (4, 4))
    with pytest.raises(
        ModelError,
        match=r"'prefix': Falcon.* cannot run with it \(RuntimeError.*use prompt, p_tuning or lora",
    ):
        attach(backbone, {"kind": "prefix", "length": 3}, task_kind="text_classification", seed=1)


# --- other kinds --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["prompt", "p_tuning", "deep_prompt", "prefix"])
def test_an_encoder_decoder_refuses_what_goes_in_front(kind: str) -> None:
    backbone = backbone_of("bart", "text_classification", **BART)
    with pytest.raises(ModelError, match=rf"kind = '{kind}': BartForSequenceClassification .*; use .*lora"):
        attach(backbone, {"kind": kind, "length": 3}, task_kind="text_classification", seed=1)
    assert attach(backbone, {"kind": "lora", "rank": 2}, task_kind="text_classification", seed=1).size > 0


@pytest.mark.parametrize("representation", ["model", "embedding"])
def test_a_generator_sees_a_model_wider_than_its_embeddings(representation: str) -> None:
    backbone = backbone_of("albert", "text_classification", **SMALL, embedding_size=8)
    spec = {"kind": "prompt_generator", "length": 3, "hidden": 5, "representation": representation}
    trainable = attach(backbone, spec, task_kind="text_classification", seed=1)
    shapes = dict(trainable.layout)
    assert shapes["generator.down.weight"] == (5, 16 if representation == "model" else 8)
    assert shapes["generator.up.weight"] == (8, 5)
    rehearse_per_sample(trainable, None, clipping="flat")


def test_lora_beside_a_module_that_never_runs_is_refused() -> None:
    backbone: Any = backbone_of("bert", "text_classification", **SMALL)
    backbone.model.bert.idle = nn.Linear(16, 16).requires_grad_(False)
    spec = {"kind": "lora", "rank": 2, "target_modules": ["query", "idle"]}
    with pytest.raises(
        ModelError,
        match=r"does not use it: no gradient reaches .*idle.lora_A.weight and 1 more; use other target",
    ):
        attach(backbone, spec, task_kind="text_classification", seed=1)


def test_a_rehearsal_leaves_nothing_behind() -> None:
    backbone = load_backbone("builtin:tiny-bert", kind="text_classification", labels=3, base=Path(), seed=5)
    state = torch.get_rng_state()
    trainable = attach(backbone, {"kind": "full"}, task_kind="text_classification", seed=1)
    rehearse_per_sample(trainable, None, clipping="flat")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in trainable.parameters.values())
    assert all(torch.equal(trainable.parameters[name], p) for name, p in backbone.model.named_parameters())


# --- gradients of single samples ----------------------------------------------------------------------------


def run_of(
    model_type: str, folder: Path, *, trainable: str, privacy: dict[str, Any], **options: Any
) -> Prepared:
    """Prepare a run on a small checkpoint of a family."""
    tokenizer = tiny_tokenizer()
    backbone: Any = backbone_of(model_type, "text_classification", **options | {"vocab_size": len(tokenizer)})
    backbone.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    data = {
        "kind": "text_classification",
        "data": "builtin:clinic_notes?size=60&validation=20",
        "clients": 4,
        "max_length": 16,
    }
    model = {
        "name": str(folder),
        "trainable": {"kind": trainable, **({"rank": 2} if trainable == "lora" else {})},
    }
    protection = SECAGG if privacy.get("unit") == "client" else {"kind": "none"}
    return prepared(make(task=data, model=model, privacy=privacy, protection=protection))


def test_a_plan_refuses_a_model_without_gradients_per_sample(tmp_path: Path) -> None:
    """DeBERTa hands its relative positions on once for the whole batch;
    only the record unit needs single samples.
    """
    deberta = SMALL | RELATIVE
    words = (
        r"'full': DebertaV2ForSequenceClassification gives no gradient per sample.*; use lora or "
        r"prompt, or the client unit"
    )
    with pytest.raises(ModelError, match=words):
        run_of("deberta-v2", tmp_path, trainable="full", privacy=RECORD, **deberta)
    for trainable, privacy in (
        ("lora", RECORD),
        ("full", CLIENT),
        ("full", {"unit": "none", "reason": "test"}),
    ):
        assert (
            run_of("deberta-v2", tmp_path, trainable=trainable, privacy=privacy, **deberta).trainable.size > 0
        )
    experts = SMALL | {"num_local_experts": 2, "num_key_value_heads": 4}
    with pytest.raises(ModelError, match=r"experts.*; use lora or prompt, or the client unit"):
        run_of("mixtral", tmp_path / "mixtral", trainable="full", privacy=RECORD, **experts)
    assert run_of("opt", tmp_path / "opt", trainable="full", privacy=RECORD, **OPT).trainable.size > 0
