"""Heads from sums: against the slow obvious definition, and against what the model itself would say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ffm_secure.errors import ModelError
from ffm_secure.queries.base import Rows, Viewed, head_of, recall
from ffm_secure.queries.class_sums import class_head, lengths_without_noise, spread, unit_rows
from ffm_secure.queries.ridge_sums import ridge_head
from ffm_secure.tasks.base import logits
from tests.federation.helpers import RECORD, SECAGG, make, prepared, train
from tests.queries.helpers import HEAD, STEPS, one_shot


def viewed(ready: object) -> tuple[Viewed, Rows]:
    ready_ = ready
    model = Viewed(trainable=ready_.trainable, task=ready_.task, batch_size=16)  # type: ignore[attr-defined]
    return model, Rows(encoded=ready_.task.encode(ready_.data.rows(0)))  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["builtin:tiny-vit", "builtin:tiny-bert"])
def test_features_are_what_the_head_reads(name: str) -> None:
    text = {"kind": "text_classification", "data": "builtin:clinic_notes", "max_length": 16, "clients": 4}
    sections = {} if name == "builtin:tiny-vit" else {"task": text}
    ready = prepared(make(model={"name": name, "trainable": {"kind": "head"}}, **sections))
    model, rows = viewed(ready)
    rows = rows.take(np.arange(20))
    head = head_of(ready.trainable)
    features = model.features(rows)
    expected = features @ head.module.weight.detach().T + head.module.bias.detach()
    batch = ready.task.evaluation_batch(rows.encoded, np.arange(20), "cpu")
    ready.trainable.model.eval()
    with torch.inference_mode():
        assert torch.allclose(expected, logits(ready.trainable.model, batch), atol=1e-4)
    assert torch.allclose(model.scores(rows), expected, atol=1e-4)


def test_the_opened_sums_are_those_added_up_row_by_row(tmp_path: Path) -> None:
    config = one_shot(protection=SECAGG)
    start = prepared(config)
    head = head_of(start.trainable)
    expected = torch.zeros(head.classes, head.width, dtype=torch.float64)
    for owner in range(4):
        rows = Rows(encoded=start.task.encode(start.data.rows(owner)))
        model = Viewed(trainable=start.trainable, task=start.task)
        for features, label in zip(unit_rows(model.features(rows)), rows.labels(), strict=True):
            expected[label] += features
    _, result = train(config, tmp_path / "run")
    answer = recall(result.state, "class_sums")
    assert answer is not None
    assert answer.sites == 4
    sums = torch.from_numpy(answer.values).view(head.classes, head.width)
    assert float((sums - expected).abs().max()) < 1e-2  # rounding of four sites to the grid
    weight = result.state.vector[head.weight].view(head.classes, head.width)
    assert torch.allclose(weight.double(), class_head(sums, deviation=answer.deviation), atol=1e-6)


def test_a_head_comes_out_of_the_secure_sum_with_noise_in_shares_and_a_site_lost(tmp_path: Path) -> None:
    """The whole way: bound, sum, grid, shares, masks, a lost site, the opened sum, the head, the ledger."""
    dropout = {"rate": 0.2, "stages": ["upload"]}
    privacy = {**RECORD, "noise": "system", "noise_shares": "sum"}
    federation = {"rounds": 1, "cohort": 6, "lifecycle": {"kind": "class_sums"}, "dropout": dropout}
    config = make(
        seed=4,
        task={"clients": 6},
        model=HEAD,
        federation=federation,
        privacy=privacy,
        protection={"kind": "secagg", "threshold": 4},
    )
    ready, result = train(config, tmp_path / "run")
    record = result.records[0]
    assert record.aborted == ""
    assert 4 <= len(record.survivors) < 6, "the seed loses nobody, and this test shows nothing"
    head = head_of(ready.trainable)
    start = prepared(config)
    model = Viewed(trainable=start.trainable, task=start.task)
    exact = torch.zeros(head.classes * head.width, dtype=torch.float64)
    for owner in record.survivors:
        rows = Rows(encoded=start.task.encode(start.data.rows(owner)))
        exact += spread(unit_rows(model.features(rows)), rows.labels(), head.classes).sum(dim=0)
    answer = recall(result.state, "class_sums")
    assert answer is not None
    noise = torch.from_numpy(answer.values) - exact
    assert float(noise.std()) == pytest.approx(answer.deviation, rel=0.12)
    assert float(noise.mean()) == pytest.approx(0.0, abs=5 * answer.deviation / len(noise) ** 0.5)
    weight = result.state.vector[head.weight].view(head.classes, head.width).double()
    opened = torch.from_numpy(answer.values).view(head.classes, head.width)
    assert torch.allclose(weight, class_head(opened, deviation=answer.deviation), atol=1e-5)
    assert 7.5 < ready.epsilon() <= 8.0


def test_a_head_from_sums_answers_with_the_nearest_class() -> None:
    draw = np.random.default_rng(0)
    centres = draw.normal(size=(5, 16))
    labels = draw.integers(5, size=400)
    features = torch.from_numpy(centres[labels] + 0.3 * draw.normal(size=(400, 16)))
    sums = spread(unit_rows(features), labels, 5).sum(dim=0).view(5, 16)
    for weight in (
        class_head(sums, deviation=0.0),
        ridge_head(unit_rows(features).T @ unit_rows(features), sums, deviation=0.0),
    ):
        right = (unit_rows(features) @ weight.T).argmax(dim=1).numpy() == labels
        assert right.mean() > 0.95
    shuffled = sums[torch.tensor([1, 2, 3, 4, 0])]
    wrong = (unit_rows(features) @ class_head(shuffled, deviation=0.0).T).argmax(dim=1).numpy() == labels
    assert wrong.mean() < 0.2


def test_noise_of_known_size_is_taken_off_a_length_before_it_counts_records() -> None:
    draw = torch.Generator().manual_seed(1)
    sums = torch.zeros(400, 64, dtype=torch.float64)
    sums[:, 0] = 10.0
    noisy = sums + torch.randn(400, 64, generator=draw, dtype=torch.float64)
    aware = lengths_without_noise(noisy, deviation=1.0)
    assert float(aware.mean()) == pytest.approx(10.0, rel=0.03)
    assert float(lengths_without_noise(noisy, deviation=0.0).mean()) > 12.0
    drowned = lengths_without_noise(noisy, deviation=100.0)
    assert torch.allclose(drowned, 0.3 * noisy.norm(dim=1, keepdim=True))


def test_ridge_sums_solve_the_regression_of_all_rows_at_once(tmp_path: Path) -> None:
    config = one_shot("ridge_sums")
    start = prepared(config)
    head = head_of(start.trainable)
    model = Viewed(trainable=start.trainable, task=start.task)
    rows = [Rows(encoded=start.task.encode(start.data.rows(owner))) for owner in range(4)]
    features = torch.cat([unit_rows(model.features(part)) for part in rows])
    labels = np.concatenate([part.labels() for part in rows])
    wanted = torch.nn.functional.one_hot(torch.from_numpy(labels), head.classes).double()
    solved = torch.linalg.solve(features.T @ features + torch.eye(head.width).double(), features.T @ wanted)
    _, result = train(config, tmp_path / "run")
    weight = result.state.vector[head.weight].view(head.classes, head.width).double()
    alike = torch.nn.functional.cosine_similarity(weight, solved.T, dim=1)
    assert float(alike.min()) > 0.99


def test_what_has_no_head_to_set_is_refused() -> None:
    trainable = {"kind": "lora", "rank": 2}
    ready = prepared(make(model={"name": "builtin:tiny-vit", "trainable": trainable}))
    del ready.trainable.parameters[
        next(name for name in ready.trainable.parameters if "classifier.weight" in name)
    ]
    with pytest.raises(ModelError, match="no linear layer with one output a class"):
        head_of(ready.trainable)


def test_lora_starts_from_the_head_of_the_sums(tmp_path: Path) -> None:
    federation = {
        "rounds": 1,
        "cohort": 4,
        "lifecycle": {**STEPS, "learning_rate": 1e-9, "start": "class_sums"},
    }
    ready, result = train(make(federation=federation), tmp_path / "run")
    head = head_of(ready.trainable)
    answer = recall(result.state, "class_sums")
    assert answer is not None, "an answer outlives the steps after it"
    sums = torch.from_numpy(answer.values).view(head.classes, head.width)
    weight = result.state.vector[head.weight].view(head.classes, head.width)
    assert torch.allclose(weight.double(), class_head(sums, deviation=answer.deviation), atol=1e-5)
    assert result.records[-1].metric >= 0.3, "tiny random features still tell some digits apart"
