"""A row that was private in one run does not become public in another, whatever columns that one reads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from defenses.dp import Ledger
from defenses.dp.records import RecordKey
from ffm_secure.config.run_file import RunConfig
from ffm_secure.engines import simulated_data, simulation
from ffm_secure.errors import DataError, StoreError
from ffm_secure.privacy.accounts import keyed_fingerprint
from ffm_secure.storage.run_directory import Store
from tests.federation.helpers import RECORD, make, prepared, train

ROWS = [
    {
        "note": f"Patient number {i} coughs since {i % 9} days",
        "summary": f"An account of visit {i} on ward {i % 4}, in other words",
        "label": "ab"[i % 2],
    }
    for i in range(240)
]


def config(folder: Path, ledger: str, *, column: str = "note", **changes: Any) -> RunConfig:
    folder.mkdir(exist_ok=True)
    file = folder / "notes.jsonl"
    if not file.exists():
        file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    task = {
        "kind": "text_classification", "data": str(file), "clients": 3, "evaluation_examples": 4,
        "max_length": 12,
        "text_column": column, "label_column": "label", "validation": "hold_out",
        "class_names": ["a", "b"],
    }  # fmt: skip
    privacy = {**RECORD, "noise": "system", "epsilon": 2.0, "ledger": ledger, **changes}
    model = {"name": "builtin:tiny-bert", "trainable": {"kind": "head"}}
    return make(task=task, model=model, federation={"rounds": 1, "cohort": 3}, privacy=privacy)


def test_reading_another_column_makes_no_private_row_public(tmp_path: Path) -> None:
    """Most rows that were held out by their note were private when the summary was read."""
    ledger = str(tmp_path / "owner.sqlite")
    first = config(tmp_path, ledger)
    train(first, tmp_path / "run")
    with Ledger.open(Path(ledger), create=False) as opened:
        opened.grant("record", 8.0, 1e-5, raise_because="a second run")
    with pytest.raises(
        DataError, match=r"of the rows that would become public .* were used as private ones before"
    ):
        prepared(config(tmp_path, ledger, column="summary"))
    assert prepared(first).outlook is not None, "the same columns part the same rows"


def test_rows_that_no_run_was_charged_for_may_become_public(tmp_path: Path) -> None:
    ledger = str(tmp_path / "owner.sqlite")
    simulation.build(prepared(config(tmp_path, ledger)), tmp_path / "run")  # built, never begun
    prepared(config(tmp_path, ledger, column="summary"))
    train(config(tmp_path, ledger), tmp_path / "run")
    for ledger in (str(tmp_path / "other.sqlite"), "run"):  # nobody's charges; fictitious rows
        assert len(prepared(config(tmp_path, ledger, column="summary")).dataset.validation) > 0


def test_what_a_run_notes_of_its_rows_is_no_membership_oracle(tmp_path: Path) -> None:
    """Whoever knew all rows but one could try guesses of that one on the bare digests."""
    made = config(tmp_path, str(tmp_path / "owner.sqlite"))
    data = simulated_data.load(made, tmp_path)
    bare, keyed = (text.replace(":", " ").split()[1::2] for text in (data.bare_contents, data.contents))
    assert len(bare) == len(keyed) == 2
    assert not any(value in data.contents for value in bare)
    assert keyed_fingerprint(data.bare_contents, RecordKey(bytes(32))) != data.contents
    key = RecordKey.public()
    assert keyed_fingerprint("data:1 validation:2", key) == keyed_fingerprint("data:1 validation:2", key)
    assert keyed_fingerprint("data:1", key) != keyed_fingerprint("data:2", key)


def test_a_run_that_noted_bare_digests_goes_on(tmp_path: Path) -> None:
    made = config(tmp_path, "run")
    data = simulated_data.load(made, tmp_path)
    with Store.open(tmp_path / "run", made) as store:
        store.require_contents(data.bare_contents)  # as an earlier version did
        store.require_contents(data.contents, bare=data.bare_contents)
        with pytest.raises(StoreError, match="training rows have changed"):
            store.require_contents("data:1 validation:2", bare=data.bare_contents.replace("data:", "data:f"))


def test_rows_that_were_private_are_no_public_rows_of_another_kind(tmp_path: Path) -> None:
    """All rows paid for a promise; then sixty were taken out for public phases, or made a validation file."""
    ledger = str(tmp_path / "owner.sqlite")
    folder = tmp_path / "parts"
    folder.mkdir()
    lines = [json.dumps(row) + "\n" for row in ROWS]
    (folder / "train.jsonl").write_text("".join(lines[:200]))
    (folder / "validation.jsonl").write_text("".join(lines[200:]))
    first = config(tmp_path, ledger)
    first = replace(first, task=replace(first.task, data=str(folder), validation=""))
    train(first, tmp_path / "run")
    with Ledger.open(Path(ledger), create=False) as opened:
        opened.grant("record", 8.0, 1e-5, raise_because="a second run")
    prepared(first)  # the same parts again

    lifecycle = replace(
        first.federation.lifecycle, kind="pretrain", public_examples=60, local_steps=1, public_steps=1
    )
    phases = replace(first, federation=replace(first.federation, lifecycle=lifecycle))
    with pytest.raises(DataError, match=r"60 of the rows .* \(as rows of public phases\)"):
        prepared(phases)

    (folder / "train.jsonl").write_text("".join(lines[40:]))
    (folder / "validation.jsonl").write_text("".join(lines[:40]))
    with pytest.raises(DataError, match=r"40 of the rows .* \(as validation rows\)"):
        prepared(first)
    (folder / "train.jsonl").write_text("".join(lines[:200]))
    prepared(first)  # what is private in the same run is not published by it


def parted(
    tmp_path: Path, private: list[dict[str, Any]], public: list[dict[str, Any]], ledger: str
) -> RunConfig:
    """Write a training and a validation part."""
    folder = tmp_path / "parts"
    folder.mkdir(exist_ok=True)
    for part, rows in (("train", private), ("validation", public)):
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = config(tmp_path, ledger)
    return replace(made, task=replace(made.task, data=str(folder), validation=""))


def test_a_row_that_was_public_once_is_never_private(tmp_path: Path) -> None:
    """Forty rows were evaluated on without noise; the next run promised epsilon 2 for them."""
    ledger = str(tmp_path / "owner.sqlite")
    first = parted(tmp_path, ROWS[:160], ROWS[200:], ledger)
    simulation.build(prepared(first), tmp_path / "built")  # built, never begun: nothing is public yet
    prepared(parted(tmp_path, ROWS[160:], ROWS[:40], ledger))
    train(parted(tmp_path, ROWS[:160], ROWS[200:], ledger), tmp_path / "run")
    with Ledger.open(Path(ledger), create=False) as opened:
        before = opened.head()
        opened.grant("record", 8.0, 1e-5, raise_because="a second run")

    again = parted(tmp_path, ROWS[:160], ROWS[200:], ledger)
    train(again, tmp_path / "again")  # the same parts again: nothing to note
    with Ledger.open(Path(ledger), create=False) as opened:
        assert [e.records for e in opened.entries() if e.kind == "public"] == [40 * 2]  # note and summary
        opened.verify(before)

    others = [{name: f"another {text}" for name, text in row.items()} for row in ROWS[:40]]
    others = [{**other, "label": row["label"]} for other, row in zip(others, ROWS, strict=False)]
    swapped = parted(tmp_path, ROWS[160:], others, ledger)
    with pytest.raises(DataError, match="40 of the private rows were used as public ones by an earlier run"):
        prepared(swapped)
    summary = replace(swapped, task=replace(swapped.task, text_column="summary"))
    with pytest.raises(DataError, match="40 of the private rows"):
        prepared(summary)  # whichever column is read
    prepared(replace(swapped, privacy=replace(swapped.privacy, ledger="run")))  # said to be fictitious
    prepared(parted(tmp_path, ROWS[160:200], ROWS[200:], ledger))  # rows that never were public


def test_rows_of_public_phases_are_never_private(tmp_path: Path) -> None:
    ledger = str(tmp_path / "owner.sqlite")
    first = parted(tmp_path, ROWS[:200], ROWS[200:], ledger)
    lifecycle = replace(
        first.federation.lifecycle, kind="pretrain", public_examples=60, local_steps=1, public_steps=1
    )
    train(replace(first, federation=replace(first.federation, lifecycle=lifecycle)), tmp_path / "run")
    with Ledger.open(Path(ledger), create=False) as opened:
        opened.grant("record", 8.0, 1e-5, raise_because="a second run")
    with pytest.raises(DataError, match="60 of the private rows were used as public ones"):
        prepared(parted(tmp_path, ROWS[:200], ROWS[200:], ledger))
