"""A site's new key knows what its old key did; a crash in the middle leaves one of the two, whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from defenses.random_source import RandomSource
from ffm_secure.errors import ConfigError, StoreError
from ffm_secure.federation import NullCallback
from ffm_secure.records import RoundRecord
from ffm_secure.site import key_rotation
from ffm_secure.site.folder import SiteFolder
from ffm_secure.site.service import open_session
from ffm_secure.transport.roster import Member
from tests.parties.helpers import RECORD, Federation, found, notes_run, open_all, run
from tests.parties.test_coordinator import places

SOURCE = RandomSource.system()


class Stop(Exception):
    """Ends a coordinator after a round."""


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """Return a federation whose run was stopped after its first round of two."""
    masks = {"kind": "secagg", "threshold": 3}
    federation = found(tmp_path_factory.mktemp("half"), notes_run(privacy=RECORD, protection=masks))
    sessions = open_all(federation)

    class StopAfterOne(NullCallback):
        def round_finished(self, record: RoundRecord) -> None:
            raise Stop

    try:
        with pytest.raises(Stop):
            run(federation, sessions, callback=StopAfterOne())
    finally:
        sessions.close()
    return federation


@pytest.fixture
def federation(half: Federation, tmp_path: Path) -> Federation:
    """Return a copy that a test may spoil."""
    shutil.copytree(half.place, tmp_path / "copy")
    return Federation(
        place=tmp_path / "copy", config=half.config, operator=half.operator, members=list(half.members)
    )


def test_a_run_goes_on_with_a_site_that_has_a_new_key(federation: Federation) -> None:
    north = SiteFolder(place=federation.site("north"))
    before = north.identity().public_key
    identity = key_rotation.rotate_key(north, SOURCE)
    assert identity.public_key != before
    with pytest.raises(ConfigError, match="the line that ffm-secure site status prints"):
        open_session(north.place).close()
    federation.members[0] = Member(name="north", key=identity.public_key)
    federation.hand_out(federation.roster(serial=2))
    sessions = open_all(federation)
    try:
        there = run(federation, sessions)
    finally:
        sessions.close()
    assert [item.survivors for item in there.records] == [(0, 1, 2, 3)] * 2
    charged = places(federation, "north")
    assert [number for _, number in charged] == [1, 2]
    assert len({run_id for run_id, _ in charged}) == 1, "the run has another id"


def test_what_the_old_key_did_the_new_key_does_not_do_again(federation: Federation) -> None:
    north = SiteFolder(place=federation.site("north"))
    rounds, memory = dict(north.rounds().rounds), north.identity().guard
    assert list(rounds.values()) == [(1, 0)]
    identity = key_rotation.rotate_key(north, SOURCE)
    assert dict(north.rounds().rounds) == rounds
    assert identity.guard._memory.updates == memory._memory.updates
    assert len(memory._memory.updates) == 1
    assert identity.guard._memory.serials == memory._memory.serials


@pytest.mark.parametrize("moment", range(7))
def test_a_crash_at_any_moment_loses_nothing(
    moment: int, federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both memories and the key are renamed twice: to their names apart, then to their places."""
    north = SiteFolder(place=federation.site("north"))
    before, rounds = north.identity().public_key, dict(north.rounds().rounds)
    plain, count = key_rotation.os.replace, []

    def replace(source: Path, target: Path) -> None:
        if source.parent.name == ".rotation":
            count.append(target)
            if len(count) > moment:
                raise Stop
        plain(source, target)

    monkeypatch.setattr(key_rotation.os, "replace", replace)
    if moment < 6:
        with pytest.raises(Stop):
            key_rotation.rotate_key(north, SOURCE)
        monkeypatch.undo()
        if moment < 3:
            assert north.identity().public_key == before, "nothing had happened yet"
        else:
            with pytest.raises(StoreError, match="finish it with: ffm-secure site rotate-key"):
                north.identity()
    after = key_rotation.rotate_key(north, SOURCE)
    assert after.public_key != before
    assert dict(north.rounds().rounds) == rounds
    assert not (north.place / ".rotation").exists()


def test_a_site_that_is_served_keeps_its_key(federation: Federation) -> None:
    session = open_session(federation.site("north"))
    try:
        with pytest.raises(StoreError, match="another process serves this site"):
            key_rotation.rotate_key(SiteFolder(place=federation.site("north")), SOURCE)
    finally:
        session.close()
