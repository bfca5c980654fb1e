"""Real processes on one ledger: killed at any instant, and two at once."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from defenses.dp.ledger import Ledger

ROOT = Path(__file__).resolve().parents[2]
# Twelve rounds of the worker's event cost 0.6200 at delta 1e-5 and thirteen 0.6477 (one Gaussian, closed form).
AFFORDABLE = 12
BUDGET = 0.63


def _worker(path: Path, log: Path, name: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.dp.ledger_worker", str(path), str(log), name]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)


def _paid(log: Path) -> list[int]:
    lines = log.read_text().splitlines() if log.exists() else []
    return [int(line.split()[1]) for line in lines if line.startswith("paid") and len(line.split()) == 2]


def _wait_for(log: Path, lines: int, worker: subprocess.Popen[bytes]) -> None:
    for _ in range(6000):
        if worker.poll() is not None or (log.exists() and len(log.read_text().splitlines()) >= lines):
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
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        _check(path, logs)
    logs.append(folder / "log last")
    assert _worker(path, logs[-1], "last").wait(timeout=120) == 0
    assert _check(path, logs) == AFFORDABLE


def _race_once(folder: Path) -> None:
    path, logs = folder / "ledger.db", [folder / "log a", folder / "log b"]
    Ledger.open(path).set_budget("o", "d", "record", BUDGET, 1e-5)
    workers = [_worker(path, log, log.name) for log in logs]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    assert _check(path, logs) == AFFORDABLE


def test_a_killed_process_never_undercounts(tmp_path: Path) -> None:
    _kill_once(tmp_path, random.Random(1))


def test_two_processes_never_overspend(tmp_path: Path) -> None:
    _race_once(tmp_path)


def test_two_processes_may_create_one_ledger(tmp_path: Path) -> None:
    command = "import sys; from defenses.dp.ledger import Ledger; Ledger.open(sys.argv[1]).set_budget('o','d','record',1.0,1e-5)"
    workers = [
        subprocess.Popen([sys.executable, "-c", command, str(tmp_path / "ledger.db")], cwd=ROOT) for _ in range(2)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    Ledger.open(tmp_path / "ledger.db", create=False).verify()


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("repetition", range(100))
def test_killed_and_raced_a_hundred_times(tmp_path: Path, repetition: int) -> None:
    for name in ("killed", "raced"):
        (tmp_path / name).mkdir()
    _kill_once(tmp_path / "killed", random.Random(repetition))
    _race_once(tmp_path / "raced")
