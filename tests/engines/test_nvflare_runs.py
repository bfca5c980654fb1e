"""Whole runs of four sites over NVFlare reach the very numbers of the local engine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch

from ffm_secure.agreed.agreement import run_digest
from ffm_secure.config.run_file import RunConfig
from ffm_secure.server.timetable import Timetable
from ffm_secure.transport.courier import Deadline, MachineCourier
from ffm_secure.transport.envelope import header_of
from ffm_secure.transport.local_socket import wait_until
from tests.engines.nvflare_federation import NAMES
from tests.engines.site_processes import SiteProcesses
from tests.federation.helpers import train
from tests.parties.helpers import PLAIN, SEEDED, Federation, found, notes_run, run
from tests.parties.kills import Killing, Kills, runs_with_losses
from tests.parties.test_parity import protection


# As long as a machine takes that does much else: who is late is lost, and then the numbers are others.
PATIENT = Timetable(join=120.0, rejoin=60.0, train=180.0, other=120.0, gather=240.0, patience=240.0)


class OpenCourier(MachineCourier, Protocol):
    """A courier of whatever engine that is waited for."""

    def open(self, *, smallest: int, seconds: float) -> None: ...


class Machines(Protocol):
    """A coordinator's processes and four relays, of whatever engine."""

    def engine_folder(self, name: str) -> Path: ...

    def courier(self, run: str, *, deadline: Deadline) -> OpenCourier: ...


@contextlib.contextmanager
def served(federation: Federation, machines: Machines) -> Iterator[tuple[OpenCourier, SiteProcesses]]:
    """Let each site's process answer its relay, and open a courier for the run."""
    places = {federation.site(name): machines.engine_folder(name) for name in NAMES}
    with contextlib.closing(SiteProcesses(places)) as sites:
        digest = run_digest(federation.config)
        courier = machines.courier(digest, deadline=lambda message: header_of(message).deadline)
        with contextlib.closing(courier):
            courier.open(smallest=len(NAMES), seconds=240.0)  # a run that begins without one is another run
            yield courier, sites


def same_as_local(config: RunConfig, machines: Machines, place: Path) -> None:
    local = train(config, place / "local")[1]
    federation = found(place, config, timetable=PATIENT)
    with served(federation, machines) as (courier, _):
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


def same_with_kills(kind: str, privacy: dict[str, Any], machines: Machines, place: Path) -> None:
    """A site's service is killed; its relay lives on and reaches the one that is started again."""
    if kind in ("bfv", "ckks"):
        pytest.importorskip("tenseal", reason="the extra 'he' is not installed")
    settings = {**protection(kind), **({"colluding": 0} if kind == "secagg" else {})}
    losing, config = runs_with_losses(settings, privacy)
    local = train(losing, place / "local")[1]
    federation = found(place, config, policy={"colluders": 0}, timetable=PATIENT)
    with served(federation, machines) as (courier, sites):
        places = [federation.site(name) for name in NAMES]

        def start(site: int) -> None:
            sites.start(places[site])
            assert wait_until(lambda: site in courier.sites(), 60.0), "the relay does not see its service"

        kills = Kills(losing=losing, kill=lambda site: sites.kill(places[site]), start=start)
        there = run(federation, Killing(courier, kills), callback=kills)
    assert kills.killed >= 3
    assert torch.equal(there.state.vector, local.state.vector)
    assert [item.survivors for item in there.records] == [item.survivors for item in local.records]


@pytest.mark.slow
@pytest.mark.parametrize("privacy", [PLAIN, SEEDED], ids=["no unit", "seeded noise"])
@pytest.mark.parametrize("kind", ["none", "secagg", "bfv", "ckks"])
def test_kills_where_the_local_engine_loses_sites(
    kind: str, privacy: dict[str, Any], machines: Machines, tmp_path: Path
) -> None:
    same_with_kills(kind, privacy, machines, tmp_path)
