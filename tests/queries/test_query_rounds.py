"""Rounds that ask: in which order, what they cost, what a site refuses, and what a kill does to them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from defenses.dp import Accountant
from defenses.random_source import RandomSource
from ffm_secure import federation
from ffm_secure.engines import simulation
from ffm_secure.engines.summary import describe
from ffm_secure.errors import ConfigError, Interrupted, PlanRefused
from ffm_secure.privacy.query_noise import calibrate_query
from ffm_secure.queries import agenda
from ffm_secure.queries.base import Query
from ffm_secure.records import LEARN
from ffm_secure.server import rounds
from ffm_secure.site.plan_check import differences
from ffm_secure.storage.run_directory import Store
from tests.federation.helpers import CLIENT, RECORD, SECAGG, finish, make, prepared, train
from tests.queries.helpers import STEPS, one_shot, queries, with_start

PRIVATE = {**RECORD, "noise": "system"}


def question(*, size: int = 6, bound: float = 1.0, whole: bool = False) -> Query:
    """Return a query that answers nothing; its noise is what is tested."""
    return Query(
        name="toy", size=size, bound=bound, whole_numbers=whole,
        answer=lambda rows, model: torch.zeros(len(rows), size), use=lambda state, opened: state,
    )  # fmt: skip


def test_a_start_is_asked_once_and_learning_follows(tmp_path: Path) -> None:
    ready, result = train(with_start(privacy=PRIVATE, protection=SECAGG), tmp_path / "run")
    assert queries(result.records) == ["class_sums", LEARN, LEARN]
    assert [record.round for record in result.records] == [1, 2, 3]
    assert result.status == "complete"
    assert ready.epsilon() <= 8.0


def test_every_whole_cohort_answers_once_and_the_answers_add_up(tmp_path: Path) -> None:
    config = with_start(cohort=2, rounds=1)
    _, result = train(config, tmp_path / "run")
    assert queries(result.records) == ["class_sums", "class_sums", LEARN]
    first, second = result.records[:2]
    assert not set(first.cohort) & set(second.cohort)
    _, whole = train(with_start(cohort=4, rounds=1), tmp_path / "whole")
    kept, one = result.state.optimizer_state, whole.state.optimizer_state
    assert np.allclose(kept["answer.class_sums"], one["answer.class_sums"], atol=1e-2)
    assert float(kept["answer.class_sums.facts"][1]) == 4.0


def test_the_plan_shows_what_each_question_costs_and_learning_pays_for_all_of_them() -> None:
    ready = prepared(with_start(privacy=PRIVATE))
    plan = describe(ready)
    (start,) = plan.queries
    assert (start.query, start.asks, start.rows) == ("class_sums", 1, "learned from")
    assert start.epsilon == pytest.approx(2.0, rel=1e-2)
    assert start.epsilon <= 2.0
    accountant = Accountant()
    for event in ready.spec.answers_planned(held_back=False):
        accountant.compose(event)
    accountant.compose(ready.mechanism.event("learn"), count=2)
    assert accountant.epsilon(1e-5).epsilon <= 8.0
    assert plan.statements[0].epsilon <= 8.0
    alone = prepared(make(federation={"rounds": 2}, privacy=PRIVATE))
    assert ready.mechanism.noise_multiplier > alone.mechanism.noise_multiplier, (
        "the rest of the budget is smaller"
    )


def test_the_ledger_composes_different_events_and_refuses_what_is_beyond_them(tmp_path: Path) -> None:
    ready, result = train(with_start(privacy=PRIVATE), tmp_path / "run")
    ledger = ready.sites[0].ledger
    kinds = {event.kind for event in ledger.events()}
    assert len(kinds) == 2
    releases = [
        entry.release for entry in ledger.ledger.entries(owner=ledger.owner) if entry.kind == "reserve"
    ]
    assert releases == ["class_sums", "update", "update"]
    again = replace(rounds.plan_round(ready.server, 1, result.state), round=4)
    assert again.query == "class_sums"
    assert not ledger.affords(again), "the same rows were never meant to answer twice"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"query": "ridge_sums"}, "this run asks"),
        ({"query": "learn"}, "mechanism"),
        ({"mechanism": "0" * 64}, "mechanism"),
        ({"layout": "0" * 64}, "names, shapes or codec"),
        ({"cohort": (0, 1, 2)}, "schedule"),
        ({"turn": 1}, "turn"),
    ],
)
def test_a_site_refuses_a_question_that_was_not_agreed_on(
    changed: dict[str, object], words: str, tmp_path: Path
) -> None:
    ready = simulation.build(prepared(with_start(privacy=PRIVATE, protection=SECAGG)), tmp_path)
    state = ready.spec.strategy.start(ready.trainable.flatten().cpu())
    plan = rounds.plan_round(ready.server, 1, state)
    assert not differences(plan, ready.spec, site=0, fingerprint=plan.fingerprint)
    other = replace(plan, **changed)  # type: ignore[arg-type]
    refused = " ".join(differences(other, ready.spec, site=0, fingerprint=plan.fingerprint))
    assert words in refused


def test_a_killed_start_is_paid_and_asked_again_from_a_spare(tmp_path: Path) -> None:
    """The kill falls between the reservation and the sum: the answer counts as spent, the spare pays for the
    next.
    """
    config = with_start(privacy={**PRIVATE, "spare_rounds": 1})
    ready = simulation.build(prepared(config), tmp_path / "run")
    state = ready.spec.strategy.start(ready.trainable.flatten().cpu())
    plan = rounds.plan_round(ready.server, 1, state)
    for site in ready.sites:
        site.ledger.reserve(plan)
    result = finish(ready, tmp_path / "run")
    assert queries(result.records) == ["class_sums", LEARN, LEARN]
    charged = [entry.release for entry in ready.ledger.entries(owner=ready.sites[0].ledger.owner)]
    assert charged.count("class_sums") == 2 + 1, "two reservations, one of them released"
    assert ready.epsilon() <= 8.0


def test_a_run_killed_after_its_start_goes_on_to_the_same_model(tmp_path: Path) -> None:
    config = with_start(privacy=RECORD)
    _, whole = train(config, tmp_path / "whole")
    ready = simulation.build(prepared(config), tmp_path / "cut")
    with Store.open(tmp_path / "cut", config) as store:
        start = ready.begin(store)
        with pytest.raises(Interrupted, match="stopped after round 1"):
            federation.run(ready.server, ready.courier, store, start=start, should_stop=lambda: True)
    ready = simulation.build(prepared(config), tmp_path / "cut")
    rest = finish(ready, tmp_path / "cut")
    assert queries(rest.records) == ["class_sums", LEARN, LEARN]
    assert torch.equal(rest.state.vector, whole.state.vector)


@pytest.mark.parametrize("protection", [{"kind": "none"}, SECAGG, {"kind": "bfv", "threshold": 3}])
def test_sums_agree_bit_for_bit_under_every_protection(protection: dict[str, object], tmp_path: Path) -> None:
    if protection["kind"] == "bfv":
        pytest.importorskip("tenseal")
    _, clear = train(one_shot(privacy=RECORD), tmp_path / "clear")
    _, sealed = train(one_shot(privacy=RECORD, protection=protection), tmp_path / "sealed")
    name = "answer.class_sums"
    assert torch.equal(clear.state.optimizer_state[name], sealed.state.optimizer_state[name])


def test_the_client_unit_takes_means_and_shares_its_noise(tmp_path: Path) -> None:
    privacy = {**CLIENT, "noise": "system", "delta": 1e-3}
    ready, result = train(one_shot(privacy=privacy, protection=SECAGG), tmp_path / "run")
    assert result.status == "complete"
    assert ready.epsilon() <= 8.0
    (asked,) = ready.spec.questions.values()
    assert asked.mechanism.adjacency == "zero out one client"


@pytest.mark.parametrize("unit", ["record", "client"])
def test_the_noise_of_the_opened_sum_is_the_one_that_is_stated(unit: str) -> None:
    privacy = {**(RECORD if unit == "record" else {**CLIENT, "delta": 1e-3}), "noise": "system"}
    noise = calibrate_query(
        make(privacy=privacy, protection=SECAGG), question(size=4000), epsilon=2.0, public_client_size=50
    )
    source = RandomSource.seeded(5)
    empty = noise.total([torch.zeros(3, 4000)])
    drawn = sum(noise.protect_total(empty, source).values for _ in range(4)) / noise.scale
    assert float(np.std(drawn)) == pytest.approx(noise.deviation(4), rel=0.05)


@settings(max_examples=30, deadline=None)
@given(
    size=st.integers(1, 12),
    huge=st.floats(1e-3, 1e300),
    where=st.integers(0, 11),
    bad=st.sampled_from([0.0, math.nan, math.inf]),
)
def test_no_row_moves_the_sum_by_more_than_the_bound(size: int, huge: float, where: int, bad: float) -> None:
    noise = calibrate_query(
        make(privacy=RECORD), question(size=size, bound=0.5), epsilon=1.0, public_client_size=10
    )
    rows = torch.full((3, size), 0.01, dtype=torch.float64)
    strange = torch.zeros(1, size, dtype=torch.float64)
    strange[0, where % size] = huge if bad == 0.0 else bad
    before = noise.total([rows]).values
    after = noise.total([rows, strange]).values
    assert float(np.linalg.norm(after - before)) <= 0.5 * (1 + 1e-9)


def test_steps_are_not_read_where_none_are_taken() -> None:
    with pytest.raises(ConfigError) as refused:
        make(federation={"rounds": 2, "cohort": 4, "lifecycle": {"kind": "class_sums", "local_steps": 3}})
    text = str(refused.value)
    assert "local_steps = 3: is not read" in text
    assert "federation.rounds = 2: must be from 1 to 1" in text
    with pytest.raises(ConfigError, match="batch_size = 0: must be at least 1"):
        make(federation={"rounds": 1, "cohort": 4, "lifecycle": {"kind": "finetune", "local_steps": 1}})
    with pytest.raises(ConfigError, match="start_epsilon = 9"):
        make(
            federation={
                "rounds": 1,
                "cohort": 4,
                "lifecycle": {**STEPS, "start": "class_sums", "start_epsilon": 9.0},
            },
            privacy=PRIVATE,
        )


def test_language_models_have_no_classes_to_sum_over() -> None:
    with pytest.raises(PlanRefused, match="sums by class need classes"):
        simulation.prepare(
            make(
                task={"kind": "causal_lm", "data": "builtin:clinic_notes", "clients": 4},
                model={"name": "builtin:tiny-gpt2", "trainable": {"kind": "lora"}},
                federation={"rounds": 1, "cohort": 4, "lifecycle": {"kind": "class_sums"}},
            ),
            Path.cwd(),
        )


def test_the_agenda_ends_where_spares_end() -> None:
    config = with_start(privacy={**PRIVATE, "spare_rounds": 1})
    lost = agenda.Asked(query="class_sums", phase="private", aborted="too few")
    done = agenda.Asked(query="class_sums", phase="private")
    learn = agenda.Asked(query=LEARN, phase="private")

    def asked_next(*records: agenda.Asked) -> str:
        turn = agenda.next_turn(config, records)
        return turn.item.query if turn else "over"

    assert asked_next() == "class_sums"
    assert asked_next(lost) == "class_sums"
    assert asked_next(lost, lost) == LEARN, "nobody pays for a third attempt"
    assert asked_next(lost, done) == LEARN
    assert asked_next(done, learn, learn) == "over"
    assert agenda.last_round(config) == 4
