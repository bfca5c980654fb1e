"""Budgets belong to rows: whatever file, order, split or format rows come in,
the ledger never states less than they went through.
"""

from __future__ import annotations

import json
import pickle
import shutil
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defenses.dp.blocks import Directory, Members, arrange
from defenses.dp.events import GaussianEvent, NonPrivateEvent
from defenses.dp.ledger import Ledger
from defenses.dp.ledger_entries import Charge
from defenses.dp.records import (
    LAST_COPY,
    RecordKey,
    Records,
    canonical_pixels,
    canonical_text,
    name_persons,
    name_records,
)
from defenses.errors import BudgetExceeded, ParameterError, TamperedError

VECTORS = Path(__file__).parent / "vectors"
DELTA = 1e-5


def event(noise: float = 2.0, **changes: Any) -> GaussianEvent:
    values: dict[str, Any] = {
        "unit": "record",
        "adjacency": "add_remove",
        "sampling": "full",
        "sampling_rate": 1.0,
        "noise_multiplier": noise,
        "steps": 1,
        "clip_norm": 1.0,
        "release": "update",
    }
    return GaussianEvent(**{**values, **changes})


def charge(blocks: tuple[int, ...], what: Any = None, **changes: Any) -> Charge:
    values: dict[str, Any] = {
        "owner": "north",
        "dataset": "rows",
        "run": "run",
        "round": 1,
        "release": "update",
    }
    return Charge(event=what or event(), blocks=blocks, **{**values, **changes})


def names(key: RecordKey, texts: list[str]) -> Records:
    return name_records(key.contents(canonical_text(text) for text in texts))


def opened(folder: Path, *, epsilon: float = 100.0) -> tuple[Ledger, RecordKey]:
    ledger = Ledger.open(folder / "ledger.db")
    ledger.grant("record", epsilon, DELTA)
    return ledger, ledger.record_key()


TEXTS = [f"Patient {index} complains of a cough" for index in range(40)]


@pytest.mark.parametrize(
    "edit",
    [
        lambda texts: texts[::-1],
        lambda texts: [text + " " for text in texts],
        lambda texts: [text.replace(" ", "\n\t") for text in texts],
        lambda texts: [text.upper() for text in texts],
        lambda texts: [text.replace("o", "\u200bo") for text in texts],
        lambda texts: texts[5:25],
        lambda texts: sorted(texts, key=hash),
    ],
)
def test_the_same_rows_are_known_in_any_form(tmp_path: Path, edit: Any) -> None:
    ledger, key = opened(tmp_path)
    ((*blocks,),) = ledger.blocks_for([names(key, TEXTS)])
    ledger.reserve([charge(tuple(blocks))])
    spent = ledger.epsilon_of(blocks, "record", DELTA)
    again = ledger.blocks_for([names(key, edit(list(TEXTS)))])[0]
    assert spent > 0
    assert ledger.epsilon_of(again, "record", DELTA) == spent


def test_an_appended_row_opens_a_block_for_itself_alone(tmp_path: Path) -> None:
    ledger, key = opened(tmp_path)
    first = ledger.blocks_for([names(key, TEXTS)])[0]
    ledger.reserve([charge(first)])
    more = ledger.blocks_for([names(key, [*TEXTS, "a new row"])])[0]
    assert len(more) == 2
    assert set(first) < set(more)
    (fresh,) = set(more) - set(first)
    assert ledger.epsilon_of([fresh], "record", DELTA) == 0.0
    assert [entry.records for entry in ledger.entries() if entry.sequence == fresh] == [1]


def test_a_stream_pays_for_the_rows_it_shares_and_no_more(tmp_path: Path) -> None:
    ledger, key = opened(tmp_path, epsilon=5.0)
    for paid, arrived in enumerate(range(10, 41, 10), start=1):  # old rows again in every task
        blocks = ledger.blocks_for([names(key, TEXTS[:arrived])])[0]
        ledger.reserve([charge(blocks)])
        whole = ledger.events_of(blocks, "record", DELTA)
        assert len(whole) == paid  # the oldest rows took part in every task
    newest = ledger.blocks_for([names(key, TEXTS[30:])])[0]
    assert len(ledger.events_of(newest, "record", DELTA)) == 1


