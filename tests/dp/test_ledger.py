"""The ledger refuses before it writes, charges once, and notices every altered byte."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from defenses.dp.accountant import epsilon
from defenses.dp.events import Event, GaussianEvent, NonPrivateEvent
from defenses.dp.ledger import Ledger
from defenses.dp.ledger_entries import Charge
from defenses.dp.ledger_file import Head
from defenses.errors import BudgetExceeded, ParameterError, TamperedError


def step(steps: int = 10, **changes: Any) -> GaussianEvent:
    values: dict[str, Any] = {
        "unit": "record",
        "adjacency": "add_remove",
        "sampling": "poisson",
        "clip_norm": 1.0,
    }
    values |= {"sampling_rate": 0.05, "noise_multiplier": 1.0, "steps": steps, "release": "update"}
    return GaussianEvent(**{**values, **changes})


def charge(owner: str = "north", event: Event | None = None, **changes: Any) -> Charge:
    values: dict[str, Any] = {
        "dataset": "cases",
        "run": "run-1",
        "round": 1,
        "release": "update",
        "commitment": b"",
    }
    return Charge(owner=owner, event=event or step(), **{**values, **changes})


def ledger_at(folder: Path, *owners: str, epsilon: float = 4.0) -> Ledger:
    ledger = Ledger.open(folder / "ledger.db", clock=lambda: "2026-01-01T00:00:00+00:00")
    ledger.set_budgets(owners or ("north",), "cases", "record", epsilon, 1e-5)
    return ledger


def test_epsilon_is_that_of_all_charges_across_restarts(tmp_path: Path) -> None:
    with ledger_at(tmp_path) as ledger:
        ledger.spend(ledger.reserve([charge()]))
    with Ledger.open(tmp_path / "ledger.db", create=False) as ledger:
        ledger.reserve([charge(run="run-2", event=step(20))])
        assert ledger.epsilon("north", "cases", "record", 1e-5) == pytest.approx(
            epsilon([step(), step(20)], 1e-5).epsilon, rel=3e-4
        )
        assert ledger.events("north", "cases", "record") == (step(), step(20))


def test_a_reservation_counts_before_it_is_spent(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    reserved = ledger.reserve([charge()])
    before = ledger.epsilon("north", "cases", "record", 1e-5)
    ledger.spend(reserved)
    ledger.spend(reserved)
    assert ledger.epsilon("north", "cases", "record", 1e-5) == before > 0
    assert [entry.kind for entry in ledger.entries()] == ["budget", "reserve", "spend"]
    assert all(entry.spent for entry in ledger.entries() if entry.kind == "reserve")


def test_all_or_nothing_and_every_debtor_is_named(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path, "north", "south", "west")
    ledger.set_budget("south", "cases", "record", 0.01, 1e-5)
    head = ledger.head()
    with pytest.raises(BudgetExceeded, match=r"(?s)'south'.*'east'.*no budget") as caught:
        ledger.reserve([charge("north"), charge("south"), charge("east")])
    assert "'north'" not in str(caught.value)
    assert ledger.head() == head


def test_the_budget_holds_to_the_last_step(tmp_path: Path) -> None:
    ledger, paid = ledger_at(tmp_path, epsilon=2.0), 0
    with contextlib.suppress(BudgetExceeded):
        for paid in range(1000):
            ledger.reserve([charge(round=paid, event=step(5))])
    assert 0 < paid < 999
    events = [step(5)] * paid
    assert epsilon(events, 1e-5).epsilon <= 2.0 * (1 + 1e-3)
    assert epsilon([*events, step(5)], 1e-5).epsilon > 2.0 * (1 - 1e-3)


def test_charges_of_one_owner_in_one_call_add_up(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path, epsilon=1.2 * epsilon([step(200)], 1e-5).epsilon)
    with pytest.raises(BudgetExceeded):
        ledger.reserve([charge(event=step(200)), charge(event=step(200), round=2)])
    ledger.reserve([charge(event=step(200))])


def test_a_replayed_release_is_charged_once(tmp_path: Path) -> None:
    ledger, same = ledger_at(tmp_path, "north", "south"), b"c" * 32
    first = ledger.reserve([charge(commitment=same)])
    again = ledger.reserve([charge(commitment=same, run="resumed"), charge("south", commitment=same)])
    assert [r.replayed for r in (*first, *again)] == [False, True, False]
    assert again[0].sequence == first[0].sequence
    assert (
        len(ledger.events("north", "cases", "record")) == len(ledger.events("south", "cases", "record")) == 1
    )
    twice = ledger.reserve([charge(commitment=b"d" * 32), charge(commitment=b"d" * 32)])
    assert [r.replayed for r in twice] == [False, True]
    with pytest.raises(ParameterError, match="another event"):
        ledger.reserve([charge(commitment=same, event=step(11))])


def test_empty_commitments_are_never_replays(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    assert not any(r.replayed for r in ledger.reserve([charge(), charge()]))
    assert len(ledger.events("north", "cases", "record")) == 2


def test_budgets_go_down_freely_and_up_only_on_record(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    ledger.set_budget("north", "cases", "record", 3.0, 1e-5)
    ledger.set_budget("north", "cases", "record", 3.0, 1e-6)
    for numbers in ((4.0, 1e-6), (3.0, 1e-5), (math.inf, 1e-6)):
        with pytest.raises(ParameterError, match="raise_because"):
            ledger.set_budget("north", "cases", "record", *numbers)
    ledger.set_budget("north", "cases", "record", 5.0, 1e-6, raise_because="board decision 7")
    assert ledger.budget("north", "cases", "record").epsilon == 5.0
    assert [entry.reason for entry in ledger.entries()][-1] == "board decision 7"


def test_data_sets_and_units_have_their_own_budgets(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    ledger.set_budget("north", "images", "record", 1.0, 1e-5)
    ledger.set_budget("north", "cases", "person", 8.0, 1e-5)
    ledger.reserve([charge(), charge(event=step(unit="person", records_per_person=3))])
    assert ledger.epsilon("north", "images", "record", 1e-5) == 0.0
    assert (
        ledger.epsilon("north", "cases", "person", 1e-5)
        > ledger.epsilon("north", "cases", "record", 1e-5)
        > 0
    )
    assert ledger.accounts() == (
        ("north", "cases", "person"),
        ("north", "cases", "record"),
        ("north", "images", "record"),
    )
    with pytest.raises(BudgetExceeded, match="mix"):
        ledger.reserve([charge(event=step(unit="person", records_per_person=5))])


def test_a_release_without_bound_needs_an_unlimited_budget_for_every_unit(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    free = charge(event=NonPrivateEvent(reason="baseline"))
    with pytest.raises(BudgetExceeded, match="inf"):
        ledger.reserve([free])
    with pytest.raises(BudgetExceeded, match="no budget"):
        ledger.reserve([charge("south", event=NonPrivateEvent(reason="baseline"))])
    ledger.set_budget("north", "cases", "record", math.inf, 1e-5, raise_because="public data")
    ledger.reserve([free])
    assert ledger.epsilon("north", "cases", "record", 1e-5) == math.inf


def test_rows_cannot_be_changed_through_sql(tmp_path: Path) -> None:
    ledger_at(tmp_path).close()
    connection = sqlite3.connect(tmp_path / "ledger.db")
    for statement in (
        "UPDATE entries SET owner = 'x'",
        "DELETE FROM entries",
        (
            "INSERT OR REPLACE INTO entries SELECT 1, kind, owner, dataset, unit, body, hash "
            "FROM entries WHERE sequence = 2"
        ),
    ):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            connection.execute(statement)


def _forge(path: Path, *statements: str) -> None:
    """Change the file as someone who first drops the triggers, and puts them back."""
    connection = sqlite3.connect(path)
    triggers = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
    for name, _ in triggers:
        connection.execute(f"DROP TRIGGER {name}")
    for statement in statements:
        connection.execute(statement)
    for _, sql in triggers:
        connection.execute(sql)
    connection.commit()
    connection.close()


FORGERIES = [
    "UPDATE entries SET owner = 'south' WHERE sequence = 3",
    "UPDATE entries SET dataset = 'other' WHERE sequence = 3",
    "UPDATE entries SET unit = 'client' WHERE sequence = 3",
    "UPDATE entries SET kind = 'budget' WHERE sequence = 3",
    "UPDATE entries SET body = replace(body, '\"steps\":10', '\"steps\":1') WHERE sequence = 3",
    "UPDATE entries SET body = body || ' ' WHERE sequence = 3",
    "UPDATE entries SET hash = zeroblob(32) WHERE sequence = 4",
    "UPDATE entries SET hash = 'text' WHERE sequence = 4",
    "DELETE FROM entries WHERE sequence = 3",
    "DELETE FROM entries WHERE sequence >= 3",
    "DELETE FROM entries WHERE sequence = 1",
    "DELETE FROM entries",
    "UPDATE entries SET sequence = 9 WHERE sequence = 4",
    "INSERT INTO entries SELECT 99, kind, owner, dataset, unit, body, hash FROM entries WHERE sequence = 3",
    (
        "UPDATE entries SET sequence = CASE sequence WHEN 3 THEN -4 WHEN 4 THEN -3 ELSE "
        "sequence END WHERE sequence IN (3, 4)"
    ),
    "CREATE TRIGGER quiet AFTER INSERT ON entries BEGIN SELECT 1; END",
    "CREATE TABLE more (x)",
]


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forgeries_are_noticed(tmp_path: Path, forgery: str) -> None:
    ledger = ledger_at(tmp_path)
    ledger.spend(ledger.reserve([charge(), charge(round=2)]))
    ledger.verify()
    _forge(tmp_path / "ledger.db", forgery)
    with pytest.raises(TamperedError, match="not authentic"):
        ledger.verify()
    ledger.close()
    with pytest.raises(TamperedError):
        Ledger.open(tmp_path / "ledger.db")


def test_missing_triggers_are_noticed(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    sqlite3.connect(tmp_path / "ledger.db").execute("DROP TRIGGER entries_no_update").connection.commit()
    with pytest.raises(TamperedError):
        ledger.verify()


def test_a_shortened_or_missing_file_is_noticed(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    ledger.reserve([charge()])
    ledger.close()
    path = tmp_path / "ledger.db"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TamperedError):
        Ledger.open(path)
    path.unlink()
    with pytest.raises(TamperedError):
        Ledger.open(path)
    path.write_bytes(whole)
    (tmp_path / "ledger.db.head").unlink()
    with pytest.raises(TamperedError):
        Ledger.open(path)


def test_an_older_copy_of_the_table_is_noticed_by_the_anchor(tmp_path: Path) -> None:
    ledger, path = ledger_at(tmp_path), tmp_path / "ledger.db"
    old = path.read_bytes()
    ledger.reserve([charge()])
    kept = ledger.head()
    ledger.close()
    new_head = (tmp_path / "ledger.db.head").read_bytes()
    path.write_bytes(old)
    with pytest.raises(TamperedError):
        Ledger.open(path)
    # Both files put back together: only an anchor kept elsewhere tells.
    (tmp_path / "ledger.db.head").write_text(
        json.dumps({"version": 1, **_last(path)}),
    )
    rolled_back = Ledger.open(path)
    rolled_back.verify()
    with pytest.raises(TamperedError):
        rolled_back.verify(kept)
    assert new_head != (tmp_path / "ledger.db.head").read_bytes()


def _last(path: Path) -> dict[str, Any]:
    row = (
        sqlite3.connect(path)
        .execute("SELECT sequence, hash FROM entries ORDER BY sequence DESC LIMIT 1")
        .fetchone()
    )
    return {"sequence": row[0], "hash": row[1].hex()}


def test_an_anchor_that_lags_is_repaired(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    behind = (tmp_path / "ledger.db.head").read_bytes()
    ledger.reserve([charge()])
    ledger.close()
    (tmp_path / "ledger.db.head").write_bytes(behind)
    ledger = Ledger.open(tmp_path / "ledger.db")
    ledger.reserve([charge(round=2)])
    assert json.loads((tmp_path / "ledger.db.head").read_text())["sequence"] == ledger.head().sequence == 4


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes, list[bytes]]:
    """The bytes of a ledger and its anchor, and every long value its rows hold."""
    folder = tmp_path_factory.mktemp("bytes")
    ledger = ledger_at(folder)
    ledger.reserve([charge(), charge(round=2)])
    ledger.close()
    rows = sqlite3.connect(folder / "ledger.db").execute("SELECT body, hash FROM entries").fetchall()
    values = [value if isinstance(value, bytes) else value.encode() for row in rows for value in row]
    return (folder / "ledger.db").read_bytes(), (folder / "ledger.db.head").read_bytes(), values


@given(which=st.integers(0, 7), position=st.integers(0, 10**6), change=st.integers(1, 255))
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_changed_byte_of_a_row_is_noticed(
    which: int, position: int, change: int, tmp_path: Path, finished: tuple[bytes, bytes, list[bytes]]
) -> None:
    whole, head, values = finished
    assert len(values) == 8
    start, raw = whole.find(values[which]), bytearray(whole)
    assert start > 0
    raw[start + position % len(values[which])] ^= change
    (tmp_path / "ledger.db").write_bytes(raw)
    (tmp_path / "ledger.db.head").write_bytes(head)
    with pytest.raises(TamperedError):
        Ledger.open(tmp_path / "ledger.db")


def test_a_ledger_that_should_exist_is_not_created(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="no ledger"):
        Ledger.open(tmp_path / "none.db", create=False)
    assert not (tmp_path / "none.db").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"owner": ""},
        {"dataset": "a\nb"},
        {"round": -1},
        {"round": True},
        {"commitment": b"short"},
        {"run": "x" * 301},
    ],
)
def test_malformed_charges_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    ledger = ledger_at(tmp_path)
    with pytest.raises(ParameterError):
        ledger.reserve([charge(**change)])


def test_spending_what_was_not_reserved_is_refused(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path, "north", "south")
    (reservation,) = ledger.reserve([charge()])
    forged = type(reservation)(
        sequence=reservation.sequence, owner="south", dataset="cases", unit="record", replayed=False
    )
    with pytest.raises(ParameterError):
        ledger.spend([forged])


def test_export_holds_every_row_and_defuses_formulas(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path, "=SUM(A1)")
    ledger.reserve([charge("=SUM(A1)")])
    document = json.loads(ledger.export("json"))
    assert document["head"]["sequence"] == len(document["rows"]) == 3
    assert document["head"]["hash"] == ledger.head().hash
    table = list(csv.DictReader(io.StringIO(ledger.export("csv"))))
    assert [row["kind"] for row in table] == ["budget", "reserve"]
    assert table[1]["owner"] == "'=SUM(A1)"
    with pytest.raises(ParameterError):
        ledger.export("xml")


def test_a_failed_change_leaves_memory_and_file_together(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path, "north", "south")
    (reservation,) = ledger.reserve([charge()])
    missing = type(reservation)(sequence=77, owner="north", dataset="cases", unit="record", replayed=False)
    with pytest.raises(ParameterError):
        ledger.spend([reservation, missing])
    assert not any(entry.spent for entry in ledger.entries())
    ledger.spend([reservation])
    ledger.verify(Head(sequence=ledger.head().sequence, hash=ledger.head().hash))


def test_many_owners_with_one_history_cost_one_computation(tmp_path: Path) -> None:
    owners = [f"client {index}" for index in range(60)]
    ledger = ledger_at(tmp_path, *owners)
    for round_number in range(3):
        ledger.reserve(
            [
                charge(owner, round=round_number, event=step(1, release=f"round {round_number}"))
                for owner in owners
            ]
        )
    assert len(ledger._books._epsilons) <= 8
    assert len(ledger._books._accountants) == 1
