"""Private evaluation: against fairlearn without noise, intervals that cover, and accounts of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ffm_secure.config import compatibility
from ffm_secure.errors import ConfigError, PlanRefused, StoreError
from ffm_secure.engines import simulation
from ffm_secure.engines.summary import describe, summarise
from ffm_secure.queries import agenda
from ffm_secure.queries.base import Opened, Rows, head_of, recall
from ffm_secure.queries.class_offsets import offsets
from ffm_secure.queries.evaluation import BINS, Cells, released
from ffm_secure.records import LEARN
from ffm_secure.server import rounds
from ffm_secure.storage.run_directory import Store, extends
from ffm_secure.tasks.encoded import EncodedImages
from tests.federation.helpers import CLIENT, RECORD, SECAGG, make, prepared, train
from tests.queries.helpers import STEPS, one_shot, queries

PRIVATE = {**RECORD, "noise": "system"}
HELD_BACK = {"rows": "held_back", "share": 0.3, "epsilon": 2.0}


def drawn(count: int, classes: int, groups: int, seed: int) -> tuple[torch.Tensor, Rows, np.ndarray]:
    """Return scores that are right about two times in three, and the rows they are about."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(classes, size=count)
    scores = draw.normal(size=(count, classes))
    scores[np.arange(count), labels] += 1.5
    pixels = torch.zeros(count, 1, 1, 1, dtype=torch.uint8)
    group = draw.integers(groups, size=count)
    rows = Rows(encoded=EncodedImages(pixels=pixels, labels=labels), groups=group)
    return torch.from_numpy(scores), rows, scores.argmax(axis=1)


def test_without_noise_the_figures_are_those_of_fairlearn() -> None:
    metrics = pytest.importorskip("fairlearn.metrics")
    from sklearn.metrics import accuracy_score, recall_score

    scores, rows, answered = drawn(500, 4, 3, seed=2)
    cells = Cells(groups=("a", "b", "c"), classes=4)
    counts = cells.answer(scores, rows).sum(dim=0).numpy()
    found = released(Opened(values=counts, deviation=0.0, sites=1), cells)
    assert rows.groups is not None
    frame = metrics.MetricFrame(
        metrics=accuracy_score, y_true=rows.labels(), y_pred=answered, sensitive_features=rows.groups
    )
    assert found.accuracy.value == pytest.approx(frame.overall, abs=1e-9)
    for number, estimate in enumerate(found.groups):
        assert estimate.value == pytest.approx(frame.by_group[number], abs=1e-9)
        assert estimate.rows == pytest.approx(float((rows.groups == number).sum()), abs=1e-9)
    assert found.gap is not None
    assert found.gap.value == pytest.approx(frame.difference(), abs=1e-9)
    recalls = recall_score(rows.labels(), answered, average=None)
    for estimate, share in zip(found.classes, recalls, strict=True):
        assert estimate.value == pytest.approx(share, abs=1e-9)


def test_a_record_falls_into_one_cell_of_either_table() -> None:
    scores, rows, _ = drawn(200, 5, 2, seed=3)
    cells = Cells(groups=("a", "b"), classes=5)
    answers = cells.answer(scores, rows)
    assert torch.equal(answers[:, : cells.first].sum(dim=1), torch.ones(200).double())
    assert torch.equal(answers[:, cells.first :].sum(dim=1), torch.ones(200).double())
    assert rows.groups is not None
    stranger = replace(rows, groups=np.full(200, -1))
    assert float(cells.answer(scores, stranger)[:, : cells.first].sum()) == 0.0
    confident = scores.softmax(dim=1).max(dim=1).values
    histogram = answers[:, cells.first :].view(200, BINS, 2).sum(dim=(0, 2))
    expected = torch.histc(confident, bins=BINS, min=0.0, max=1.0)
    assert torch.equal(histogram, expected.double())


