"""The commands as a user meets them: output for people and machines, exit codes, wrong input."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from ffm_secure.cli.doctor import examine
from ffm_secure.config import run_file as config
from tests.federation.helpers import call, make


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run file and the finished run it gives."""
    folder = tmp_path_factory.mktemp("cli")
    made = make(
        privacy={"ledger": "run", "unit": "record", "epsilon": 8.0, "delta": 1e-5, "clip_norm": 1.0},
        protection={"kind": "secagg", "threshold": 3},
        federation={"rounds": 2, "cohort": 4},
    )
    (folder / "run.toml").write_text(config.dump(made))
    done = call("run", "run.toml", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "result.json").write_text(done.stdout)
    return folder


def test_run_prints_one_json_object(place: Path) -> None:
    result = json.loads((place / "result.json").read_text())
    assert result["status"] == "complete"
    assert 0 < result["epsilon"] <= 8.0
    assert result["rounds"] == 2
    assert result["bytes_up"] > 0
    for name in ("run.toml", "rounds.jsonl", "report.html", "report.json", "ledger.sqlite", "adapter"):
        assert (place / "runs" / "test" / name).exists(), name


def test_plan_says_the_four_things_and_trains_nothing(place: Path) -> None:
    done = call("plan", "run.toml", "--set", "name=other", cwd=place)
    assert done.returncode == 0
    for word in ("trains", "sends", "spends", "sees", "breaks", "colluding_server", "noise"):
        assert word in done.stdout
    assert not (place / "runs" / "other").exists()
    described = json.loads(call("plan", "run.toml", "--json", cwd=place).stdout)
    assert described["trainable_parameters"] > 0
    assert len(described["statements"]) == 4
    for statement in described["statements"]:
        assert {"unit", "adjacency", "observer", "mechanism", "delta", "accountant", "slack"} <= set(
            statement
        )


def test_a_second_call_resumes_and_changes_nothing(place: Path) -> None:
    ledger = call("ledger", "runs/test", "--json", cwd=place).stdout
    again = call("run", "run.toml", "--json", cwd=place)
    assert again.returncode == 0
    before = json.loads((place / "result.json").read_text())
    assert json.loads(again.stdout)["epsilon"] == pytest.approx(before["epsilon"], rel=1e-3)
    assert (
        json.loads(call("ledger", "runs/test", "--json", cwd=place).stdout)["entries"]
        == json.loads(ledger)["entries"]
    )


def test_ledger_shows_verifies_and_exports(place: Path) -> None:
    shown = call("ledger", "runs/test", cwd=place)
    assert shown.returncode == 0
    assert "verified" in shown.stdout
    assert "client-4" in shown.stdout
    rows = list(csv.reader(io.StringIO(call("ledger", "runs/test", "--export", "csv", cwd=place).stdout)))
    assert len(rows) > 8
    assert json.loads(call("ledger", "runs/test", "--export", "json", cwd=place).stdout)
    assert call("ledger", "runs/test", "--owner", "nobody", cwd=place).returncode == 5


def test_a_tampered_ledger_is_refused(place: Path, tmp_path: Path) -> None:
    content = bytearray((place / "runs" / "test" / "ledger.sqlite").read_bytes())
    at = content.rindex(b"client-2")
    content[at + 7] ^= 1
    (tmp_path / "ledger.sqlite").write_bytes(bytes(content))
    (tmp_path / "ledger.sqlite.head").write_bytes(
        (place / "runs" / "test" / "ledger.sqlite.head").read_bytes()
    )
    done = call("ledger", str(tmp_path / "ledger.sqlite"))
    assert done.returncode == 5
    assert "not authentic" in done.stderr


def test_report_is_written_anew(place: Path) -> None:
    page = place / "runs" / "test" / "report.html"
    old = page.read_bytes()
    page.unlink()
    assert call("report", "runs/test", cwd=place).returncode == 0
    assert page.read_bytes() == old


def test_audit_writes_verdicts_into_the_report(place: Path) -> None:
    done = call("audit", "runs/test", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["findings"]
    assert {item["verdict"] for item in found["findings"]} <= {
        "leaked",
        "not leaked",
        "inconclusive",
        "not applicable",
    }
    assert 0 <= found["epsilon_lower"] <= 8.0
    assert json.loads((place / "runs" / "test" / "report.json").read_text())["audit"]["findings"]


def test_doctor_finds_the_essentials() -> None:
    found = examine()
    names = {check["name"] for check in found["checks"]}
    assert {"python", "random source", "accelerator", "SQLite", "TenSEAL"} <= names
    assert found["ok"]


def test_epsilon_and_sigma_are_inverse() -> None:
    sigma = json.loads(call("sigma", "--epsilon", "3", "--q", "0.01", "--steps", "500", "--json").stdout)
    value = next(value for name, value in sigma.items() if "noise" in name or "sigma" in name)
    epsilon = json.loads(
        call("epsilon", "--q", "0.01", "--sigma", str(value), "--steps", "500", "--json").stdout
    )
    assert 2.98 < epsilon["epsilon"] <= 3.0 + 1e-9


def test_epsilon_matches_the_published_reference() -> None:
    found = json.loads(
        call(
            "epsilon", "--q", "0.01", "--sigma", "1.0", "--steps", "1000", "--delta", "1e-5", "--json"
        ).stdout
    )
    assert found["epsilon"] == pytest.approx(1.828, abs=2e-3)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("run", "nowhere.toml"), 2, "nowhere.toml"),
        (("plan", "run.toml", "--set", "privacy.epsilom=3"), 2, "did you mean 'epsilon'?"),
        (("plan", "run.toml", "--set", "federation.weighting=examples"), 3, "public constant"),
        (("plan", "run.toml", "--set", "task.data=no/such/folder"), 2, "no/such/folder"),
        (("plan", "run.toml", "--set", "model.name=no/such/model/at/all"), 2, "no/such/model"),
        (("run", "run.toml", "--set", "federation.cohort=3"), 5, "other settings"),
        (("plan", "run.toml", "--set", "privacy.epsilon=0.5"), 5, "other settings (privacy.epsilon"),
        (("report", "nowhere"), 5, "not a run directory"),
        (("audit",), 2, "exactly one"),
        (("audit", "runs/test", "--budget", "huge"), 2, "--budget"),
        (("ledger", "nowhere.sqlite"), 5, "not a ledger"),
        (("epsilon", "--q", "0.1"), 2, "--sigma: missing"),
        (("epsilon", "--segment", "1,2"), 2, "sampling rate, noise multiplier, steps"),
        (("epsilon", "--q", "2", "--sigma", "-1", "--steps", "0"), 2, "3 problems"),
    ],
)
def test_wrong_input_is_one_clear_error(words: tuple[str, ...], code: int, message: str, place: Path) -> None:
    done = call(*words, cwd=place)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert words[0] == "run" or done.stdout == ""


def test_the_installed_command_runs_in_a_process_of_its_own() -> None:
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("ffm-secure")),
            "epsilon",
            "--q",
            "0.01",
            "--sigma",
            "1.0",
            "--steps",
            "10",
        ],
        text=True,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "epsilon" in done.stdout
