"""Whole runs of four sites over NVFlare reach the very numbers of the local engine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ffm_secure.agreed.agreement import run_digest
from ffm_secure.config.run_file import RunConfig
from ffm_secure.engines.nvflare.courier import NVFlareCourier
from ffm_secure.transport.envelope import header_of
from tests.engines.nvflare_federation import NAMES, Machines
from tests.engines.site_processes import SiteProcesses
from tests.federation.helpers import train
from tests.parties.helpers import PLAIN, SEEDED, Federation, found, notes_run, run
from tests.parties.test_parity import protection


@contextlib.contextmanager
def served(federation: Federation, machines: Machines) -> Iterator[NVFlareCourier]:
    """Let each site's process answer its relay, and open a courier for the run."""
    places = {federation.site(name): machines.engine_folder(name) for name in NAMES}
    with contextlib.closing(SiteProcesses(places)):
        digest = run_digest(federation.config)
        courier = machines.courier(digest, deadline=lambda message: header_of(message).deadline)
        with contextlib.closing(courier):
            yield courier


def same_as_local(config: RunConfig, machines: Machines, place: Path) -> None:
    local = train(config, place / "local")[1]
    federation = found(place, config)
    with served(federation, machines) as courier:
        there = run(federation, courier)
    assert torch.equal(there.state.vector, local.state.vector)
    assert [(item.survivors, item.loss) for item in there.records] == [
        (item.survivors, item.loss) for item in local.records
    ]
    assert float((there.state.vector != 0).sum()) > 0


def test_masks_and_seeded_noise(machines: Machines, tmp_path: Path) -> None:
    same_as_local(notes_run(privacy=SEEDED, protection=protection("secagg")), machines, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("privacy", [PLAIN, SEEDED], ids=["no unit", "seeded noise"])
@pytest.mark.parametrize("kind", ["none", "secagg", "bfv", "ckks"])
def test_every_protection(kind: str, privacy: dict[str, Any], machines: Machines, tmp_path: Path) -> None:
    if kind in ("bfv", "ckks"):
        pytest.importorskip("tenseal", reason="the extra 'he' is not installed")
    same_as_local(notes_run(privacy=privacy, protection=protection(kind)), machines, tmp_path)
