"""Votes on public candidates: what one record can change, what is kept, and what a run leaves behind."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ffm_secure as ffm
from ffm_secure import federation
from ffm_secure.auditing.run_audit import audit_run
from ffm_secure.config.run_file import RunConfig
from ffm_secure.engines import simulation
from ffm_secure.engines.summary import describe
from ffm_secure.errors import ConfigError, DataError, Interrupted, ModelError, PlanRefused
from ffm_secure.privacy.query_noise import calibrate_query
from ffm_secure.queries.base import Query, Rows, Viewed, head_of
from ffm_secure.queries.candidate_votes import (
    NAME,
    best_by_class,
    on_grid,
    one_hot_votes,
    quotas,
    standing_of,
    varied,
)
from ffm_secure.queries.class_sums import unit_rows
from ffm_secure.server import rounds
from ffm_secure.site.plan_check import differences
from ffm_secure.storage.run_directory import Store
from tests.federation.helpers import CLIENT, RECORD, SECAGG, finish, make, prepared, train

ROWS = "builtin:clinic_notes?size=120&validation=40"
CANDIDATES = "builtin:clinic_notes?seed=9&size=10&validation=50"
PRIVATE = {**RECORD, "noise": "system"}
TABLE = f"answer.{NAME}.table"


def voting(
    *, rounds: int = 1, cohort: int = 4, task: dict[str, Any] | None = None, **sections: Any
) -> RunConfig:
    """Return a run in which records vote; keyword `votes` changes what on."""
    votes = {"candidates": CANDIDATES, "keep": 12, "asked": 30, **sections.pop("votes", {})}
    data = {"data": ROWS, "clients": 4, "evaluation_examples": 20, "max_length": 12}
    return make(
        task={"kind": "text_classification", **data, **(task or {})},
        model={"name": "builtin:tiny-bert", "trainable": {"kind": "head"}},
        federation={
            "rounds": rounds,
            "cohort": cohort,
            "lifecycle": {"kind": NAME, "votes": votes},
        },
        **sections,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> ffm.Run:
    """One run of two questions under masks, with real noise."""
    config = replace(voting(rounds=2, privacy=PRIVATE, protection=SECAGG), name="votes")
    run = ffm.Run(config, runs=tmp_path_factory.mktemp("votes"))
    run.start(fairness=False, complete=False)
    return run


# ------------------------------------------------------------------------------------- what a record says


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 99), nearest=st.integers(1, 4), crafted=st.sampled_from(["no", "same", "own", "nan"])
)
def test_one_record_changes_the_sum_by_so_many_ones_whatever_it_and_the_candidates_are(
    seed: int, nearest: int, crafted: str
) -> None:
    """The bound of the docstring, against a slow definition: also for candidates made to single it out."""
    draw = np.random.default_rng(seed)
    rows, candidates = torch.from_numpy(draw.normal(size=(6, 5))), torch.from_numpy(draw.normal(size=(7, 5)))
    if crafted == "same":
        candidates[:] = candidates[0]
    elif crafted == "own":
        candidates[3] = rows[2] * 1e6
    elif crafted == "nan":
        candidates[1], rows[2] = math.nan, math.inf
    labels = draw.integers(0, 3, size=6)
    votes = one_hot_votes(rows, labels, candidates, classes=3, nearest=nearest)
    without = np.delete(votes.numpy(), 2, axis=0).sum(axis=0)
    change = votes.numpy().sum(axis=0) - without
    assert np.linalg.norm(change) == pytest.approx(math.sqrt(nearest))
    assert set(np.unique(change)) <= {0.0, 1.0}
    if crafted != "no":
        return
    for row, label, table in zip(rows, labels, votes.view(6, 3, 7), strict=True):
        similar = [float(on_grid(row) @ on_grid(candidate)) for candidate in candidates]
        best = sorted(range(7), key=lambda place: -similar[place])[:nearest]
        assert sorted(table[label].nonzero().flatten().tolist()) == sorted(best)
        assert table.sum() == nearest


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), taken_off=st.integers(0, 39), width=st.sampled_from([1, 7, 33, 128]))
def test_a_record_that_leaves_moves_no_vote_of_another_between_level_candidates(
    seed: int, taken_off: int, width: int
) -> None:
    """Pairs of candidates are mirrored, so that only the last bits of a sum would tell them apart."""
    draw = np.random.default_rng(seed)
    half = unit_rows(torch.from_numpy(draw.normal(size=(4, width))))
    candidates = torch.cat([half, half.flip(1)])
    rows = torch.from_numpy(draw.normal(size=(40, width)))
    rows = unit_rows(rows + rows.flip(1))  # as near to either of a pair
    labels = np.zeros(40, dtype=np.int64)
    votes = one_hot_votes(rows, labels, candidates, classes=1, nearest=1).numpy()
    rest = np.delete(np.arange(40), taken_off)
    without = one_hot_votes(rows[rest], labels[rest], candidates, classes=1, nearest=1).numpy()
    assert np.array_equal(without, votes[rest])
    assert not votes[:, 4:].any(), "of two that are level the first has the vote"


def test_a_record_is_looked_at_alone(tmp_path: Path) -> None:
    """In a batch the features of one record have other last bits, and with them another vote."""
    ready = simulation.build(prepared(voting()), tmp_path)
    query, task = ready.spec.questions[NAME].query, ready.task
    rows = Rows(encoded=ready.sites[0].data.examples)
    model = Viewed(trainable=ready.trainable, task=task)
    seen: list[int] = []

    def spy(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(len(inputs[0]))

    handle = head_of(ready.trainable).module.register_forward_pre_hook(spy)
    query.answer(rows, model)
    handle.remove()
    candidates = len(ready.prepared.facts.candidates)  # public, so they may share a batch
    assert seen == [1] * len(rows) + [candidates]


def test_the_mechanism_cuts_a_vote_that_is_longer_than_its_bound() -> None:
    """Whatever code at a site answers: more votes than the bound allows do not count as more."""
    noise = calibrate_query(
        voting(privacy=PRIVATE), _toy(size=20, bound=math.sqrt(2)), epsilon=4.0, public_client_size=30
    )
    honest = torch.zeros(1, 20)
    honest[0, :2] = 1.0
    assert noise.total([honest]).values.tolist() == [1.0] * 2 + [0.0] * 18
    greedy = noise.total([torch.full((1, 20), 5.0)]).values
    assert np.linalg.norm(greedy) <= math.sqrt(2)


def _toy(*, size: int, bound: float) -> Query:
    return Query(
        name="toy", size=size, bound=bound, whole_numbers=True,
        answer=lambda rows, model: torch.zeros(len(rows), size), use=lambda state, opened: state,
    )  # fmt: skip


# ------------------------------------------------------------------------------------- what is kept


def test_the_best_are_kept_by_label_and_counts() -> None:
    assert quotas(np.array([30.0, 10.0, 0.0]), 7).tolist() == [4, 2, 1]
    assert quotas(np.zeros(3), 6).tolist() == [2, 2, 2], "noise may leave no count at all"
    table = np.array([[9.0, 1.0, 5.0, 0.0, -3.0], [2.0, 8.0, 0.0, -1.0, -4.0]])
    places, labels = best_by_class(table, np.array([1, 3]))
    assert places.tolist() == [0, 1]
    assert labels.tolist() == [0, 1]
    places, _ = best_by_class(table, np.array([3, 3]))
    assert places.tolist() == [0, 2, 1], "one without a vote is not kept, however much room there is"


def test_the_next_question_is_about_what_was_kept_and_its_new_neighbours() -> None:
    places = torch.linspace(0.0, 3.0, 10, dtype=torch.float64)
    features = torch.stack([places.cos(), places.sin()], dim=1)
    asked = varied(np.array([8]), features, before={0, 1, 2, 8}, room=4)
    assert asked == (6, 7, 8, 9)
    assert varied(np.array([1]), features, before=set(range(9)), room=3) == (0, 1, 9), "the rest fill up"


# ------------------------------------------------------------------------------------- a run of it


def test_a_run_asks_twice_pays_twice_and_keeps_what_the_second_question_says(finished: ffm.Run) -> None:
    ready = simulation.build(finished.prepared(), finished.folder)
    state, records, _ = Store.read(finished.folder).resume()  # type: ignore[misc]
    assert [record.query for record in records] == [NAME, NAME]
    standing = standing_of(state)
    assert standing.answers == 2
    assert 0 < len(standing.chosen) <= 12
    assert set(standing.chosen) <= set(standing.before)
    assert 30 < len(standing.before) <= 50, "the second question was about others, too"
    charged = [entry.release for entry in ready.ledger.entries(owner=ready.sites[0].ledger.owner)]
    assert charged.count(NAME) == 4, "reserved and spent, twice"
    assert 4.0 < ready.epsilon() <= 8.0
    third = replace(rounds.plan_round(ready.server, 2, state), round=3)
    assert not ready.sites[0].ledger.affords(third), "the budget was for two answers"


def test_the_plan_prices_both_answers_and_says_what_is_published(finished: ffm.Run) -> None:
    plan = describe(finished.prepared())
    (asked,) = plan.queries
    assert (asked.query, asked.asks, asked.answers, asked.numbers) == (NAME, 2, 2, 300)
    assert 7.5 < asked.epsilon <= 8.0
    once = describe(prepared(voting(privacy=PRIVATE, protection=SECAGG))).queries[0]
    assert once.noise_multiplier < asked.noise_multiplier
    assert "candidates kept" in plan.reveals["public"]
    crowded = describe(prepared(voting(votes={"asked": 50}, privacy=PRIVATE)))
    assert any("more than a third as many" in warning for warning in crowded.warnings)


def test_the_set_is_described_with_what_it_cost(finished: ffm.Run) -> None:
    folder = finished.folder / "synthetic"
    content = (folder / "data.jsonl").read_bytes()
    rows = [json.loads(line) for line in content.decode().splitlines()]
    texts = finished.prepared().facts.candidates
    assert rows
    assert {row["text"] for row in rows} <= set(texts)
    assert {row["label"] for row in rows} <= set(finished.prepared().dataset.label_names or ())
    described = json.loads((folder / "croissant.json").read_text())
    (file,) = described["distribution"]
    assert file["sha256"] == hashlib.sha256(content).hexdigest()
    assert [field["name"] for field in described["recordSet"][0]["field"]] == ["text", "label", "votes"]
    assert "epsilon 7.99" in described["description"]
    assert "label counts" in described["description"]
    pytest.importorskip("mlcroissant").Dataset(jsonld=folder / "croissant.json")


def test_an_audit_says_that_no_update_crossed_the_wire(finished: ffm.Run) -> None:
    audit = audit_run(finished.folder).audit
    assert audit is not None
    assert audit.epsilon_lower is not None
    assert audit.epsilon_lower <= 8.0
    assert "No update of a model crosses the wire" in audit.sentence


@pytest.mark.parametrize(
    "protection", [SECAGG, pytest.param({"kind": "bfv", "threshold": 3}, marks=pytest.mark.slow)]
)
def test_votes_agree_bit_for_bit_under_every_protection(
    protection: dict[str, object], tmp_path: Path
) -> None:
    if protection["kind"] == "bfv":
        pytest.importorskip("tenseal")
    _, clear = train(voting(privacy=RECORD), tmp_path / "clear")
    _, sealed = train(voting(privacy=RECORD, protection=protection), tmp_path / "sealed")
    assert torch.equal(clear.state.optimizer_state[TABLE], sealed.state.optimizer_state[TABLE])
    assert torch.equal(clear.state.vector, sealed.state.vector)


@pytest.mark.slow
def test_cohorts_vote_on_one_question_before_anything_is_kept(tmp_path: Path) -> None:
    _, parts = train(voting(rounds=2, cohort=2), tmp_path / "parts")
    _, whole = train(voting(), tmp_path / "whole")
    assert torch.equal(parts.state.optimizer_state[TABLE], whole.state.optimizer_state[TABLE])
    assert standing_of(parts.state).chosen == standing_of(whole.state).chosen


def test_a_run_that_is_cut_between_two_questions_goes_on_to_the_same_set(tmp_path: Path) -> None:
    config = voting(rounds=2, privacy=RECORD)
    _, whole = train(config, tmp_path / "whole")
    ready = simulation.build(prepared(config), tmp_path / "cut")
    with Store.open(tmp_path / "cut", config) as store:
        start = ready.begin(store)
        with pytest.raises(Interrupted, match="stopped after round 1"):
            federation.run(ready.server, ready.courier, store, start=start, should_stop=lambda: True)
    rest = finish(simulation.build(prepared(config), tmp_path / "cut"), tmp_path / "cut")
    assert standing_of(rest.state) == standing_of(whole.state)
    assert torch.equal(rest.state.vector, whole.state.vector)


@pytest.mark.slow
def test_clients_as_units_share_the_noise_of_their_votes(tmp_path: Path) -> None:
    privacy = {**CLIENT, "noise": "system", "delta": 1e-3}
    ready, result = train(voting(privacy=privacy, protection=SECAGG), tmp_path)
    assert result.status == "complete"
    assert ready.spec.questions[NAME].mechanism.adjacency == "zero out one client"


# ------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "asked", [(), (0,) * 30, tuple(range(29)), tuple(range(29, -1, -1)), tuple(range(30, 60))]
)
def test_a_site_refuses_to_vote_on_what_the_run_does_not_have(
    asked: tuple[int, ...], finished: ffm.Run
) -> None:
    ready = simulation.build(finished.prepared(), finished.folder)
    state = ready.spec.strategy.start(ready.trainable.flatten().cpu())
    plan = rounds.plan_round(ready.server, 1, state)
    assert not differences(plan, ready.spec, site=0, fingerprint=plan.fingerprint)
    few, twice, turned, beyond = range(29), (0,) * 30, range(29, -1, -1), range(30, 60)
    for asked in ((), few, twice, turned, beyond):
        other = replace(plan, asked=tuple(asked))
        refused = differences(other, ready.spec, site=0, fingerprint=plan.fingerprint)
        assert refused == ("what is asked about is not a choice that this run has",)


def test_a_site_refuses_other_candidates_of_the_same_number() -> None:
    one = prepared(voting(privacy=PRIVATE)).spec.message(NAME)
    other = prepared(voting(votes={"candidates": CANDIDATES.replace("seed=9", "seed=8")}, privacy=PRIVATE))
    assert one.layout != other.spec.message(NAME).layout


@pytest.mark.parametrize(
    ("votes", "words"),
    [
        ({"keep": 5}, "keep = 5: must be from 10"),
        ({"asked": 51}, "there are 50 candidates only"),
        ({"asked": 12, "nearest": 12}, "nearest = 12: must be below the 12"),
        ({"asked": 0}, "asking again would only add noise"),
    ],
)
def test_numbers_that_keep_or_ask_nothing_are_refused(votes: dict[str, object], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        prepared(voting(votes=votes, rounds=2 if votes == {"asked": 0} else 1))


def test_a_run_file_that_cannot_vote_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"votes\.candidates = '': missing"):
        voting(votes={"candidates": ""})
    with pytest.raises(ConfigError, match=r"federation\.rounds = 3: must be a multiple of 2"):
        voting(rounds=3, cohort=2)
    with pytest.raises(ConfigError, match=r"federation\.cohort = 3: must divide"):
        voting(cohort=3)
    lora = replace(voting().model, trainable=replace(voting().model.trainable, kind="lora"))
    with pytest.raises(PlanRefused, match="use trainable head"):
        prepared(replace(voting(), model=lora))
    texts = prepared(voting()).dataset.train.column("text")
    file = tmp_path / "candidates.jsonl"
    disguised = [f" {text.upper()}\u200b" for text in texts[:30]]  # as ledgers compare rows, the same
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in disguised))
    with pytest.raises(DataError, match="30 of 30 candidates are private rows of this run"):
        prepared(voting(votes={"candidates": str(file)}))
