"""An owner leaves by one command; later plans say so, and the ledger says what is still out there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from defenses.dp import Ledger
from ffm_secure.config import run_file
from ffm_secure.quantities import bound as rounded_up
from tests.federation.helpers import call, make

PRIVATE = {"unit": "record", "epsilon": 4.0, "delta": 1e-5, "clip_norm": 1.0, "ledger": "owner.sqlite"}


def write(folder: Path, name: str, **privacy: object) -> None:
    values = {**PRIVATE, **privacy}
    config = make(name=name, federation={"rounds": 1, "cohort": 4}, privacy=values)
    (folder / f"{name}.toml").write_text(run_file.dump(config))


def test_who_leaves_is_used_by_no_later_run(tmp_path: Path) -> None:
    file = str(tmp_path / "owner.sqlite")
    write(tmp_path, "first")
    assert call("ledger", "init", file, "--epsilon", "20").returncode == 0
    assert call("run", "first.toml", "--quiet", cwd=tmp_path).returncode == 0
    with Ledger.open(file, create=False) as ledger:
        (owner, *_) = sorted({entry.owner for entry in ledger.entries() if entry.kind == "reserve"})
    left = call("ledger", "withdraw", file, "--owner", owner, "--because", "contract ended", "--json")
    assert left.returncode == 0, left.stderr
    answer = json.loads(left.stdout)
    (bound,) = answer["bounds"]
    assert (answer["owner"], answer["because"], bound["unit"]) == (owner, "contract ended", "record")
    assert 0 < bound["epsilon"] <= 4.0
    words = f"{owner}, 1 block (contract ended); released models may still reveal at most epsilon"
    assert f"{words} {rounded_up(bound['epsilon'])} at delta 1e-5 per record" in call("ledger", file).stdout
    assert words in call("ledger", "verify", file).stdout
    assert "contract ended" in call("ledger", file, "--export", "csv").stdout
    write(tmp_path, "second")
    with_reason = f"'{owner}' withdrawn on"
    write(tmp_path, "open", unit="none", reason="a test", epsilon=0.0, delta=0.0, clip_norm=0.0)
    for name in ("second", "open"):
        refused = call("plan", f"{name}.toml", cwd=tmp_path)
        assert refused.returncode == 3, refused.stdout
        assert with_reason in refused.stderr
        assert "contract ended" in refused.stderr
    head = call("ledger", "verify", file).stdout
    assert call("run", "second.toml", cwd=tmp_path).returncode == 3
    assert call("ledger", "verify", file).stdout == head


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--because", "x"), 2, "give --owner NAME or --block N, one of the two"),
        (("--owner", "a", "--block", "2", "--because", "x"), 2, "one of the two"),
        (("--block", "2"), 2, "say why, it is recorded for good"),
        (("--block", "99", "--because", "x"), 2, "block 99: this ledger holds no such block"),
        (("--owner", "nobody", "--because", "x"), 5, "the ledger knows nobody"),
    ],
)
def test_what_is_not_meant_is_not_withdrawn(
    tmp_path: Path, words: tuple[str, ...], code: int, said: str
) -> None:
    file = str(tmp_path / "owner.sqlite")
    call("ledger", "init", file, "--epsilon", "4")
    before = os.stat(file).st_size, call("ledger", "verify", file).stdout
    refused = call("ledger", "withdraw", file, *words)
    assert refused.returncode == code, refused.stderr
    assert said in refused.stderr
    assert (os.stat(file).st_size, call("ledger", "verify", file).stdout) == before
