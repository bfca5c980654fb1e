"""A federation over Flower on this machine: the folders of the other engine's, and other processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ffm_secure.engines.flower import processes, running
from ffm_secure.engines.flower.courier import FlowerCourier, Patience
from ffm_secure.engines.flower.folders import ENGINE, write_relay_folder
from ffm_secure.engines.nvflare.enrolment import COORDINATOR
from ffm_secure.engines.nvflare.processes import Process
from ffm_secure.transport.courier import Deadline
from tests.engines import nvflare_federation


@dataclass(slots=True, kw_only=True)
class FlowerMachines:
    """The folders of everybody, and the processes that run."""

    folder: Path
    sites: tuple[str, ...]
    server: Process | None = None
    gate: Process | None = None
    relays: dict[str, Process] = field(default_factory=dict)

    def engine_folder(self, name: str) -> Path:
        return self.folder / name / ENGINE

    def start(self) -> None:
        folder = self.engine_folder(COORDINATOR)
        self.server, self.gate = processes.start_server(folder), processes.start_gate(folder)
        for name in self.sites:
            self.start_site(name)

    def start_site(self, name: str) -> None:
        self.relays[name] = processes.start_relay(self.engine_folder(name))

    def kill(self, name: str) -> None:
        self.relays.pop(name).kill()

    def courier(
        self, run: str, patience: Patience | None = None, deadline: Deadline | None = None
    ) -> FlowerCourier:
        folder = self.engine_folder(COORDINATOR)
        return running.connect(folder, self.sites, run, patience=patience, deadline=deadline)

    def stop(self) -> None:
        for process in (*self.relays.values(), self.gate, self.server):
            if process is not None:
                process.kill()


def enrol(folder: Path, sites: Sequence[str]) -> FlowerMachines:
    """Let everybody enrol, as for any engine, and write what this one's processes read."""
    nvflare_federation.enrol(folder, sites)
    running.prepare(folder / COORDINATOR, sites)
    for name in sites:
        write_relay_folder(folder / name)
    return FlowerMachines(folder=folder, sites=tuple(sites))
