"""`kill -9` at any moment, then the same command again:
the same tensors, and a ledger that never shows less than was released.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from defenses.dp import Ledger
from ffm_secure.config import run_file as config
from ffm_secure.config.run_file import RunConfig
from ffm_secure.engines import simulation
from ffm_secure.engines.simulation import Simulation
from ffm_secure.records import RoundRecord
from ffm_secure.storage.run_directory import Store
from tests.federation.helpers import (
    RECORD,
    SECAGG,
    charge_everybody,
    finish,
    first_plan,
    make,
    prepared,
    train,
)

ROOT = Path(__file__).resolve().parents[2]
NOTES = {
    "data": "builtin:clinic_notes?size=240&validation=40",
    "clients": 4,
    "max_length": 16,
    "evaluation_examples": 40,
}
STEPS = {"local_steps": 2, "batch_size": 8, "learning_rate": 0.1}
SWITCHED = {
    "kind": "pretrain",
    **STEPS,
    "public_examples": 60,
    "controller": {"kind": "plateau", "patience": 1, "margin": 0.01},
}
STAGES: dict[str, dict[str, Any]] = {
    "finetune": {"trainable": {"kind": "lora", "rank": 2}},
    "pretrain": {"trainable": {"kind": "lora", "rank": 2}, "task": "masked_lm", "lifecycle": SWITCHED},
    "prompt generator": {"trainable": {"kind": "prompt_generator", "length": 3, "hidden": 4}},
    "folding": {"trainable": {"kind": "lora", "ranks": [1, 2]}, "strategy": {"kind": "flora"}},
    "distillation": {
        "trainable": {"kind": "head"},
        "lifecycle": {"kind": "distillation", **STEPS, "public_examples": 40},
        "distillation": {
            "steps": 2,
            "learning_rate": 0.01,
            "back_steps": 1,
            "models": [
                {"name": "builtin:tiny-bert", "trainable": {"kind": "head"}},
                {"name": "builtin:tiny-gpt2", "trainable": {"kind": "lora", "rank": 2}},
            ],
        },
    },
    "kept at home": {"trainable": {"kind": "lora", "rank": 2}, "strategy": {"kind": "fedsa"}},
    "fewer bytes": {
        "trainable": {"kind": "lora", "rank": 2},
        "compression": {"kind": "support", "share": 0.25, "residual": True, "field_bits": 16},
    },
}


def stage(name: str, *, noise: str = "seeded") -> RunConfig:
    """Return a run of six rounds of one stage of a foundation model's life, under noise and masks."""
    chosen = STAGES[name]
    return make(
        task={**NOTES, "kind": chosen.get("task", "text_classification")},
        model={"name": "builtin:tiny-bert", "trainable": chosen["trainable"]},
        federation={
            "rounds": 6,
            "cohort": 4,
            "lifecycle": chosen.get("lifecycle", {"kind": "finetune", **STEPS}),
            "strategy": chosen.get("strategy", {"kind": "average"}),
        },
        # A kill between the payments of two owners leaves rows that share a cell (a patient, say) with
        # unequal histories; the next start lets both inherit the larger, and the spare rounds of the
        # calibration pay for that.
        privacy={**RECORD, "noise": noise, "spare_rounds": 4},
        protection=SECAGG,
        compression=chosen.get("compression", {"kind": "none"}),
        distillation=chosen.get("distillation", {}),
    )


