"""A coordinator that is killed, an engine that hangs: the run goes on under its id, and every stage ends."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from defenses.dp import GaussianEvent, Ledger
from ffm_secure.cli.coordinator_commands import Shown, tracked
from ffm_secure.display.notebook import Callbacks
from ffm_secure.engines import coordinated
from ffm_secure.federation import NullCallback
from ffm_secure.records import LEARN, Receipt, RoundRecord
from ffm_secure import record_codec
from ffm_secure.server.timetable import Timetable
from ffm_secure.transport import envelope
from ffm_secure.transport.courier import Reply
from tests.parties.helpers import NAMES, RECORD, SEEDED, Direct, Federation, found, notes_run, open_all, run
from tests.tracking.helpers import record

SURE: dict[str, Any] = {
    "unit": "record", "adjacency": "add_remove", "sampling": "full", "sampling_rate": 1.0, "steps": 1,
    "clip_norm": 1.0, "release": "test",
}  # fmt: skip
MASKS = {"kind": "secagg", "threshold": 3}


class Killed(Exception):
    """Stands for a power cut at the coordinator."""


def places(federation: Federation, name: str) -> list[tuple[str, int]]:
    with Ledger.open(federation.site(name) / "ledger.sqlite", create=False) as ledger:
        ledger.verify()
        return [(entry.run, entry.round) for entry in ledger.entries() if entry.kind == "reserve"]


@pytest.mark.parametrize(
    "stage",
    [
        "upload",
        pytest.param("plan", marks=pytest.mark.slow),
        pytest.param("begin", marks=pytest.mark.slow),
        pytest.param("unmask", marks=pytest.mark.slow),
        pytest.param("finish", marks=pytest.mark.slow),
    ],
)
def test_a_killed_coordinator_goes_on_under_the_same_id(stage: str, tmp_path: Path) -> None:
    """It is killed in round 1 when a stage has just gone out to its last site, with real noise."""
    privacy = {**RECORD, "spare_rounds": 1}
    federation = found(tmp_path, notes_run(privacy=privacy, protection=MASKS))
    sessions = open_all(federation)
    try:
        hit: list[str] = []

        def cut(now: str, site: int) -> None:
            if now == stage and site == 3 and not hit:
                hit.append(now)
                raise Killed

        sessions.before = cut
        with pytest.raises(Killed):
            run(federation, sessions)
        there = run(federation, sessions)
    finally:
        sessions.close()
    assert [(item.round, item.survivors, item.aborted) for item in there.records] == [
        (1, (0, 1, 2, 3), ""),
        (2, (0, 1, 2, 3), ""),
    ]
    for name in NAMES[:3]:
        charged = places(federation, name)
        assert len({run for run, _ in charged}) == 1, "the run has another id"
        assert [number for _, number in charged] == [1, 2] if stage == "plan" else [1, 1, 2]


class Hanging(Direct):
    """Carry nothing of one stage, and never come back."""

    stuck = threading.Event()

    def send(self, stage: str, messages: Mapping[int, bytes]) -> Iterator[Reply]:
        if stage == "upload":
            self.stuck.wait(30)
        yield from super().send(stage, messages)


def test_an_engine_that_hangs_is_left_behind(tmp_path: Path) -> None:
    brief = Timetable(join=20.0, rejoin=1.0, train=0.5, other=10.0, gather=20.0, patience=20.0)
    config = notes_run(privacy=SEEDED, federation={"rounds": 1})
    federation = found(tmp_path, config, timetable=brief)
    sessions = open_all(federation)
    courier = Hanging(sessions.sessions)
    began = time.monotonic()
    try:
        there = run(federation, courier)
    finally:
        courier.stuck.set()
        sessions.close()
    assert there.records[0].aborted
    assert set(there.records[0].dropped.values()) == {"upload"}
    assert time.monotonic() - began < 25


def test_what_a_coordinator_leaves_behind(tmp_path: Path) -> None:
    federation = found(tmp_path, notes_run(privacy=RECORD, protection=MASKS))
    sessions = open_all(federation)
    finished: list[RoundRecord] = []

    class Keep(NullCallback):
        def round_finished(self, record: RoundRecord) -> None:
            finished.append(record)

    ready = federation.coordinator()
    shown = Shown(track=("csv",))
    try:
        with tracked(ready, shown) as trackers:
            ready.coordinator.callback = Callbacks([Keep(), *trackers])
            trained = ready.coordinator.run(sessions)
        curve = (ready.folder / "tracking" / "csv" / "test.csv").read_text()
        with tracked(ready, shown):  # the same command again goes on with the same curve
            pass
        summary = coordinated.finish(ready, trained)
    finally:
        ready.close()
        sessions.close()
    folder = federation.place / "coordinator" / "runs" / "test"
    for name in ("report.html", "report.json", "receipts.json", "adapter", "rounds.jsonl"):
        assert (folder / name).exists(), name
    assert tuple(finished) == summary.rounds
    assert [line.split(",")[0] for line in curve.splitlines()] == ["round", "1", "2"]
    assert (folder / "tracking" / "csv" / "test.csv").read_text() == curve
    assert summary.statements[0].epsilon <= 8.0
    stored = record_codec.from_bytes(
        coordinated.Receipts, (folder / "receipts.json").read_bytes().strip(), "receipts"
    )
    assert sorted(stored.sites) == sorted(NAMES)
    for name, key in zip(ready.coordinator.roster.names, ready.coordinator.roster.keys, strict=True):
        signed = stored.sites[name]
        answer = b"\x01" + signed.signature + signed.content
        content = envelope.unseal_answer(answer, signed.request, key)
        receipt = record_codec.from_bytes(Receipt, bytes(content), "a receipt")
        with Ledger.open(federation.site(name) / "ledger.sqlite", create=False) as ledger:
            assert receipt.head == ledger.head().hash
        assert 0 < receipt.epsilon <= 8.0


def test_a_coordinators_report_counts_questions_as_what_they_cost() -> None:
    """Every round was counted as one of learning, also those that asked for a start at half the budget."""
    learning, asking = (
        GaussianEvent(**SURE, noise_multiplier=9.0),
        GaussianEvent(**SURE, noise_multiplier=1.0),
    )
    events = {LEARN: learning, "class_sums": asking}
    everybody = record(1, query="class_sums", dropped={1: "declined", 2: "upload"})
    rounds = (everybody, record(2, dropped={}), record(3, cohort=(0, 1), dropped={}))
    charged = coordinated.most_charged(rounds, events, 1e-5)
    assert Counter(charged) == {asking: 1, learning: 2}, "the first site; the second declined to be asked"
    assert Counter(coordinated.most_charged(rounds[1:], events, 1e-5)) == {learning: 2}
    assert coordinated.most_charged((), events, 1e-5) == ()
