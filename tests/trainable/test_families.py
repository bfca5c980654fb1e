"""Families with layers of their own:
gradients of single samples are those of the sample alone, or the plan says what to use.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from benchmarks.exports import CAUSAL, CLASSIFY, TEXT, Case, _checkpoint
from defenses.dp import PerSampleEngine
from ffm_secure.errors import ModelError
from ffm_secure.models.backbone import Backbone, load_backbone
from ffm_secure.models.builtin import tiny_tokenizer
from ffm_secure.report.model_card import loading_code
from ffm_secure.trainable import TrainableModel, attach, rehearse_per_sample
from ffm_secure.trainable.exports import export

ALL = {"kind": "lora", "rank": 2, "target_modules": ["all-linear"]}
FULL = {"kind": "full"}
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]])
PICTURE = {"image_size": 32, "patch_size": 8, "num_channels": 3}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
STAGES = {"hidden_sizes": [16, 32], "depths": [1, 1]}
WINDOWS = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 4,
}
NETWORKS: dict[str, dict[str, Any]] = {
    "resnet": STAGES | {"embedding_size": 16, "layer_type": "basic"},
    "convnext": STAGES | {"num_stages": 2, "image_size": 32},
    "efficientnet": {"image_size": 32, "width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128},
    "swin": WINDOWS,
    "dinov2": SMALL | PICTURE,
    "beit": SMALL | PICTURE,
    "clip": {"vision_config": SMALL | PICTURE, "text_config": SMALL, "projection_dim": 16},
    "siglip": {"vision_config": SMALL | PICTURE, "text_config": SMALL},
}


def text_model(model: str, task: str, folder: Path) -> Backbone:
    place = _checkpoint(Case(model=model, task=task, spec={}), folder)
    return load_backbone(str(place), kind=task, labels=3, base=folder, seed=5)


def picture_model(model: str, folder: Path) -> Backbone:
    config = transformers.AutoConfig.for_model(model, num_labels=3, **NETWORKS[model])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = transformers.AutoModelForImageClassification.from_config(config)
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0.0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    network.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"size": {"height": 32, "width": 32}}')
    return load_backbone(str(folder), kind="image_classification", labels=3, base=folder, seed=5)


def shake(trainable: TrainableModel) -> None:
    noise = torch.randn(trainable.size, generator=torch.Generator().manual_seed(9))
    trainable.load_vector(trainable.flatten() + 0.05 * noise)


def compare(trainable: TrainableModel, batch: dict[str, torch.Tensor]) -> None:
    """Hold the engine's gradients to those of every sample alone, computed by autograd."""

    def losses(chosen: slice = slice(None)) -> torch.Tensor:
        part = {name: value[chosen] for name, value in batch.items()}
        scores: torch.Tensor = trainable.model(**part).logits.float()
        if scores.ndim == 3:
            scores = scores * part["attention_mask"].unsqueeze(-1)
        return scores.square().flatten(1).mean(dim=1)

    parameters = list(trainable.parameters.values())
    wanted = []
    for row in range(3):
        alone = torch.autograd.grad(losses(slice(row, row + 1)).sum(), parameters, allow_unused=True)
        filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, alone, strict=True)]
        wanted.append(torch.cat([gradient.flatten() for gradient in filled]))
    with PerSampleEngine(trainable.model, parameters=trainable.parameters) as engine:
        answer = engine.per_sample(losses)
    flat = torch.cat([answer[name].flatten(1) for name in trainable.parameters], dim=1)
    error = (flat - torch.stack(wanted)).norm() / torch.stack(wanted).norm()
    assert error < 1e-5


