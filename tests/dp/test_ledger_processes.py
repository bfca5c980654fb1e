"""Real processes on one ledger: killed at any instant, and two at once."""

from __future__ import annotations

import multiprocessing
import random
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from defenses.dp.ledger import Ledger
from tests.dp import ledger_worker

# Twelve rounds of the worker's event cost 0.6200 at delta 1e-5 and thirteen 0.6477 (one Gaussian, closed
# form).
AFFORDABLE = 12
BUDGET = 0.63


# Processes are forked from a server that has imported everything once: a new one starts in milliseconds.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.dp.ledger_worker"])


def _worker(path: Path, log: Path, name: str) -> ForkServerProcess:
    process = PROCESSES.Process(target=ledger_worker.main, args=(str(path), str(log), name))
    process.start()
    return process


def _finish(worker: ForkServerProcess) -> int | None:
    worker.join(timeout=300)
    return worker.exitcode


def _paid(log: Path) -> list[int]:
    lines = log.read_text().splitlines() if log.exists() else []
    return [int(line.split()[1]) for line in lines if line.startswith("paid") and len(line.split()) == 2]


def _wait_for(log: Path, lines: int, worker: ForkServerProcess) -> None:
    for _ in range(6000):
        if worker.exitcode is not None or (log.exists() and len(log.read_text().splitlines()) >= lines):
            return
        time.sleep(0.005)


def _check(path: Path, logs: list[Path]) -> int:
    with Ledger.open(path, create=False) as ledger:
        ledger.verify()
        reserved = [entry.sequence for entry in ledger.entries() if entry.kind == "reserve"]
        assert ledger.epsilon("o", "d", "record", 1e-5) <= BUDGET
    paid = [sequence for log in logs for sequence in _paid(log)]
    assert len(paid) == len(set(paid)), "two processes were given the same reservation"
    assert set(paid) <= set(reserved), "a reservation that was returned is not in the ledger"
    assert len(reserved) <= AFFORDABLE
    return len(reserved)


def _kill_once(folder: Path, chance: random.Random) -> None:
    path, logs = folder / "ledger.db", []
    Ledger.open(path).set_budget("o", "d", "record", BUDGET, 1e-5)
    for life in range(3):
        logs.append(folder / f"log {life}")
        worker = _worker(path, logs[-1], f"life {life}")
        _wait_for(logs[-1], chance.randint(1, 4), worker)
        time.sleep(chance.random() * 0.02)
        worker.kill()
        _finish(worker)
        _check(path, logs)
    logs.append(folder / "log last")
    assert _finish(_worker(path, logs[-1], "last")) == 0
    assert _check(path, logs) == AFFORDABLE


def _race_once(folder: Path) -> None:
    path, logs = folder / "ledger.db", [folder / "log a", folder / "log b"]
    Ledger.open(path).set_budget("o", "d", "record", BUDGET, 1e-5)
    workers = [_worker(path, log, log.name) for log in logs]
    assert [_finish(worker) for worker in workers] == [0, 0]
    assert _check(path, logs) == AFFORDABLE


def test_a_killed_process_never_undercounts(tmp_path: Path) -> None:
    _kill_once(tmp_path, random.Random(1))


def test_two_processes_never_overspend(tmp_path: Path) -> None:
    _race_once(tmp_path)


def test_two_processes_may_create_one_ledger(tmp_path: Path) -> None:
    path = str(tmp_path / "ledger.db")
    workers = [PROCESSES.Process(target=ledger_worker.create, args=(path,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert [_finish(worker) for worker in workers] == [0, 0]
    Ledger.open(tmp_path / "ledger.db", create=False).verify()


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("repetition", range(100))
def test_killed_and_raced_a_hundred_times(tmp_path: Path, repetition: int) -> None:
    for name in ("killed", "raced"):
        (tmp_path / name).mkdir()
    _kill_once(tmp_path / "killed", random.Random(repetition))
    _race_once(tmp_path / "raced")
