"""A federation over NVFlare on this machine: operator, coordinator and sites, each in a folder."""

from __future__ import annotations

import datetime
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from defenses.random_source import RandomSource
from defenses.secagg import Identity
from ffm_secure.engines.nvflare import enrolment, processes
from ffm_secure.engines.nvflare.courier import NVFlareCourier, Patience
from ffm_secure.engines.nvflare.enrolment import COORDINATOR, ENGINE, SUBMITTER_NAME, relay_name
from ffm_secure.engines.nvflare.processes import Process
from ffm_secure.transport.courier import Deadline

HOST = "localhost"
NAMES = ("north", "south", "east", "west")


@dataclass(slots=True, kw_only=True)
class Machines:
    """The folders of everybody, and the processes that run."""

    folder: Path
    sites: tuple[str, ...]
    server: Process | None = None
    relays: dict[str, Process] = field(default_factory=dict)

    def engine_folder(self, name: str) -> Path:
        return self.folder / name / ENGINE

    def start(self) -> None:
        self.server = processes.start_server(self.engine_folder(COORDINATOR) / "server")
        for name in self.sites:
            self.start_site(name)

    def start_site(self, name: str) -> None:
        self.relays[name] = processes.start_site(self.engine_folder(name), name=relay_name(name))

    def kill(self, name: str) -> None:
        self.relays.pop(name).kill()

    def courier(
        self,
        run: str,
        patience: Patience | None = None,
        deadline: Deadline | None = None,
        hosts: Mapping[str, str] | None = None,
    ) -> NVFlareCourier:
        return NVFlareCourier(
            server=self.engine_folder(COORDINATOR) / "server",
            submitter=self.engine_folder(COORDINATOR) / "submitter",
            submitter_name=SUBMITTER_NAME,
            sites=self.sites,
            hosts=hosts or {},
            run=run,
            patience=patience,
            deadline=deadline,
        )

    def stop(self) -> None:
        for process in (*self.relays.values(), self.server):
            if process is not None:
                process.kill()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def identities(names: Sequence[str]) -> dict[str, Identity]:
    return {name: Identity.generate(RandomSource.system()) for name in names}


def enrol(folder: Path, sites: Sequence[str]) -> Machines:
    """Let everybody make a key, the operator sign it, and everybody write the engine's folder."""
    people = identities(("operator", COORDINATOR, *sites))
    operator = people.pop("operator")
    now = datetime.datetime.now(datetime.UTC)
    enrolment.create_authority(folder / "operator", "wards", now=now)
    keys = {name: identity.public_key for name, identity in people.items()}
    for name, identity in people.items():
        if name == COORDINATOR:
            asked = enrolment.request_coordinator(folder / name, (HOST, free_port()), identity.sign)
        else:
            asked = enrolment.request_site(folder / name, name, identity.sign)
        _, approved = enrolment.approve(
            folder / "operator", asked.read_bytes(), keys=keys, sign=operator.sign, now=now
        )
        enrolment.accept(folder / name, approved, name=name, operator=operator.public_key)
    return Machines(folder=folder, sites=tuple(sites))
