"""Who leaves is charged no more, whatever block its rows move to; what was released keeps its bound."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defenses.dp import Ledger, Withdrawal
from defenses.dp.events import NonPrivateEvent
from defenses.errors import BudgetExceeded, ParameterError, TamperedError
from tests.dp.test_blocks import DELTA, charge, event, names, opened
from tests.dp.test_ledger import charge as named_charge
from tests.dp.test_ledger import ledger_at

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [f"row {number}" for number in range(12)]


def test_a_closed_block_is_charged_no_more_and_keeps_its_bound(tmp_path: Path) -> None:
    ledger, key = opened(tmp_path)
    (leaving,), (staying,) = ledger.blocks_for([names(key, TEXTS[:6]), names(key, TEXTS[6:])])
    ledger.spend(ledger.reserve([charge((leaving, staying))]))
    before = ledger.epsilon_of([leaving], "record", DELTA)
    withdrawal = ledger.withdraw(because="consent revoked", blocks=[leaving])
    head = ledger.head()
    for call in (ledger.check, ledger.reserve):
        with pytest.raises(BudgetExceeded, match=r"rows of 1 block of rows withdrawn on .*consent revoked"):
            call([charge((staying,)), charge((leaving,))])
    with pytest.raises(BudgetExceeded, match="consent revoked"):
        ledger.reserve([charge((leaving,), NonPrivateEvent(reason="no unit"))])
    assert ledger.head() == head
    ledger.reserve([charge((staying,))])
    assert ledger.epsilon_of([leaving], "record", DELTA) == before > 0
    assert ledger.withdrawals() == ledger.withdrawals([leaving, staying]) == (withdrawal,)
    assert ledger.withdrawals([staying]) == ()


def test_an_owner_leaves_with_its_name_and_all_it_was_charged_for(tmp_path: Path) -> None:
    """Rows that another owner reads later are still rows of the one who left."""
    ledger, key = opened(tmp_path)
    north, south = ledger.blocks_for([names(key, TEXTS[:6]), names(key, TEXTS[6:])])
    ledger.reserve([charge(north, owner="north"), charge(south, owner="south")])
    ledger.withdraw(because="left the federation", owner="north")
    with pytest.raises(BudgetExceeded, match="'south' would use rows of 'north' withdrawn on"):
        ledger.reserve([charge(north, owner="south")])
    fresh = ledger.blocks_for([names(key, ["a row nobody knew"])])[0]
    with pytest.raises(BudgetExceeded, match="nothing is charged to this owner any more"):
        ledger.reserve([charge(fresh, owner="north")])
    ledger.reserve([charge(fresh, owner="south"), charge(south, owner="south")])


def test_an_owner_of_a_named_account_leaves_too(tmp_path: Path) -> None:
    """Ledgers of an earlier version charge names, no blocks."""
    with ledger_at(tmp_path, "north", "south") as ledger:
        ledger.reserve([named_charge("north")])
        withdrawal = ledger.withdraw(because="closed", owner="north")
        assert withdrawal.blocks == ()
        with pytest.raises(BudgetExceeded, match="'north' withdrawn on 2026-01-01: closed"):
            ledger.reserve([named_charge("south"), named_charge("north", round=2)])
        ledger.reserve([named_charge("south")])
        assert ledger.epsilon("north", "cases", "record", 1e-5) > 0


def test_what_cannot_be_withdrawn_is_refused_and_written_nowhere(tmp_path: Path) -> None:
    ledger, key = opened(tmp_path)
    (block,) = ledger.blocks_for([names(key, TEXTS)])[0]
    head = ledger.head()
    with pytest.raises(ParameterError, match="because"):
        ledger.withdraw(because=" ", blocks=[block])
    with pytest.raises(ParameterError, match="nothing was named"):
        ledger.withdraw(because="x")
    with pytest.raises(ParameterError, match="block 99: this ledger holds no such block"):
        ledger.withdraw(because="x", blocks=[99])
    assert ledger.head() == head
    ledger.withdraw(because="first", blocks=[block])
    with pytest.raises(ParameterError, match=r"closed already: 1 block of rows withdrawn on .*first"):
        ledger.withdraw(because="again", blocks=[block])
    assert len(ledger.withdrawals()) == 1


ROWS = st.sets(st.integers(0, 11), min_size=1)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.lists(ROWS, min_size=1, max_size=3)),
        st.tuples(st.just("leave"), st.lists(ROWS, min_size=1, max_size=1)),
        st.tuples(st.just("reopen"), st.just([])),
    ),
    max_size=10,
)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS)
def test_no_row_that_left_is_charged_and_no_other_is_refused(steps: list[tuple[str, list[set[int]]]]) -> None:
    """The obvious definition: a set of rows. Blocks part, join and move below; the answer stays the same."""
    with tempfile.TemporaryDirectory() as folder:
        ledger, key = opened(Path(folder))
        left: set[int] = set()
        for number, (what, groups) in enumerate(steps):
            if what == "reopen":
                ledger.close()
                ledger = Ledger.open(Path(folder) / "ledger.db", create=False)
            asked = [names(key, [TEXTS[row] for row in sorted(rows)]) for rows in _apart(groups)]
            blocks = ledger.blocks_for(asked) if asked else ()
            if what == "leave" and not groups[0] <= left:
                ledger.withdraw(because=f"step {number}", blocks=blocks[0])
                left |= groups[0]
            for rows, members in zip(_apart(groups), blocks):
                if what == "read" and rows & left:
                    assert ledger.withdrawals(members)
                    with pytest.raises(BudgetExceeded, match="withdrawn"):
                        ledger.reserve([charge(members, event(50.0), round=number)])
                elif what == "read":
                    assert ledger.withdrawals(members) == ()
                    ledger.reserve([charge(members, event(50.0), round=number)])
        ledger.verify()
        ledger.close()


def _apart(groups: list[set[int]]) -> list[set[int]]:
    """Deal every row to the first group that asks for it: a row belongs to one request."""
    dealt: set[int] = set()
    parts = []
    for rows in groups:
        if rows - dealt:
            parts.append(rows - dealt)
        dealt |= rows
    return parts


def test_a_row_that_left_is_known_by_its_content_in_another_table(tmp_path: Path) -> None:
    """Its text stands in another column, beside a new one: it is the same person's row."""
    ledger, key = opened(tmp_path)
    (block,) = ledger.blocks_for([names(key, TEXTS)])[0]
    ledger.withdraw(because="left", blocks=[block])
    part = ledger.blocks_for([names(key, [TEXTS[3].upper(), "new"])])[0]
    with pytest.raises(BudgetExceeded, match="withdrawn"):
        ledger.reserve([charge(part)])
    (alone,) = ledger.blocks_for([names(key, ["new"])])[0]
    ledger.reserve([charge((alone,))])


