"""What keeps a site or a coordinator from starting: a sentence for each thing, and who must do what."""

from __future__ import annotations

import shutil
import stat
import time
from pathlib import Path

import pytest

from ffm_secure.errors import ConfigError, PlanRefused, StoreError
from ffm_secure.site import site_file
from ffm_secure.site.folder import SiteFolder
from ffm_secure.site.policy import objections
from ffm_secure.site.service import open_session
from tests.parties.helpers import (
    PLAIN,
    RECORD,
    SEEDED,
    Federation,
    change_site,
    found,
    notes_run,
    open_all,
    run,
)

MASKS = {"kind": "secagg", "threshold": 3}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return found(tmp_path_factory.mktemp("folders"), notes_run(privacy=PLAIN))


@pytest.fixture
def federation(made: Federation, tmp_path: Path) -> Federation:
    """Return a copy that a test may spoil."""
    shutil.copytree(made.place, tmp_path / "copy")
    return Federation(
        place=tmp_path / "copy", config=made.config, operator=made.operator, members=list(made.members)
    )


def problems(folder: Path, **settings: object) -> str:
    with pytest.raises((ConfigError, StoreError)) as caught:
        open_session(folder, **settings).close()  # type: ignore[arg-type]
    return str(caught.value)


def test_an_expired_roster(federation: Federation) -> None:
    federation.hand_out(federation.roster(expires=int(time.time()) - 10))
    assert "the roster expired on" in problems(federation.site("north"))
    with pytest.raises(StoreError, match="ask the operator for a new one"):
        federation.coordinator()


def test_a_roster_that_expires_while_a_site_is_served(federation: Federation) -> None:
    expires = int(time.time()) + 60
    federation.hand_out(federation.roster(expires=expires))
    later = [0.0]
    session = open_session(federation.site("north"), clock=lambda: time.time() + later[0])
    later[0] = 120.0
    assert session.handle("join", b"") == b"\x00"
    session.close()


def test_a_revoked_site_and_one_with_another_key(federation: Federation) -> None:
    without = [member for member in federation.members if member.name != "north"]
    federation.hand_out(federation.roster(without, serial=2))
    assert "has revoked it; ask the operator" in problems(federation.site("north"))
    swapped = [*without, type(without[0])(name="north", key=federation.operator.public_key)]
    federation.hand_out(federation.roster(swapped, serial=3))
    assert "holds another key for north" in problems(federation.site("north"))


def test_a_roster_that_was_replaced_by_an_older_one(federation: Federation) -> None:
    older = federation.roster(serial=1)
    federation.hand_out(federation.roster(serial=5))
    open_session(federation.site("north")).close()
    federation.hand_out(older)
    assert "serial 1 is older than one this site had" in problems(federation.site("north"))


def test_a_roster_of_somebody_else(federation: Federation) -> None:
    path = federation.site("north") / "roster.json"
    content = bytearray(path.read_bytes())
    content[content.index(b"north")] ^= 1
    path.write_bytes(bytes(content))
    assert "not signed by the operator whose key is in site.toml" in problems(federation.site("north"))


def test_all_problems_of_a_folder_come_at_once(federation: Federation) -> None:
    north = federation.site("north")
    (north / "roster.json").unlink()
    (north / "rounds.guard").unlink()
    change_site(north, data="nowhere.csv")
    said = problems(north)
    assert "3 problems" in said
    for words in ("ask the operator for the roster", "a site whose memory is lost", "there is no"):
        assert words in said


def test_one_process_serves_a_site(federation: Federation) -> None:
    first = open_session(federation.site("north"))
    try:
        assert "another process serves this site" in problems(federation.site("north"))
    finally:
        first.close()
    open_session(federation.site("north")).close()


def test_what_a_site_makes_is_its_owners_alone(federation: Federation) -> None:
    north = federation.site("north")
    open_session(north).close()
    for path in north.rglob("*"):
        wanted = 0o700 if path.is_dir() else 0o600
        made_here = path.name not in ("rows.csv", "roster.json")
        assert not made_here or stat.S_IMODE(path.stat().st_mode) == wanted, path.name


def test_a_ledger_never_goes_back(tmp_path: Path) -> None:
    config = notes_run(privacy=SEEDED, federation={"rounds": 1})
    federation = found(tmp_path, config)
    north = federation.site("north")
    open_session(north).close()
    shutil.copy(north / "ledger.sqlite", tmp_path / "backup")
    sessions = open_all(federation)
    run(federation, sessions)
    sessions.close()
    open_session(north).close()
    shutil.copy(tmp_path / "backup", north / "ledger.sqlite")
    assert "a ledger never goes back" in problems(north)


def test_an_allowed_run_file_that_was_changed(federation: Federation) -> None:
    (path,) = (federation.site("north") / "allowed").glob("*.toml")
    path.write_text(path.read_text().replace("rounds = 2", "rounds = 3"))
    assert "was changed after it was allowed" in problems(federation.site("north"))


def site(**policy: object) -> site_file.SiteFile:
    settings = {"largest_epsilon": 8.0, **policy}
    return site_file.SiteFile(
        format=1,
        name="north",
        data="rows.csv",
        operator="ed25519:" + "0" * 64,
        budget=site_file.LifetimeBudget(epsilon=8.0),
        policy=site_file.Policy(**settings),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("policy", "sections", "words"),
    [
        ({"largest_epsilon": 1.0}, {}, "privacy.epsilon = 8: policy.largest_epsilon = 1"),
        ({"largest_delta": 1e-9}, {}, "privacy.delta = 1e-05: policy.largest_delta = 1e-09"),
        ({"largest_clip": 0.5}, {}, "privacy.clip_norm = 1: policy.largest_clip = 0.5"),
        ({"smallest_cohort": 4}, {}, "a sum of 3 sites could be opened: policy.smallest_cohort = 4"),
        ({"colluders": 2}, {}, "protection.colluding = 1: policy.colluders = 2"),
        ({}, {"protection": {"kind": "none", "threshold": 3}}, "policy.protections accepts secagg"),
        ({}, {"privacy": SEEDED}, "policy.without_guarantee is not true"),
        ({}, {"task": {"clients": 3}, "federation": {"cohort": 3}}, "must be 4, the number of sites"),
        ({}, {"task": {"nominal_examples": 0}}, "say a public size of one site's data"),
        ({}, {"task": {"class_names": []}}, "declare the classes in order"),
        ({}, {"task": {"text_column": ""}}, "task.text_column = ''"),
    ],
)
def test_a_policy_objects_in_words(
    policy: dict[str, object], sections: dict[str, dict[str, object]], words: str
) -> None:
    config = notes_run(**{"privacy": RECORD, "protection": MASKS, **sections})
    assert words in "\n".join(objections(config, site(**policy), sites=4))


def test_a_run_within_the_policy_has_no_objection() -> None:
    assert objections(notes_run(privacy=RECORD, protection=MASKS), site(), sites=4) == ()


def test_a_coordinator_refuses_a_run_that_cannot_be_run_among_machines(federation: Federation) -> None:
    path = federation.run_file
    path.write_text(path.read_text().replace("nominal_examples = 40", "nominal_examples = 0"))
    with pytest.raises(PlanRefused, match="nobody counts another's rows"):
        federation.coordinator()


def test_a_site_is_made_once(federation: Federation) -> None:
    from defenses.random_source import RandomSource
    from ffm_secure.site.folder import create

    with pytest.raises(StoreError, match="a site is made once"):
        create(federation.site("north"), site(), RandomSource.system())
    assert SiteFolder(place=federation.site("north")).read().name == "north"
