"""Whole runs of four sites over Flower reach the very numbers of the local engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")

from tests.engines.flower_federation import FlowerMachines
from tests.engines.test_nvflare_runs import same_as_local, same_with_kills
from tests.parties.helpers import PLAIN, SEEDED, notes_run
from tests.parties.test_parity import protection

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "privacy"),
    [("none", PLAIN), ("secagg", PLAIN), ("secagg", SEEDED), ("bfv", SEEDED), ("ckks", PLAIN)],
    ids=lambda value: value if isinstance(value, str) else f"unit {value['unit']}",
)
def test_the_same_numbers(
    kind: str, privacy: dict[str, Any], flower_machines: FlowerMachines, tmp_path: Path
) -> None:
    if kind in ("bfv", "ckks"):
        pytest.importorskip("tenseal", reason="the extra 'he' is not installed")
    config = notes_run(privacy=privacy, protection=protection(kind))
    same_as_local(config, flower_machines, tmp_path)


@pytest.mark.parametrize("kind", ["none", "secagg"])
def test_kills_where_the_local_engine_loses_sites(
    kind: str, flower_machines: FlowerMachines, tmp_path: Path
) -> None:
    same_with_kills(kind, SEEDED, flower_machines, tmp_path)
