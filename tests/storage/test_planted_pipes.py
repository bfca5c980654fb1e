"""Whoever can write a folder of rows, of a model or of a run can put a pipe there: nobody waits for it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from attacks.truth import load_truth
from defenses.dp import Ledger
from defenses.errors import DefenseError
from defenses.random_source import RandomSource
from defenses.replay_guard import ReplayGuard
from ffm_secure.agreed.loaded_model import stored_noise
from ffm_secure.api import load
from ffm_secure.cli import ledger_table, runs
from ffm_secure.config import run_file
from ffm_secure.data import delimited, files
from ffm_secure.engines import simulation
from ffm_secure.errors import DataError, FfmError, ModelError
from ffm_secure.models.backbone import load_backbone
from ffm_secure.record_codec import read_json
from ffm_secure.report import document
from ffm_secure.storage import key_file
from ffm_secure.storage.observations import read_observations
from ffm_secure.record_codec import read_regular
from ffm_secure.storage.run_directory import Store
from tests.federation.helpers import RECORD, make

PATIENCE = 1.0  # seconds an action has before somebody looks whether it waits


@contextlib.contextmanager
def nobody_waits(pipe: Path) -> Iterator[None]:
    """Fail where the pipe is being waited for; whoever waits is let go on, so that a test ends.

    A process of its own looks: a library that waits may hold every thread of this one.
    """
    looking = os.fork()
    if looking == 0:
        look(pipe)
    try:
        yield
    finally:
        os.kill(looking, signal.SIGTERM)
        _, status = os.waitpid(looking, 0)
    assert os.WIFSIGNALED(status), f"{pipe} was waited for"


def look(pipe: Path) -> NoReturn:
    """Leave by oneself only where somebody waits for a pipe."""
    time.sleep(PATIENCE)
    while True:
        with contextlib.suppress(OSError):  # nobody reads
            os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
            os._exit(0)
        time.sleep(0.05)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small run that recorded what its server saw."""
    folder = tmp_path_factory.mktemp("finished")
    made = make(
        federation={"rounds": 1, "cohort": 3},
        task={"clients": 3, "evaluation_examples": 20},
        privacy=RECORD,
        model={"trainable": {"kind": "head"}},
        audit={"observers": ["server"], "attacks": ["idlg_label"]},
    )
    (folder / "run.toml").write_text(run_file.dump(made))
    load(folder / "run.toml", runs=folder / "runs").start()
    return folder / "runs" / "test"


def look_at_run(folder: Path) -> None:
    """Do with a run what commands do that read it."""
    actions: tuple[Callable[[], object], ...] = (
        lambda: Store.read(folder).resume(),
        lambda: Store.read(folder).best(),
        lambda: Store.read(folder).run_begun(),
        lambda: runs.read_run(folder),
        lambda: document.read(folder),
        lambda: list(read_observations(folder / "observations")),
        lambda: ledger_table.open_for_reading(folder).close(),
        lambda: stored_noise(folder),
    )
    for action in actions:
        with contextlib.suppress(FfmError, DefenseError):
            action()


def test_no_file_of_a_run_holds_its_readers_as_a_pipe(finished: Path, tmp_path: Path) -> None:
    names = sorted(path.relative_to(finished) for path in finished.rglob("*") if path.is_file())
    unread = (".html", ".md", ".lock", ".key")
    looked_at = [
        name for name in names if name.suffix not in unread and name.parts[0] not in ("home", "adapter")
    ]
    assert len(looked_at) > 12
    for number, name in enumerate(looked_at):
        folder = tmp_path / str(number)
        shutil.copytree(finished, folder)
        pipe = folder / name
        pipe.unlink()
        os.mkfifo(pipe)
        with nobody_waits(pipe):
            look_at_run(folder)


def rows_in(folder: Path) -> None:
    lines = [json.dumps({"text": f"note {i}", "label": i % 2}) for i in range(8)]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")


def beside_a_license(folder: Path) -> Path:
    rows_in(folder)
    return folder / "README.md"


def saved_arrow(folder: Path) -> Path:
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "rows.arrow"}]}))
    return folder / "rows.arrow"


