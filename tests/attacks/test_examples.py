"""The ten-line uses under examples/audit run, stay short, and show what they promise."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "audit"
SHOWN = {
    "plain_pytorch": r"largest error: \d\.\d+e-0[4-9]|largest error: 0\.0\b|largest error: 0\.000",
    "federated_delta": r"\[2, 1, 3, 0\]",
    "secure_sum": r"noise 0\.0: \[2, 3, 0, 1\]",
    "crafted_broadcast": r"layout",
}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_examples_run_and_stay_short(path, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        runpy.run_path(str(path))
    assert re.search(SHOWN[path.stem], capsys.readouterr().out)
    body = path.read_text(encoding="utf-8").split('"""')[2]
    assert len([line for line in body.splitlines() if line.strip() and "import" not in line]) <= 14