@pytest.mark.parametrize("deviation", [0.0, 3.0, 12.0])
def test_intervals_cover_the_truth_of_the_population(deviation: float) -> None:
    """Rows and noise are drawn anew each time; the truth is that of a hundred thousand rows."""
    cells = Cells(groups=("a", "b"), classes=2)
    scores, rows, answered = drawn(100_000, 2, 2, seed=4)
    assert rows.groups is not None
    right = answered == rows.labels()
    truth = right.mean()
    truths = [right[rows.groups == group].mean() for group in (0, 1)]
    answers = cells.answer(scores, rows).numpy()
    draw = np.random.default_rng(5)
    covered = np.zeros(3)
    for _ in range(1000):
        counts = answers[draw.integers(len(answers), size=600)].sum(axis=0)
        noisy = counts + draw.normal(size=len(counts)) * deviation
        found = released(Opened(values=noisy, deviation=deviation, sites=1), cells)
        estimates = (found.accuracy, *found.groups)
        wanted = (truth, *truths)
        covered += [item.low <= value <= item.high for item, value in zip(estimates, wanted, strict=True)]
    assert (covered / 1000 >= 0.93).all(), covered / 1000
    assert (covered / 1000 <= 0.995).all(), "an interval that always covers says nothing"


def test_with_owners_a_record_counts_in_one_more_cell() -> None:
    scores, rows, answered = drawn(200, 3, 2, seed=6)
    cells = Cells(groups=("a", "b"), classes=3, owners=4)
    answers = cells.answer(scores, replace(rows, owner=2))
    assert torch.equal(answers.square().sum(dim=1), torch.full((200,), 3.0).double()), "the bound is sqrt(3)"
    _, _, owned = cells.split(answers.sum(dim=0).numpy())
    right = int((answered == rows.labels()).sum())
    assert owned.tolist() == [[0, 0], [0, 0], [200 - right, right], [0, 0]]
    assert replace(rows, owner=2).take(np.arange(3)).owner == 2


def test_the_interval_of_the_worst_owner_covers_the_truly_worst() -> None:
    """With ten owners alike, the smallest share alone lies far too low."""
    owners, count, deviation = 10, 120, 4.0
    cells = Cells(groups=("all",), classes=2, owners=owners)
    truth = np.full(owners, 0.8)
    draw = np.random.default_rng(7)
    covered, too_low = 0, 0
    for _ in range(400):
        right = draw.binomial(count, truth)
        values = np.zeros(cells.size)
        values[cells.first + 20 :] = np.stack([count - right, right], axis=1).reshape(-1)
        values += draw.normal(size=cells.size) * deviation
        found = released(Opened(values=values, deviation=deviation, sites=1), cells)
        worst = found.worst[-1]
        assert worst.name.startswith("worst owner")
        covered += worst.low <= 0.8 <= worst.high
        too_low += worst.value + 1.96 * worst.deviation < 0.8
    assert covered >= 0.93 * 400
    assert too_low > 0.05 * 400, "an interval of the chosen one alone would do, and this test shows nothing"


def test_held_back_rows_have_an_account_of_their_own(tmp_path: Path) -> None:
    config = make(federation={"rounds": 2}, privacy=PRIVATE, protection=SECAGG, evaluation=HELD_BACK)
    ready, result = train(config, tmp_path / "run")
    assert queries(result.records) == [LEARN, LEARN, "evaluation"]
    ledger = ready.sites[0].ledger
    assert not set(ledger.blocks) & set(ledger.held_back_blocks)
    learned = ledger.ledger.epsilon_of(ledger.blocks, "record", 1e-5)
    asked = ledger.ledger.epsilon_of(ledger.held_back_blocks, "record", 1e-5)
    alone = prepared(make(federation={"rounds": 2}, privacy=PRIVATE, protection=SECAGG))
    assert ready.mechanism.noise_multiplier == alone.mechanism.noise_multiplier, (
        "learning pays nothing for it"
    )
    assert 7.5 < learned <= 8.0
    assert 1.9 < asked <= 2.0
    found = summarise(ready, result, zero_metric=0.0, outcomes=(), seconds=0.0, ended="").evaluation
    assert found is not None
    assert found.deviation > 0.0
    assert [item.rows for item in describe(ready.prepared).queries] == ["held back"]


