"""The run directory: atomic, locked, strict; damaged files are named, never believed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from ffm_secure.errors import StoreError
from ffm_secure.store import Store, write_atomic
from ffm_secure.strategies import ServerState
from ffm_secure.types import RoundRecord
from tests.federation.helpers import make

RUN = bytes(range(16))


def record(number: int, **changes: object) -> RoundRecord:
    values: dict[str, object] = {
        "round": number,
        "phase": "private",
        "cohort": (0, 1),
        "survivors": (0,),
        "dropped": {1: "upload"},
        "aborted": "",
        "loss": 0.5,
        "metric": 0.25,
        "metric_name": "accuracy",
        "epsilon_spent": math.inf,
        "bytes_up": 10,
        "bytes_down": 20,
        "seconds": 1.5,
        "client_seconds": 1.0,
    }
    return RoundRecord(**{**values, **changes})  # type: ignore[arg-type]


def state(number: int) -> ServerState:
    return ServerState(
        round=number, vector=torch.full((5,), float(number)), slots={"mean": torch.ones(5, dtype=torch.float64)}
    )


def fill(folder: Path, rounds: int = 3) -> None:
    with Store.open(folder, make()) as store:
        for number in range(1, rounds + 1):
            store.commit(state(number), record(number), run_id=RUN)


def test_what_was_committed_comes_back(tmp_path: Path) -> None:
    fill(tmp_path)
    with Store.open(tmp_path, make()) as store:
        resumed = store.resume()
    assert resumed is not None
    found, records, run_id = resumed
    assert found.round == 3
    assert run_id == RUN
    assert torch.equal(found.vector, state(3).vector)
    assert torch.equal(found.slots["mean"], state(3).slots["mean"])
    assert records == (record(1), record(2), record(3))
    assert len(list((tmp_path / "checkpoints").glob("round-*"))) == 2


def test_a_fresh_folder_has_nothing_to_resume(tmp_path: Path) -> None:
    with Store.open(tmp_path, make()) as store:
        assert store.resume() is None
        assert store.config() == make()


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    fill(tmp_path)
    path = tmp_path / "rounds.jsonl"
    path.write_bytes(path.read_bytes() + b'{"round": 4, "los')
    with Store.open(tmp_path, make()) as store:
        resumed = store.resume()
        assert resumed is not None
        assert len(resumed[1]) == 3
    assert path.read_bytes().count(b"\n") == 3


def test_a_kill_between_checkpoint_and_line_loses_nothing(tmp_path: Path) -> None:
    fill(tmp_path)
    path = tmp_path / "rounds.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    with Store.open(tmp_path, make()) as store:
        resumed = store.resume()
    assert resumed is not None
    assert [item.round for item in resumed[1]] == [1, 2, 3]


def test_two_processes_cannot_share_a_run(tmp_path: Path) -> None:
    with Store.open(tmp_path, make()), pytest.raises(StoreError, match="another process"):
        Store.open(tmp_path, make())
    Store.open(tmp_path, make()).close()


def test_another_run_is_refused_and_named(tmp_path: Path) -> None:
    fill(tmp_path)
    with pytest.raises(StoreError, match=r"federation\.rounds: 3 there, 9 asked"):
        Store.open(tmp_path, make(federation={"rounds": 9}))
    Store.open(tmp_path, make(speed={"workers": 2})).close()


@pytest.mark.parametrize(
    "name",
    ["run.toml", "rounds.jsonl", "checkpoints/round-000003/state.safetensors", "checkpoints/round-000003/record.json"],
)
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "text"])
def test_damage_is_named_or_harmless(name: str, damage: str, tmp_path: Path) -> None:
    fill(tmp_path)
    path = tmp_path / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 3] ^= 0x55
    path.write_bytes(
        {"flip": bytes(content), "cut": bytes(content[: len(content) // 2]), "empty": b"", "text": b"hello\n"}[damage]
    )
    try:
        with Store.open(tmp_path, make()) as store:
            resumed = store.resume()
    except StoreError as error:
        assert str(tmp_path) in str(error)
        return
    assert resumed is not None
    assert resumed[0].round == 3


@pytest.mark.parametrize(
    "change", [{"round": "1"}, {"loss": None}, {"extra": 1}, {"survivors": 3}, {"phase": "odd"}, {"loss": True}]
)
def test_a_record_that_does_not_fit_its_types_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    fill(tmp_path, rounds=1)
    path = tmp_path / "rounds.jsonl"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, **change}) + "\n")
    if change == {"round": "1"}:
        assert Store.read(tmp_path).records()[0].round == 1
        return
    with pytest.raises(StoreError, match="damaged"):
        Store.read(tmp_path).records()


def test_atomic_writes_leave_no_part_behind(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")
    with pytest.raises(TypeError):
        write_atomic(path, "not bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["file"]
