"""An error on one private row is a row that teaches nothing: nothing else says that it was drawn."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ffm_secure.data.dataset import Examples
from ffm_secure.engines import simulation
from ffm_secure.federation import TrainingResult
from ffm_secure.lifecycle.finetune import one_by_one_if_needed
from ffm_secure.queries.base import Rows
from ffm_secure.site.trainer import SiteTrainer
from ffm_secure.tasks.base import Classification
from ffm_secure.tasks.encoded import readable
from tests.federation.helpers import CLIENT, RECORD, SECAGG, finish, first_plan, make, prepared, table
from tests.queries.helpers import one_shot

REAL = {**RECORD, "noise": "system"}
POISON = 4242.0  # a value no pixel has


def poisoned(built: simulation.Simulation, rows: set[int]) -> None:
    """Let the first owner hold rows the model cannot be trained on: their pictures bear a mark."""
    for row in rows:
        built.sites[0].data.examples.labels[row] = -7  # type: ignore[union-attr]


def failing(real: Any) -> Any:
    """Return a loss that fails as a whole as soon as one marked row is in the batch."""

    def losses(self: Any, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        if bool((batch["labels"] == -7).any()):
            raise LookupError("no such token")
        result: Tensor = real(self, model, batch)
        return result

    return losses


def ran(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, rows: set[int], **sections: Any
) -> tuple[simulation.Simulation, TrainingResult]:
    built = simulation.build(prepared(make(**sections)), folder)
    poisoned(built, rows)
    with monkeypatch.context() as patched:
        patched.setattr(Classification, "losses", failing(Classification.losses))
        return built, finish(built, folder)


@pytest.mark.parametrize("privacy", [REAL, {**CLIENT, "noise": "system"}], ids=["record", "client"])
def test_a_row_on_which_the_model_fails_shows_nowhere(
    privacy: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ended the round after everybody had paid: the error said that the row was drawn."""
    everything = set(range(50))
    built, trained = ran(tmp_path / "a", monkeypatch, rows=everything, privacy=privacy, protection=SECAGG)
    clean, whole = ran(tmp_path / "b", monkeypatch, rows=set(), privacy=privacy, protection=SECAGG)
    assert trained.status == whole.status == "complete"
    for one, other in zip(trained.records, whole.records, strict=True):
        assert (one.cohort, one.survivors, one.dropped, one.aborted) == (
            other.cohort,
            other.survivors,
            other.dropped,
            other.aborted,
        )
        assert (one.epsilon_spent, one.bytes_up) == (other.epsilon_spent, other.bytes_up)
    assert built.ledger.head().sequence == clean.ledger.head().sequence


def test_without_a_unit_an_error_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LookupError):
        ran(tmp_path, monkeypatch, rows=set(range(400)))


