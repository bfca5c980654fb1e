"""The runbook of docs/deploy.md, command by command, and what each command says to a mistake."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from ffm_secure.cli import coordinator_commands, operator_commands, site_commands
from ffm_secure.config import run_file
from ffm_secure.engines import simulated_data
from ffm_secure.engines.coordinator_folder import Headquarters
from ffm_secure.errors import FfmError
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
    assert "epsilon 8 at delta 1e-5 per record, clip 1" in allowed
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


def test_a_coordinator_that_was_not_made_can_be_made(tmp_path: Path) -> None:
    settings = ("--operator", "ed25519:zz", "--host", "two words", "--port", 70_000)
    problems = refused("coordinator", "init", tmp_path / "coordinator", *settings)
    for words in ("3 problems", "--operator = 'ed25519:zz'", "--host = 'two words'", "--port = 70000"):
        assert words in problems
    assert not (tmp_path / "coordinator").exists()


def test_without_the_engine_nothing_is_half_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str = "nvflare") -> None:
        raise FfmError("the engine nvflare needs cryptography")

    for commands in (operator_commands, coordinator_commands, site_commands):
        monkeypatch.setattr(commands, "enrolment", missing)
    settings = ("--name", "north", "--data", "x.csv", "--operator", KEY, "--epsilon", 4)
    assert "the engine nvflare needs" in call("site", "init", str(tmp_path / "a"), *map(str, settings)).stderr
    assert (
        "the engine nvflare needs"
        in call("operator", "init", str(tmp_path / "b"), "--federation", "c").stderr
    )
    assert (
        "the engine nvflare needs"
        in call("coordinator", "init", str(tmp_path / "d"), "--operator", KEY).stderr
    )
    assert list(tmp_path.iterdir()) == []


def test_rows_are_looked_for_where_the_command_is_run(tmp_path: Path) -> None:
    (tmp_path / "notes.csv").write_text("text,label\n")
    common = ("--operator", KEY, "--epsilon", "4")
    words = ("--name", "north", "--data", "notes.csv", "--public", "later.csv")
    ended = call("site", "init", "north", *words, *common, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "public: there is no later.csv yet" in ended.stdout
    assert SiteFolder(place=tmp_path / "north").read().data == str(tmp_path / "notes.csv")


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


def test_a_site_and_a_coordinator_get_new_keys(place: Path, tmp_path: Path) -> None:
    """The roster that follows holds both; everybody else's place on it is what it was."""
    for name in ("operator", "coordinator", "north"):
        shutil.copytree(place / name, tmp_path / name)
    operator = tmp_path / "operator"
    for name in ("coordinator", "north"):
        whose = "coordinator" if name == "coordinator" else "site"
        line = key_in(said(whose, "rotate-key", tmp_path / name))
        request = tmp_path / name / "tls-request.json"
        early = call("operator", "approve", str(operator), str(request))
        assert "signed with another key than the one that is known" in early.stderr
        changed = said("operator", "roster", "add", operator, name, line)
        assert f"{name}: its new key takes the place of ed25519:" in changed
        said("operator", "approve", operator, request)
        said(whose, "enrol", tmp_path / name, operator / f"approval-{name}.json")
    assert "holds another key for north" in refused("site", "check", tmp_path / "north")
    assert "roster 2 of clinics" in said("operator", "roster", "sign", operator)
    shutil.copy(operator / "roster.json", tmp_path / "north" / "roster.json")
    assert "keys, roster and ledger are in order" in said("site", "check", tmp_path / "north")
    shutil.copy(operator / "roster.json", tmp_path / "coordinator" / "roster.json")
    quarters = Headquarters(place=tmp_path / "coordinator")
    assert quarters.roster(quarters.read(), now=time.time()).names == NAMES


def test_a_tracker_that_nobody_has_is_named(place: Path) -> None:
    words = ("coordinator", "start", place / "coordinator", place / "run.toml", "--track", "wall")
    assert "track = 'wall': must be one of" in refused(*words)


def test_a_revoked_site_gets_a_roster_without_it(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "operator", tmp_path / "operator")
    said("operator", "roster", "revoke", tmp_path / "operator", "east")
    printed = said("operator", "roster", "sign", tmp_path / "operator")
    assert "roster 2 of clinics" in printed
    assert "north, south, west" in printed
