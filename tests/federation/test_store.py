"""The run directory: atomic, locked, strict; damaged files are named, never believed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ffm_secure.api import Run
from ffm_secure.engines import simulation
from ffm_secure.errors import Interrupted, StoreError
from ffm_secure.federation import NullCallback
from ffm_secure.records import RoundRecord
from ffm_secure.storage.run_directory import Store, write_atomic
from ffm_secure.strategies import ServerState
from tests.federation.helpers import make, table

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
    return RoundRecord(**{**values, **changes})


def state(number: int) -> ServerState:
    return ServerState(
        round=number,
        vector=torch.full((5,), float(number)),
        optimizer_state={"mean": torch.ones(5, dtype=torch.float64)},
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
    assert torch.equal(found.optimizer_state["mean"], state(3).optimizer_state["mean"])
    assert records == (record(1), record(2), record(3))
    assert len(list((tmp_path / "checkpoints").glob("round-*"))) == 2


def test_a_fresh_folder_has_nothing_to_resume(tmp_path: Path) -> None:
    with Store.open(tmp_path, make()) as store:
        assert store.resume() is None
        assert store.config() == make()


def test_the_rows_of_a_run_are_noted_once_and_required_after(tmp_path: Path) -> None:
    rows = "data:1 validation:2 public:3"
    with Store.open(tmp_path / "new", make()) as store:
        assert store.contents() == ""
        store.require_contents(rows)
        store.require_contents(rows)
        assert store.contents() == rows
        for other, words in (
            ("data:9 validation:2 public:3", "training"),
            ("data:1 validation:9", "validation and public"),
        ):
            with pytest.raises(
                StoreError, match=f"new: its {words} rows have changed since the run began; restore them"
            ):
                store.require_contents(other)
        assert store.contents() == rows
        (tmp_path / "new" / "data.json").write_text("{}")
        with pytest.raises(StoreError, match=r"data\.json: is damaged"):
            store.contents()
    fill(tmp_path / "begun")
    with Store.open(tmp_path / "begun", make()) as store:
        store.require_contents(rows)
        assert store.contents() == "", "what it began with was not noted, and is not made up"


def test_every_set_a_run_reads_is_among_its_rows(tmp_path: Path) -> None:
    """Training, validation and another set's public rows: each changes its own digest;
    a copy elsewhere changes none.
    """

    def found(folder: str, **changed: str) -> list[str]:
        for name, part in (
            ("private", "train"),
            ("private", "validation"),
            ("public", "train"),
            ("public", "validation"),
        ):
            place = tmp_path / folder / name
            place.mkdir(parents=True, exist_ok=True)
            word = changed.get(name if name == part else f"{name}_{part}", "note")
            (place / f"{part}.csv").write_text(
                "text,label\n" + "".join(f"{word} {i},{i % 2}\n" for i in range(20))
            )
        lifecycle = {
            "kind": "pretrain",
            "local_steps": 1,
            "batch_size": 4,
            "learning_rate": 0.1,
            "public_data": "public",
        }
        made = make(
            task={**table()["task"], "kind": "text_classification", "data": "private", "max_length": 8},
            model={"name": "builtin:tiny-bert", "trainable": {"kind": "lora", "rank": 2}},
            federation={"rounds": 1, "cohort": 4, "lifecycle": lifecycle},
        )
        now = simulation.contents(made, tmp_path / folder)
        assert now.digests == simulation.prepare(made, tmp_path / folder).contents, (
            "a grid reads them without a model"
        )
        return now.digests.split()

    first = found("a")
    assert [word.partition(":")[0] for word in first] == ["data", "validation", "public"]
    assert found("b") == first
    for place, changed in enumerate(("private_train", "private_validation", "public_train")):
        other = found("a", **{changed: "other"})
        assert [old != new for old, new in zip(first, other, strict=True)] == [
            place == index for index in range(3)
        ]
    assert found("a", public_validation="other") == first, (
        "nobody reads the validation rows of the public set"
    )


def test_an_interrupted_run_does_not_go_on_with_other_rows(tmp_path: Path) -> None:
    """Both ways: with the rows it began with it goes on."""

    class Stop(NullCallback):
        def round_finished(self, record: RoundRecord) -> None:
            raise KeyboardInterrupt

    def write(word: str) -> None:
        (tmp_path / "rows").mkdir(exist_ok=True)
        for part in ("train", "validation"):
            (tmp_path / "rows" / f"{part}.csv").write_text(
                "text,label\n" + "".join(f"{word} {i},{i % 2}\n" for i in range(20))
            )

    made = make(
        task={**table()["task"], "kind": "text_classification", "data": "rows", "max_length": 8},
        model={"name": "builtin:tiny-bert", "trainable": {"kind": "lora", "rank": 2}},
    )
    write("note")
    with pytest.raises(Interrupted):
        Run(made, base=tmp_path, runs=tmp_path / "runs").start(callback=Stop())
    write("other")
    with pytest.raises(StoreError, match="its training and validation rows have changed since the run began"):
        Run(made, base=tmp_path, runs=tmp_path / "runs").start()
    write("note")
    assert Run(made, base=tmp_path, runs=tmp_path / "runs").start().summary.status == "complete"


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
    with pytest.raises(StoreError, match=r"federation\.rounds: 3 there, 2 asked"):
        Store.open(tmp_path, make(federation={"rounds": 2}))
    with pytest.raises(StoreError, match=r"federation\.cohort: 4 there, 3 asked"):
        Store.open(tmp_path, make(federation={"rounds": 9, "cohort": 3}))
    Store.open(tmp_path, make(speed={"workers": 2})).close()


@pytest.mark.parametrize(
    "name",
    [
        "run.toml",
        "rounds.jsonl",
        "checkpoints/round-000003/state.safetensors",
        "checkpoints/round-000003/record.json",
    ],
)
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "text"])
def test_damage_is_named_or_harmless(name: str, damage: str, tmp_path: Path) -> None:
    fill(tmp_path)
    path = tmp_path / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 3] ^= 0x55
    path.write_bytes(
        {
            "flip": bytes(content),
            "cut": bytes(content[: len(content) // 2]),
            "empty": b"",
            "text": b"hello\n",
        }[damage]
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
    "change",
    [{"round": "1"}, {"loss": None}, {"extra": 1}, {"survivors": 3}, {"phase": "odd"}, {"loss": True}],
)
def test_a_record_that_does_not_fit_its_types_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    fill(tmp_path, rounds=1)
    path = tmp_path / "rounds.jsonl"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, **change}) + "\n")
    with pytest.raises(StoreError, match=rf"line 1: is damaged: record\.{next(iter(change))}"):
        Store.read(tmp_path).records()


def test_atomic_writes_leave_no_part_behind(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")
    with pytest.raises(TypeError):
        write_atomic(path, "not bytes")
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_is_full_under_tensors_is_said_and_leaves_the_old_folder_alone(tmp_path: Path) -> None:
    """The library of tensors has an error of its own for this, and a half-filled folder was left."""

    def write(folder: Path) -> None:
        (folder / "weights").write_text("old")

    def fail(folder: Path) -> None:
        (folder / "weights").write_text("new")
        safetensors.torch.save_file({"weights": torch.zeros(10)}, folder)  # as on a full disk: its own error

    with Store.open(tmp_path / "run", make()) as store:
        store.replace_folder("adapter", write)
        with pytest.raises(StoreError, match=r"cannot be written .*free space or mend the disk"):
            store.replace_folder("adapter", fail)
    assert (tmp_path / "run" / "adapter" / "weights").read_text() == "old"
    assert not list((tmp_path / "run").glob(".adapter*"))
