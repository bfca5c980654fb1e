"""Four sites over NVFlare, with mutual TLS on loopback: the contract of all couriers, and its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from ffm_secure.engines.nvflare.courier import NVFlareCourier, Patience
from ffm_secure.engines.nvflare.site_service import serve
from ffm_secure.errors import FfmError
from ffm_secure.transport.courier import Lost
from ffm_secure.transport.local_socket import Answering, wait_until
from tests.engines.nvflare_federation import NAMES, Machines
from tests.engines.courier_contract import (
    ALL,
    CourierContract,
    CourierLossContract,
    EchoSite,
    by_site,
    content,
)

RUN = "ab" * 32


class NVFlareFederation:
    notice = 20.0
    rejoin = 60.0

    def __init__(self, machines: Machines) -> None:
        self.sites = {site: EchoSite() for site in ALL}
        self.machines = machines
        self.doors: dict[int, Answering] = {site: self.serve(site) for site in ALL}
        self.courier: NVFlareCourier = self.machines.courier(RUN)

    def open(self) -> None:
        self.courier.open(smallest=len(NAMES), seconds=90.0)

    def serve(self, site: int) -> Answering:
        folder = self.machines.engine_folder(NAMES[site])
        return serve(folder, self.sites[site].handle, lambda run: run == RUN)

    def kill(self, site: int) -> None:
        self.machines.kill(NAMES[site])

    def revive(self, site: int) -> None:
        self.machines.start_site(NAMES[site])

    def restart(self) -> None:
        self.courier.close()
        self.courier = self.machines.courier(RUN)
        self.courier.open(smallest=len(NAMES), seconds=90.0)

    def close(self) -> None:
        self.courier.close()
        for door in self.doors.values():
            door.close()


@pytest.fixture(scope="module")
def federation(machines: Machines) -> Iterator[NVFlareFederation]:
    federation = NVFlareFederation(machines)
    try:
        federation.open()
        yield federation
    finally:
        federation.close()


class TestNVFlare(CourierContract):
    pass


@pytest.mark.slow
class TestNVFlareLosses(CourierLossContract):
    pass


def replies_of(federation: NVFlareFederation, stage: str = "echo") -> set[int]:
    """Return who answers."""
    replies = by_site(federation.courier, stage, dict.fromkeys(ALL, b"x"))
    return {site for site, reply in replies.items() if not isinstance(reply.content, Lost)}


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    assert wait_until(condition, seconds, 0.3), f"not within {seconds:g} s"


def test_a_service_that_starts_again_is_reached_by_the_same_job(federation: NVFlareFederation) -> None:
    jobs = federation.courier.jobs_begun
    federation.doors[3].close()
    assert replies_of(federation) == {0, 1, 2}
    federation.doors[3] = federation.serve(3)
    wait_for(lambda: replies_of(federation) == set(ALL), 10.0)
    assert federation.courier.jobs_begun == jobs


def test_everything_in_the_folders_is_its_owners_alone(federation: NVFlareFederation) -> None:
    open_to_others = [path for path in federation.machines.folder.rglob("*") if path.stat().st_mode & 0o077]
    assert open_to_others == []
    assert len(list(federation.machines.folder.rglob("*"))) > 50


def test_nothing_of_a_message_stays_on_a_disk(federation: NVFlareFederation) -> None:
    mark = b"a row that nobody else may see"
    assert content(by_site(federation.courier, "echo", {0: mark * 1000})[0]) == mark * 1000
    files = [path for path in federation.machines.folder.rglob("*") if path.is_file()]
    assert not [path for path in files if mark in path.read_bytes()]
    assert max(path.stat().st_size for path in files) < 2_000_000


@pytest.mark.slow
def test_a_run_that_nobody_allowed_starts_nowhere(federation: NVFlareFederation) -> None:
    other = federation.machines.courier("cd" * 32, Patience(start=15.0))
    try:
        with pytest.raises(FfmError, match="missing: north, south, east, west"):
            other.open(smallest=1, seconds=20.0)
        assert other.sites() == frozenset()
    finally:
        other.close()
