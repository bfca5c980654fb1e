"""A grid of private runs on the same rows says what they cost together,
before the first and in its report.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defenses.dp import Accountant, Event, GaussianEvent, NonPrivateEvent, TuningEvent
from defenses.dp import epsilon as epsilon_of
from ffm_secure.experiments import grid as experiments
from ffm_secure.experiments.grid_cost import CellCost, _cost_of, grid_costs
from tests.experiments.test_experiments import GRID
from tests.federation.helpers import RECORD, make
from tests.queries.helpers import HEAD, STEPS, one_shot

PRIVATE = 'privacy = { ledger = "run", unit = "record", epsilon = 4.0, delta = 1e-5, clip_norm = 1.0 }'
OPEN = 'privacy = { ledger = "run", unit = "none", reason = "test data" }'


def event(sigma: float = 1.0, unit: str = "record") -> GaussianEvent:
    return GaussianEvent(
        unit=unit,  # type: ignore[arg-type]
        adjacency="add_remove",
        sampling="poisson",
        sampling_rate=0.1,
        noise_multiplier=sigma,
        steps=2,
        clip_norm=1.0,
        release="update",
    )


def cell(run: str, keys: Sequence[int], *, sigma: float = 1.0, data: str = "", rounds: int = 3) -> CellCost:
    happened: Event = event(sigma) if sigma else NonPrivateEvent(reason="none")
    return CellCost(
        run=run,
        data=data or run,
        keys=np.unique(np.array(keys, dtype=np.uint64)),
        unit="record" if sigma else "none",
        delta=1e-5,
        event=happened,
        rounds=rounds,
        guaranteed=bool(sigma),
    )


def test_runs_on_the_same_rows_compose_and_others_do_not() -> None:
    one, two, apart = cell("a", [1, 2, 3]), cell("b", [3, 4], sigma=2.0), cell("c", [9])
    shared, alone = grid_costs([one, apart, two])[::-1]
    assert (shared.runs, alone.runs) == (2, 1)
    truth = epsilon_of([event(1.0)] * 3 + [event(2.0)] * 3, 1e-5).epsilon
    assert shared.together == pytest.approx(truth, rel=1e-3)
    assert shared.each == pytest.approx(epsilon_of([event(1.0)] * 3, 1e-5).epsilon, rel=1e-3)
    assert alone.together == alone.each


@settings(max_examples=30, deadline=None)
@given(runs=st.lists(st.sets(st.integers(0, 8), min_size=1), min_size=1, max_size=5), order=st.randoms())
def test_no_row_costs_more_than_is_stated(runs: list[set[int]], order: object) -> None:
    """The obvious definition: every row's own list of what read it, in any order of the runs."""
    sigmas = [0.8 + 0.3 * number for number in range(len(runs))]
    cells = [cell(str(number), sorted(rows), sigma=sigmas[number]) for number, rows in enumerate(runs)]
    order.shuffle(cells)  # type: ignore[attr-defined]
    stated = grid_costs(cells)
    for row in set().union(*runs):
        history = [event(sigmas[n]) for n, rows in enumerate(runs) if row in rows for _ in range(3)]
        truth = epsilon_of(history, 1e-5).epsilon
        assert max(cost.together for cost in stated) >= truth * (1 - 1e-3)
    assert sum(cost.runs for cost in stated) == len(runs)


def test_one_run_without_a_bound_spoils_what_the_others_promise() -> None:
    (cost,) = grid_costs([cell("a", [1]), cell("b", [1]), cell("bare", [1, 2], sigma=0.0)])
    assert cost.without == ("bare",)
    assert "with bare, which read them without a bound, nothing is promised" in cost.words()


def test_the_best_of_a_random_number_of_equal_runs_is_priced() -> None:
    cells = [cell(f"seed-{number}", [1], data="same") for number in range(10)]
    (cost,) = grid_costs(cells)
    accountant = Accountant()
    base = (event(),) * 3
    accountant.compose(TuningEvent(base=base, distribution="poisson", stopping=10.0, release="x"))
    assert cost.best_only == pytest.approx(accountant.epsilon(1e-5).epsilon)
    assert cost.each < cost.best_only < cost.together
    (mixed,) = grid_costs([cell("a", [1], data="same"), cell("b", [1], data="same", sigma=2.0)])
    assert mixed.best_only is None


