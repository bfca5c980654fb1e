"""Sequence to sequence: an encoder reads, a decoder learns to write the answer and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.exports import WRITE, Case, _checkpoint
from defenses.dp import Clipping, PerSampleEngine
from ffm_secure.config.compatibility import position
from ffm_secure.data.dataset import Examples
from ffm_secure.errors import ModelError
from ffm_secure.models.backbone import Backbone, load_backbone
from ffm_secure.tasks import TaskData, build_task
from ffm_secure.tasks.encoded import IGNORED
from ffm_secure.tasks.sequence import SequenceToSequence
from ffm_secure.trainable import TrainableModel, attach, rehearse_per_sample
from tests.trainable.test_families import shake

ROWS = Examples(
    columns={
        "q": ["is it good", "the plot is long and bad today", "home", "we love it"],
        "a": ["yes it is", "no", "we are at home and very well", ""],
    }
)


@pytest.fixture(scope="module", params=["t5", "bart"])
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder = tmp_path_factory.mktemp(request.param)
    place = _checkpoint(Case(model=request.param, task=WRITE, spec={}), folder)
    return load_backbone(str(place), kind=WRITE, labels=None, base=folder, seed=5)


def task_of(backbone: Backbone, **options: Any) -> SequenceToSequence:
    return SequenceToSequence(backbone, TaskData(text_columns=("q", "a")), **{"max_length": 24} | options)


def batch_of(backbone: Backbone, rows: tuple[int, ...] = (0, 1, 2, 3)) -> dict[str, torch.Tensor]:
    task = task_of(backbone)
    return task.batch(task.encode(ROWS), list(rows), device="cpu")


def test_the_encoder_reads_the_prompt_and_the_decoder_writes_the_answer(backbone: Backbone) -> None:
    batch, tokenizer = batch_of(backbone), backbone.tokenizer
    for row in range(4):
        read = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        asked = batch["targets"][row] != IGNORED
        written = batch["targets"][row][asked]
        assert read.tolist() == tokenizer(ROWS.column("q")[row])["input_ids"]
        assert written.tolist() == (tokenizer(ROWS.column("a")[row])["input_ids"] or [tokenizer.eos_token_id])
        assert written[-1] == tokenizer.eos_token_id, "an answer learns to end"
        given = batch["decoder_input_ids"][row][asked]
        assert given[0] == backbone.config.decoder_start_token_id
        assert given[1:].tolist() == written[:-1].tolist(), "each token is predicted from those before it"
        assert batch["decoder_attention_mask"][row].bool().tolist() == asked.tolist()


def test_the_loss_is_that_of_the_library_for_each_sample_alone(backbone: Backbone) -> None:
    batch = batch_of(backbone)
    losses = task_of(backbone).losses(backbone.model, batch)
    for row in range(4):
        alone = batch_of(backbone, (row,))
        with torch.inference_mode():
            wanted = backbone.model(
                input_ids=alone["input_ids"], attention_mask=alone["attention_mask"], labels=alone["targets"]
            ).loss
        assert losses[row].item() == pytest.approx(float(wanted), abs=1e-5)


def test_what_comes_later_in_an_answer_changes_nothing_before_it(backbone: Backbone) -> None:
    batch = batch_of(backbone, (2,))
    changed = {**batch, "decoder_input_ids": batch["decoder_input_ids"].clone()}
    changed["decoder_input_ids"][0, -1] += 1
    with torch.inference_mode():
        before, after = (backbone.model(**_inputs(part)).logits[0] for part in (batch, changed))
    assert torch.equal(before[:-1], after[:-1])
    assert not torch.equal(before[-1], after[-1])


def _inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in batch.items() if name != "targets"}


SPECS = (
    {"kind": "lora", "rank": 2},
    {"kind": "full"},
    {"kind": "lora_xs", "rank": 2},
    {"kind": "prompt", "length": 3},
    {"kind": "p_tuning", "length": 3, "hidden": 8},
)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec["kind"])
def test_clipped_gradients_are_those_of_every_sample_alone(backbone: Backbone, spec: dict[str, Any]) -> None:
    task = task_of(backbone)
    trainable = attach(backbone, spec, task_kind=WRITE, seed=3)
    rehearse_per_sample(trainable, None, clipping="flat")
    shake(trainable)
    batch, bound = batch_of(backbone), 0.5
    with PerSampleEngine(trainable.model, parameters=trainable.active) as engine:
        summed = engine.clipped_sum(
            lambda: task.losses(trainable.model, batch), clip=Clipping(kind="flat", clip_norm=bound)
        )
    wanted = sum(_clipped(task, trainable, row, bound) for row in range(4))
    fast = torch.cat([summed.gradients[name].flatten() for name in trainable.parameters])
    assert (fast - wanted).norm() / wanted.norm() < 1e-5


def _clipped(task: SequenceToSequence, trainable: TrainableModel, row: int, bound: float) -> torch.Tensor:
    """Return one sample's gradient, computed alone and shortened to the bound."""
    alone = task.batch(task.encode(ROWS), [row], device="cpu")
    parameters = list(trainable.parameters.values())
    loss = task.losses(trainable.model, alone).sum()
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    flat = torch.cat([gradient.flatten() for gradient in filled])
    return flat * min(1.0, bound / float(flat.norm()))


@pytest.mark.parametrize("kind", ["head", "prefix", "deep_prompt", "prompt_generator"])
def test_what_stands_before_one_text_alone_is_refused(kind: str) -> None:
    assert "use prompt" in position(("task", WRITE), ("trainable", kind)) or kind == "head"
    assert position(("task", WRITE), ("trainable", kind))
    assert not position(("task", WRITE), ("trainable", "prompt"))


@pytest.mark.parametrize("kind", ["head", "prefix", "deep_prompt", "prompt_generator"])
def test_the_model_itself_refuses_them_too(backbone: Backbone, kind: str) -> None:
    with pytest.raises(ModelError, match=f"kind = '{kind}'"):
        attach(backbone, {"kind": kind, "length": 3}, task_kind=WRITE, seed=1)


def test_answers_are_counted_and_cut(backbone: Backbone) -> None:
    task = task_of(backbone, max_length=4)
    lengths = [
        max(len(backbone.tokenizer(text)["input_ids"]) for text in pair)
        for pair in zip(ROWS.column("q"), ROWS.column("a"), strict=True)
    ]
    assert task.full_lengths(ROWS).tolist() == lengths
    assert task.batch(task.encode(ROWS), [2], device="cpu")["targets"].shape == (1, 4)
    fixed = task_of(backbone, fixed_length=True)
    batch = fixed.batch(fixed.encode(ROWS).take([3, 0]), [0, 1], device="cpu")
    assert {value.shape for value in batch.values()} == {(2, 24)}
    assert np.isfinite(fixed.evaluate(backbone.model, fixed.encode(ROWS)).metric)


def test_a_model_of_one_side_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot do sequence_to_sequence"):
        load_backbone("builtin:tiny-gpt2", kind=WRITE, labels=None, base=tmp_path, seed=1)
    tiny = load_backbone("builtin:tiny-t5", kind=WRITE, labels=None, base=tmp_path, seed=1)
    with pytest.raises(ModelError, match="cannot read text columns"):
        build_task(WRITE, backbone=tiny, dataset=TaskData(text_columns=("q",)))
