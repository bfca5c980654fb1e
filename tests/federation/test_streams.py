"""Rows that arrive in stages: who pays for what, what is forgotten, and that sums do not mind the order."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from defenses.dp import Event, GaussianEvent, Ledger, accountant
from defenses.dp.records import RecordKey, canonical_text, name_records
from defenses.random_source import RandomSource
from ffm_secure import api
from ffm_secure.auditing.lower_bound import bounds_over_rounds, strongest
from ffm_secure.config.federated import shared_objections
from ffm_secure.config.run_file import RunConfig
from ffm_secure.data.stream import stages_of
from ffm_secure.engines import simulation
from ffm_secure.engines.summary import describe
from ffm_secure.errors import ConfigError, DataError, Interrupted, PlanRefused, StoreError
from ffm_secure.lifecycle.finetune import Arrived
from ffm_secure.lifecycle.stream_measures import measures
from ffm_secure.privacy.mechanism import replay_events, replay_of
from ffm_secure.queries import agenda
from ffm_secure.queries.base import Opened, Query, of_classes
from ffm_secure.records import LEARN, RoundPlan
from ffm_secure.site.site_ledger import SiteLedger
from ffm_secure.site.stage_accounts import StageAccounts
from tests.federation.helpers import RECORD, make, prepared, train
from tests.queries.helpers import HEAD, STEPS, one_shot

PRIVATE = {**RECORD, "noise": "system"}
HALVES = ("0|1|2|3|4", "5|6|7|8|9")
ONE_STEP = {**STEPS, "local_steps": 1}
DELTA = 1e-5


def staged(order: tuple[str, ...] = HALVES, **stream: Any) -> dict[str, Any]:
    """Return the table of a task whose classes arrive one half after the other."""
    return {"stream": {"column": "label", "order": list(order), **stream}, "evaluation_examples": 150}


def learning(rounds: int = 2, *, replay: float = 0.0, **sections: Any) -> RunConfig:
    """Return a run that learns stage after stage."""
    federation = {"rounds": rounds, "lifecycle": ONE_STEP}
    return make(task=staged(replay=replay), model=HEAD, federation=federation, **sections)


def test_the_order_of_the_stages_changes_nothing_about_sums(tmp_path: Path) -> None:
    vectors = []
    for number, order in enumerate((HALVES, HALVES[::-1])):
        config = one_shot("class_sums", rounds=2, task=staged(order))
        _, result = train(config, tmp_path / str(number))
        assert [record.stage for record in result.records] == list(order)
        vectors.append(result.state.vector)
    _, whole = train(one_shot("class_sums", task={"evaluation_examples": 150}), tmp_path / "whole")
    assert torch.allclose(vectors[0], vectors[1], atol=1e-3), "rounding"
    assert torch.allclose(vectors[0], whole.state.vector, atol=1e-3)
    assert float(vectors[0].norm()) > 1.0


@pytest.fixture(scope="module")
def replayed(tmp_path_factory: pytest.TempPathFactory) -> tuple[api.Run, api.Result]:
    config = learning(2, replay=0.3, privacy={**PRIVATE, "spare_rounds": 1})
    run = api.place(config, base=Path.cwd(), runs=tmp_path_factory.mktemp("stream"))
    return run, run.start(fairness=False)


def test_rows_of_the_reservoir_pay_in_later_stages_and_no_others(
    replayed: tuple[api.Run, api.Result],
) -> None:
    run, result = replayed
    assert result.epsilon <= 8.0
    with Ledger.open(run.folder / "ledger.sqlite", create=False) as ledger:
        charges = [entry for entry in ledger.entries() if entry.kind == "reserve"]
        spent = {block: ledger.epsilon_of((block,), "record", DELTA) for block in ledger.blocks()}
    assert len(charges) == 4 * 3, "four sites, one charge in the first stage and two in the second"
    labels = Counter(entry.event.release for entry in charges if isinstance(entry.event, GaussianEvent))
    assert labels == {
        "update of one round, stage 1": 4,
        "update of one round, stage 2": 4,
        "replay of one round, stage 2": 4,
    }
    assert max(spent.values()) <= 8.0
    assert len({round(value, 6) for value in spent.values()}) == 2, "once, or once and replayed"


def test_the_plan_composes_a_new_row_that_stays(replayed: tuple[api.Run, api.Result]) -> None:
    run, _ = replayed
    ready = run.prepared()
    again = replay_events(ready.mechanism, run.config)
    assert len(again) == 2, "the second stage, and the spare attempt"
    event = ready.mechanism.event("learn")
    epsilon = accountant.composed(((event, 2), (again[0], 2)), DELTA)
    assert 7.5 < epsilon <= 8.0
    alone = prepared(learning(2, privacy={**PRIVATE, "spare_rounds": 1}))
    assert ready.mechanism.noise_multiplier > alone.mechanism.noise_multiplier
    (statement, *_) = describe(ready).statements
    assert statement.epsilon == pytest.approx(epsilon, rel=1e-3)
    assert any("replay" in words for words in statement.mechanism)


def test_canaries_of_the_first_stage_are_audited_after_the_last() -> None:
    """A ledger that forgot the replay would be below what they prove; the one there is stays above."""
    often = staged(replay=0.5, replay_rate=100.0)
    federation = {"rounds": 6, "lifecycle": {**STEPS, "local_steps": 2, "batch_size": 1}}
    ready = prepared(make(task=often, model=HEAD, federation=federation, privacy=PRIVATE))
    bounds = bounds_over_rounds(ready, source=RandomSource.seeded(11))
    assert max(bounds) == 6, "three rounds of the first stage, three of the second"
    forgetful = accountant.composed(((ready.mechanism.event("learn"), 3),), DELTA)
    proven = strongest(bounds[6]).epsilon
    assert forgetful < proven <= 8.0


def test_a_report_shows_every_stage(replayed: tuple[api.Run, api.Result]) -> None:
    run, result = replayed
    stream = result.summary.stream
    assert stream is not None
    assert stream.stages == HALVES
    assert len(stream.unknown) == 3
    table = json.loads((run.folder / "report.json").read_text())["stream"]
    assert table["measures_unknown"]["average"] == pytest.approx(np.mean(stream.unknown[-1]))
    assert "Stage by stage" in (run.folder / "details.html").read_text()
    last = result.summary.rounds[-1]
    assert [score.stage for score in last.stages] == list(HALVES)
    assert sum(score.rows for score in last.stages) == 150
    assert all(known >= unknown for known, unknown in zip(stream.known[-1], stream.unknown[-1], strict=True))


def test_a_site_draws_what_has_arrived_at_the_rate_it_is_charged_for(
    replayed: tuple[api.Run, api.Result],
) -> None:
    run, _ = replayed
    ready = simulation.build(run.prepared(), run.folder.parent / "again")
    site = ready.sites[1]
    stages = stages_of(ready.prepared.data.rows(1), run.config.task.stream, ready.prepared.dataset)
    replay = replay_of(ready.mechanism)
    assert replay is not None
    with ready.courier.trainers.borrow() as trainer:
        plan = RoundPlan(run_id=b"0" * 16, round=2, cohort=(1,), fingerprint="", mechanism="", turn=1)
        arrived = trainer._arrived(site.data, plan)
    assert set(stages[arrived.new]) == {1}
    assert set(stages[arrived.reservoir]) == {0}
    share = len(arrived.reservoir) / np.sum(stages == 0)
    assert 0.15 < share < 0.45
    assert arrived.replay_rate == replay.sampling_rate


def test_a_step_draws_new_rows_and_reservoir_at_rates_of_their_own() -> None:
    arrived = Arrived(new=np.arange(5), reservoir=np.arange(100, 300), replay_rate=0.25)
    source = RandomSource.seeded(1)
    draws = [arrived.drawn(np.array([1, 3]), source) for _ in range(200)]
    assert all(draw[:2].tolist() == [1, 3] for draw in draws)
    counts = np.array([len(draw) - 2 for draw in draws])
    assert abs(counts.mean() - 50) < 4 * np.sqrt(200 * 0.25 * 0.75 / 200)
    assert Arrived.everything(4).drawn(np.array([2]), source).tolist() == [2]


SITE = "north"


def site_ledger(ledger: Ledger, *, stages: int, turns: int, new: Event, replay: Event) -> SiteLedger:
    """Return the account of one owner with four rows a stage, two of which stay."""
    key = ledger.record_key()
    requests = []
    for stage in range(stages):
        for kind in ("passes", "stays"):
            texts = [canonical_text(f"{kind} {stage} {number}") for number in range(2)]
            requests.append(name_records(key.contents(texts), []))
    blocks = ledger.blocks_for(requests)
    accounts = StageAccounts(passing=blocks[0::2], staying=blocks[1::2], turns=turns, replay=replay)
    privacy = make(privacy=PRIVATE).privacy
    return SiteLedger(
        ledger=ledger, owner=SITE, index=0, dataset="rows", blocks=accounts.blocks, privacy=privacy,
        unit="record", delta=DELTA, event=new, guaranteed=True, stages=accounts,
    )  # fmt: skip


def gaussian(rate: float, noise: float, steps: int, release: str) -> GaussianEvent:
    return GaussianEvent(
        unit="record", adjacency="add_remove", sampling="poisson", sampling_rate=rate, noise_multiplier=noise,
        steps=steps, clip_norm=1.0, release=release,
    )  # fmt: skip


@settings(max_examples=8, deadline=None)
@given(
    stages=st.integers(2, 4),
    turns=st.integers(1, 2),
    rates=st.sampled_from([(0.05, 0.2), (0.2, 0.05)]),
    order=st.lists(st.integers(0, 7), min_size=4, max_size=12),
    lifetime=st.sampled_from([8.0, 100.0]),
)
def test_no_block_ever_passes_the_budget_whatever_is_asked(
    tmp_path_factory: pytest.TempPathFactory,
    stages: int,
    turns: int,
    rates: tuple[float, float],
    order: list[int],
    lifetime: float,
) -> None:
    """The slow definition beside it: every row's own list of what it was drawn for, composed."""
    path = tmp_path_factory.mktemp("ledger") / "ledger.sqlite"
    new, replay = gaussian(rates[0], 0.6, 5, "new"), gaussian(rates[1], 0.6, 5, "again")
    with Ledger.open(path) as ledger:
        ledger.grant("record", lifetime, DELTA)
        account = site_ledger(ledger, stages=stages, turns=turns, new=new, replay=replay)
        went_through: dict[tuple[int, bool], Counter[Event]] = {
            (stage, stays): Counter() for stage in range(stages) for stays in (False, True)
        }
        for number, turn in enumerate(order):
            plan = RoundPlan(
                run_id=b"1" * 16, round=number + 1, cohort=(0,), fingerprint="", mechanism="",
                turn=turn % (stages * turns),
            )  # fmt: skip
            if not account.affords(plan):
                continue
            account.reserve(plan)
            stage = plan.turn // turns
            for stays in (False, True):
                went_through[stage, stays][new] += 1
            for earlier in range(stage):
                went_through[earlier, True][replay] += 1
        stages_blocks = (account.stages.passing, account.stages.staying) if account.stages else ()
        for (stage, stays), events in went_through.items():
            own = accountant.composed(tuple(events.items()), DELTA) if events else 0.0
            held = ledger.epsilon_of(stages_blocks[stays][stage], "record", DELTA)
            assert own <= 8.0 * (1 + 1e-6)
            assert held == pytest.approx(own, rel=2e-3, abs=1e-6)
            assert held <= lifetime


