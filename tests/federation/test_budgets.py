"""A budget belongs to people's rows: no file name, seed, format, order, column or task makes it fresh."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from defenses.dp import Ledger
from ffm_secure import api
from ffm_secure.config import run_file
from ffm_secure.data.dataset import Examples, load
from ffm_secure.data.row_names import named
from ffm_secure.engines import simulation, summary
from ffm_secure.errors import ConfigError, Interrupted, PlanRefused
from defenses.dp.records import RecordKey
from tests.federation.helpers import RECORD, call, first_plan, make, prepared, table, train

ROWS = [(f"Patient number {i} coughs since {i % 9} days", "ab"[i % 2]) for i in range(60)]
TASK = {"kind": "text_classification", "clients": 3, "evaluation_examples": 4, "max_length": 12}
MODEL = {"name": "builtin:tiny-bert", "trainable": {"kind": "head"}}
FEDERATION = {"rounds": 1, "cohort": 3}


def write(folder: Path, rows: list[dict[str, Any]], *, suffix: str = "jsonl") -> Path:
    """Write a training and a validation part."""
    folder.mkdir(parents=True)
    both = sorted(rows, key=lambda row: row["label"])
    for part, chosen in (("train", rows), ("validation", [*both[:2], both[-1]])):
        if suffix == "jsonl":
            text = "".join(json.dumps(row) + "\n" for row in chosen)
        else:
            names = list(rows[0])
            lines = [",".join(str(row[name]) for name in names) for row in chosen]
            text = "\n".join([",".join(names), *lines]) + "\n"
        (folder / f"{part}.{suffix}").write_text(text)
    return folder


def plain() -> list[dict[str, Any]]:
    return [{"text": text, "label": label} for text, label in ROWS]


def config(data: Path | str, ledger: Path, **changes: Any) -> run_file.RunConfig:
    privacy = {**RECORD, "noise": "system", "epsilon": 4.0, "ledger": str(ledger)}
    sections = {
        "task": {**TASK, "data": str(data)},
        "model": MODEL,
        "federation": FEDERATION,
        "privacy": privacy,
    }
    for name, value in changes.items():
        known = sections.get(name, {})
        sections[name] = {**known, **value} if isinstance(value, dict) else value
    return make(**sections)


def linked(folder: Path) -> Path:
    source, target = write(folder / "source", plain()), folder / "target"
    target.mkdir()
    for file in source.iterdir():
        os.link(file, target / file.name)
    return target


CHANGES: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "nothing": (lambda folder: write(folder / "x", plain()), {}),
    "seed 8": (lambda folder: write(folder / "x", plain()), {"seed": 8}),
    "seed 9": (lambda folder: write(folder / "x", plain()), {"seed": 9}),
    "hard links": (linked, {}),
    "csv": (lambda folder: write(folder / "x", plain(), suffix="csv"), {}),
    "shuffled": (lambda folder: write(folder / "x", random.Random(1).sample(plain(), len(ROWS))), {}),
    "a subset": (lambda folder: write(folder / "x", plain()[7:40]), {}),
    "an extra column": (lambda folder: write(folder / "x", [{**row, "ward": "west"} for row in plain()]), {}),
    "a renamed column": (
        lambda folder: write(folder / "x", [{"note": r["text"], "label": r["label"]} for r in plain()]),
        {},
    ),
    "one trailing space": (
        lambda folder: write(folder / "x", [{**r, "text": r["text"] + " "} for r in plain()]),
        {},
    ),
    "another task": (
        lambda folder: write(folder / "x", plain()),
        {"task": {"kind": "masked_lm"}, "model": {"trainable": {"kind": "lora", "rank": 2}}},
    ),
    "another label column": (
        lambda folder: write(folder / "x", [{**r, "grave": "yn"[i % 2]} for i, r in enumerate(plain())]),
        {"task": {"label_column": "grave"}},
    ),
    "another text column": (
        lambda folder: write(folder / "x", [{**r, "title": f"visit {i}"} for i, r in enumerate(plain())]),
        {"task": {"text_column": "title"}},
    ),
    "more clients": (lambda folder: write(folder / "x", plain()), {"task": {"clients": 5}}),
}


@pytest.fixture(scope="module")
def spent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a ledger whose budget of 4 was spent once, on all rows."""
    folder = tmp_path_factory.mktemp("spent")
    ledger = folder / "owner.sqlite"
    train(config(write(folder / "rows", plain()), ledger), folder / "run")
    return ledger


@pytest.mark.parametrize("change", CHANGES)
def test_the_same_rows_never_get_a_fresh_budget(change: str, spent: Path, tmp_path: Path) -> None:
    """Each of these printed 3.995 of a fresh 4."""
    place, settings = CHANGES[change]
    with pytest.raises(PlanRefused, match=r"these rows have spent 3\.99\d before, together [45]\.\d"):
        prepared(config(place(tmp_path), spent, **settings))


