"""A run refuses to start when one sample could move the sum by more than its bound."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor, nn

from defenses.errors import NotPrivateError
from ffm_secure.engines import simulation
from ffm_secure.errors import DataError
from ffm_secure.tasks import ImageClassification
from tests.federation.helpers import RECORD, make, prepared


class MeanLoss(ImageClassification):
    """Divide every loss by the batch:
    what training loops usually do, and what no bound per sample survives.
    """

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        losses = super().losses(model, batch)
        return losses / len(losses)


def test_a_coupled_loss_is_refused_before_private_data_are_read(tmp_path: Path) -> None:
    made = prepared(make(privacy=RECORD))
    coupled = MeanLoss(made.backbone, made.task.data, max_length=made.task.max_length)
    with pytest.raises(NotPrivateError, match="loss"):
        simulation.build(replace(made, task=coupled), tmp_path)
    assert not (tmp_path / "ledger.sqlite").exists()


@pytest.mark.parametrize(
    ("model", "kind", "data"),
    [
        ("builtin:tiny-vit", "image_classification", "builtin:digits"),
        ("builtin:tiny-bert", "masked_lm", "builtin:clinic_notes"),
        ("builtin:tiny-gpt2", "causal_lm", "builtin:clinic_notes"),
    ],
)
@pytest.mark.parametrize("trainable", ["lora", "prompt"])
def test_every_task_passes_the_probe(model: str, kind: str, data: str, trainable: str) -> None:
    task = {"kind": kind, "data": data, "clients": 4, "max_length": 24, "evaluation_examples": 10}
    made = prepared(make(task=task, model={"name": model, "trainable": {"kind": trainable}}, privacy=RECORD))
    simulation.probe(made, made.task.encode(made.dataset.validation.take(range(10))))


@pytest.mark.parametrize("rows", [1, 2])
def test_the_probe_does_not_shrink_with_the_evaluation(rows: int, tmp_path: Path) -> None:
    """With one evaluation row it was skipped, with two it ended in an error about its own arguments."""
    made = prepared(make(privacy=RECORD, task={"evaluation_examples": rows}))
    simulation.build(made, tmp_path / "sound")
    coupled = MeanLoss(made.backbone, made.task.data, max_length=made.task.max_length)
    with pytest.raises(NotPrivateError, match="loss"):
        simulation.build(replace(made, task=coupled), tmp_path / "coupled")


def test_too_few_public_rows_for_the_probe_are_named(tmp_path: Path) -> None:
    for part, count in (("train", 30), ("validation", 2)):
        rows = "".join(f"row {i} of {part},{'ab'[i % 2]}\n" for i in range(count))
        (tmp_path / f"{part}.csv").write_text("text,label\n" + rows)
    task = {"kind": "text_classification", "data": str(tmp_path), "clients": 4}
    model = {"name": "builtin:tiny-bert", "trainable": {"kind": "head"}}
    with pytest.raises(DataError, match="has 2 validation rows, and the bound on one record is tried on 3"):
        simulation.build(prepared(make(privacy=RECORD, task=task, model=model)), tmp_path / "run")