def test_the_released_counts_are_those_of_the_rows_held_back(tmp_path: Path) -> None:
    evaluation = {"rows": "held_back", "share": 0.3, "by_owner": True}
    config = make(federation={"rounds": 1}, evaluation=evaluation)
    ready, result = train(config, tmp_path / "run")
    found = summarise(ready, result, zero_metric=0.0, outcomes=(), seconds=0.0, ended="").evaluation
    assert found is not None
    ready.trainable.load_vector(result.state.vector)
    right, count = 0.0, 0
    for site in ready.sites:
        assert site.data.held_back is not None
        encoded = site.data.held_back.encoded
        own = ready.evaluate(result.state.vector, encoded).metric
        assert found.owners[site.data.index].value == pytest.approx(own, abs=1e-9)
        right += own * len(encoded)
        count += len(encoded)
    assert found.accuracy.value == pytest.approx(right / count, abs=1e-9)
    assert found.accuracy.rows == count


def test_a_row_is_on_one_side_in_every_run() -> None:
    sides = []
    for seed in (3, 4):
        data = prepared(make(seed=seed, evaluation={"rows": "held_back", "share": 0.3})).data
        held = {int(row) for part in data.held_back for row in part}
        learned = {int(row) for part in data.parts for row in part}
        assert not held & learned
        assert 0.2 < len(held) / (len(held) + len(learned)) < 0.4
        records = data.dataset.train.records
        assert records is not None
        sides.append({int(records.keys[row]) for row in held})
    assert sides[0] == sides[1]