def test_another_process_learns_of_a_withdrawal_at_once(tmp_path: Path) -> None:
    ledger, key = opened(tmp_path)
    (block,) = ledger.blocks_for([names(key, TEXTS)])[0]
    script = (
        "import sys; from defenses.dp import Ledger\n"
        "Ledger.open(sys.argv[1], create=False).withdraw(because='elsewhere', blocks=[int(sys.argv[2])])"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "ledger.db"), str(block)]
    subprocess.run(command, cwd=ROOT, check=True)
    with pytest.raises(BudgetExceeded, match="elsewhere"):
        ledger.reserve([charge((block,))])


def test_exports_and_entries_show_who_left(tmp_path: Path) -> None:
    ledger, key = opened(tmp_path)
    blocks = ledger.blocks_for([names(key, TEXTS)])[0]
    ledger.reserve([charge(blocks)])
    ledger.withdraw(because="=consent() revoked", owner="north")
    (row,) = [row for row in csv.DictReader(io.StringIO(ledger.export("csv"))) if row["kind"] == "withdrawal"]
    assert (row["owner"], row["blocks"], row["reason"]) == (
        "north",
        str(blocks[0]),
        "'=consent() revoked",
    )
    stored = [row["body"] for row in json.loads(ledger.export("json"))["rows"]]
    (body,) = [body for body in stored if body["kind"] == "withdrawal"]
    assert body["blocks"] == list(blocks)
    assert ledger.entries()[-1].reason == "=consent() revoked"


def test_a_withdrawal_cannot_be_edited_out(tmp_path: Path) -> None:
    ledger, key = opened(tmp_path)
    blocks = ledger.blocks_for([names(key, TEXTS)])[0]
    ledger.withdraw(because="left", blocks=blocks)
    ledger.close()
    path = tmp_path / "ledger.db"
    for statement in (
        "DELETE FROM entries WHERE kind = 'withdrawal'",
        "UPDATE entries SET kind = 'note' WHERE kind = 'withdrawal'",
        "UPDATE entries SET body = replace(body, 'left', 'kept') WHERE kind = 'withdrawal'",
    ):
        copy = tmp_path / "copy.db"
        shutil.copy(path, copy)
        shutil.copy(tmp_path / "ledger.db.head", tmp_path / "copy.db.head")
        with sqlite3.connect(copy) as connection:
            triggers = connection.execute(
                "SELECT name, sql FROM sqlite_master WHERE type = 'trigger'"
            ).fetchall()
            for name, _ in triggers:
                connection.execute(f"DROP TRIGGER {name}")
            connection.execute(statement)
            for _, sql in triggers:
                connection.execute(sql)
        connection.close()
        with pytest.raises(TamperedError):
            Ledger.open(copy, create=False)


def test_what_was_paid_before_may_still_be_confirmed(tmp_path: Path) -> None:
    """A release under way when its owner leaves was paid for: the ledger must be able to say it happened."""
    ledger, key = opened(tmp_path)
    blocks = ledger.blocks_for([names(key, TEXTS)])[0]
    reserved = ledger.reserve([charge(blocks)])
    ledger.withdraw(because="left", owner="north")
    ledger.spend(reserved)
    assert all(entry.spent for entry in ledger.entries() if entry.kind == "reserve")
    assert isinstance(ledger.withdrawals()[0], Withdrawal)
