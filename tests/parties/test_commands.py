"""The runbook of docs/deploy.md, command by command, and what each command says to a mistake."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ffm_secure.config import run_file
from ffm_secure.engines import simulated_data
from ffm_secure.site.folder import SiteFolder
from tests.federation.helpers import Done, call
from tests.parties.helpers import NAMES, RECORD, notes_run, rows_to_csv

KEY = "ed25519:" + "11" * 31 + "12"


def said(*words: object) -> str:
    """Run a command that must succeed, and return what it printed."""
    done = call(*map(str, words))
    assert done.returncode == 0, done.stderr
    return done.stdout


def key_in(printed: str) -> str:
    return next(word for word in printed.split() if word.startswith("ed25519:"))


def founded(place: Path, run: Path) -> None:
    """Let the operator, the coordinator and four sites do what the runbook says, up to the roster."""
    operator, coordinator = place / "operator", place / "coordinator"
    trusted = key_in(said("operator", "init", operator, "--federation", "clinics"))
    own = key_in(said("coordinator", "init", coordinator, "--operator", trusted, "--port", 8123))
    said("operator", "roster", "add", operator, "coordinator", own)
    for name in NAMES:
        settings = ("--name", name, "--data", place / f"{name}.csv", "--epsilon", 8)
        printed = said("site", "init", place / name, "--operator", trusted, *settings)
        said("operator", "roster", "add", operator, name, key_in(printed))
    said("operator", "roster", "sign", operator, "--days", 30)
    for name in ("coordinator", *NAMES):
        shutil.copy(operator / "roster.json", place / name / "roster.json")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("people")
    config = notes_run(privacy=RECORD, protection={"kind": "secagg", "threshold": 3})
    (folder / "run.toml").write_text(run_file.dump(config))
    data = simulated_data.load(config, Path.cwd())
    for index, name in enumerate(NAMES):
        rows_to_csv(folder / f"{name}.csv", data.rows(index))
    founded(folder, folder / "run.toml")
    return folder


def test_all_three_people_follow_the_runbook(place: Path) -> None:
    operator = place / "operator"
    for name in ("coordinator", "north"):
        said("operator", "approve", operator, place / name / "tls-request.json")
        whose = "coordinator" if name == "coordinator" else "site"
        assert "8123" in said(whose, "enrol", place / name, operator / f"approval-{name}.json")
    allowed = said("site", "allow", place / "north", place / "run.toml")
    assert "sums of at least 3 sites, by secagg" in allowed
    assert "epsilon 8 at delta 1e-05 per record, clip 1" in allowed
    checked = said("site", "check", place / "north")
    assert "nothing was charged" in checked
    assert "rows" in checked
    status = said("site", "status", place / "north")
    for words in ("not served", "roster 1: north, south, east, west", "0 spent of 8", "north ed25519:"):
        assert words in status
    assert json.loads(said("site", "status", place / "north", "--json"))["served"] is False
    assert "no run is under way" in said("coordinator", "status", place / "coordinator")
    held = {path.name for path in operator.iterdir()}
    assert held >= {"operator.key", "members.json", "roster.json"}
    assert not any("csv" in name or "toml" in name for name in held), "the operator has a part in a run"


def refused(*words: object) -> str:
    done: Done = call(*map(str, words))
    assert done.returncode not in (0, 1), (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_site_is_told_all_mistakes_of_its_making_at_once(tmp_path: Path) -> None:
    settings = ("--name", "no/rth", "--data", "x.csv", "--operator", "ed25519:zz", "--epsilon", 0)
    problems = refused("site", "init", tmp_path / "north", *settings)
    for words in ("3 problems", "--name = 'no/rth'", "ask the operator for its key", "--epsilon = 0"):
        assert words in problems
    assert not (tmp_path / "north").exists()


def test_a_roster_needs_names_and_keys(tmp_path: Path) -> None:
    said("operator", "init", tmp_path / "operator", "--federation", "clinics")
    problems = refused("operator", "roster", "add", tmp_path / "operator", "a b", "12")
    assert "2 problems" in problems
    assert "no coordinator" in refused("operator", "roster", "sign", tmp_path / "operator")
    said("operator", "roster", "add", tmp_path / "operator", "coordinator", KEY)
    assert "no site stands in it" in refused("operator", "roster", "sign", tmp_path / "operator")
    assert "is not on the list" in refused("operator", "roster", "revoke", tmp_path / "operator", "x")
    assert "an operator is made once" in refused(
        "operator", "init", tmp_path / "operator", "--federation", "clinics"
    )


def test_what_a_policy_does_not_admit_is_not_allowed(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "south", tmp_path / "south")
    file = tmp_path / "south" / "site.toml"
    file.write_text(file.read_text().replace("largest_epsilon = 8.0", "largest_epsilon = 2.0"))
    problems = refused("site", "allow", tmp_path / "south", place / "run.toml")
    assert "privacy.epsilon = 8: policy.largest_epsilon = 2" in problems
    assert not SiteFolder(place=tmp_path / "south").allowed()


def test_a_check_names_what_is_missing(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "east", tmp_path / "east")
    (tmp_path / "east" / "roster.json").unlink()
    assert "ask the operator for the roster" in refused("site", "check", tmp_path / "east")
    assert "make a site with" in refused("site", "check", tmp_path / "nowhere")


def test_nobody_starts_without_a_certificate_or_an_engine(place: Path) -> None:
    assert "has no certificate yet" in refused("site", "start", place / "west")
    assert "must be one of nvflare" in refused("site", "start", place / "west", "--engine", "pigeons")
    problems = refused("coordinator", "start", place / "coordinator", place / "run.toml", "--engine", "x")
    assert "must be one of nvflare" in problems


def test_a_revoked_site_gets_a_roster_without_it(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "operator", tmp_path / "operator")
    said("operator", "roster", "revoke", tmp_path / "operator", "east")
    printed = said("operator", "roster", "sign", tmp_path / "operator")
    assert "roster 2 of clinics" in printed
    assert "north, south, west" in printed