@pytest.mark.parametrize("privacy", [RECORD, CLIENT], ids=["record", "client"])
def test_what_fails_contributes_zero_and_the_others_as_ever(
    privacy: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The obvious definition: the sum over the other rows, with the same divisor."""
    built = simulation.build(prepared(make(privacy=privacy, protection=SECAGG)), tmp_path)
    site, rows = built.sites[0], np.arange(6)
    with built.courier.trainers.borrow() as trainer, trainer.trainable.training_only(None):

        def summed(chosen: np.ndarray) -> dict[str, Tensor]:
            rule = trainer.rule(site.data, first_plan(built), site.source(first_plan(built)))
            if privacy is RECORD:
                bound = trainer.spec.mechanism.record_level.bound  # type: ignore[union-attr]
                return dict(rule._clipped_sum(chosen, bound).gradients)  # type: ignore[attr-defined]
            gradients = rule._gradient(chosen)  # type: ignore[attr-defined]
            return {name: value.clone() * len(chosen) for name, value in gradients.items()}

        expected = summed(np.array([0, 1, 3, 5]))
        poisoned(built, {2, 4})
        monkeypatch.setattr(Classification, "losses", failing(Classification.losses))
        found = summed(rows)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value.double(), rtol=1e-4, atol=1e-6)
    assert any(bool(value.abs().sum() > 0) for value in expected.values())


def test_a_machine_without_memory_is_no_private_row() -> None:
    def work(rows: np.ndarray) -> int:
        raise MemoryError

    with pytest.raises(MemoryError):
        one_by_one_if_needed(work, np.arange(3))


def test_rows_are_tried_alone_only_where_they_fail_together() -> None:
    tried: list[list[int]] = []

    def work(rows: np.ndarray) -> int:
        tried.append(rows.tolist())
        if 3 in rows:
            raise KeyError("three")
        return int(rows.sum())

    assert one_by_one_if_needed(work, np.array([1, 2])) == [3]
    assert one_by_one_if_needed(work, np.array([1, 3, 5])) == [1, 5]
    assert one_by_one_if_needed(work, np.array([3])) == []
    assert tried == [[1, 2], [1, 3, 5], [1], [3], [5], [3]]


@pytest.mark.parametrize("kind", ["text_classification", "causal_lm", "masked_lm"])
def test_half_a_character_is_read_as_a_lost_one(kind: str, tmp_path: Path) -> None:
    """A tokenizer raises for it: the run ended with an unexpected error about one row."""
    for part in ("train", "validation"):
        rows = [{"text": f"note {number} of {part}", "label": number % 2} for number in range(40)]
        rows[7]["text"] = "half a pair \ud800 and a whole one \U0001f600"
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = "builtin:tiny-gpt2" if kind == "causal_lm" else "builtin:tiny-bert"
    task = {**table()["task"], "kind": kind, "data": str(tmp_path), "max_length": 16, "clients": 3}
    made = make(
        task=task,
        model={"name": model, "trainable": {"kind": "lora", "rank": 2}},
        federation={"rounds": 1, "cohort": 3},
        privacy=RECORD,
    )
    built = simulation.build(prepared(made), tmp_path / "run")
    assert finish(built, tmp_path / "run").status == "complete"
    texts = Examples(columns={"text": ["a\ud800b \U0001f600"]})
    assert readable(texts.column("text")[0]) == "a\ufffdb \U0001f600"


def test_a_recorded_round_keeps_no_truth_of_a_row_it_cannot_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit = {"observers": ["server"], "record_rounds": 1}
    built = simulation.build(prepared(make(privacy=REAL, protection=SECAGG, audit=audit)), tmp_path)
    real = type(built.task).evaluation_batch
    private = built.sites[0].data.examples

    def reading(self: Any, encoded: Any, indices: Any, device: str) -> Any:
        if encoded is private:
            raise LookupError("no such token")
        return real(self, encoded, indices, device)

    monkeypatch.setattr(type(built.task), "evaluation_batch", reading)
    assert finish(built, tmp_path).status == "complete"


def test_the_trainer_contains_errors_only_under_a_unit(tmp_path: Path) -> None:
    for sections, contained in (({}, False), ({"privacy": CLIENT, "protection": SECAGG}, True)):
        built = simulation.build(prepared(make(**sections)), tmp_path / str(contained))
        with built.courier.trainers.borrow() as trainer:
            assert isinstance(trainer, SiteTrainer)
            site = built.sites[0]
            rule = trainer.rule(site.data, first_plan(built), site.source(first_plan(built)))
            assert rule.contained is contained  # type: ignore[attr-defined]


def test_a_row_on_which_a_query_fails_counts_nowhere(tmp_path: Path) -> None:
    built = simulation.build(prepared(one_shot(privacy=REAL, protection=SECAGG)), tmp_path)
    question = built.spec.questions["class_sums"]
    real, examples = question.query.answer, built.sites[0].data.examples
    with built.courier.trainers.borrow() as trainer:
        good = Rows(encoded=examples.take(np.array([0, 1, 3, 5])))
        expected = torch.cat(list(trainer._answers(question.query, good, ())))

    def answering(rows: Rows, model: Any) -> Tensor:
        if bool((np.asarray(rows.encoded.labels) == -7).any()):
            raise LookupError("no such token")
        return real(rows, model)

    poisoned(built, {2, 4})
    object.__setattr__(question.query, "answer", answering)
    with built.courier.trainers.borrow() as trainer:
        six = Rows(encoded=examples.take(np.arange(6)))
        found = torch.cat(list(trainer._answers(question.query, six, ())))
    torch.testing.assert_close(found.sum(0), expected.sum(0))
    trained = finish(built, tmp_path)
    assert (trained.status, [record.aborted for record in trained.records]) == ("complete", [""])
    assert trained.records[0].survivors == (0, 1, 2, 3)