def test_dealing_the_rows_anew_joins_equal_histories(tmp_path: Path) -> None:
    ledger, key = opened(tmp_path)
    rows = names(key, TEXTS)
    shards = np.array_split(np.arange(40), 4)
    for round_number in range(3):
        dealt = [rows.take(np.roll(np.arange(40), 7 * round_number)[shard]) for shard in shards]
        held = ledger.blocks_for(dealt)
        assert all(len(blocks) == 1 for blocks in held)
        ledger.reserve([charge(blocks, owner=f"client-{n}") for n, blocks in enumerate(held)])
    assert len(ledger.events_of(held[0], "record", DELTA)) == 3


def test_the_same_rows_again_write_nothing(tmp_path: Path) -> None:
    ledger, key = opened(tmp_path)
    rows = names(key, [*TEXTS, *TEXTS[:3]])
    dealt = [rows.take(np.arange(0, 43, 2)), rows.take(np.arange(1, 43, 2))]
    held = ledger.blocks_for(dealt)
    ledger.reserve([charge(held[0])])
    assert [ledger.blocks_for(dealt) for _ in range(2)] == [ledger.blocks_for(dealt)] * 2
    before = ledger.head()
    ledger.blocks_for(dealt)
    assert ledger.head() == before


def test_a_row_read_from_another_column_is_known_by_its_other_cells(tmp_path: Path) -> None:
    ledger, key = opened(tmp_path)
    titles = [f"title {index}" for index in range(40)]
    cells = [key.contents(map(canonical_text, column)) for column in (titles, TEXTS)]
    blocks = ledger.blocks_for([name_records(cells[1], cells)])[0]
    ledger.reserve([charge(blocks)])
    spent = ledger.epsilon_of(blocks, "record", DELTA)
    by_title = ledger.blocks_for([name_records(cells[0])])[0]
    assert ledger.epsilon_of(by_title, "record", DELTA) == spent
    joined = key.contents(canonical_text(f"{t} {b}") for t, b in zip(titles, TEXTS, strict=True))
    by_both = ledger.blocks_for([name_records(joined, cells[1:])])[0]
    assert ledger.epsilon_of(by_both, "record", DELTA) == spent


def test_copies_of_a_text_pay_apart_and_inherit_together(tmp_path: Path) -> None:
    ledger, key = opened(tmp_path)
    rows = names(key, ["same", "same", "other"])
    first, second = ledger.blocks_for([rows.take(np.array([0, 2])), rows.take(np.array([1]))])
    for _ in range(3):
        ledger.reserve([charge(first)])
    ledger.reserve([charge(second)])
    assert len(ledger.events_of(second, "record", DELTA)) == 1
    # Another order of the file exchanges the copies; nobody can tell, so both start from three.
    again = ledger.blocks_for([rows.take(np.array([1]))])[0]
    assert len(ledger.events_of(again, "record", DELTA)) == 3


def test_a_person_is_one_record_however_many_rows(tmp_path: Path) -> None:
    ledger, key = opened(tmp_path)
    ledger.grant("person", 100.0, DELTA)
    persons = key.contents([b"anna", b"anna", b"bert"])
    event_of_two = event(unit="person", records_per_person=2)
    (blocks,) = ledger.blocks_for([name_persons(persons)])
    ledger.reserve([charge(blocks, event_of_two)])
    later = ledger.blocks_for([name_persons(key.contents([b"anna", b"carl"]))])[0]
    ledger.reserve([charge(later, event_of_two)])
    assert len(ledger.events_of(later, "person", DELTA)) == 2