def test_options_in_another_order_name_the_same_rows(tmp_path: Path) -> None:
    ledger, task = tmp_path / "owner.sqlite", {"clients": 3}
    train(config("builtin:clinic_notes?size=90&validation=20", ledger, task=task), tmp_path / "run")
    with pytest.raises(PlanRefused, match="have spent 3"):
        prepared(config("builtin:clinic_notes?validation=20&size=90", ledger, task=task))


def test_other_rows_have_a_budget_of_their_own(spent: Path, tmp_path: Path) -> None:
    others = [{"text": f"{row['text']} and sneezes", "label": row["label"]} for row in plain()]
    outlook = prepared(config(write(tmp_path / "x", others), spent)).outlook
    assert outlook is not None
    assert (outlook.before, outlook.left) == (0.0, pytest.approx(4.0 - outlook.run))
    assert "spent before 0, this run 3.99" in outlook.words()


def test_one_appended_row_is_the_only_fresh_one(spent: Path, tmp_path: Path) -> None:
    rows = [*plain(), {"text": "somebody who came yesterday", "label": "a"}]
    made = config(write(tmp_path / "x", rows), spent, privacy={"epsilon": 0.001, "clip_norm": 1.0})
    with Ledger.open(spent, create=False) as ledger:
        ledger.grant("record", 5.0, 1e-5, raise_because="a test of streams")
        ready = simulation.build(prepared(made), tmp_path / "run")
        assert {site.ledger.epsilon() > 3.9 for site in ready.sites} == {True}
        fresh = [block for block in ledger.blocks() if ledger.epsilon_of([block], "record", 1e-5) == 0.0]
        sizes = {entry.sequence: entry.records for entry in ledger.entries() if entry.kind == "block"}
        assert [sizes[block] for block in fresh] == [1]


def test_a_run_spends_its_own_epsilon_at_most(tmp_path: Path) -> None:
    """The owner's budget is larger, yet a run that repeats rounds stops at what it said."""
    ledger = tmp_path / "owner.sqlite"
    with Ledger.open(ledger) as opened:
        opened.grant("record", 50.0, 1e-5)
    ready = simulation.build(prepared(config(write(tmp_path / "x", plain()), ledger)), tmp_path / "run")
    plan = first_plan(ready)
    site = ready.sites[0]
    assert site.ledger.affords(plan)
    site.ledger.reserve(plan)
    assert not site.ledger.affords(plan)
    assert ready.ledger.lifetime("record").epsilon == 50.0


def test_many_rounds_of_a_small_budget_are_all_run(tmp_path: Path) -> None:
    """A plan that is accepted pays for every round it says, and for none beyond."""
    changes = {"federation": {"rounds": 40}, "privacy": {"epsilon": 1.0}}
    made = config(write(tmp_path / "x", plain()), tmp_path / "owner.sqlite", **changes)
    ready = simulation.build(prepared(made), tmp_path / "run")
    plan, site = first_plan(ready), ready.sites[0]
    for number in range(1, 41):
        assert site.ledger.affords(replace(plan, round=number)), number
        site.ledger.reserve(replace(plan, round=number))
    assert not site.ledger.affords(replace(plan, round=41))
    assert 0.9 < site.ledger.epsilon() <= 1.0


def test_the_default_ledger_outlives_every_run(tmp_path: Path, data_home: Path) -> None:
    made = config(write(tmp_path / "x", plain()), Path(), privacy={"ledger": ""})
    train(made, tmp_path / "run")
    assert (data_home / "ledger.sqlite").is_file()
    assert not (tmp_path / "run" / "ledger.sqlite").exists()
    with pytest.raises(PlanRefused, match="have spent"):
        prepared(made)


def test_a_ledger_in_the_run_says_so(tmp_path: Path, data_home: Path) -> None:
    made = config(write(tmp_path / "x", plain()), Path(), privacy={"ledger": "run"})
    for folder in ("one", "two"):
        train(made, tmp_path / folder)
        assert (tmp_path / folder / "ledger.sqlite").is_file()
    assert not (data_home / "ledger.sqlite").exists()
    assert "the ledger lies in the run" in summary.describe(prepared(made)).spends