def saved_state_of_a_part(folder: Path) -> Path:
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    (folder / "train").mkdir()
    table = pa.table({"text": ["a"], "label": [0]})
    place = str(folder / "train" / "rows.arrow")
    with pa.OSFile(place, "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return folder / "train" / "state.json"


def picture_of_a_class(folder: Path) -> Path:
    for name in ("cat", "dog"):
        (folder / "train" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / "train" / name / "a.png")
    return folder / "train" / "cat" / "b.png"


def read_rows(folder: Path) -> None:
    kind = "image_classification" if (folder / "train" / "cat").is_dir() else "text_classification"
    model = "builtin:tiny-vit" if kind.startswith("image") else "builtin:tiny-bert"
    made = make(
        task={"kind": kind, "data": str(folder), "clients": 1, "validation": "hold_out"},
        federation={"rounds": 1, "cohort": 1},
        model={"name": model, "trainable": {"kind": "head"}},
    )
    simulation.load_dataset(made, folder)


@pytest.mark.parametrize(
    "planted", [beside_a_license, saved_arrow, saved_state_of_a_part, picture_of_a_class]
)
def test_no_file_beside_or_among_rows_holds_a_plan_as_a_pipe(
    planted: Callable[[Path], Path], tmp_path: Path
) -> None:
    pipe = planted(tmp_path)
    os.mkfifo(pipe)
    with nobody_waits(pipe), contextlib.suppress(DataError):
        read_rows(tmp_path)


def model(path: Path) -> object:
    (path.parent / "config.json").write_text(json.dumps({"model_type": "bert"}))
    return load_backbone(str(path.parent), kind="masked_lm", labels=None, seed=0, base=path.parent)


def guard(path: Path) -> object:
    return ReplayGuard.open(path, owner=bytes(32))


def ledger_with_a_pipe_for_an_anchor(path: Path) -> object:
    beside = path.parent / "ledger.sqlite"
    Ledger.open(beside).close()
    beside.with_name("ledger.sqlite.head").unlink()
    os.rename(path, beside.with_name("ledger.sqlite.head"))
    os.symlink(beside.with_name("ledger.sqlite.head"), path)
    return Ledger.open(beside)


READERS: dict[str, Callable[[Path], object]] = {
    "rows.csv": files.read_table,
    "rows.jsonl": files.read_table,
    "rows.parquet": files.read_table,
    "rows.npz": files.read_table,
    "rows.tsv": delimited.guess_encoding,
    "model.safetensors": model,
    "some.json": read_json,
    "truth.safetensors": load_truth,
    "identity.key": key_file.read_key_file,
    "guard.json": guard,
    "anchor": ledger_with_a_pipe_for_an_anchor,
}


@pytest.mark.parametrize("name", READERS)
def test_what_reads_a_file_refuses_a_pipe(name: str, tmp_path: Path) -> None:
    pipe = tmp_path / name
    os.mkfifo(pipe, mode=0o600)
    with nobody_waits(pipe), pytest.raises((FfmError, DefenseError, ValueError, OSError)):
        READERS[name](pipe)


def test_a_device_and_a_file_larger_than_any_are_refused_unread(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no regular file"):
        read_regular(Path("/dev/zero"))
    large = tmp_path / "train.jsonl"
    with large.open("wb") as file:
        file.truncate(100 << 30)  # takes no room on the disk
    with pytest.raises(OSError, match="larger than"):
        read_regular(large)
    for reader in (files.read_table, delimited.guess_encoding):
        with pytest.raises(DataError, match="more than the bound"):
            reader(large)
    (tmp_path / "train.csv").symlink_to("/dev/zero")
    with pytest.raises((DataError, OSError), match="no regular file"):
        files.read_table(tmp_path / "train.csv")


def test_a_model_folder_says_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.safetensors: no regular files"):
        model(tmp_path / "model.safetensors")


def test_a_sound_file_is_read_as_it_is(tmp_path: Path) -> None:
    content = RandomSource.system().random_bytes(1000)
    (tmp_path / "some").write_bytes(content)
    (tmp_path / "link").symlink_to(tmp_path / "some")
    assert read_regular(tmp_path / "some") == read_regular(tmp_path / "link") == content
    with pytest.raises(OSError, match="larger than 999 bytes"):
        read_regular(tmp_path / "some", 999)
