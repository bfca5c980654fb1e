"""Whatever is wrong with a run file, a data file or a run directory:
a clear error, never a traceback, never half a file.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ffm_secure.api import load
from ffm_secure.cli import ledger_table as ledgers
from ffm_secure.config import run_file as config
from ffm_secure.config.run_file import RunConfig
from ffm_secure.config.schema import dump_toml
from ffm_secure.engines import simulation
from ffm_secure.errors import FfmError
from ffm_secure.report import document as report
from ffm_secure.storage.run_directory import Store
from tests.federation.helpers import call, make

CASES = 60


def damage(content: bytes, chance: random.Random) -> bytes:
    """Return a wrong version: bits flipped, cut, repeated, filled with noise,
    or with lines shuffled or edited.
    """
    data = bytearray(content)
    kind = chance.randrange(6)
    if kind == 0 and data:
        for _ in range(chance.randint(1, 20)):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif kind == 1:
        del data[chance.randrange(len(data) + 1) :]
    elif kind == 2:
        at = chance.randrange(len(data) + 1)
        data[at:at] = chance.randbytes(chance.randint(1, 200))
    elif kind == 3:
        return chance.randbytes(chance.randint(0, 500))
    elif kind == 4:
        lines = data.split(b"\n")
        chance.shuffle(lines)
        data = bytearray(b"\n".join(lines))
    else:
        digits = [at for at, byte in enumerate(data) if 48 <= byte <= 57]
        for at in chance.sample(digits, min(len(digits), 3)):
            data[at : at + 1] = chance.choice([b"-", b"9e999", b"nan", b'"x"', b"[", b"true", b"0"])
    return bytes(data)


@pytest.mark.parametrize("start", range(0, CASES, 20))
def test_run_files(start: int, tmp_path: Path) -> None:
    good = dump_toml(make()).encode()
    path = tmp_path / "run.toml"
    for seed in range(start, start + 20):
        path.write_bytes(damage(good, random.Random(seed)))
        try:
            config.load(path)
        except FfmError as error:
            assert "run.toml" in str(error)


def write_sources(folder: Path) -> tuple[str, ...]:
    """Write one good file of every kind; return their names."""
    table = {
        "text": [f"note number {index}" for index in range(40)],
        "label": [index % 2 for index in range(40)],
    }
    pq.write_table(pa.table(table), folder / "train.parquet")
    (folder / "train.csv").write_text("text,label\n" + "\n".join(f"note {i},{i % 2}" for i in range(40)))
    (folder / "train.jsonl").write_text(
        "\n".join(json.dumps({"text": f"note {i}", "label": i % 2}) for i in range(40))
    )
    np.savez(folder / "train.npz", images=np.zeros((40, 8, 8), dtype=np.uint8), labels=np.arange(40) % 2)
    return ("train.parquet", "train.csv", "train.jsonl", "train.npz")


def damaged_source(sources: Path, folder: Path, seed: int) -> RunConfig:
    """Put one damaged data file into a new folder; return the run that would read it."""
    chance = random.Random(seed)
    name = chance.choice(["train.parquet", "train.csv", "train.jsonl", "train.npz"])
    folder.mkdir()
    (folder / name).write_bytes(damage((sources / name).read_bytes(), chance))
    image = name.endswith("npz")
    kind = "image_classification" if image else "text_classification"
    model = {"name": "builtin:tiny-vit" if image else "builtin:tiny-bert", "trainable": {"kind": "head"}}
    return make(task={"kind": kind, "data": str(folder), "clients": 4}, model=model)


def test_data_files(tmp_path: Path) -> None:
    write_sources(tmp_path)
    for seed in range(CASES):
        made = damaged_source(tmp_path, tmp_path / f"case{seed}", seed)
        try:
            simulation.load_dataset(made, tmp_path)
        except FfmError as error:
            assert len(str(error)) > 10


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the smallest run once; the tests damage copies of its directory."""
    folder = tmp_path_factory.mktemp("finished")
    made = make(
        federation={"rounds": 2, "cohort": 3},
        task={"clients": 3},
        privacy={"unit": "record", "epsilon": 8.0, "delta": 1e-5, "clip_norm": 1.0},
    )
    (folder / "run.toml").write_text(config.dump(made))
    load(folder / "run.toml", runs=folder / "runs").start()
    return folder / "runs" / "test"


