"""Owners carry their real names wherever a person reads, and no account is forgotten for it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from defenses.dp import Ledger

from ffm_secure.api import Run
from ffm_secure.config.run_file import RunConfig
from ffm_secure.data.dataset import Examples
from ffm_secure.data.partition import owner_names, partition
from ffm_secure.engines import simulation
from ffm_secure.site.client_state import folder_name
from tests.federation.helpers import RECORD, make

NAMES = ("Mercy", "St. Mary's / West", "=cmd()|x")


def rows(values: list[object]) -> Examples:
    return Examples(columns={"text": [f"t{i}" for i in range(len(values))], "site": values})


def names_of(values: list[object], clients: int, **options: object) -> tuple[str, ...]:
    return owner_names(
        rows(values), clients=clients, split={"kind": "natural", "column": "site", **options}, seed=1
    )


def test_a_name_belongs_to_the_rows_it_is_dealt_with() -> None:
    values = list(np.random.default_rng(0).choice(["b", "a", "d", "c"], 60))
    examples, split = rows(list(map(str, values))), {"kind": "natural", "column": "site"}
    parts = partition(examples, clients=4, split=split, seed=1)
    for name, part in zip(names_of(values, 4), parts, strict=True):
        assert {values[row] for row in part} == {name}


def test_merged_owners_are_counted() -> None:
    values = ["big"] * 9 + ["mid"] * 5 + ["x", "y", "z"]
    assert "".join(names_of(values, 1)) == "big and 4 more"
    assert names_of(values, 2, groups="largest") == ("big", "mid")
    merged = names_of(values, 2)
    assert [name.split()[0] for name in merged] == ["big", "mid"]
    assert sum(int(name.split()[2]) for name in merged if "more" in name) == 3


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["a\n", "a", "a\t "], ("a", "a (2)", "a (3)")),
        (["*", "\x1b[2J", "x" * 200], ("owner '*'", "?[2J", "x" * 60)),
        ([3, 3, 12], ("3", "12")),
    ],
)
def test_names_are_printable_short_and_different(values: list[object], expected: tuple[str, ...]) -> None:
    found = names_of(values, len(set(values)))
    assert sorted(found) == sorted(expected)
    assert all(name.isprintable() and 0 < len(name) <= 80 for name in found)


def test_owners_without_a_column_have_numbers() -> None:
    found = owner_names(rows(["a"] * 20), clients=10, split={"kind": "iid"}, seed=0)
    assert (found[0], found[-1]) == ("client-01", "client-10")


def test_a_folder_of_an_owner_stays_inside_and_is_its_own() -> None:
    odd = ["../../etc", "a/b", "a:b", "", ".", "..", "A" * 300, "Zürich", "con", *NAMES]
    folders = [folder_name(name) for name in odd]
    assert len(set(folders)) == len(odd)
    assert all(Path("home", name).resolve().parent == Path("home").resolve() for name in folders)
    assert folder_name("client-3") == "client-3"


def config(tmp_path: Path, **privacy: object) -> RunConfig:
    lines = [{"text": f"note {i} good", "label": i % 2, "site": NAMES[i % 3]} for i in range(60)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return make(
        task={
            "kind": "text_classification",
            "data": str(tmp_path / "train.jsonl"),
            "clients": 3,
            "validation": "hold_out",
            "max_length": 8,
            "split": {"kind": "natural", "column": "site"},
        },
        model={"name": "builtin:tiny-bert", "trainable": {"kind": "lora", "rank": 2}},
        federation={"rounds": 1, "cohort": 3},
        privacy={**RECORD, **privacy},
    )


def test_report_and_ledger_call_owners_by_name(tmp_path: Path) -> None:
    result = Run(config(tmp_path), base=tmp_path, runs=tmp_path / "runs").start()
    assert [client.client for client in result.summary.clients] == sorted(NAMES)
    assert "Mercy" in (result.folder / "report.html").read_text()


def test_a_ledger_that_knows_owners_by_number_keeps_their_accounts(tmp_path: Path, monkeypatch) -> None:
    made = config(tmp_path, noise="system", ledger=str(tmp_path / "ledger.sqlite"))
    with monkeypatch.context() as older:
        older.setattr(
            "ffm_secure.data.partition.owner_names",
            lambda *_, clients, **__: simulation.numbered_names(clients),
        )
        first = simulation.prepare(made, tmp_path)
        with Ledger.open(tmp_path / "ledger.sqlite", create=True) as ledger:
            ledger.set_budgets(first.owners, first.account, "record", 8.0, 1e-5)
    assert first.owners == ("client-1", "client-2", "client-3")
    assert simulation.prepare(made, tmp_path).owners == first.owners
    fresh = config(tmp_path, noise="system", ledger=str(tmp_path / "another.sqlite"))
    assert simulation.prepare(fresh, tmp_path).owners == tuple(sorted(NAMES))