@pytest.mark.parametrize(
    ("model", "task", "spec"),
    [
        ("gemma", CAUSAL, FULL),
        ("gemma2", CLASSIFY, FULL),
        ("opt", CAUSAL, FULL),
        ("opt", CLASSIFY, ALL),
        ("falcon", CAUSAL, FULL),
        ("bart", CLASSIFY, FULL),
        ("mpnet", CLASSIFY, FULL),
        ("t5", CLASSIFY, FULL),
    ],
    ids=str,
)
def test_gradients_of_single_samples_are_those_of_the_sample_alone(
    model: str, task: str, spec: dict[str, Any], tmp_path: Path
) -> None:
    trainable = attach(text_model(model, task, tmp_path), spec, task_kind=task, seed=3)
    shake(trainable)
    tokens = torch.randint(20, 100, (3, 6), generator=torch.Generator().manual_seed(2))
    pad = trainable.backbone.config.pad_token_id
    compare(trainable, {"input_ids": tokens.masked_fill(MASK == 0, pad), "attention_mask": MASK})


@pytest.mark.parametrize(
    "model, spec",
    [
        ("resnet", FULL),
        ("resnet", {"kind": "lora", "rank": 2}),
        ("clip", {"kind": "lora", "rank": 2}),
        ("efficientnet", {"kind": "lora", "rank": 2}),
    ],
    ids=str,
)
def test_gradients_of_single_pictures_are_those_of_the_picture_alone(
    model: str, spec: dict[str, Any], tmp_path: Path
) -> None:
    trainable = attach(picture_model(model, tmp_path), spec, task_kind="image_classification", seed=3)
    shake(trainable)
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    compare(trainable, {"pixel_values": pixels})


@pytest.mark.parametrize("model", NETWORKS)
def test_a_picture_network_trains_its_head_and_adapters_by_default(model: str, tmp_path: Path) -> None:
    backbone = picture_model(model, tmp_path)
    assert backbone.image_size == 32
    head = attach(backbone, {"kind": "head"}, task_kind="image_classification", seed=1)
    assert all(".classifier." in name for name in head.parameters)
    rehearse_per_sample(head, None, clipping="flat")
    assert (
        attach(backbone, {"kind": "lora", "rank": 2}, task_kind="image_classification", seed=1).size
        > head.size
    )


def test_windows_over_the_batch_are_refused_with_what_to_use(tmp_path: Path) -> None:
    """Swin cuts pictures into windows along the first axis; a client unit needs no single samples."""
    trainable = attach(
        picture_model("swin", tmp_path), {"kind": "lora", "rank": 2}, task_kind="image_classification", seed=1
    )
    with pytest.raises(
        ModelError,
        match=r"gives no gradient per sample.*; use other target_modules, or prompt, or the client unit",
    ):
        rehearse_per_sample(trainable, None, clipping="flat")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "lora", "rank": 2, "folded": True}, "are convolutions; use federation.strategy.kind"),
        ({"kind": "lora_xs", "rank": 2}, "is a convolution; use lora or head"),
        ({"kind": "prompt", "length": 2}, "need a ViT"),
        ({"kind": "deep_prompt", "length": 2}, "no single list; use lora or head"),
    ],
)
def test_what_needs_matrices_or_words_is_refused_before_convolutions(
    spec: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        attach(picture_model("resnet", tmp_path), spec, task_kind="image_classification", seed=1)


def test_a_mixture_of_experts_is_refused_with_what_to_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = TEXT["mistral"][0] | {"num_local_experts": 2}
    monkeypatch.setitem(TEXT, "mixtral", (options, (CAUSAL,)))
    trainable = attach(text_model("mixtral", CAUSAL, tmp_path), FULL, task_kind=CAUSAL, seed=1)
    with pytest.raises(
        ModelError,
        match=r"'full': MixtralForCausalLM gives no gradient per sample.*; use lora or prompt, or the client",
    ):
        rehearse_per_sample(trainable, None, clipping="flat")


# --- padding and the end of a text --------------------------------------------------------------------------


@pytest.mark.parametrize("stated", [-1, 0, 7, None])
@pytest.mark.parametrize("own", [True, False])
def test_tokenizer_and_configuration_share_one_padding_token(
    stated: int | None, own: bool, tmp_path: Path
) -> None:
    place = _checkpoint(Case(model="llama", task=CLASSIFY, spec={}), tmp_path)
    edit(place / "config.json", pad_token_id=stated)
    if not own:
        edit(place / "tokenizer_config.json", pad_token=None)
    backbone = load_backbone(str(place), kind=CLASSIFY, labels=3, base=tmp_path, seed=5)
    assert backbone.tokenizer is not None
    assert backbone.config.pad_token_id == backbone.tokenizer.pad_token_id
    tokens = torch.tensor([[40, 50, 60, 0, 0, 0]]).masked_fill(MASK[2:] == 0, backbone.tokenizer.pad_token_id)
    with torch.no_grad():
        alone = backbone.model(input_ids=tokens[:, :3], attention_mask=MASK[2:, :3]).logits
        padded = backbone.model(input_ids=tokens, attention_mask=MASK[2:]).logits
    torch.testing.assert_close(padded, alone)


def edit(path: Path, **values: Any) -> None:
    import json

    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "model, options", [("xlnet", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}), ("fnet", SMALL)]
)
def test_a_model_that_reads_padding_is_refused(
    model: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TEXT, model, (options, (CLASSIFY,)))
    with pytest.raises(ModelError, match="answers a text differently when others in its batch are longer"):
        text_model(model, CLASSIFY, tmp_path)


