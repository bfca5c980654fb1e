"""A run as people live with it:
done twice, extended, started from another, and honest when nothing was learned.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from defenses.dp import Accountant, Ledger, RecordMechanism
from ffm_secure.config import run_file
from ffm_secure.engines import simulation
from ffm_secure.records import RoundRecord
from ffm_secure.server.rounds import is_best
from ffm_secure.storage.run_directory import Store
from ffm_secure.site.allowance import composed, within_run
from tests.federation.test_store import record
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
    (tmp_path / "runs" / "test" / "internal.json").write_text("{")
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


def rounds(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs" / "test" / "rounds.jsonl").read_text().splitlines()]


def test_a_finished_run_goes_on_when_asked_for_more_rounds(tmp_path: Path) -> None:
    assert start(tmp_path, federation={"rounds": 2, "cohort": 4}).returncode == 0
    first = rounds(tmp_path)
    outcome = start(tmp_path, "--set", "federation.rounds=4")
    assert outcome.returncode == 0, outcome.stderr
    assert rounds(tmp_path)[:2] == first
    assert len(rounds(tmp_path)) == 4
    assert "rounds = 4" in (tmp_path / "runs" / "test" / "run.toml").read_text()
    whole = tmp_path / "whole"
    whole.mkdir()
    assert start(whole, federation={"rounds": 4, "cohort": 4}).returncode == 0
    measured = [(item["loss"], item["metric"]) for item in rounds(whole)]
    assert [(item["loss"], item["metric"]) for item in rounds(tmp_path)] == measured, (
        "as if asked for at once"
    )


@pytest.mark.parametrize("unit", ["record", "client"])
def test_a_private_run_goes_on_within_its_budget_at_more_noise(unit: str, tmp_path: Path) -> None:
    """What is left of the budget pays for the rest; epsilon is that of both kinds of rounds together."""
    privacy = {**RECORD, "unit": unit, "ledger": "run"}
    first = start(
        tmp_path, "--json", federation={"rounds": 2, "cohort": 4}, privacy=privacy, protection=SECAGG
    )
    assert first.returncode == 0, first.stderr
    before = json.loads(first.stdout)
    assert "goes on after round 2: " in start_plan(tmp_path, "--set", "federation.rounds=3").stdout
    outcome = start(tmp_path, "--set", "federation.rounds=3", "--json")
    assert outcome.returncode == 0, outcome.stderr
    result = json.loads(outcome.stdout)
    assert result["rounds"] == 3
    assert before["epsilon"] < result["epsilon"] <= 8.0
    assert result["noise_multiplier"] > 2 * before["noise_multiplier"]
    with Ledger.open(tmp_path / "runs" / "test" / "ledger.sqlite", create=False) as ledger:
        entries = [entry for entry in ledger.entries() if entry.kind == "reserve"]
        owner = [entry for entry in entries if entry.owner == entries[0].owner]
        (run,) = {entry.run for entry in entries}
        charged = ledger.charged(owner[0].owner, run)
    assert sorted(count for _, count in charged) == [1, 2]
    accountant = Accountant()
    for entry in owner:
        accountant.compose(entry.event)
    assert accountant.epsilon(1e-5).epsilon == pytest.approx(result["epsilon"], rel=1e-3)


def test_a_run_that_went_on_is_held_to_all_it_was_charged_for() -> None:
    """Cheap rounds at the end do not make the dear ones before them cheap."""
    dear = RecordMechanism(
        noise_multiplier=0.4, sampling_rate=0.02, clip_norm=1.0, expected_batch_size=8.0, steps=2
    )
    cheap = replace(dear, noise_multiplier=50.0)
    events = [mechanism.event(release="update") for mechanism in (dear, cheap)]
    privacy = make(privacy={**RECORD, "epsilon": composed(((events[0], 2),), 1e-5) + 1e-9}).privacy
    assert not within_run(((events[0], 2),), events[0], privacy)
    assert not within_run(((events[0], 2), (events[1], 5)), events[0], privacy)
    assert not within_run(((events[0], 3),), events[1], privacy)
    assert within_run(((events[1], 5),), events[1], privacy)


def test_a_private_run_goes_on_with_a_larger_budget(tmp_path: Path) -> None:
    privacy = {**RECORD, "ledger": "run"}
    assert (
        start(tmp_path, federation={"rounds": 2, "cohort": 4}, privacy=privacy, protection=SECAGG).returncode
        == 0
    )
    more = ("--set", "federation.rounds=3", "--set", "privacy.epsilon=12.0")
    plan = start_plan(tmp_path, *more)
    assert "goes on after round 2: 7.9" in plan.stdout
    assert "left for the rest at noise" in plan.stdout
    outcome = start(tmp_path, *more, "--json")
    assert outcome.returncode == 0, outcome.stderr
    result = json.loads(outcome.stdout)
    assert 8.0 < result["epsilon"] <= 12.0
    assert result["epsilon"] > 11.9, "what was given is used"
    assert json.loads(start(tmp_path, *more, "--json").stdout)["already_complete"]
    assert "12.0 there, 8.0 asked" in start(tmp_path).stderr, "what was given is not taken back in silence"


def test_more_epsilon_without_more_rounds_is_another_run(tmp_path: Path) -> None:
    privacy = {**RECORD, "ledger": "run"}
    assert (
        start(tmp_path, federation={"rounds": 1, "cohort": 4}, privacy=privacy, protection=SECAGG).returncode
        == 0
    )
    outcome = start(tmp_path, "--set", "privacy.epsilon=12.0")
    assert outcome.returncode == 5
    assert "privacy.epsilon: 8.0 there, 12.0 asked" in outcome.stderr


def start_plan(folder: Path, *words: str) -> Done:
    return call("plan", "run.toml", *words, cwd=folder)


def test_the_best_round_is_kept_beside_the_last(tmp_path: Path) -> None:
    """A learning rate that overshoots: the best round comes before the last, and its model is there.

    Where rounds swing, the last places decide which is best, and they are the processor's: several rates.
    """
    for rate in (3.0, 10.0, 30.0):
        workplace = tmp_path / f"{rate:g}"
        workplace.mkdir()
        lifecycle = {"kind": "finetune", "local_steps": 2, "batch_size": 8, "learning_rate": rate}
        outcome = start(workplace, federation={"rounds": 6, "cohort": 4, "lifecycle": lifecycle})
        assert outcome.returncode == 0, outcome.stderr
        measured = [item["metric"] for item in rounds(workplace)]
        best = measured.index(max(measured)) + 1
        if best < 6:
            break
    assert best < 6, "or this test shows nothing"
    folder = workplace / "runs" / "test"
    assert f"best     accuracy {max(measured):.4f} after round {best}, kept in" in outcome.stdout
    kept, best_record = Store.read(folder).best() or pytest.fail("none is kept")
    assert best_record.round == best
    assert best_record.metric == max(measured)
    prepared = simulation.prepare(run_file.load(folder / "run.toml"), tmp_path)
    prepared.trainable.import_(folder / "best" / "adapter")
    assert torch.equal(prepared.trainable.flatten().cpu(), kept.vector)
    prepared.trainable.import_(folder / "adapter")
    assert not torch.equal(prepared.trainable.flatten().cpu(), kept.vector)


def test_what_is_best_is_told_by_the_public_metric_of_opened_rounds() -> None:
    def of(metric: float, aborted: str = "") -> RoundRecord:
        return record(1, metric=metric, aborted=aborted)

    assert is_best((), of(0.5), higher=True)
    assert is_best((of(0.4), of(0.9, "too few")), of(0.5), higher=True)
    assert not is_best((of(0.5),), of(0.5), higher=True), "the first of equals"
    assert not is_best((of(0.5),), of(0.9), higher=False)
    assert is_best((of(0.5), of(float("nan"))), of(0.4), higher=False)
    assert not is_best((), of(float("nan")), higher=True)
    assert not is_best((), of(0.5, "too few"), higher=True)
