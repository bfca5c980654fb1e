"""Coordinator and sites with folders and keys of their own reach the very numbers of the local engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.federation.helpers import train
from tests.parties.helpers import PLAIN, SEEDED, found, notes_run, open_all, run

SECAGG = {"kind": "secagg", "threshold": 3}


def protection(kind: str) -> dict[str, Any]:
    if kind == "secagg":
        return SECAGG
    return {"kind": kind, "threshold": 3, "value_bits": 12}


EVERY = [(kind, privacy) for kind in ("none", "secagg", "bfv", "ckks") for privacy in (PLAIN, SEEDED)]
BY_DEFAULT = [("none", PLAIN), ("secagg", SEEDED), ("bfv", SEEDED), ("ckks", PLAIN)]


@pytest.mark.parametrize(
    ("kind", "privacy"),
    [pytest.param(*case, marks=() if case in BY_DEFAULT else pytest.mark.slow) for case in EVERY],
    ids=[f"{kind}, unit {privacy['unit']}" for kind, privacy in EVERY],
)
def test_sessions_equal_the_local_engine(kind: str, privacy: dict[str, Any], tmp_path: Path) -> None:
    if kind in ("bfv", "ckks"):
        pytest.importorskip("tenseal", reason="the extra 'he' is not installed")
    config = notes_run(privacy=privacy, protection=protection(kind))
    local = train(config, tmp_path / "local")[1]
    federation = found(tmp_path, config)
    courier = open_all(federation)
    try:
        there = run(federation, courier)
    finally:
        courier.close()
    assert torch.equal(there.state.vector, local.state.vector)
    assert [(item.survivors, item.aborted, item.loss, item.metric) for item in there.records] == [
        (item.survivors, item.aborted, item.loss, item.metric) for item in local.records
    ]
    assert float((there.state.vector != 0).sum()) > 0