def test_answers_and_rows_held_back_are_counted_too() -> None:
    """A grid stated what its rounds of learning cost, and nothing of what its runs ask beside."""
    asked = replace(cell("a", [1]), answers=(event(3.0),) * 2, held_back=(event(0.9),))
    (alone,) = grid_costs([asked])
    learned = epsilon_of([event()] * 3 + [event(3.0)] * 2, 1e-5).epsilon
    assert alone.each == alone.together == pytest.approx(learned, rel=1e-3)
    (both,) = grid_costs([asked, replace(cell("b", [1]), held_back=(event(0.9),))])
    one_side = epsilon_of([event()] * 6 + [event(3.0)] * 2, 1e-5).epsilon
    other_side = epsilon_of([event(0.9), *[event()] * 3], 1e-5).epsilon
    assert both.together >= max(one_side, other_side) * (1 - 1e-3)
    assert both.best_only is None


@pytest.mark.parametrize(
    "asked",
    [{"start": "class_sums", "start_epsilon": 4.0}, {"finish": "class_offsets", "finish_epsilon": 4.0}],
    ids=["start", "finish"],
)
def test_a_run_of_a_grid_costs_what_its_plan_says(asked: dict[str, object]) -> None:
    """Of a run whose start costs half of epsilon 8 the learning alone was stated."""
    config = make(
        model=HEAD, privacy={**RECORD, "noise": "system"}, federation={"lifecycle": {**STEPS, **asked}}
    )
    (cost,) = grid_costs([_cost_of(config, Path.cwd())])
    assert 8.0 * 0.99 < cost.each <= 8.0


def test_a_head_from_sums_costs_its_answers_in_a_grid() -> None:
    config = one_shot(privacy={**RECORD, "noise": "system", "epsilon": 2.0})
    (cost,) = grid_costs([_cost_of(config, Path.cwd())])
    assert 2.0 * 0.99 < cost.each <= 2.0


def test_a_run_that_pays_for_no_round_costs_nothing() -> None:
    """A baseline on public rows alone stands in a grid beside private runs on the same rows."""
    baseline, private = cell("public", [1, 2], rounds=0), cell("private", [1, 2])
    (cost,) = grid_costs([baseline, private])
    truth = epsilon_of([event()] * 3, 1e-5).epsilon
    assert cost.together == pytest.approx(truth, rel=1e-3)
    assert cost.each == pytest.approx(truth, rel=1e-3)
    (free,) = grid_costs([baseline, cell("seed-2", [1, 2], rounds=0)])
    assert (free.each, free.together, free.best_only) == (0.0, 0.0, None)


def test_a_grid_says_its_cost_before_the_first_run_and_in_its_report(tmp_path: Path) -> None:
    """Five seeds at epsilon 4 printed 4 in every row, and nowhere what they cost together."""
    path = tmp_path / "grid.toml"
    path.write_text(GRID.replace(OPEN, PRIVATE).replace("seeds = [1]", "seeds = [1, 2]"))
    said: list[str] = []
    page, results = experiments.run(path, out=tmp_path / "out", say=said.append)
    assert "4 private runs on the same rows: each costs at most" in said[0]
    (cost,) = results["costs"]
    assert cost["runs"] == 4
    assert max(item["epsilon"] for item in results["cells"]) <= cost["each"] * (1 + 1e-3) <= 4.0 * (1 + 1e-3)
    assert 4.0 < cost["together"] < 4 * 4.0
    for name in ("report.html", "results.md", "results.json"):
        assert "4 private runs on the same rows" in (page.parent / name).read_text(), name
    stored = json.loads((page.parent / "results.json").read_text())
    assert stored["costs"][0]["together"] == cost["together"]


def test_a_grid_without_private_runs_states_nothing(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(GRID)
    said: list[str] = []
    _, results = experiments.run(path, out=tmp_path / "out", say=said.append)
    assert results["costs"] == []
    assert said[0].startswith("1/2")


def test_infinity_is_written_where_nothing_is_promised() -> None:
    from ffm_secure.experiments.grid_cost import as_table

    (cost,) = grid_costs([cell("a", [1]), cell("b", [1]), cell("bare", [1], sigma=0.0)])
    table = as_table(cost)
    assert table["together"] == math.inf
    assert replace(cost, without=()).together == table["private_runs_together"]