@pytest.mark.parametrize("start", range(0, CASES, 20))
def test_run_directories(start: int, finished: Path, tmp_path: Path) -> None:
    """Resume, ledger and report on a damaged directory: each either works or says clearly what is wrong."""
    from defenses.errors import DefenseError

    names = sorted(
        path.relative_to(finished).as_posix()
        for path in finished.rglob("*")
        if path.is_file() and path.name != ".lock"
    )
    for seed in range(start, start + 20):
        chance = random.Random(seed)
        folder = tmp_path / f"case{seed}"
        shutil.copytree(finished, folder)
        victim = folder / chance.choice(names)
        victim.write_bytes(damage(victim.read_bytes(), chance))
        before = sorted(path.name for path in folder.iterdir())
        for action in (_resume, _ledger, _report):
            try:
                action(folder)
            except (FfmError, DefenseError) as error:
                assert len(str(error)) > 10
        after = sorted(path.name for path in folder.iterdir() if not path.name.startswith("ledger.sqlite-"))
        assert [name for name in after if name.endswith(".new")] == []
        assert set(before) <= set(after) | {"ledger.sqlite-journal", "ledger.sqlite-wal", "ledger.sqlite-shm"}


def _resume(folder: Path) -> None:
    made = Store.read(folder).config()
    with Store.open(folder, made) as store:
        store.resume()


def _ledger(folder: Path) -> None:
    opened = ledgers.open_for_reading(folder)
    try:
        opened.verify()
        ledgers.ledger_lines(ledgers.ledger_table(opened, owner=""))
    finally:
        opened.close()


def _report(folder: Path) -> None:
    report.write(report.read(folder), folder)


def check_command(*words: str, cwd: Path) -> int:
    """Run one command as a user would:
    it works, or it ends with a code that means something and one clear message.
    """
    done = call(*words, cwd=cwd)
    assert done.returncode in (0, 2, 3, 4, 5), (words, done)
    assert "Traceback" not in done.stdout + done.stderr, (words, done)
    assert done.returncode == 0 or done.stderr.startswith("error: "), (words, done)
    return done.returncode


def snapshot(folder: Path) -> dict[str, bytes]:
    """Return every file of a folder, but SQLite's own."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "sqlite-" not in path.name and path.name != ".lock"
    }


@pytest.mark.slow
def test_a_thousand(finished: Path, tmp_path: Path) -> None:
    """1,000 damaged run files, data files and run directories, each met through the command line."""
    refused = {"run file": 0, "data": 0, "directory": 0}
    good = dump_toml(make()).encode()
    for seed in range(1000, 1334):
        (tmp_path / "run.toml").write_bytes(damage(good, random.Random(seed)))
        refused["run file"] += check_command("plan", "run.toml", cwd=tmp_path) != 0
    write_sources(tmp_path)
    for seed in range(2000, 2333):
        made = damaged_source(tmp_path, tmp_path / f"data{seed}", seed)
        (tmp_path / "data.toml").write_text(config.dump(made))
        refused["data"] += check_command("plan", "data.toml", cwd=tmp_path) != 0
    names = sorted(name for name in snapshot(finished) if name != ".lock")
    looked_at = [name for name in names if "/" not in name]  # a run has many files that these do not read
    for seed in range(3000, 3333):
        chance = random.Random(seed)
        folder = tmp_path / f"run{seed}"
        shutil.copytree(finished, folder)
        victim = folder / chance.choice(names if seed % 2 else looked_at)
        victim.write_bytes(damage(victim.read_bytes(), chance))
        before = snapshot(folder)
        codes = [
            check_command("ledger", folder.name, cwd=tmp_path),
            check_command("report", folder.name, cwd=tmp_path),
        ]
        after = snapshot(folder)
        kept = [name for name in before if name not in ("report.html", "details.html", "report.json")]
        assert {name: before[name] for name in kept} == {name: after.get(name) for name in kept}, (
            "data were changed"
        )
        assert not [name for name in after if name.endswith(".new")], "a half-written file was left"
        refused["directory"] += any(codes)
        shutil.rmtree(folder)
    print(refused)
    assert min(refused.values()) >= 50, refused