def test_a_killed_stream_goes_on_to_the_same_end_and_more_rounds_are_another_run(tmp_path: Path) -> None:
    config = learning(4, replay=0.3)
    whole = api.place(config, base=Path.cwd(), runs=tmp_path / "whole").start(fairness=False)
    run = api.place(config, base=Path.cwd(), runs=tmp_path / "parts")
    asked = iter([False, True])
    with pytest.raises(Interrupted):
        run.start(fairness=False, should_stop=lambda: next(asked, False))
    result = api.place(config, base=Path.cwd(), runs=tmp_path / "parts").start(fairness=False)
    assert [record.stage for record in result.summary.rounds] == [HALVES[0]] * 2 + [HALVES[1]] * 2
    digests = [summary.digests["trained numbers"] for summary in (whole.summary, result.summary)]
    assert digests[0] == digests[1]
    assert result.summary.stream == whole.summary.stream
    longer = api.place(learning(6, replay=0.3), base=Path.cwd(), runs=tmp_path / "parts")
    with pytest.raises(StoreError, match="rounds"):
        longer.start(fairness=False)


def test_measures_are_those_of_the_literature() -> None:
    table = [[0.1, 0.2, 0.0], [0.9, 0.3, 0.1], [0.7, 0.8, 0.3], [0.4, 0.9, 0.7]]
    measured = measures(table)
    assert measured.average == pytest.approx((0.4 + 0.9 + 0.7) / 3)
    assert measured.forgetting == pytest.approx(((0.9 - 0.4) + (0.8 - 0.9)) / 2)
    assert measured.backward == pytest.approx(((0.4 - 0.9) + (0.9 - 0.8)) / 2)
    assert measured.forward == pytest.approx(((0.3 - 0.2) + (0.3 - 0.0)) / 2)