@pytest.mark.parametrize("model", ["t5", "bart"])
def test_a_text_without_an_end_or_with_several_changes_no_other_answer(model: str, tmp_path: Path) -> None:
    """The control: without the hook the model stops with an error on such a batch."""
    backbone = text_model(model, CLASSIFY, tmp_path)
    end = backbone.config.eos_token_id
    tokens = torch.tensor([[40, 50, end], [end, 60, end], [40, 50, 60]])
    mask = torch.ones_like(tokens)
    with torch.no_grad():
        answers = backbone.model(input_ids=tokens, attention_mask=mask).logits
        alone = backbone.model(input_ids=tokens[:1], attention_mask=mask[:1]).logits
    torch.testing.assert_close(answers[:1], alone)
    assert torch.isfinite(answers).all()
    backbone.model._forward_pre_hooks.clear()
    with pytest.raises(Exception, match="same number of <eos>"), torch.no_grad():
        backbone.model(input_ids=tokens, attention_mask=mask)


def test_a_folder_without_a_tokenizer_says_how_to_write_one(tmp_path: Path) -> None:
    place = _checkpoint(Case(model="llama", task=CAUSAL, spec={}), tmp_path)
    for path in place.glob("*token*"):
        path.unlink()
    with pytest.raises(ModelError, match=r"holds no tokenizer.*save_pretrained"):
        load_backbone(str(place), kind=CAUSAL, labels=None, base=tmp_path, seed=5)


# --- the text part of a model for texts and pictures --------------------------------------------------------


