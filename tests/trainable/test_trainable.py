"""What is trained: vectors, sharing, replicas, export and import,
and per-sample gradients of every kind on every model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict

from defenses.dp.per_sample import PerSampleEngine
from ffm_secure.errors import ModelError
from ffm_secure.models.backbone import Backbone, fingerprint, load_backbone
from ffm_secure.tasks import Task, build_task
from ffm_secure.trainable import TrainableModel, attach, replicate

MODELS = [
    ("tiny-bert", "text_classification"),
    ("tiny-gpt2", "text_classification"),
    ("tiny-llama", "text_classification"),
    ("tiny-bert", "masked_lm"),
    ("tiny-gpt2", "causal_lm"),
    ("tiny-llama", "causal_lm"),
    ("tiny-vit", "image_classification"),
]
SPECS: list[dict[str, Any]] = [
    {"kind": "full"},
    {"kind": "head"},
    {"kind": "lora", "rank": 3},
    {"kind": "lora", "rank": 2, "target_modules": ("all-linear",)},
    {"kind": "prompt", "length": 5},
    {"kind": "prefix", "length": 5},
    {"kind": "p_tuning", "length": 5, "hidden": 6},
    {"kind": "deep_prompt", "length": 5},
    {"kind": "prompt_generator", "length": 5, "hidden": 4},
]
DRAWN = (
    "lora",
    "prompt",
    "prefix",
    "p_tuning",
    "deep_prompt",
    "prompt_generator",
)  # the start depends on the seed
NEWER = (
    "prefix",
    "p_tuning",
    "deep_prompt",
    "prompt_generator",
)  # checked on one model of each family, to save time
FEWER = [
    ("tiny-bert", "text_classification"),
    ("tiny-bert", "masked_lm"),
    ("tiny-gpt2", "text_classification"),
    ("tiny-llama", "causal_lm"),
    ("tiny-vit", "image_classification"),
]
IMPOSSIBLE = {  # kind of training -> tasks it cannot do
    "head": ("causal_lm", "masked_lm"),
    "prefix": ("image_classification",),
    "prompt_generator": ("causal_lm",),
}
GRID = [
    pytest.param(name, kind, spec, id="-".join((name, kind, spec["kind"], *spec.get("target_modules", ()))))
    for name, kind in MODELS
    for spec in SPECS
    if kind not in IMPOSSIBLE.get(spec["kind"], ())
    if spec["kind"] not in NEWER or (name, kind) in FEWER
]
LABELS = np.array([1, 0, 2, 1])


class Table:
    """Examples by column."""

    def __init__(self, **columns: Any) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def column(self, name: str) -> Any:
        return self.columns[name]


def backbone_of(name: str, kind: str, seed: int = 5) -> Backbone:
    return load_backbone(f"builtin:{name}", kind=kind, labels=3, base=Path(), seed=seed)


def task_of(backbone: Backbone) -> tuple[Task, Any]:
    pictures = backbone.kind == "image_classification"
    dataset = SimpleNamespace(
        text_columns=() if pictures else ("text",),
        label_column="label",
        image_column="picture" if pictures else None,
    )
    task = build_task(backbone.kind, backbone=backbone, dataset=dataset)
    texts = ["a good movie", "the plot is bad and long", "home", "we love this story very much today"]
    noise = np.random.default_rng(1).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    return task, task.encode(Table(text=texts, picture=noise, label=LABELS))


def prepare(name: str, kind: str, spec: Mapping[str, Any]) -> tuple[TrainableModel, Task, Any]:
    backbone = backbone_of(name, kind)
    task, encoded = task_of(backbone)
    return attach(backbone, spec, task_kind=kind, seed=3), task, encoded


def shake(trainable: TrainableModel, seed: int = 9) -> None:
    """Move away from the start, where LoRA's B is zero and hides mistakes."""
    noise = torch.randn(trainable.size, generator=torch.Generator().manual_seed(seed))
    trainable.load_vector(trainable.flatten() + 0.05 * noise)


def losses(
    trainable: TrainableModel, task: Task, encoded: Any, rows: Sequence[int] = range(4)
) -> torch.Tensor:
    return task.losses(trainable.model, task.batch(encoded, rows, device="cpu"))


