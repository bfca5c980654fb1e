"""Run directories an older version wrote, from before every record had one codec:
they resume, are audited, report.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ffm_secure.api import Run
from ffm_secure.config import run_file
from ffm_secure.report.document import from_json
from ffm_secure.report.release import released
from ffm_secure.storage.run_directory import Store
from tests.federation.helpers import call

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "abb556a"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    copied = Path(shutil.copytree(FIXTURES, tmp_path / "runs"))
    for folder in (path for path in copied.rglob("*") if path.is_dir()):
        folder.chmod(0o755)  # whatever rights a checkout gave them
    return copied


def test_an_older_run_that_was_stopped_goes_on(runs: Path) -> None:
    before = Store.read(runs / "stopped").records()
    assert [record.round for record in before] == [1, 2]
    config = run_file.load(runs / "stopped" / "run.toml")
    summary = Run(config, base=runs, runs=runs).start().summary
    assert summary.status == "complete"
    assert summary.rounds[:2] == before
    assert before[1].epsilon_spent < summary.rounds[2].epsilon_spent <= config.privacy.epsilon
    assert summary.ledger_entries > 0


def test_an_older_run_that_finished_is_reported_anew(runs: Path) -> None:
    folder = runs / "finished"
    outcome = call("report", str(folder))
    assert outcome.returncode == 0, outcome.stderr
    assert (folder / "report.html").read_text().count("<h1") == 1
    older = from_json((FIXTURES / "finished" / "report.json").read_text())
    assert from_json((folder / "internal.json").read_text()) == older  # nothing of it is lost
    assert from_json((folder / "report.json").read_text()) == released(older)
    assert call("report", str(folder)).returncode == 0
    assert from_json((folder / "internal.json").read_text()) == older


def test_an_older_run_that_finished_is_audited(runs: Path) -> None:
    folder = runs / "finished"
    text = (folder / "run.toml").read_text()
    (folder / "run.toml").write_text(text.replace('attacks = ["all"]', 'attacks = ["label_identity"]'))
    outcome = call("audit", str(folder), "--budget", "quick", "--json")
    assert outcome.returncode == 0, outcome.stderr
    findings = json.loads(outcome.stdout)["findings"]
    assert {finding["attack"] for finding in findings} == {"label_identity"}
    assert json.loads((folder / "internal.json").read_text())["audit"]["findings"] == findings
    public = json.loads((folder / "report.json").read_text())["audit"]["findings"]
    assert [item["verdict"] for item in public] == [item["verdict"] for item in findings]


def test_the_ledger_of_an_older_run_is_verified(runs: Path) -> None:
    outcome = call("ledger", str(runs / "finished"))
    assert outcome.returncode == 0, outcome.stderr