def test_a_run_opened_before_rows_were_dealt_anew_still_pays(tmp_path: Path) -> None:
    ledger, key = opened(tmp_path)
    rows = names(key, TEXTS)
    old = ledger.blocks_for([rows])[0]
    part = ledger.blocks_for([rows.take(np.arange(10))])[0]
    ledger.reserve([charge(old)])
    rest = ledger.blocks_for([rows.take(np.arange(10, 40))])[0]
    assert ledger.epsilon_of(part, "record", DELTA) == ledger.epsilon_of(rest, "record", DELTA) > 0


def test_the_lifetime_budget_holds_for_every_row(tmp_path: Path) -> None:
    ledger, key = opened(tmp_path, epsilon=1.0)
    blocks = ledger.blocks_for([names(key, TEXTS)])[0]
    ledger.reserve([charge(blocks, event(10.0))])
    ledger.reserve([charge(ledger.blocks_for([names(key, ["someone else"])])[0], event(6.0))])
    with pytest.raises(BudgetExceeded, match="of epsilon 1"):
        ledger.reserve([charge(ledger.blocks_for([names(key, TEXTS[:1])])[0], event(4.0))])
    with pytest.raises(BudgetExceeded, match="per person"):
        ledger.reserve([charge(blocks, event(50.0, unit="person", records_per_person=2))])
    ledger.grant("person", 5.0, DELTA)
    with pytest.raises(BudgetExceeded, match="would forget"):
        ledger.reserve([charge(blocks, event(50.0, unit="person", records_per_person=2))])


def test_a_release_without_bound_spoils_its_rows_for_good(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path / "ledger.db")
    key = ledger.record_key()
    free = NonPrivateEvent(reason="a baseline")
    ledger.reserve([charge(ledger.blocks_for([names(key, TEXTS)])[0], free)])
    ledger.grant("record", 8.0, DELTA)
    with pytest.raises(BudgetExceeded, match="inf"):
        ledger.reserve([charge(ledger.blocks_for([names(key, TEXTS[:1])])[0])])
    ledger.reserve([charge(ledger.blocks_for([names(key, ["untouched"])])[0])])
    with pytest.raises(BudgetExceeded):
        ledger.reserve([charge(ledger.blocks_for([names(key, ["untouched"])])[0], free)])


def test_what_is_known_is_told_without_a_write(tmp_path: Path) -> None:
    ledger, key = opened(tmp_path)
    blocks = ledger.blocks_for([names(key, TEXTS)])[0]
    ledger.reserve([charge(blocks)])
    before = ledger.head()
    known = ledger.known_blocks([names(key, [*TEXTS[:2], "new"])])
    assert ledger.epsilon_of(known, "record", DELTA) == ledger.epsilon_of(blocks, "record", DELTA) > 0
    more = ledger.epsilon_of(known, "record", DELTA, after=[event()])
    assert more > ledger.epsilon_of(known, "record", DELTA)
    assert ledger.known_blocks([names(key, ["new"])]) == (0,)
    assert ledger.epsilon_of((0,), "record", DELTA) == 0.0
    assert ledger.head() == before


def test_a_ledger_of_an_earlier_format_opens_and_its_charges_count(tmp_path: Path) -> None:
    for name in ("ledger_v1.sqlite", "ledger_v1.sqlite.head"):
        shutil.copy(VECTORS / name, tmp_path / name)
    ledger = Ledger.open(tmp_path / "ledger_v1.sqlite", create=False)
    owner, dataset, unit = ledger.accounts()[0]
    assert ledger.epsilon(owner, dataset, unit, DELTA) == pytest.approx(2.7039701571725634, rel=1e-3)
    key = ledger.record_key()
    ledger.grant("record", 4.0, DELTA)
    rows = names(key, TEXTS)
    assert ledger.epsilon_of(ledger.known_blocks([rows]), "record", DELTA) == pytest.approx(2.70397, rel=1e-3)
    blocks = ledger.blocks_for([rows])[0]
    assert ledger.epsilon_of(blocks, "record", DELTA) == pytest.approx(2.7039701571725634, rel=1e-3)
    with pytest.raises(BudgetExceeded, match=r"spent 2\.704"):
        ledger.reserve([charge(blocks, event(1.0))])
    ledger.verify()
    ledger.close()
    again = Ledger.open(tmp_path / "ledger_v1.sqlite", create=False)
    assert again.blocks_for([rows])[0] == blocks


