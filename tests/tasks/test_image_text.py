"""Pictures scored against texts: zero-shot as stock libraries answer, own gradients, contexts, exports."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel

import ffm_secure as ffm
from defenses.dp.per_sample import PerSampleEngine
from ffm_secure.config.run_file import from_table
from ffm_secure.errors import ModelError, PlanRefused
from ffm_secure.models.backbone import Backbone, load_backbone
from ffm_secure.models.builtin import tiny_tokenizer
from ffm_secure.tasks import Task, build_task
from ffm_secure.trainable import attach
from ffm_secure.trainable.base import stored_tensors
from ffm_secure.trainable.predictor import ModelSource, Predictor
from tests.federation.helpers import RECORD, SECAGG, table

KIND = "image_text_classification"
NAMES = ("empty road", "car", "cyclist")
TEXT = "a look at the {}."  # four words of the tiny vocabulary
TRAINABLES: tuple[dict[str, Any], ...] = (
    {"kind": "lora", "rank": 2},
    {"kind": "lora", "rank": 2, "target_modules": ["text_projection"]},
    {"kind": "lora", "rank": 2, "target_modules": ["vision_model.*.q_proj"]},
    {"kind": "lora_xs", "rank": 2},
    {"kind": "context", "length": 3},
    {"kind": "class_context", "length": 3},
    {"kind": "head"},
)


def siglip(folder: Path) -> Path:
    """Save a tiny SigLIP with a tokenizer."""
    tower = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    tokenizer = tiny_tokenizer()
    marks = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**tower, **marks, "vocab_size": len(tokenizer), "max_position_embeddings": 32}
    config = transformers.SiglipConfig(
        text_config={**text, "projection_size": 32},
        vision_config={**tower, "image_size": 16, "patch_size": 8},
    )
    torch.manual_seed(5)
    transformers.SiglipModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def loaded(name: str = "builtin:tiny-clip", text: str = TEXT) -> Backbone:
    return load_backbone(name, kind=KIND, labels=len(NAMES), base=Path("."), seed=1, class_text=text)


def task_for(backbone: Backbone, *, kind: str = KIND, names: tuple[str, ...] = NAMES) -> Task:
    data = SimpleNamespace(label_column="label", label_names=names, image_column="image")
    return build_task(kind, backbone=backbone, dataset=data, max_length=32)


def batch_of(task: Task, count: int = 4) -> dict[str, torch.Tensor]:
    pictures = np.random.default_rng(3).integers(0, 256, (count, 16, 16, 3)).astype(np.uint8)
    columns = {"image": pictures, "label": np.arange(count) % len(NAMES)}
    rows = SimpleNamespace(column=columns.__getitem__)
    return task.batch(task.encode(rows), range(count), device="cpu")


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_before_training_it_answers_as_the_stock_model_does(family: str, tmp_path: Path) -> None:
    backbone = loaded() if family == "clip" else loaded(str(siglip(tmp_path / "s")))
    if family == "clip":
        backbone.model.save_pretrained(tmp_path / "s")
    stock = transformers.AutoModelForZeroShotImageClassification.from_pretrained(tmp_path / "s").eval()
    task = task_for(backbone)
    batch = batch_of(task)
    padding: dict[str, Any] = (
        {"padding": "max_length", "max_length": 32} if family == "siglip" else {"padding": True}
    )
    words = backbone.tokenizer([TEXT.replace("{}", n) for n in NAMES], return_tensors="pt", **padding)
    context = attach(backbone, {"kind": "context", "length": 4}, task_kind=KIND, seed=1)
    with torch.inference_mode():
        expected = stock(input_ids=words["input_ids"], pixel_values=batch["pixel_values"]).logits_per_image
        answered = backbone.model(batch["pixel_values"], batch["class_texts"]).logits
        answered_by_context = context.model(**batch).logits
    bias = getattr(stock, "logit_bias", torch.zeros(1))  # the same for all classes
    assert torch.allclose(answered, expected - bias.detach(), atol=1e-5)
    assert torch.allclose(answered_by_context, answered, atol=1e-5)  # four words, four vectors


@pytest.mark.parametrize("spec", TRAINABLES, ids=lambda spec: "-".join(map(str, spec.values())))
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_every_picture_has_its_own_gradient(family: str, spec: dict[str, Any], tmp_path: Path) -> None:
    backbone = loaded() if family == "clip" else loaded(str(siglip(tmp_path / "s")))
    if family == "siglip" and spec.get("target_modules") == ["text_projection"]:
        spec = {**spec, "target_modules": ["text_model.head"]}
    trained = attach(backbone, {**spec}, task_kind=KIND, seed=1)
    trained.load_vector(trained.flatten() + 0.05 * torch.randn(trained.size, generator=torch.manual_seed(2)))
    task = task_for(backbone)
    batch = batch_of(task)
    with PerSampleEngine(trained.model, parameters=trained.parameters) as engine:
        gradients = engine.per_sample(lambda: task.losses(trained.model, batch))
    for row in range(4):
        alone = {name: value[row : row + 1] for name, value in batch.items()}
        loss = task.losses(trained.model, alone).sum()
        expected = torch.autograd.grad(loss, list(trained.parameters.values()))
        for (name, values), wanted in zip(gradients.items(), expected, strict=True):
            assert torch.allclose(values[row], wanted, atol=1e-5, rtol=1e-3), name
            assert bool(wanted.any()) or name.endswith("lora_A.weight"), name


def test_what_names_cannot_tell_apart_is_refused() -> None:
    backbone = loaded()
    with pytest.raises(ModelError, match=r"numbers alone.*class_names"):
        task_for(backbone, names=("0", "1", "2"))
    with pytest.raises(ModelError, match="the same name"):
        task_for(backbone, names=("car", "Car ", "cyclist"))
    with pytest.raises(ModelError, match="must name the class once"):
        task_for(loaded(text="a photo"))
    with pytest.raises(ModelError, match="at most 32 are read"):
        task_for(backbone, names=("car", "cyclist", "a very long name " * 9))
    with pytest.raises(ModelError, match="must end in a space"):
        attach(loaded(text="re{}"), {"kind": "context"}, task_kind=KIND, seed=1)
    with pytest.raises(ModelError, match="lower the length"):
        attach(loaded(text="{}"), {"kind": "context", "length": 72}, task_kind=KIND, seed=1).model(
            **batch_of(task_for(loaded(text="{}"), names=("car", "cyclist", "the empty road of the morning")))
        )
    with pytest.raises(ModelError, match="cannot do image_text_classification"):
        load_backbone("builtin:tiny-vit", kind=KIND, labels=3, base=Path("."), seed=1)


def test_the_contrastive_loss_is_that_of_the_definition() -> None:
    backbone = loaded()
    task = task_for(backbone, kind="image_text_contrastive_classification")
    batch = batch_of(task, 5)
    scores, labels = backbone.model(batch["pixel_values"], batch["class_texts"]).logits, batch["labels"]
    losses = task.losses(backbone.model, batch)
    for row in range(5):
        same = [j for j in range(5) if labels[j] == labels[row]]
        to_texts = [float(scores[row, labels[j]]) for j in range(5)]
        to_pictures = [float(scores[j, labels[row]]) for j in range(5)]
        expected = 0.0
        for values in (to_texts, to_pictures):
            total = np.log(np.sum(np.exp(values)))
            expected += float(np.mean([total - values[j] for j in same])) / 2
        assert abs(float(losses[row]) - expected) < 1e-4


def clip_table(**sections: Any) -> dict[str, Any]:
    task = {
        "kind": KIND,
        "data": "builtin:road_scenes?size=80&validation=40",
        "clients": 4,
        "class_text": "a {}",
    }
    return table(
        task={**task, **sections.pop("task", {})},
        model=sections.pop("model", {"name": "builtin:tiny-clip", "trainable": {"kind": "lora", "rank": 2}}),
        federation={
            "rounds": 2,
            "cohort": 4,
            "lifecycle": {"kind": "finetune", "local_steps": 1, "batch_size": 4, "learning_rate": 0.1},
        },
        **sections,
    )


def refused(**sections: Any) -> str:
    with pytest.raises(PlanRefused) as error:
        ffm.Run(from_table(clip_table(**sections))).plan()
    return str(error.value)


def test_a_loss_over_the_batch_is_refused_for_records_and_planned_for_clients(tmp_path: Path) -> None:
    contrastive = {"kind": "image_text_contrastive_classification"}
    assert "depends on the others of its batch" in refused(task=contrastive, privacy=RECORD)
    client = {"unit": "client", "epsilon": 8.0, "delta": 1e-5, "clip_norm": 1.0}
    planned = from_table(clip_table(task=contrastive, privacy=client, protection=SECAGG))
    assert ffm.Run(planned, runs=tmp_path).plan().noise_multiplier > 0


@pytest.mark.parametrize(
    "spec", [{"kind": "context", "length": 2}, {"kind": "lora", "rank": 2}], ids=["context", "lora"]
)
def test_a_run_is_masked_planned_exported_and_answers(spec: dict[str, Any], tmp_path: Path) -> None:
    model = {"name": "builtin:tiny-clip", "trainable": spec}
    masked = from_table(clip_table(model=model, privacy=RECORD, protection=SECAGG))
    plain = from_table(clip_table(model=model, privacy=RECORD))
    first = ffm.Run(masked, runs=tmp_path / "masked").start()
    second = ffm.Run(plain, runs=tmp_path / "plain").start()
    tensors = stored_tensors(second.folder / "adapter")
    for name, value in stored_tensors(first.folder / "adapter").items():
        assert torch.allclose(value, tensors[name], atol=2e-4)
    folder = first.folder / "adapter"
    source = ModelSource(name="builtin:tiny-clip", spec={**spec}, seed=3)
    predictor = Predictor.load(folder, source, base=tmp_path)
    picture = np.random.default_rng(1).integers(0, 256, (1, 32, 32, 3)).astype(np.uint8)
    answer = predictor.logits({"picture": picture}, 1)
    assert predictor.pictures(list(picture))[0].answer in predictor.export.labels
    if spec["kind"] == "context":
        assert predictor.export.form == "own"
        return
    texts = ["a " + name for name in json.loads((folder / "export.json").read_text())["labels"]]
    base = transformers.AutoModelForZeroShotImageClassification.from_pretrained(folder / "base")
    stock = PeftModel.from_pretrained(base, folder).eval()
    words = transformers.AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    pixels = transformers.AutoImageProcessor.from_pretrained(folder)(list(picture), return_tensors="pt")
    with torch.inference_mode():
        stock_answer = stock(input_ids=words["input_ids"], **pixels).logits_per_image
    assert torch.allclose(stock_answer, answer, atol=1e-4)
    assert "logits_per_image" in (folder / "README.md").read_text()


@pytest.mark.slow
def test_pictures_and_texts_are_learned_together(tmp_path: Path) -> None:
    steps = {
        "kind": "finetune",
        "local_steps": 12,
        "batch_size": 64,
        "learning_rate": 0.002,
        "optimizer": "adam",
    }
    together = clip_table(
        task={"kind": "image_text_contrastive_classification", "data": "builtin:road_scenes"},
        model={"name": "builtin:tiny-clip", "trainable": {"kind": "full"}},
    )
    together["federation"] = {**together["federation"], "rounds": 16, "lifecycle": steps}
    result = ffm.Run(from_table(together), runs=tmp_path).start(fairness=False)
    assert result.summary.metric_zero_round < 0.35
    assert result.metric > 0.6