def same_length(backbone: Backbone) -> dict[str, torch.Tensor]:
    if backbone.kind == "image_classification":
        return {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)}
    ids = torch.tensor([[2, 40, 50, 60, 3], [2, 41, 3, 45, 3]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


# --- vectors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, kind, spec", GRID)
def test_only_the_named_tensors_are_trained_and_the_vector_is_exact(
    name: str, kind: str, spec: dict[str, Any]
) -> None:
    trainable, task, encoded = prepare(name, kind, spec)
    assert {id(p) for p in trainable.model.parameters() if p.requires_grad} == {
        id(p) for p in trainable.parameters.values()
    }
    assert trainable.layout == tuple((n, tuple(p.shape)) for n, p in trainable.parameters.items())
    vector = trainable.flatten()
    assert vector.dtype == torch.float32
    assert vector.shape == (trainable.size,)
    other = torch.randn(trainable.size, generator=torch.Generator().manual_seed(1))
    trainable.load_vector(other)
    assert torch.equal(trainable.flatten(), other)
    trainable.load_vector(vector)
    assert torch.equal(trainable.flatten(), vector)
    losses(trainable, task, encoded).sum().backward()
    assert all(p.grad is not None for p in trainable.parameters.values())


@pytest.mark.parametrize("name, kind, spec", GRID)
def test_the_start_depends_on_the_seed_alone(name: str, kind: str, spec: dict[str, Any]) -> None:
    backbone = backbone_of(name, kind)
    one, same, other = (attach(backbone, spec, task_kind=kind, seed=seed).tensors() for seed in (3, 3, 4))
    assert fingerprint(one) == fingerprint(same)
    assert (fingerprint(one) != fingerprint(other)) == (spec["kind"] in DRAWN)


@pytest.mark.parametrize("name, kind, spec", GRID)
def test_training_never_touches_the_backbone(name: str, kind: str, spec: dict[str, Any]) -> None:
    backbone = backbone_of(name, kind)
    before = fingerprint(backbone.model.state_dict())
    task, encoded = task_of(backbone)
    trainable = attach(backbone, spec, task_kind=kind, seed=3)
    optimizer = torch.optim.SGD(trainable.parameters.values(), lr=0.1)
    first = losses(trainable, task, encoded).mean()
    first.backward()
    optimizer.step()
    assert losses(trainable, task, encoded).mean() < first
    assert fingerprint(backbone.model.state_dict()) == before
    assert not any(p.requires_grad for p in backbone.model.parameters())


@pytest.mark.parametrize("spec", SPECS[1:], ids=str)
def test_frozen_storage_is_shared_by_all_trainables_of_a_backbone(spec: dict[str, Any]) -> None:
    backbone = backbone_of("tiny-bert", "text_classification")
    one, two = (attach(backbone, spec, task_kind="text_classification", seed=s) for s in (1, 2))
    frozen = {p.data_ptr() for p in backbone.model.parameters()}
    for trainable in (one, two):
        rest = [p for p in trainable.model.parameters() if not p.requires_grad]
        assert rest
        assert all(p.data_ptr() in frozen for p in rest)
    shake(two)
    assert not torch.equal(one.flatten(), two.flatten())


@pytest.mark.parametrize("name, kind, spec", GRID)
def test_a_replica_shares_what_is_frozen_and_owns_what_is_trained(
    name: str, kind: str, spec: dict[str, Any]
) -> None:
    trainable, task, encoded = prepare(name, kind, spec)
    shake(trainable)
    before, start = losses(trainable, task, encoded).detach(), trainable.flatten()
    copy = replicate(trainable)
    assert copy.layout == trainable.layout
    assert torch.equal(losses(copy, task, encoded), before)
    pointers = {p.data_ptr() for p in trainable.model.parameters() if not p.requires_grad}
    assert {p.data_ptr() for p in copy.model.parameters() if not p.requires_grad} == pointers
    copy.load_vector(torch.zeros(copy.size))
    losses(copy, task, encoded).sum().backward()
    assert torch.equal(trainable.flatten(), start)
    assert all(p.grad is None for p in trainable.parameters.values())
    assert torch.equal(losses(trainable, task, encoded), before)


@pytest.mark.parametrize("length", [0, 1, 10_000_000])
def test_a_vector_of_another_length_is_refused(length: int) -> None:
    trainable, _, _ = prepare("tiny-bert", "text_classification", {"kind": "lora"})
    with pytest.raises(ModelError, match="does not fit"):
        trainable.load_vector(torch.zeros(length))


@pytest.mark.parametrize("name, kind", MODELS)
def test_lora_starts_as_the_backbone(name: str, kind: str) -> None:
    backbone = backbone_of(name, kind)
    task, encoded = task_of(backbone)
    trainable = attach(backbone, {"kind": "lora"}, task_kind=kind, seed=3)
    with torch.no_grad():
        plain = task.losses(backbone.model, task.batch(encoded, range(4), device="cpu"))
    torch.testing.assert_close(losses(trainable, task, encoded).detach(), plain)


def test_full_training_computes_what_the_plain_model_computes() -> None:
    """The expanded embeddings and the explicit positions change no number."""
    for name, kind in MODELS:
        backbone = backbone_of(name, kind)
        task, encoded = task_of(backbone)
        trainable = attach(backbone, {"kind": "full"}, task_kind=kind, seed=3)
        assert tuple(trainable.parameters) == tuple(n for n, _ in backbone.model.named_parameters())
        plain = task.losses(backbone.model, task.batch(encoded, range(4), device="cpu"))
        torch.testing.assert_close(losses(trainable, task, encoded).detach(), plain)


@pytest.mark.parametrize(
    "name, kind, spec", [p for p in GRID if "length" in p.values[2] and p.values[0] != "tiny-vit"]
)
def test_a_prompted_loss_does_not_depend_on_the_company(name: str, kind: str, spec: dict[str, Any]) -> None:
    if kind == "masked_lm":
        pytest.skip("masks are drawn anew by row")
    trainable, task, encoded = prepare(name, kind, spec)
    shake(trainable)
    together = losses(trainable, task, encoded).detach()
    assert together.std() > 1e-3
    for row in range(4):
        torch.testing.assert_close(
            losses(trainable, task, encoded, [row]).detach()[0], together[row], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_half_precision_models_train_and_travel_as_float32(spec: dict[str, Any]) -> None:
    kind = "text_classification"
    backbone = load_backbone("builtin:tiny-bert", kind=kind, labels=3, base=Path(), seed=5, dtype="bfloat16")
    task, encoded = task_of(backbone)
    trainable = attach(backbone, spec, task_kind=kind, seed=3)
    vector = trainable.flatten()
    assert vector.dtype == torch.float32
    trainable.load_vector(vector)
    assert torch.equal(trainable.flatten(), vector)
    values = losses(trainable, task, encoded)
    assert values.dtype == torch.float32
    values.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in trainable.parameters.values() if p.grad is not None)


# --- per-sample gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name, kind, spec", GRID)
def test_per_sample_gradients_equal_a_loop_over_batches_of_one(
    name: str, kind: str, spec: dict[str, Any]
) -> None:
    trainable, task, encoded = prepare(name, kind, spec)
    shake(trainable)
    wanted = []
    for row in range(4):
        gradients = torch.autograd.grad(
            losses(trainable, task, encoded, [row]).sum(), list(trainable.parameters.values())
        )
        wanted.append(torch.cat([g.flatten() for g in gradients]))
    with PerSampleEngine(trainable.model, parameters=trainable.parameters) as engine:
        found = engine.per_sample(lambda: losses(trainable, task, encoded))
    flat = torch.cat([found[key].flatten(1) for key in trainable.parameters], dim=1)
    error = (flat - torch.stack(wanted)).norm() / torch.stack(wanted).norm()
    assert error < 2e-6


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, kind, spec", GRID)
def test_export_and_import_keep_every_bit(name: str, kind: str, spec: dict[str, Any], tmp_path: Path) -> None:
    trainable, _, _ = prepare(name, kind, spec)
    shake(trainable)
    trainable.export(tmp_path / "out", "base")
    again, _, _ = prepare(name, kind, spec)
    again.import_(tmp_path / "out")
    assert fingerprint(again.tensors()) == fingerprint(trainable.tensors())
    assert not list((tmp_path / "out").glob("*.bin"))


def own_logits(trainable: TrainableModel) -> torch.Tensor:
    with torch.inference_mode():
        out: torch.Tensor = trainable.model(**same_length(trainable.backbone)).logits
    return out


@pytest.mark.parametrize(
    "name, kind, spec",
    [p for p in GRID if p.values[2]["kind"] in ("lora", "head")],
)
def test_plain_peft_loads_the_adapter_on_the_same_base(
    name: str, kind: str, spec: dict[str, Any], tmp_path: Path
) -> None:
    trainable, _, _ = prepare(name, kind, spec)
    shake(trainable)
    trainable.export(tmp_path, "base")
    loaded = PeftModel.from_pretrained(backbone_of(name, kind).model, str(tmp_path)).eval()
    with torch.inference_mode():
        theirs = loaded(**same_length(trainable.backbone)).logits
    torch.testing.assert_close(theirs, own_logits(trainable), atol=1e-6, rtol=1e-5)
    stored = get_peft_model_state_dict(loaded, save_embedding_layers=False)
    if spec["kind"] == "lora":
        assert set(stored) == set(trainable.parameters)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"


@pytest.mark.parametrize("how", ["prompt", "prefix", "p_tuning"])
@pytest.mark.parametrize(
    "name, kind", [pair for pair in MODELS if pair[1] in ("text_classification", "causal_lm")]
)
def test_plain_peft_loads_the_prompt(name: str, kind: str, how: str, tmp_path: Path) -> None:
    """Equal lengths: PEFT hands decoders no place to find the last word of a padded text."""
    trainable, _, _ = prepare(name, kind, {"kind": how, "length": 4})
    shake(trainable)
    trainable.export(tmp_path, "base")
    loaded = PeftModel.from_pretrained(backbone_of(name, kind).model, str(tmp_path)).eval()
    with torch.inference_mode():
        theirs = loaded(**same_length(trainable.backbone)).logits
    if kind == "causal_lm" and how != "prefix":
        theirs = theirs[:, 4:]
    torch.testing.assert_close(theirs, own_logits(trainable), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name, kind", MODELS)
def test_plain_transformers_loads_a_full_export(name: str, kind: str, tmp_path: Path) -> None:
    trainable, _, _ = prepare(name, kind, {"kind": "full"})
    shake(trainable)
    trainable.export(tmp_path, "base")
    auto = {
        "text_classification": transformers.AutoModelForSequenceClassification,
        "masked_lm": transformers.AutoModelForMaskedLM,
        "causal_lm": transformers.AutoModelForCausalLM,
        "image_classification": transformers.AutoModelForImageClassification,
    }[kind]
    loaded = auto.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        torch.testing.assert_close(loaded(**same_length(trainable.backbone)).logits, own_logits(trainable))


@pytest.mark.parametrize("name, kind", [("tiny-bert", "masked_lm"), ("tiny-vit", "image_classification")])
def test_prompts_peft_has_no_type_for_are_stored_with_a_version(name: str, kind: str, tmp_path: Path) -> None:
    trainable, _, _ = prepare(name, kind, {"kind": "prompt", "length": 4})
    trainable.export(tmp_path, "base")
    table = json.loads((tmp_path / "trainable.json").read_text())
    assert table == {
        "format": 1,
        "base_model": "base",
        "kind": "prompt",
        "task": kind,
        "length": 4,
        "width": 64,
    }
    (tmp_path / "trainable.json").write_text(json.dumps(table | {"format": 2}))
    with pytest.raises(ModelError, match="format = 2"):
        trainable.import_(tmp_path)
    (tmp_path / "trainable.json").write_text("not json")
    with pytest.raises(ModelError, match="cannot be read"):
        trainable.import_(tmp_path)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_damaged_or_foreign_files_are_refused_and_change_nothing(
    spec: dict[str, Any], tmp_path: Path
) -> None:
    trainable, _, _ = prepare("tiny-bert", "text_classification", spec)
    trainable.export(tmp_path / "cut", "base")
    for path in (tmp_path / "cut").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-7])
    wider = {**spec, "rank": 4, "length": 6}
    other = prepare(
        "tiny-llama" if spec["kind"] in ("full", "head") else "tiny-bert", "text_classification", wider
    )[0]
    other.export(tmp_path / "other", "base")
    before = fingerprint(trainable.tensors())
    for folder in ("cut", "other", "missing"):
        with pytest.raises(ModelError):
            trainable.import_(tmp_path / folder)
    assert fingerprint(trainable.tensors()) == before


# --- mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, spec, words",
    [
        ("text_classification", {"kind": "everything"}, "must be one of full, head, lora"),
        ("text_classification", {"kind": "prefix", "length": 256}, "below 256"),
        ("text_classification", {"kind": "lora", "rnak": 3}, "unknown option"),
        ("text_classification", {"kind": "lora", "rank": 0}, "at least 1"),
        ("text_classification", {"kind": "lora", "target_modules": ("q_proj",)}, "query"),
        ("text_classification", {"kind": "prompt", "length": 256}, "below 256"),
        ("masked_lm", {"kind": "head"}, "no head of its own"),
    ],
)
def test_mistakes_are_explained(kind: str, spec: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        prepare("tiny-bert", kind, spec)


def test_options_of_other_kinds_are_not_read() -> None:
    whole = {"kind": "prompt", "rank": 8, "alpha": 16.0, "target_modules": (), "length": 3}
    assert prepare("tiny-bert", "text_classification", whole)[0].layout[0] == ("prompt_embeddings", (3, 64))


def test_a_model_loaded_for_another_task_is_refused() -> None:
    with pytest.raises(ModelError, match="loaded for masked_lm"):
        attach(
            backbone_of("tiny-bert", "masked_lm"), {"kind": "full"}, task_kind="text_classification", seed=1
        )


def test_a_text_too_long_for_prompt_and_model_is_refused() -> None:
    trainable, task, _ = prepare("tiny-bert", "text_classification", {"kind": "prompt", "length": 250})
    encoded = task.encode(Table(text=["good " * 30], label=[0]))
    with pytest.raises(ModelError, match="exceed the 256 positions"):
        losses(trainable, task, encoded, [0])


def test_a_causal_model_is_not_told_what_it_has_to_predict() -> None:
    with pytest.raises(ModelError, match="has to predict"):
        prepare("tiny-gpt2", "causal_lm", {"kind": "prompt_generator"})


def test_pictures_have_no_prefix() -> None:
    with pytest.raises(ModelError, match="use deep_prompt"):
        prepare("tiny-vit", "image_classification", {"kind": "prefix"})


# --- what the kinds of prompt do ----------------------------------------------------------------------------


@pytest.mark.parametrize("representation", ["model", "embedding"])
@pytest.mark.parametrize(
    "name, kind", [("tiny-bert", "text_classification"), ("tiny-vit", "image_classification")]
)
def test_a_generated_prompt_depends_on_its_own_input_alone(name: str, kind: str, representation: str) -> None:
    spec = {"kind": "prompt_generator", "length": 3, "hidden": 4, "representation": representation}
    trainable, task, encoded = prepare(name, kind, spec)
    model: Any = trainable.model
    batch = {n: v for n, v in task.batch(encoded, range(4), device="cpu").items() if n != "labels"}
    first = model.virtual_tokens(batch)
    assert torch.equal(first[0], first[1]), "it starts as one plain soft prompt"
    shake(trainable)
    together = model.virtual_tokens(batch)
    assert (together[0] - together[1]).abs().max() > 1e-4
    alone = model.virtual_tokens({n: v[:1] for n, v in batch.items()})
    torch.testing.assert_close(alone[0], together[0], atol=1e-5, rtol=1e-5)


def test_the_frozen_representation_carries_no_gradient() -> None:
    trainable, task, encoded = prepare(
        "tiny-bert", "text_classification", {"kind": "prompt_generator", "length": 3}
    )
    batch = task.batch(encoded, range(4), device="cpu")
    assert not trainable.model.frozen_representation(batch).requires_grad


@pytest.mark.parametrize(
    "name, kind", [("tiny-bert", "text_classification"), ("tiny-vit", "image_classification")]
)
def test_deep_prompts_reach_every_layer(name: str, kind: str) -> None:
    trainable, task, encoded = prepare(name, kind, {"kind": "deep_prompt", "length": 3})
    losses(trainable, task, encoded).sum().backward()
    first, later = (trainable.parameters[part].grad for part in ("prompts.first", "prompts.later"))
    assert first is not None
    assert later is not None
    assert later.shape[0] == trainable.backbone.config.num_hidden_layers - 1
    assert all(float(part.abs().max()) > 0 for part in (first, *later))
