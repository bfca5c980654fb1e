"""An error about a file of private rows says where and what to do, and quotes no row."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ffm_secure.data.dataset import load
from ffm_secure.errors import DataError

SECRET = "Xanthippe"  # stands in every row that is damaged below, and in nothing else


def csv(text: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "train.csv").write_text(text)
        return folder / "train.csv"

    return write


def jsonl(*lines: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
        return folder / "train.jsonl"

    return write


def latin(folder: Path) -> Path:
    (folder / "train.csv").write_bytes(f"text,label\n{SECRET} \xe9,1\n".encode("latin-1"))
    return folder / "train.csv"


def parquet(**columns: list[object]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        pq.write_table(pa.table(columns), folder / "train.parquet")
        return folder / "train.parquet"

    return write


def numbers(folder: Path) -> Path:
    np.savez(folder / "train.npz", label=np.array([70_123_456, 1]), text=np.array(["a", "b"]))
    return folder / "train.npz"


def objects(folder: Path) -> Path:
    np.savez(folder / "train.npz", text=np.array([{"a": SECRET}], dtype=object))
    return folder / "train.npz"


DAMAGED = {
    "no header": csv(f"{SECRET} is ill,1\nfine,0\nwell,1\nbetter,0\n"),
    "no header, tab": csv(f"{SECRET},1\nfine,0\nwell,1\nbetter,0\n"),
    "no header, twice the same": csv(f"{SECRET},{SECRET}\nfine,0\nwell,1\nbetter,0\n"),
    "a field too many": csv(f"text,label\n{SECRET},{SECRET},1\n"),
    "an open quote": csv(f'text,label\n"{SECRET},1\n'),
    "a quote within": csv(f'text,label\n"{SECRET}"x,1\n'),
    "another encoding": latin,
    "broken json": jsonl('{"text": "a", "label": 0}', f'{{"text": "{SECRET}'),
    "bare word": jsonl(f'{{"text": {SECRET}}}'),
    "a number of thousands of digits": jsonl(f'{{"text": "{SECRET}", "label": {"9" * 6000}}}'),
    "not a number": jsonl(f'{{"text": "{SECRET}", "label": NaN}}'),
    "deep": jsonl("[" * 100_000 + SECRET),
    "a key of its own": jsonl('{"text": "a", "label": 0}', f'{{"text": "b", "label": 0, "{SECRET}": 1}}'),
    "a list": jsonl(f'["{SECRET}"]'),
    "labels of two types": jsonl('{"text": "a", "label": 0}', f'{{"text": "b", "label": "{SECRET}"}}'),
    "a list as label": parquet(text=["a", "b"], label=[[SECRET], [SECRET]]),
    "a list as text": parquet(text=[[SECRET], ["a"]], label=[0, 1]),
    "objects": objects,
}


@pytest.mark.parametrize("write", DAMAGED.values(), ids=DAMAGED)
def test_no_error_quotes_a_row(write: Callable[[Path], Path], tmp_path: Path) -> None:
    path = write(tmp_path)
    with pytest.raises(DataError) as caught:
        load(str(path), kind="text_classification", base=tmp_path, seed=1)
    assert str(path) in str(caught.value)
    shown = "".join(traceback.format_exception(caught.value))
    assert SECRET not in shown
    assert caught.value.__cause__ is None


def test_a_label_out_of_range_is_not_quoted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 0: a label in column 'label' is outside 0 to") as caught:
        load(str(numbers(tmp_path)), kind="text_classification", base=tmp_path, seed=1)
    assert "70123456" not in str(caught.value)
