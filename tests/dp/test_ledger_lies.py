"""What lies beside a ledger, damaged, planted or taken away: a refusal, and never a fresh budget."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from defenses.dp import Ledger
from defenses.dp.ledger_entries import IMPLIED
from defenses.dp.records import KEY_BYTES, RecordKey, canonical_text
from defenses.errors import ParameterError, TamperedError
from ffm_secure.errors import StoreError
from ffm_secure.site.ledger_place import open_ledger

Harm = Callable[[Path], object]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    folder = tmp_path / "own"
    folder.mkdir(mode=0o700)
    with Ledger.open(folder / "ledger") as ledger:
        ledger.grant("record", 4.0, 1e-5)
        ledger.record_key()
    return folder / "ledger"


def beside(place: Path, suffix: str) -> Path:
    return place.with_name(place.name + suffix)


def without(*suffixes: str) -> Harm:
    return lambda place: [beside(place, suffix).unlink() for suffix in suffixes]


def with_head(text: str) -> Harm:
    return lambda place: beside(place, ".head").write_text(text)


@pytest.mark.parametrize(
    "harm",
    [
        without(""),
        without("", ".head"),
        lambda place: (place.write_bytes(b""), beside(place, ".head").unlink()),
        with_head("[" * 100_000),
        with_head('{"version": 1, "sequence": 1e400, "hash": "a"}'),
        with_head('{"version": 1, "sequence": ' + "9" * 6000 + ', "hash": "a"}'),
        with_head('{"version": 1, "sequence": NaN, "hash": "a"}'),
        with_head("null"),
    ],
    ids=["ledger gone", "ledger and anchor gone", "emptied", "nested", "infinite", "digits", "nan", "null"],
)
def test_what_is_left_of_a_ledger_is_no_new_one(harm: Harm, place: Path) -> None:
    """Without ledger and anchor, beside its key, every row had a fresh budget; two anchors were a
    traceback.
    """
    harm(place)
    with pytest.raises(TamperedError):
        Ledger.open(place)


def test_a_key_that_others_may_read_is_refused_with_the_remedy(place: Path) -> None:
    with Ledger.open(place) as ledger:
        beside(place, ".key").chmod(0o644)
        with pytest.raises(ParameterError, match="chmod 600"):
            ledger.record_key()
        beside(place, ".key").chmod(0o600)
        ledger.record_key()


@pytest.mark.parametrize("planted", ["link", "pipe"])
def test_a_key_that_is_no_file_is_none(planted: str, place: Path) -> None:
    """A pipe kept whoever opened it waiting for ever."""
    key = beside(place, ".key")
    shutil.move(key, place.parent / "elsewhere")
    if planted == "link":
        key.symlink_to(place.parent / "elsewhere")
    else:
        os.mkfifo(key, 0o600)
    with Ledger.open(place) as ledger, pytest.raises(ParameterError, match="missing or damaged"):
        ledger.record_key()


def test_a_link_to_a_ledger_is_refused_by_name(place: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(place)
    with pytest.raises(ParameterError, match="is a link"):
        Ledger.open(tmp_path / "link")
    assert set(os.listdir(tmp_path)) == {"own", "link"}, "nothing was written beside the link"


def test_a_folder_that_everybody_may_write_holds_no_ledger(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(StoreError, match=r"everybody may write here.*chmod o-w"):
        open_ledger(folder / "ledger")
    assert os.listdir(folder) == []
    folder.chmod(0o755)
    open_ledger(folder / "ledger").close()


@pytest.mark.parametrize("reason", [IMPLIED, f" {IMPLIED} ", "a\x1b[2Jb", "two\nlines", "x" * 2000, "\ud800"])
def test_a_reason_is_a_line_of_its_owner(reason: str, place: Path) -> None:
    """The reason that runs give made an owner's budget one that runs may raise."""
    with Ledger.open(place) as ledger:
        with pytest.raises(ParameterError, match="raise_because"):
            ledger.grant("record", 5.0, 1e-5, raise_because=reason)
        lifetime = ledger.lifetime("record")
        assert lifetime is not None
        assert (lifetime.epsilon, ledger.is_implied("record")) == (4.0, False)


@pytest.mark.parametrize("epsilon", [10**400, float("nan"), -1.0, 0, True, "4"])
def test_a_budget_that_is_no_number_is_refused(epsilon: float, place: Path) -> None:
    with Ledger.open(place) as ledger, pytest.raises(ParameterError, match="epsilon"):
        ledger.grant("record", epsilon, 1e-5, raise_because="a test")


def test_what_was_noted_as_public_is_checked_like_every_row(place: Path) -> None:
    key = RecordKey.public()
    contents = key.contents(canonical_text(f"row {number}") for number in range(20))
    with Ledger.open(place) as ledger:
        ledger.publish(contents[:12])
        head = ledger.head()
        ledger.publish(contents[:12])
        assert ledger.head() == head, "the same again writes nothing"
        ledger.publish(contents[8:16])
        assert ledger.are_published(contents).tolist() == [True] * 16 + [False] * 4
        assert [entry.records for entry in ledger.entries() if entry.kind == "public"] == [12, 4]
        assert np.array_equal(ledger.are_published(contents[::-1]), ledger.are_published(contents)[::-1])
        ledger.verify(head)
        ledger._file._connection.execute("DROP TRIGGER blocks_no_update")
        ledger._file._connection.execute("UPDATE blocks SET keys = zeroblob(96)")
    with pytest.raises(TamperedError):
        Ledger.open(place, create=False)


def test_a_full_disk_leaves_no_half_of_a_key(tmp_path: Path) -> None:
    """What was left of it was refused for ever as a damaged key, and there was no backup to restore."""
    with Ledger.open(tmp_path / "ledger") as ledger:
        ledger.grant("record", 4.0, 1e-5)
        limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (KEY_BYTES // 2, most))
        try:
            with pytest.raises(OSError, match="too large"):
                ledger.record_key()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["ledger", "ledger.head"]
        key = ledger.record_key()
    with Ledger.open(tmp_path / "ledger") as again:
        assert again.record_key().check() == key.check()