def test_noise_of_classes_nobody_was_asked_about_is_left_out() -> None:
    query = Query(
        name="toy", size=7, bound=1.0, by_class=1, answer=lambda rows, model: torch.zeros(0),
        use=lambda state, opened: state,
    )  # fmt: skip
    opened = Opened(values=np.arange(1.0, 8.0), deviation=2.0, sites=3)
    part = of_classes(query, opened, np.array([True, False, True]))
    assert part.values.tolist() == [1, 2, 3, 0, 0, 6, 7]
    assert part.by_class is not None
    assert part.by_class.tolist() == [2, 0, 2]


def test_turns_are_dealt_to_the_stages_evenly() -> None:
    config = learning(6)
    assert [agenda.stage_of(config, turn) for turn in range(6)] == [0, 0, 0, 1, 1, 1]
    assert [agenda.stage_of(make(), turn) for turn in range(3)] == [0, 0, 0]
    halves = make(
        task=staged(), federation={"rounds": 4, "cohort": 2, "lifecycle": {"kind": "class_sums"}},
        model={"name": "builtin:tiny-vit", "trainable": {"kind": "head"}},
    )  # fmt: skip
    schedule = prepared(halves).spec.questions["class_sums"].schedule
    for stage in (0, 2):
        assert not set(schedule[stage]) & set(schedule[stage + 1]), "nobody answers twice in one stage"


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"privacy": {**PRIVATE, "unit": "client"}, "protection": {"kind": "secagg"}}, "a client"),
        ({"federation": {"rounds": 2, "lifecycle": {**STEPS, "start": "class_sums"}}}, "made anew"),
        ({"federation": {"rounds": 2, "lifecycle": {**STEPS, "finish": "class_offsets"}}}, "finish"),
        ({"evaluation": {"rows": "held_back"}}, "held_back"),
    ],
)
def test_what_does_not_go_with_a_stream_is_refused_in_the_plan(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanRefused) as refused:
        prepared(make(**{"task": staged(), "federation": {"rounds": 2}, **sections}))
    assert any(words in reason and "stream" in reason for reason in refused.value.reasons)


