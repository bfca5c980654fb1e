"""Four echoing sites over an engine with processes of its own, as the contract of couriers wants them."""

from __future__ import annotations

from pathlib import Path
from typing import Generic, Protocol, TypeVar

from ffm_secure.engines.nvflare.site_service import serve
from ffm_secure.transport.courier import Courier
from ffm_secure.transport.local_socket import Answering
from tests.engines.courier_contract import ALL, EchoSite
from tests.engines.nvflare_federation import NAMES

RUN = "ab" * 32


class EngineCourier(Courier, Protocol):
    def open(self, smallest: int, seconds: float) -> None: ...

    def close(self) -> None: ...


C = TypeVar("C", bound=EngineCourier)
A = TypeVar("A", bound=EngineCourier, covariant=True)


class EngineMachines(Protocol[A]):
    def courier(self, run: str) -> A: ...

    def engine_folder(self, name: str) -> Path: ...

    def kill(self, name: str) -> None: ...

    def start_site(self, name: str) -> None: ...


class MachineFederation(Generic[C]):
    """Say, by engine, within how many seconds a fall is noticed and a site is back."""

    notice: float
    rejoin = 60.0

    def __init__(self, machines: EngineMachines[C]) -> None:
        self.sites = {site: EchoSite() for site in ALL}
        self.machines = machines
        self.doors: dict[int, Answering] = {site: self.serve(site) for site in ALL}
        self.courier: C = machines.courier(RUN)

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