def test_the_text_part_of_a_composite_model_is_trained_and_exported(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    text = TEXT["gemma"][0] | {"vocab_size": len(tokenizer)}
    tower = SMALL | {"image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=tower, mm_tokens_per_image=4, image_token_index=50
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        whole = transformers.Gemma3ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path / "whole")
    tokenizer.save_pretrained(tmp_path / "whole")
    backbone = load_backbone(str(tmp_path / "whole"), kind=CAUSAL, labels=None, base=tmp_path, seed=1)
    tokens = torch.tensor([[40, 51, 60, 70]])
    with torch.no_grad():
        answer = backbone.model(input_ids=tokens).logits
        torch.testing.assert_close(answer, whole(input_ids=tokens).logits)
    assert "the part for texts" in " ".join(backbone.notes)
    trainable = attach(backbone, {"kind": "lora", "rank": 2}, task_kind=CAUSAL, seed=1)
    shake(trainable)
    rehearse_per_sample(trainable, None, clipping="flat")
    record = export(trainable, tmp_path / "out", str(tmp_path / "whole"), max_length=8)
    space: dict[str, Any] = {}
    exec(loading_code(record, str(tmp_path / "out")), space)  # noqa: S102
    with torch.no_grad():
        loaded = space["model"](input_ids=tokens).logits
        torch.testing.assert_close(loaded, trainable.model(input_ids=tokens).logits, atol=1e-5, rtol=1e-5)
    assert (loaded - answer).abs().max() > 1e-3, "what was trained matters"


TEXT_OF_TWO = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
TOWER = SMALL | {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
MIXERS = {f"linear_{name}": 8 for name in ("key_head_dim", "value_head_dim")}
MIXERS |= {f"linear_num_{name}": 2 for name in ("key_heads", "value_heads")}
COMPOSITES: dict[str, tuple[str, dict[str, Any]]] = {
    "layers without attention": (
        "Qwen3_5",
        {
            "text_config": TEXT_OF_TWO | MIXERS,
            "vision_config": {"depth": 1, "hidden_size": 32, "num_heads": 4, "out_hidden_size": 32},
        },
    ),
    "a head that only the whole says is the embedding": (
        "Mistral3",
        {
            "text_config": TEXT_OF_TWO | {"model_type": "mistral"},
            "vision_config": TOWER | {"model_type": "pixtral", "head_dim": 8},
        },
    ),
    "a text part under another name": (
        "Idefics3",
        {"text_config": TEXT_OF_TWO | {"model_type": "llama"}, "vision_config": TOWER},
    ),
}


@pytest.mark.parametrize("case", COMPOSITES)
def test_the_text_part_answers_as_the_whole_does(case: str, tmp_path: Path) -> None:
    family, parts = COMPOSITES[case]
    tokenizer = tiny_tokenizer()
    parts = {**parts, "text_config": parts["text_config"] | {"vocab_size": len(tokenizer)}}
    config = getattr(transformers, f"{family}Config")(**parts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        whole = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    whole.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path), kind=CAUSAL, labels=None, base=tmp_path, seed=1)
    tokens = torch.tensor([[40, 51, 60, 70]])
    with torch.no_grad():
        torch.testing.assert_close(backbone.model(input_ids=tokens).logits, whole(input_ids=tokens).logits)
    trainable = attach(backbone, {"kind": "lora", "rank": 2}, task_kind=CAUSAL, seed=1)
    rehearse_per_sample(trainable, None, clipping="flat")


def test_a_text_part_under_unknown_names_is_one_sentence(tmp_path: Path) -> None:
    _, parts = COMPOSITES["a text part under another name"]
    tokenizer = tiny_tokenizer()
    config = transformers.Idefics3Config(
        **{**parts, "text_config": parts["text_config"] | {"vocab_size": len(tokenizer)}}
    )
    transformers.Idefics3ForConditionalGeneration(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    moved = {name.replace("text_model", "words"): value for name, value in stored.items()}
    save_file(moved, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"its text part lie under names .*save the text model alone"):
        load_backbone(str(tmp_path), kind=CAUSAL, labels=None, base=tmp_path, seed=1)


def test_a_configuration_that_cannot_run_is_one_sentence(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    config = transformers.GPTJConfig(
        n_embd=16, n_layer=1, n_head=2, rotary_dim=64, vocab_size=len(tokenizer), n_positions=32
    )
    transformers.GPTJForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="GPTJForCausalLM does not run on a plain text"):
        load_backbone(str(tmp_path), kind=CAUSAL, labels=None, base=tmp_path, seed=1)


WITHOUT_MARKS = {
    "funnel": {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64, "block_sizes": [1, 1]},
    "canine": SMALL | {"num_hash_buckets": 64},
}


def without_marks(model: str, folder: Path) -> Backbone:
    tokenizer = tiny_tokenizer()
    config = transformers.AutoConfig.for_model(model, **WITHOUT_MARKS[model], num_labels=3)
    config.vocab_size = len(tokenizer)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_backbone(str(folder), kind=CLASSIFY, labels=3, base=folder, seed=1)


def test_a_configuration_that_names_no_end_of_a_text_is_trained(tmp_path: Path) -> None:
    trainable = attach(without_marks("funnel", tmp_path), ALL, task_kind=CLASSIFY, seed=1)
    assert trainable.backbone.config.eos_token_id is None
    assert trainable.size > 0


def test_a_model_that_looks_up_no_word_says_what_it_has_no_place_for(tmp_path: Path) -> None:
    backbone = without_marks("canine", tmp_path)
    with pytest.raises(ModelError, match=r"'prompt': Canine.* has no place for it .*; use lora or full"):
        attach(backbone, {"kind": "prompt", "length": 2}, task_kind=CLASSIFY, seed=1)
