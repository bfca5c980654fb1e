"""Whatever is wrong with a run file, a data file or a run directory: a clear error, never a traceback, never half a file."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ffm_secure import config, ledgers, report, setup
from ffm_secure.errors import FfmError
from ffm_secure.run import load
from ffm_secure.schema import dump_toml
from ffm_secure.store import Store
from tests.federation.helpers import make

CASES = 60


def damage(content: bytes, chance: random.Random) -> bytes:
    """Return a wrong version: bits flipped, cut, repeated, filled with noise, or with lines shuffled or edited."""
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


def test_data_files(tmp_path: Path) -> None:
    table = {"text": [f"note number {index}" for index in range(40)], "label": [index % 2 for index in range(40)]}
    pq.write_table(pa.table(table), tmp_path / "train.parquet")
    (tmp_path / "train.csv").write_text("text,label\n" + "\n".join(f"note {i},{i % 2}" for i in range(40)))
    (tmp_path / "train.jsonl").write_text(
        "\n".join(json.dumps({"text": f"note {i}", "label": i % 2}) for i in range(40))
    )
    np.savez(tmp_path / "train.npz", images=np.zeros((40, 8, 8), dtype=np.uint8), labels=np.arange(40) % 2)
    for seed in range(CASES):
        chance = random.Random(seed)
        name = chance.choice(["train.parquet", "train.csv", "train.jsonl", "train.npz"])
        folder = tmp_path / f"case{seed}"
        folder.mkdir()
        (folder / name).write_bytes(damage((tmp_path / name).read_bytes(), chance))
        kind = "image_classification" if name.endswith("npz") else "text_classification"
        made = make(task={"kind": kind, "data": str(folder), "clients": 4})
        try:
            setup.load_dataset(made, tmp_path)
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
        path.relative_to(finished).as_posix() for path in finished.rglob("*") if path.is_file() and path.name != ".lock"
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
    try:
        text = (folder / "report.json").read_text()
    except UnicodeDecodeError:
        return
    report.write(report.from_json(text), folder)


@pytest.mark.slow
def test_a_thousand(finished: Path, tmp_path: Path) -> None:
    for start in range(1000, 1000 + 340, 20):
        test_run_files(start, tmp_path)
        test_run_directories(start, finished, tmp_path)
