"""`kill -9` at any moment, then the same command again: the same tensors, and a ledger that never shows less than was released."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ffm_secure import config
from ffm_secure.store import Store
from tests.federation.helpers import RECORD, SECAGG, make, train

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from ffm_secure import config, setup
from ffm_secure.federation import run
from ffm_secure.store import Store
made = config.load(Path(sys.argv[1]))
prepared = setup.prepare(made, Path.cwd())
built = setup.build(prepared, Path(sys.argv[2]))
with Store.open(Path(sys.argv[2]), made) as store:
    print("ready", flush=True)
    run(built, store)
print("finished", flush=True)
"""


def start(file: Path, folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(file), str(folder)],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def kill_and_resume(folder: Path, file: Path, *, kills: int, chance: random.Random, span: float) -> int:
    """Kill a run at random moments until it survived `kills` of them; return how many kills hit a running loop."""
    hits = 0
    for _ in range(kills):
        process = start(file, folder)
        assert process.stdout is not None
        if process.stdout.readline().strip() == "ready":
            time.sleep(chance.uniform(0.0, span))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            hits += 1
        process.communicate()
    process = start(file, folder)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "finished" in out
    return hits


def check(tmp_path: Path, *, kills: int, seed: int) -> int:
    made = make(privacy=RECORD, protection=SECAGG, federation={"rounds": 6, "cohort": 4})
    file = tmp_path / "run.toml"
    file.write_text(config.dump(made))
    built, whole = train(made, tmp_path / "whole")
    began = time.perf_counter()
    train(made, tmp_path / "timed")
    span = time.perf_counter() - began
    hits = kill_and_resume(
        tmp_path / "killed", file, kills=kills, chance=random.Random(seed), span=span / max(1, kills) * 2
    )
    with Store.open(tmp_path / "killed", made) as store:
        resumed = store.resume()
    assert resumed is not None
    assert torch.equal(resumed[0].vector, whole.state.vector)
    assert [record.round for record in resumed[1]] == list(range(1, 7))
    from defenses.dp import Ledger

    ledger = Ledger.open(tmp_path / "killed" / "ledger.sqlite", create=False)
    ledger.verify()
    for owner in built.prepared.owners:
        charged = ledger.events(owner, built.prepared.account, "record")
        released = built.charges.ledger.events(owner, built.prepared.account, "record")
        assert len(charged) >= len(released) == 6, "the ledger undercounts"
        assert set(charged) == set(released)
        assert ledger.epsilon(owner, built.prepared.account, "record", 1e-5) <= made.privacy.epsilon
    return hits


def test_kill_and_resume(tmp_path: Path) -> None:
    assert check(tmp_path, kills=3, seed=5) >= 1


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_kill_twenty_times(tmp_path: Path) -> None:
    assert check(tmp_path, kills=20, seed=11) >= 15


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    made = make(privacy=RECORD)
    first, done = train(made, tmp_path)
    entries = first.charges.ledger.head().sequence
    second, again = train(made, tmp_path)
    assert torch.equal(done.state.vector, again.state.vector)
    assert second.charges.ledger.head().sequence == entries


def test_without_a_seed_a_crash_is_charged_and_the_budget_holds(tmp_path: Path) -> None:
    """Real noise cannot be replayed: a round lost to a crash stays spent, and the run ends where the budget does."""
    made = make(privacy={**RECORD, "noise": "system"})
    built, trained = train(made, tmp_path / "a")
    assert trained.status == "complete"
    from ffm_secure import setup
    from ffm_secure.federation import run
    from tests.federation.helpers import prepared

    crashed = setup.build(prepared(made), tmp_path / "b")
    crashed.charges.reserve(_plan(crashed))  # the process dies right after
    with Store.open(tmp_path / "b", made) as store:
        ended = run(setup.build(prepared(made), tmp_path / "b"), store)
    assert ended.status == "budget exhausted"
    assert len(ended.records) == 2
    assert built.charges.epsilon() <= made.privacy.epsilon


def _plan(built: object) -> object:
    from ffm_secure import server
    from ffm_secure.strategies import ServerState

    state = ServerState(round=0, vector=built.trainable.flatten())  # type: ignore[attr-defined]
    return server.plan_round(built, 1, state)  # type: ignore[arg-type]
