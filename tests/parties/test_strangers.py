"""What goes wrong among people of several houses is said to whoever can mend it, and costs nothing."""

from __future__ import annotations

import errno
import os
import resource
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ffm_secure.cli.coordinator_watch import SpokenWatch
from ffm_secure.coordinator.sealed_courier import NoWatch
from ffm_secure.display.console import clear_errors
from ffm_secure.errors import StoreError
from ffm_secure.federation import NullCallback
from ffm_secure.records import RoundRecord
from ffm_secure.server.timetable import Timetable
from ffm_secure.site.site_log import SiteLog
from tests.parties.helpers import SEEDED, Direct, Federation, found, log_of, notes_run, open_all, run
from tests.parties.machines import Machines
from tests.parties.test_processes import four_machines, rounds_charged

# Four sites that share among each other can lose one where no other works with the coordinator.
MASKS = {"kind": "secagg", "threshold": 3, "colluding": 0}
PATIENT = Timetable(join=60.0, rejoin=10.0, train=20.0, other=60.0, gather=120.0, patience=120.0)


def three_rounds(place: Path, **settings: Any) -> Federation:
    config = notes_run(privacy=SEEDED, protection=MASKS, federation={"rounds": 3})
    return found(place, config, policy={"colluders": 0}, timetable=PATIENT, **settings)


def test_a_full_disk_does_not_silence_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = SiteLog(tmp_path / "site.log")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(log._handler, "shouldRollover", full)
    log.refuse("refused 'begin': No space left on device")
    with monkeypatch.context() as worse:
        worse.setattr(sys.stderr, "write", full)
        log.refuse("what nobody hears ends no service")
    log.close()
    said = capsys.readouterr().err
    assert "site.log cannot be written; free space." in said
    assert "WARNING refused 'begin': No space left on device" in said
    assert "Logging error" not in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "rounds.jsonl"), "rounds.jsonl: No space left"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "a file: Disk quota exceeded"),
        (sqlite3.OperationalError("database or disk is full"), "a ledger cannot be read or written"),
    ],
)
def test_a_full_disk_is_a_sentence_of_every_command(fault: Exception, words: str) -> None:
    mend = pytest.raises(StoreError, match="run the same command again: what was finished is not lost")
    with mend as said, clear_errors():
        raise fault
    assert words in str(said.value)


def test_what_is_no_fault_of_the_disk_is_not_called_one() -> None:
    with pytest.raises(FileNotFoundError), clear_errors():
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")


def test_a_run_ends_with_its_roster_before_anybody_is_asked(tmp_path: Path) -> None:
    federation = three_rounds(tmp_path)
    late = [0.0]
    ready = federation.coordinator(clock=lambda: time.time() + late[0])
    late[0] = 100_000.0
    nobody = Direct({})
    try:
        with pytest.raises(StoreError, match=r"expired on .* ask the operator .* the last finished round"):
            ready.coordinator.run(nobody)
    finally:
        ready.close()
    assert nobody.carried == []


def test_what_is_new_about_a_site_is_said_once() -> None:
    lines: list[str] = []
    watch = SpokenWatch(inner=NoWatch(), say=lines.append)
    outcomes = (("silent", "silent"), ("answered", "answered"), ("silent",), ("refused",))
    for number, answers in enumerate(outcomes, start=1):
        watch.opened("upload" if number == 3 else "join", number, ["west"], 0.0)
        for outcome in answers:
            watch.answered("west", outcome)
    assert [line.split(" ")[:5] for line in lines] == [
        ["round", "1,", "join:", "west", "does"],
        ["round", "2,", "join:", "west", "takes"],
        ["round", "3,", "upload:", "west", "does"],
        ["round", "4,", "join:", "west", "refuses;"],
    ]


class Between(NullCallback):
    """Do something after a round."""

    def __init__(self, **after: Callable[[], object]) -> None:
        self.after = after

    def round_finished(self, record: RoundRecord) -> None:
        self.after.get(f"round_{record.round}", lambda: None)()


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[tuple[Federation, Machines]]:
    federation = three_rounds(tmp_path)
    with four_machines(federation) as started:
        yield federation, started


def limit_files(process: int, size: int) -> None:
    """Let a process write no further than so many bytes into any file, as a quota does."""
    resource.prlimit(process, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.slow
def test_a_full_disk_refuses_a_round_and_loses_nothing(
    machines: tuple[Federation, Machines],
) -> None:
    """West can write nothing in round 2, not even its log; everything it wrote before is whole."""
    federation, started = machines
    west = started.machines[3].process
    mended = Between(
        round_1=lambda: limit_files(west, 0), round_2=lambda: limit_files(west, resource.RLIM_INFINITY)
    )
    there = run(federation, started, callback=mended)
    assert [item.survivors for item in there.records] == [(0, 1, 2, 3), (0, 1, 2), (0, 1, 2, 3)]
    assert rounds_charged(federation, "west") == [1, 3]
    assert "joined the run 'test'" in log_of(federation, "west")


@pytest.mark.slow
def test_a_site_that_hangs_or_is_slow_costs_its_own_part(machines: tuple[Federation, Machines]) -> None:
    """West is stopped while round 1 learns, like a machine behind a dead link, and goes on after it."""
    federation, started = machines
    west = started.machines[3].process
    stopped: list[str] = []

    def stop_once(stage: str) -> None:
        if stage == "upload" and not stopped:
            stopped.append(stage)
            os.kill(west, signal.SIGSTOP)

    started.before = stop_once
    there = run(federation, started, callback=Between(round_1=lambda: os.kill(west, signal.SIGCONT)))
    assert [item.survivors for item in there.records] == [(0, 1, 2), (0, 1, 2, 3), (0, 1, 2, 3)]
    assert there.records[0].dropped == {3: "upload"}
    assert rounds_charged(federation, "west") == [1, 2, 3], "what was reserved stays reserved"
    assert "after its deadline" in log_of(federation, "west")


@pytest.mark.slow
def test_a_roster_that_expires_ends_a_run_after_a_whole_round(tmp_path: Path) -> None:
    federation = three_rounds(tmp_path)
    late = [0.0]

    def expire() -> None:
        late[0] = 100_000.0

    sessions = open_all(federation)
    try:
        with pytest.raises(StoreError, match="expired on"):
            run(
                federation,
                sessions,
                callback=Between(round_1=expire),
                clock=lambda: time.time() + late[0],
            )
    finally:
        sessions.close()
    assert rounds_charged(federation, "north") == [1]
    federation.hand_out(federation.roster(serial=2))
    sessions = open_all(federation)
    try:
        there = run(federation, sessions)
    finally:
        sessions.close()
    assert [item.round for item in there.records] == [1, 2, 3]
    assert rounds_charged(federation, "north") == [1, 2, 3]
