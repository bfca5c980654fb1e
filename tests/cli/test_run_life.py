"""A run as people live with it: done twice, extended, started from another, and honest when nothing was learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ffm_secure.config import run_file
from tests.federation.helpers import SECAGG, Done, call, make

RECORD = {"unit": "record", "epsilon": 8.0, "delta": 1e-5, "clip_norm": 1.0}


def start(folder: Path, *words: str, **sections: Any) -> Done:
    """Run a small file in a folder."""
    if sections or not (folder / "run.toml").is_file():
        (folder / "run.toml").write_text(run_file.dump(make(**sections)))
    return call("run", "run.toml", *words, cwd=folder)


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of a run with what it holds."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_says_so_and_does_nothing_again(tmp_path: Path) -> None:
    audit = {"observers": ["public"], "attacks": ["label_identity"], "budget": "quick"}
    first = start(
        tmp_path, federation={"rounds": 1, "cohort": 4}, privacy=RECORD, protection=SECAGG, audit=audit
    )
    assert first.returncode == 0, first.stderr
    assert "auditing" in first.stdout
    before = contents(tmp_path / "runs" / "test")
    again = start(tmp_path)
    assert again.returncode == 0, again.stderr
    assert "this run is complete: 1 rounds; nothing was trained or charged" in again.stdout
    assert "federation.rounds=N" in again.stdout
    assert "auditing" not in again.stdout
    assert contents(tmp_path / "runs" / "test") == before
    machine = json.loads(start(tmp_path, "--json").stdout)
    assert machine["already_complete"]
    assert machine["audit"] is not None


def test_a_finished_run_that_lost_its_model_writes_it_again(tmp_path: Path) -> None:
    assert start(tmp_path, federation={"rounds": 1, "cohort": 4}).returncode == 0
    before = contents(tmp_path / "runs" / "test" / "adapter")
    for path in (tmp_path / "runs" / "test" / "adapter").rglob("*"):
        if path.is_file():
            path.unlink()
    (tmp_path / "runs" / "test" / "report.json").write_text("{")
    assert start(tmp_path).returncode == 0
    assert contents(tmp_path / "runs" / "test" / "adapter").keys() == before.keys()


def test_that_nothing_was_learned_is_said_in_the_terminal(tmp_path: Path) -> None:
    lifecycle = {"kind": "finetune", "local_steps": 1, "batch_size": 8, "learning_rate": 1e-9}
    outcome = start(tmp_path, federation={"rounds": 1, "cohort": 4, "lifecycle": lifecycle})
    assert outcome.returncode == 0, outcome.stderr
    assert "No gain: the final accuracy is no better than before training." in outcome.stdout
    assert json.loads(start(tmp_path, "--json").stdout)["warnings"]


def test_a_run_whose_every_round_was_aborted_is_no_success(tmp_path: Path) -> None:
    dropout = {"rate": 0.99, "stages": ["advertise"]}
    federation = {"rounds": 2, "cohort": 4, "dropout": dropout}
    outcome = start(tmp_path, federation=federation, protection={"kind": "secagg", "threshold": 4})
    assert outcome.returncode == 1
    assert "every round was aborted, so nothing was learned" in outcome.stderr
    assert "Nothing was learned: all 2 rounds were aborted" in outcome.stdout
    assert start(tmp_path).returncode == 1, "and asking again changes nothing"


@pytest.mark.parametrize("flag", ["--json", "--quiet"])
def test_a_run_that_was_aborted_fails_for_machines_too(flag: str, tmp_path: Path) -> None:
    dropout = {"rate": 0.99, "stages": ["advertise"]}
    federation = {"rounds": 1, "cohort": 4, "dropout": dropout}
    outcome = start(tmp_path, flag, federation=federation, protection={"kind": "secagg", "threshold": 4})
    assert outcome.returncode == 1