def test_a_head_from_sums_is_evaluated_too(tmp_path: Path) -> None:
    _, result = train(one_shot(privacy=PRIVATE, evaluation=HELD_BACK), tmp_path / "run")
    assert queries(result.records) == ["class_sums", "evaluation"]


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"evaluation": {"rows": "held_back"}, "privacy": PRIVATE}, "evaluation.epsilon = 0.0"),
        ({"evaluation": {**HELD_BACK, "epsilon": 9.0}, "privacy": PRIVATE}, "at most privacy.epsilon = 8"),
        ({"evaluation": {"epsilon": 1.0}}, "rows = 'held_back' alone"),
        ({"evaluation": {"by_owner": True}}, "rows = 'held_back' alone"),
        ({"evaluation": {**HELD_BACK, "group_column": "sex"}}, "evaluation.groups"),
    ],
)
def test_what_an_evaluation_lacks_is_said(sections: dict[str, dict[str, object]], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        make(**sections)
    assert words in str(refused.value)


def test_a_client_has_no_table_of_its_own() -> None:
    privacy = {**CLIENT, "noise": "system", "delta": 1e-3}
    with pytest.raises(PlanRefused, match="one bounded table"):
        prepared(make(privacy=privacy, protection=SECAGG, evaluation=HELD_BACK))


def test_what_was_evaluated_is_not_learned_further(tmp_path: Path) -> None:
    evaluation = {"rows": "held_back", "share": 0.3}
    train(make(federation={"rounds": 1}, evaluation=evaluation), tmp_path / "run")
    with pytest.raises(StoreError, match="other settings"):
        Store.open(tmp_path / "run", make(federation={"rounds": 2}, evaluation=evaluation))


def test_offsets_lift_a_rare_class_and_the_plan_pays_for_them(tmp_path: Path) -> None:
    lifecycle = {**STEPS, "finish": "class_offsets", "finish_epsilon": 1.0}
    config = make(federation={"rounds": 1, "cohort": 4, "lifecycle": lifecycle}, privacy=PRIVATE)
    ready, result = train(config, tmp_path / "run")
    assert queries(result.records) == [LEARN, "class_offsets"]
    assert ready.epsilon() <= 8.0
    assert describe(ready.prepared).queries[0].epsilon <= 1.0
    shifted = offsets(torch.tensor([1000.0, 10.0, -5.0]), deviation=2.0)
    assert float(shifted.sum()) == pytest.approx(0.0, abs=1e-9)
    assert float(shifted[1] - shifted[0]) == pytest.approx(np.log(100.0))
    assert float(shifted[2] - shifted[0]) == pytest.approx(np.log(500.0)), (
        "a count below its noise is its noise"
    )


def test_a_prior_is_there_while_the_head_learns_and_gone_at_the_end(tmp_path: Path) -> None:
    lifecycle = {**STEPS, "start": "class_prior", "learning_rate": 1e-12}
    config = make(federation={"rounds": 2, "cohort": 2, "lifecycle": lifecycle})
    ready = simulation.build(prepared(config), tmp_path / "run")
    bias = head_of(ready.trainable).bias
    initial = ready.trainable.flatten()[bias]
    assert float(initial.abs().max()) == 0.0
    biases = []
    with Store.open(tmp_path / "run", ready.config) as store:
        state, records = ready.begin(store)
        while agenda.next_turn(config, records) is not None:
            plan = rounds.plan_round(ready.server, len(records) + 1, state, records)
            result = rounds.collect(ready.server, plan, state, ready.courier, lambda finished, total: None)
            state, result = rounds.advance(ready.server, plan, state, result, records)
            record = rounds.record(ready.server, plan, result, state, records, ready.courier, began=0.0)
            store.commit(state, record, run_id=ready.server.run_id)
            records = (*records, record)
            biases.append(state.vector[bias])
    assert queries(records) == ["class_prior", "class_prior", LEARN, LEARN]
    counts = np.zeros(10)
    for site in ready.sites:
        counts += np.bincount(site.data.examples.labels, minlength=10)
    shares = torch.from_numpy(np.log(np.maximum(counts, 1.0)))
    answer = recall(state, "class_prior")
    assert answer is not None
    np.testing.assert_array_equal(answer.values, counts)
    for learning in biases[1:3]:
        torch.testing.assert_close(learning.double(), shares - shares.mean(), atol=1e-5, rtol=0)
    torch.testing.assert_close(biases[3], initial, atol=1e-5, rtol=0)


def test_a_prior_is_taken_off_once() -> None:
    lifecycle = {**STEPS, "start": "class_prior", "finish": "class_offsets"}
    with pytest.raises(PlanRefused, match="use one of the two"):
        compatibility.check(make(federation={"lifecycle": lifecycle}))
    first = make(federation={"rounds": 1, "lifecycle": {**STEPS, "start": "class_prior"}})
    more = make(federation={"rounds": 2, "lifecycle": {**STEPS, "start": "class_prior"}})
    assert not extends(first, more)


def test_offsets_undo_the_prior_of_a_head_that_learned_it() -> None:
    """A rare class is drowned by what a head knows of its rarity; the offsets take that off."""
    draw = np.random.default_rng(0)
    labels = (draw.random(20_000) < 0.03).astype(int)
    feature = draw.normal(size=20_000) + 2.0 * labels
    log_odds = np.log(0.03 / 0.97) + 2.0 * feature - 2.0  # what regression on these rows converges to
    counts = torch.from_numpy(np.bincount(labels, minlength=2).astype(float))
    shift = offsets(counts, deviation=1.0)
    before = (log_odds > 0)[labels == 1].mean()
    after = (log_odds + float(shift[1] - shift[0]) > 0)[labels == 1].mean()
    assert before < 0.3
    assert after > 0.8


def test_a_column_that_is_not_there_is_said(tmp_path: Path) -> None:
    evaluation = {"rows": "held_back", "group_column": "sex", "groups": ["f", "m"]}
    with pytest.raises(simulation.DataError, match="no such column"):
        simulation.build(prepared(make(evaluation=evaluation)), tmp_path)
