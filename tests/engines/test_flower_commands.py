"""The commands of the runbook with `--engine flower`: four services and a coordinator, each a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")

from tests.engines import nvflare_federation
from tests.engines.nvflare_federation import NAMES
from tests.parties.helpers import SEEDED, found, notes_run
from tests.engines.test_nvflare_runs import PATIENT

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def started(*words: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "ffm_secure", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT) as process:
        try:
            yield process
        finally:
            process.terminate()


@pytest.mark.slow
def test_a_run_by_the_commands(tmp_path: Path) -> None:
    config = notes_run(privacy=SEEDED, protection={"kind": "secagg", "threshold": 3, "colluding": 0})
    federation = found(tmp_path, config, policy={"colluders": 0}, timetable=PATIENT)
    nvflare_federation.enrol(tmp_path, NAMES)
    with ExitStack() as stack:
        for name in NAMES:
            site = stack.enter_context(started("site", "start", federation.site(name), "--engine", "flower"))
            assert site.stdout is not None
            assert f"{name} is served" in site.stdout.readline()
        words = (tmp_path / "coordinator", federation.run_file, "--engine", "flower", "--json")
        coordinator = stack.enter_context(started("coordinator", "start", *words))
        printed, _ = coordinator.communicate(timeout=500)
        assert coordinator.returncode == 0
    ended = json.loads(printed.strip().splitlines()[-1])
    assert (ended["status"], ended["rounds"]) == ("complete", 2)
    assert (Path(ended["folder"]) / "report.html").is_file()
    assert (tmp_path / "north" / "flower" / "node.pem").stat().st_mode & 0o077 == 0