def test_a_relative_ledger_counts_from_the_run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same file run elsewhere had a fresh budget."""
    write(tmp_path / "files" / "x", plain())
    made = table(
        task={**TASK, "data": "x"},
        model=MODEL,
        federation=FEDERATION,
        privacy={**RECORD, "noise": "system", "ledger": "owner.sqlite"},
    )
    (tmp_path / "files" / "run.toml").write_text(run_file.dump(run_file.from_table(made)))
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        run = api.load(tmp_path / "files" / "run.toml")
        assert run.config.privacy.ledger == str(tmp_path / "files" / "owner.sqlite")


def test_seeded_noise_is_charged_inside_the_run_only() -> None:
    with pytest.raises(ConfigError, match="say 'run'"):
        make(privacy={**RECORD, "ledger": ""})


def test_another_unit_is_refused_with_the_units_named(spent: Path, tmp_path: Path) -> None:
    client = {"unit": "client", "epsilon": 4.0}
    made = config(
        write(tmp_path / "x", plain()), spent, privacy=client, protection={"kind": "secagg", "threshold": 3}
    )
    with pytest.raises(PlanRefused, match=r"holds charges per record for these rows"):
        prepared(made)


def test_a_run_without_bound_spoils_its_rows_but_no_others(tmp_path: Path) -> None:
    ledger, rows = tmp_path / "owner.sqlite", write(tmp_path / "x", plain())
    none = {"unit": "none", "reason": "a baseline", "ledger": str(ledger)}
    free = table(task={**TASK, "data": str(rows)}, model=MODEL, federation=FEDERATION, privacy=none)
    train(run_file.from_table(free), tmp_path / "free")
    with pytest.raises(PlanRefused, match="used without any bound before"):
        prepared(config(rows, ledger))
    others = [{"text": f"quite another {i}", "label": "ab"[i % 2]} for i in range(60)]
    assert prepared(config(write(tmp_path / "y", others), ledger)).outlook is not None


def test_names_go_with_their_rows() -> None:
    dataset = named(
        load("builtin:clinic_notes?size=40&validation=10", kind="masked_lm", base=Path(), seed=0),
        RecordKey.public(),
    )
    records = dataset.train.records
    assert records is not None
    assert len(set(records.keys.tolist())) == 40
    part = dataset.train.take([7, 3])
    assert part.records is not None
    assert part.records.keys.tolist() == records.keys[[7, 3]].tolist()


def test_pictures_are_named_by_their_pixels() -> None:
    dataset = named(
        load("builtin:digits", kind="image_classification", base=Path(), seed=0), RecordKey.public()
    )
    assert isinstance(dataset.train, Examples)
    assert dataset.train.records is not None
    assert len(set(dataset.train.records.keys.tolist())) == len(dataset.train)


def test_plan_says_before_this_run_and_left(tmp_path: Path) -> None:
    made = config(write(tmp_path / "x", plain()), tmp_path / "owner.sqlite")
    (tmp_path / "run.toml").write_text(run_file.dump(made))
    shown = call("plan", "run.toml", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    words = " ".join(shown.stdout.split())
    assert "spent before 0, this run 3.99" in words
    assert "left 0.00" in words


def test_spare_rounds_are_calibrated_and_pay_for_lost_attempts(tmp_path: Path) -> None:
    """Without them one lost attempt ended the run a round early."""
    privacy = {"spare_rounds": 2}
    rows = write(tmp_path / "x", plain())
    ready = simulation.build(prepared(config(rows, tmp_path / "a.sqlite", privacy=privacy)), tmp_path / "run")
    without = prepared(config(rows, tmp_path / "b.sqlite"))
    assert ready.mechanism.noise_multiplier > without.mechanism.noise_multiplier
    plan, ledger = first_plan(ready), ready.sites[0].ledger
    for _ in range(3):  # one round, lost twice
        assert ledger.affords(plan)
        ledger.reserve(plan)
    assert not ledger.affords(plan)
    assert ledger.epsilon() <= 4.0


def test_a_run_that_is_asked_to_stop_ends_after_a_whole_round(tmp_path: Path) -> None:
    made = config(write(tmp_path / "x", plain()), tmp_path / "owner.sqlite", federation={"rounds": 3})
    run = api.place(made, base=tmp_path, runs=tmp_path / "runs")
    with pytest.raises(Interrupted, match="stopped after round 1"):
        run.start(should_stop=lambda: True)
    result = api.place(made, base=tmp_path, runs=tmp_path / "runs").start()
    assert result.summary.status == "complete"
    assert result.epsilon <= 4.0
    assert len(result.summary.rounds) == 3


@pytest.mark.parametrize(
    ("privacy", "words"),
    [({"delta": 0.4}, "privacy.delta = 0.4"), ({"epsilon": 1e5}, "nothing is promised")],
)
def test_promises_that_promise_nothing_are_refused(
    privacy: dict[str, float], words: str, tmp_path: Path
) -> None:
    with pytest.raises(PlanRefused, match=words):
        prepared(config(write(tmp_path / "x", plain()), tmp_path / "owner.sqlite", privacy=privacy))


def test_other_rows_are_not_held_to_the_budget_of_the_first_run(tmp_path: Path) -> None:
    """A ledger that no owner has given a budget grows with what runs ask for;
    the same rows still pay in all.
    """
    ledger = tmp_path / "shared.sqlite"
    train(config(write(tmp_path / "a", plain()), ledger, privacy={"epsilon": 1.0}), tmp_path / "first")
    others = [{**row, "text": f"Another {row['text']}"} for row in plain()]
    small, large = config(write(tmp_path / "b", others), ledger), config(tmp_path / "a", ledger)
    train(small, tmp_path / "second")
    with pytest.raises(PlanRefused, match=r"spent 0\.9"):
        train(large, tmp_path / "third")


def test_a_budget_that_an_owner_has_set_is_moved_by_no_run(tmp_path: Path) -> None:
    ledger = tmp_path / "owner.sqlite"
    with Ledger.open(ledger) as opened:
        opened.grant("record", 1.0, 1e-5)
    with pytest.raises(PlanRefused, match="lifetime budget of 1 "):
        train(config(write(tmp_path / "a", plain()), ledger), tmp_path / "first")