def test_files_and_exports_are_no_membership_oracle(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    stored = []
    for folder in ("one", "two"):
        ledger, key = opened(tmp_path / folder)
        ledger.blocks_for([names(key, TEXTS)])
        stored.append(ledger.export("json"))
        ledger.close()
        assert (tmp_path / folder / "ledger.db.key").stat().st_mode & 0o777 == 0o600
        assert key._secret not in (tmp_path / folder / "ledger.db").read_bytes()
        assert key._secret.hex() not in stored[-1]
    members = [[row["body"].get("members") for row in json.loads(text)["rows"]] for text in stored]
    assert members[0] != members[1]
    assert repr(key) == "RecordKey(secret)"
    with pytest.raises(TypeError):
        pickle.dumps(key)


def test_a_lost_or_foreign_key_is_refused(tmp_path: Path) -> None:
    ledger, key = opened(tmp_path)
    ledger.blocks_for([names(key, TEXTS)])
    path = tmp_path / "ledger.db.key"
    path.write_bytes(bytes(32))
    with pytest.raises(ParameterError, match="not the key of this ledger"):
        ledger.record_key()
    path.unlink()
    with pytest.raises(ParameterError, match="restore it"):
        ledger.record_key()
    assert not path.exists()


@pytest.mark.parametrize("column", ["keys", "links"])
def test_changed_members_are_noticed(tmp_path: Path, column: str) -> None:
    ledger, key = opened(tmp_path)
    ledger.blocks_for([names(key, TEXTS)])
    ledger.close()
    connection = sqlite3.connect(tmp_path / "ledger.db")
    sql = connection.execute("SELECT sql FROM sqlite_master WHERE name = 'blocks_no_update'").fetchone()[0]
    connection.execute("DROP TRIGGER blocks_no_update")
    connection.execute(f"UPDATE blocks SET {column} = zeroblob(16)")
    connection.execute(sql)
    connection.commit()
    connection.close()
    ledger = Ledger.open(tmp_path / "ledger.db")
    for look in (ledger.verify, lambda: ledger.blocks_for([names(key, TEXTS)])):
        with pytest.raises(TamperedError):
            look()


def test_pictures_are_compared_by_pixels() -> None:
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    coloured = np.repeat(grey[:, :, None], 3, axis=2)
    assert canonical_pixels(grey) == canonical_pixels(coloured) == canonical_pixels(grey[:, :, None])
    assert canonical_pixels(grey) != canonical_pixels(grey.reshape(4, 3))
    changed = coloured.copy()
    changed[0, 0, 1] += 1
    assert canonical_pixels(changed) != canonical_pixels(coloured)


def test_two_ledgers_handles_agree(tmp_path: Path) -> None:
    ledger, key = opened(tmp_path)
    other = Ledger.open(tmp_path / "ledger.db")
    blocks = ledger.blocks_for([names(key, TEXTS)])[0]
    part = other.blocks_for([names(other.record_key(), TEXTS[:7])])[0]
    ledger.reserve([charge(blocks)])
    assert other.epsilon_of(part, "record", DELTA) == ledger.epsilon_of(blocks, "record", DELTA) > 0


# Rows of a small world: a content and whose copy it is. Each run reads some of them, edited, in some order,
# dealt to owners.
_WORLD = [(f"Text {index % 7}", index) for index in range(12)]
_EDITS = [str, str.upper, lambda text: f"  {text}\n", lambda text: text.replace(" ", " \t ")]


@st.composite
def _runs(draw: st.DrawFn) -> tuple[list[int], list[int], list[int], list[tuple[int, ...]]]:
    rows = draw(st.lists(st.integers(0, len(_WORLD) - 1), min_size=1, max_size=12, unique=True))
    owners = draw(st.lists(st.integers(0, 2), min_size=len(rows), max_size=len(rows)))
    edits = draw(st.lists(st.integers(0, len(_EDITS) - 1), min_size=len(rows), max_size=len(rows)))
    cohorts = draw(st.lists(st.sampled_from([(0,), (1,), (2,), (0, 1), (0, 1, 2)]), min_size=1, max_size=3))
    return rows, owners, edits, cohorts


@settings(max_examples=60, deadline=None, derandomize=True)
@given(runs=st.lists(_runs(), min_size=2, max_size=5), apart=st.booleans())
def test_no_record_went_through_more_than_the_ledger_states(
    tmp_path_factory: pytest.TempPathFactory, runs: list[Any], apart: bool
) -> None:
    """The definition, kept row by row, beside the ledger:
    over edits, orders, splits, overlaps, copies, one call or many.
    """
    ledger, key = opened(tmp_path_factory.mktemp("world"), epsilon=1e6)
    truth: dict[int, Counter[float]] = {row: Counter() for row in range(len(_WORLD))}
    for number, (rows, owners, edits, cohorts) in enumerate(runs):
        texts = [_EDITS[edit](_WORLD[row][0]) for row, edit in zip(rows, edits, strict=True)]
        whole = names(key, texts)
        dealt = [whole.take(np.flatnonzero(np.array(owners) == owner)) for owner in range(3)]
        held = [ledger.blocks_for([part])[0] for part in dealt] if apart else list(ledger.blocks_for(dealt))
        for cohort in cohorts:
            noise = 2.0 + number
            paying = [charge(held[owner], event(noise)) for owner in cohort if held[owner]]
            if paying:
                ledger.reserve(paying)
            for row, owner in zip(rows, owners, strict=True):
                truth[row][noise] += owner in cohort
    stated = {text: _stated(ledger, names(key, [text] * 4)) for text, _ in _WORLD}
    for row, (text, _) in enumerate(_WORLD):
        assert any(+truth[row] <= history for history in stated[text]), (text, truth[row], stated[text])


def _stated(ledger: Ledger, copies: Records) -> list[Counter[float]]:
    """Return the history of every copy of a text that stands in a block, read from the directory itself."""
    directory = ledger._blocks.directory(ledger._file.load_block)
    places, known = directory.positions(np.sort(copies.keys))
    blocks = set(directory.blocks[places[known]].tolist())
    histories = [ledger.events_of((block,), "record", DELTA) for block in blocks]
    return [Counter(e.noise_multiplier for e in history) for history in histories] or [Counter()]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(runs=st.lists(_runs(), min_size=1, max_size=6))
def test_blocks_stay_a_partition(runs: list[Any]) -> None:
    """Requests are exactly the union of their blocks, and no record ever stands in two;
    checked against sets.
    """
    key, standing, number = RecordKey.public(), {}, 0
    for rows, owners, _, _ in runs:
        whole = names(key, [_WORLD[row][0] for row in rows])
        dealt = [whole.take(np.flatnonzero(np.array(owners) == owner)) for owner in range(3)]
        plan = arrange(Directory(standing), dealt, lambda blocks: min(blocks, default=0) % 3)
        numbers = []
        for block in plan.opened:
            number += 1
            numbers.append(number)
            for closed in block.closes:
                standing.pop(closed, None)
            standing[number] = block.members
        for part, members in zip(dealt, plan.requests, strict=True):
            blocks = [m if m > 0 else numbers[-1 - m] for m in members]
            keys = [set(standing[b].keys.tolist()) for b in blocks]
            assert set().union(*keys) == set(part.keys.tolist())
        everything = [value for members in standing.values() for value in members.keys.tolist()]
        assert len(everything) == len(set(everything))


def test_copies_beyond_the_last_share_its_number() -> None:
    records = name_records(RecordKey.public().contents([b"x"] * (LAST_COPY + 5)))
    assert len(set(records.keys.tolist())) == LAST_COPY + 1


def test_members_are_stored_by_value() -> None:
    members = Members(keys=np.array([1], dtype=np.uint64), links=np.zeros((0, 2), dtype=np.uint64))
    assert Directory({4: members}).sizes == {4: 1}