def killed(made: RunConfig, folder: Path, *, kills: int, seed: int, span: float) -> int:
    """Kill the run of a folder at random moments, then let it finish;
    return how many kills hit it running.
    """
    file = folder.with_suffix(".toml")
    file.write_text(config.dump(made))
    words = [sys.executable, "-m", "tests.federation.killing", file, folder, kills, seed, span]
    done = subprocess.run(
        [str(word) for word in words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=2000,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


def check_ledger(built: Simulation, folder: Path, records: tuple[RoundRecord, ...]) -> None:
    """Every opened round is charged to everyone in its cohort, and nobody is above the budget."""
    ledger = Ledger.open(folder / "ledger.sqlite", create=False)
    ledger.verify()
    privacy, held = built.config.privacy, ledger.blocks_for(built.prepared.data.names())
    for index, owner in enumerate(built.prepared.owners):
        entries = ledger.entries(owner=owner)
        charged = [entry.event for entry in entries if entry.kind == "reserve"]
        worst = len(ledger.events_of(held[index], "record", privacy.delta))
        assert len(charged) <= worst <= len(charged) + privacy.spare_rounds
        assert len(charged) >= sum(index in record.cohort for record in records), "the ledger undercounts"
        assert set(charged) <= {built.event}
        assert ledger.epsilon_of(held[index], "record", privacy.delta) <= privacy.epsilon


def check(name: str, tmp_path: Path, *, kills: int, seed: int) -> int:
    made = stage(name)
    built, whole = train(made, tmp_path / "whole")
    span = sum(record.seconds for record in whole.records) / max(1, kills) * 2
    hits = killed(made, tmp_path / "killed", kills=kills, seed=seed, span=span)
    with Store.open(tmp_path / "killed", made) as store:
        resumed = store.resume()
    assert resumed is not None
    state, records, _ = resumed
    what_happened = [(record.round, record.aborted, dict(record.dropped)) for record in records]
    assert torch.equal(state.vector, whole.state.vector), what_happened
    assert {key: value.tolist() for key, value in state.optimizer_state.items()} == {
        key: value.tolist() for key, value in whole.state.optimizer_state.items()
    }
    assert [(r.round, r.phase, r.cohort, r.loss, r.alignment) for r in records] == [
        (r.round, r.phase, r.cohort, r.loss, r.alignment) for r in whole.records
    ]
    if name == "pretrain":
        assert {record.phase for record in records} == {"public", "private"}
    again = simulation.build(prepared(made), tmp_path / "killed")
    with Store.open(tmp_path / "killed", made) as store:
        again.begin(store)
    for index in range(len(again.sites)):
        mine, theirs = (one.own_vector(index, state.vector, before=7) for one in (again, built))
        assert torch.equal(mine, theirs), "a client has another model"
    check_ledger(again, tmp_path / "killed", records)
    return hits


@pytest.mark.parametrize("name", ["finetune", pytest.param("pretrain", marks=pytest.mark.slow)])
def test_kill_and_resume(name: str, tmp_path: Path) -> None:
    assert check(name, tmp_path, kills=4, seed=5) >= 1


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", sorted(STAGES))
def test_kill_twenty_times(name: str, tmp_path: Path) -> None:
    assert check(name, tmp_path, kills=20, seed=11) >= 10


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", ["finetune", "pretrain"])
def test_with_real_noise_kills_are_charged_and_the_budget_holds(name: str, tmp_path: Path) -> None:
    """Nothing can be replayed: every round lost to a kill stays spent,
    and the run ends where the budget does.
    """
    made = stage(name, noise="system")
    assert killed(made, tmp_path / "killed", kills=4, seed=3, span=0.5) >= 1
    with Store.open(tmp_path / "killed", made) as store:
        resumed = store.resume()
    records = resumed[1] if resumed is not None else ()
    check_ledger(simulation.build(prepared(made), tmp_path / "killed"), tmp_path / "killed", records)


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    made = make(privacy=RECORD)
    first, done = train(made, tmp_path)
    entries = first.ledger.head().sequence
    second, again = train(made, tmp_path)
    assert torch.equal(done.state.vector, again.state.vector)
    assert second.ledger.head().sequence == entries


def test_without_a_seed_a_crash_is_charged_and_the_budget_holds(tmp_path: Path) -> None:
    """Real noise cannot be replayed:
    a round lost to a crash stays spent, and the run ends where the budget does.
    """
    made = make(privacy={**RECORD, "noise": "system"})
    built, trained = train(made, tmp_path / "a")
    assert trained.status == "complete"
    crashed = simulation.build(prepared(made), tmp_path / "b")
    charge_everybody(crashed)  # the process dies right after
    ended = finish(simulation.build(prepared(made), tmp_path / "b"), tmp_path / "b")
    assert ended.status == "budget exhausted"
    assert len(ended.records) == 2
    assert built.epsilon() <= made.privacy.epsilon


def test_a_kill_between_two_payments_costs_related_rows_one_round_and_no_more(tmp_path: Path) -> None:
    """Owners pay one after another:
    what was paid is replayed, and a related row inherits one round at most.
    """
    made = stage("finetune")
    stopped = simulation.build(prepared(made), tmp_path)
    for site in stopped.sites[:2]:
        site.ledger.reserve(first_plan(stopped))
    again = simulation.build(prepared(made), tmp_path)
    worst = []
    for site in again.sites:
        site.ledger.reserve(first_plan(again))
        entries = again.ledger.entries(owner=site.data.name)
        assert sum(entry.kind == "reserve" for entry in entries) == 1, "a replayed round was charged again"
        worst.append(len(again.ledger.events_of(site.ledger.blocks, "record", made.privacy.delta)))
    assert worst[:2] == [1, 1]
    assert max(worst[2:]) == 2