def test_sums_are_not_replayed() -> None:
    with pytest.raises(PlanRefused, match="sums forget nothing"):
        prepared(one_shot(rounds=2, task=staged(replay=0.5)))


def test_a_stream_of_wrong_numbers_is_refused_with_all_of_them() -> None:
    with pytest.raises(ConfigError) as refused:
        make(task={"stream": {"column": "label", "order": ["0|1", "1|2"]}}, federation={"rounds": 3})
    assert "there once" in str(refused.value)
    assert "multiple of the 2 stages" in str(refused.value)
    with pytest.raises(ConfigError, match=r"task\.stream\.order"):
        make(task={"stream": {"order": ["a", "b"]}}, federation={"rounds": 2})


def test_a_stage_without_public_rows_and_a_missing_column_are_refused(tmp_path: Path) -> None:
    lonely = make(
        task={**staged(("0", "1")), "evaluation_examples": 1}, federation={"rounds": 2, "lifecycle": ONE_STEP}
    )
    with pytest.raises(DataError, match="of the stage"):
        simulation.build(prepared(lonely), tmp_path)
    other = replace(lonely, task=replace(lonely.task, stream=replace(lonely.task.stream, column="month")))
    with pytest.raises(DataError, match="no such column"):
        prepared(other)


def test_rows_of_no_declared_value_are_never_read() -> None:
    ready = prepared(make(task=staged(("0", "1|2")), federation={"rounds": 2, "lifecycle": ONE_STEP}))
    labels = np.concatenate([ready.data.rows(owner).labels for owner in range(4)])
    assert set(labels) == {0, 1, 2}


def test_sites_of_their_own_have_no_stages_yet() -> None:
    assert any("stream" in reason for reason in shared_objections(learning(), sites=4))
    assert LEARN == "learn"
    assert RecordKey.public() is not None
