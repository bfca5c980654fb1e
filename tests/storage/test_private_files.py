"""What a run leaves is its owner's alone, and nothing planted in its folder is followed,
emptied or deleted.
"""

from __future__ import annotations

import os
import stat
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attacks.observation import Observation, save_observation
from defenses.dp import Ledger
from ffm_secure.errors import StoreError
from ffm_secure.report import document
from ffm_secure.site.truth import TruthKeeper, truth_path, update_path
from ffm_secure.storage.run_directory import Store
from ffm_secure.tasks.encoded import EncodedText
from tests.federation.helpers import ROOT, call, make
from tests.federation.test_store import RUN, record, state
from tests.report import samples


@pytest.fixture(autouse=True)
def open_umask() -> object:
    """Let the machine be one where new files are everybody's."""
    previous = os.umask(0)
    yield
    os.umask(previous)


def too_open(folder: Path) -> list[str]:
    """Return every file and folder, this one included, that others may read, write or enter."""
    wrong = []
    for path in (folder, *sorted(folder.rglob("*"))):
        if path.lstat().st_mode & 0o077:
            wrong.append(f"{path.relative_to(folder.parent)} {stat.filemode(path.lstat().st_mode)}")
    return wrong


def test_what_the_store_writes_is_private_from_the_run_folder_down(tmp_path: Path) -> None:
    with Store.open(tmp_path / "runs" / "a", make()) as store:
        store.require_contents("data:1")
        store.commit(state(1), record(1), run_id=RUN)
        store.commit(state(2), record(2), run_id=RUN)
        store.resume()

        def fill(folder: Path) -> None:
            assert not folder.stat().st_mode & 0o077, "private before anything is in it"
            (folder / "deep").mkdir()
            (folder / "deep" / "weights").write_text("w")

        store.replace_folder("adapter", fill)
        store.replace_folder("adapter", fill)
        store.write_text("note", "n")
    document.write(samples.private(), tmp_path / "runs" / "a")
    assert too_open(tmp_path / "runs") == []
    assert (tmp_path / "runs" / "a" / "adapter" / "deep" / "weights").read_text() == "w"


def test_a_ledger_and_its_anchor_are_private(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir(mode=0o700)
    Ledger.open(tmp_path / "own" / "ledger.sqlite").close()
    assert too_open(tmp_path / "own") == []


def test_an_observation_is_private(tmp_path: Path) -> None:
    seen = Observation(
        kind="gradient", round=1, observer="server", contributors=1, tensors={"w": torch.ones(2)}
    )
    save_observation(seen, tmp_path / "seen")
    save_observation(seen, tmp_path / "seen")
    assert too_open(tmp_path / "seen") == []


def test_everything_a_whole_run_leaves_is_private(tmp_path: Path) -> None:
    table = tomllib.loads((ROOT / "examples" / "tiny.toml").read_text())
    assert table["federation"]["rounds"] == 3
    words = ("--set", "federation.rounds=1", "--set", "task.evaluation_examples=20", "--quiet")
    outcome = call("run", "examples/tiny.toml", "--runs", str(tmp_path / "runs"), *words)
    assert outcome.returncode == 0, outcome.stderr
    assert (tmp_path / "runs" / "tiny" / "ledger.sqlite").is_file()
    assert too_open(tmp_path / "runs") == []
    assert os.umask(0) == 0, "the command line gives the machine's own rights back"


@pytest.mark.parametrize("name", ["../../outside", "..", "a/b", "/absolute", "new\nline"])
def test_no_name_of_an_owner_leaves_the_run_folder(name: str, tmp_path: Path) -> None:
    """A hospital column that says ../../outside had an audit's private rows written outside of the run."""
    truth = TruthKeeper(folder=tmp_path / "run" / "home", rounds=frozenset({1}), task=Reading())
    truth.keep(name, 1, EncodedText(tokens=np.zeros(3, "i4"), offsets=np.arange(4)), {0, 1})
    truth.keep_update(name, 1, np.zeros(2))
    written = list(tmp_path.rglob("*.safetensors"))
    assert len(written) == 2
    for path in written:
        assert path.parent.parent.parent == tmp_path / "run" / "home"
        assert path == path.resolve()
    assert {truth_path(truth.folder, name, 1), update_path(truth.folder, name, 1)} == set(written)


class Reading:
    """A task that turns every row into its number."""

    def evaluation_batch(self, encoded: EncodedText, indices: Any, device: str) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.as_tensor(indices).reshape(-1, 1)}


def test_a_planted_lock_empties_no_file_elsewhere(tmp_path: Path) -> None:
    precious, folder = tmp_path / "precious", tmp_path / "run"
    precious.write_text("mine")
    folder.mkdir(mode=0o700)
    (folder / ".lock").symlink_to(precious)
    with pytest.raises(StoreError, match=r"\.lock: is a link"):
        Store.open(folder, make())
    assert precious.read_text() == "mine"


def test_a_planted_folder_of_checkpoints_deletes_nothing_elsewhere(tmp_path: Path) -> None:
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "run"
    for number in range(5):
        (elsewhere / f"round-{number}").mkdir(parents=True)
    folder.mkdir(mode=0o700)
    (folder / "checkpoints").symlink_to(elsewhere)
    with pytest.raises(StoreError, match="checkpoints: is a link"):
        Store.open(folder, make())
    assert len(list(elsewhere.iterdir())) == 5


@pytest.mark.parametrize(
    "name", [".lock", "checkpoints", "adapter", "home", "ledger.sqlite", "rounds.jsonl", "report.json"]
)
def test_no_link_in_a_run_folder_is_followed(name: str, tmp_path: Path) -> None:
    with Store.open(tmp_path / "run", make()):
        pass
    place = tmp_path / "run" / name
    if place.is_dir():
        place.rmdir()
    place.unlink(missing_ok=True)
    place.symlink_to(tmp_path / "not there")
    with pytest.raises(StoreError, match="is a link"):
        Store.open(tmp_path / "run", make())


def test_a_run_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "run").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="run: is a link"):
        Store.open(tmp_path / "run", make())
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770, 0o702])
@pytest.mark.parametrize("inner", ["", "checkpoints"])
def test_a_folder_that_others_may_write_is_refused_with_the_remedy(
    mode: int, inner: str, tmp_path: Path
) -> None:
    with Store.open(tmp_path / "run", make()):
        pass
    (tmp_path / "run" / inner).chmod(mode)
    with pytest.raises(
        StoreError, match=r"others may write here; check what it holds, then run: chmod -R go-w"
    ):
        Store.open(tmp_path / "run", make())


def test_a_folder_of_another_owner_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store.open(tmp_path / "run", make()):
        pass
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(StoreError, match="belongs to another user"):
        Store.open(tmp_path / "run", make())


def test_a_planted_part_of_a_report_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    precious, folder = tmp_path / "precious", tmp_path / "run"
    precious.write_text("mine")
    folder.mkdir(mode=0o700)
    for name in (f".report.json.{os.getpid()}.new", "report.json", "report.html", "internal.json"):
        (folder / name).symlink_to(precious)
    document.write(samples.private(), folder)
    assert precious.read_text() == "mine"
    assert not any(path.is_symlink() for path in folder.iterdir())
