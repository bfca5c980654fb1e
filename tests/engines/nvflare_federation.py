"""A federation over NVFlare on this machine:
an operator, a coordinator's server and sites, each in a folder.
"""

from __future__ import annotations

import datetime
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ffm_secure.engines.nvflare import certificates, folders, processes
from ffm_secure.engines.nvflare.courier import NVFlareCourier, Patience
from ffm_secure.engines.nvflare.folders import Endpoint
from ffm_secure.engines.nvflare.processes import Process

SUBMITTER = "coordinator@ffm-secure.example"
HOST = "localhost"


@dataclass(slots=True, kw_only=True)
class Machines:
    """The folders of everybody, and the processes that run."""

    folder: Path
    endpoint: Endpoint
    sites: tuple[str, ...]
    server: Process | None = None
    relays: dict[str, Process] = field(default_factory=dict)

    def engine_folder(self, name: str) -> Path:
        return self.folder / name / "nvflare"

    def start(self) -> None:
        self.server = processes.start_server(self.engine_folder("server"))
        for name in self.sites:
            self.start_site(name)

    def start_site(self, name: str) -> None:
        self.relays[name] = processes.start_site(self.engine_folder(name), name=name)

    def kill(self, name: str) -> None:
        self.relays.pop(name).kill()

    def courier(self, run: str, patience: Patience | None = None) -> NVFlareCourier:
        return NVFlareCourier(
            server=self.engine_folder("server"),
            submitter=self.engine_folder("submitter"),
            submitter_name=SUBMITTER,
            sites=self.sites,
            run=run,
            patience=patience,
        )

    def stop(self) -> None:
        for process in (*self.relays.values(), self.server):
            if process is not None:
                process.kill()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def enrol(folder: Path, sites: Sequence[str]) -> Machines:
    """Let everybody make a key, the operator sign it, and everybody write the engine's folder."""
    endpoint = Endpoint(federation="wards", host=HOST, port=free_port())
    now = datetime.datetime.now(datetime.UTC)
    authority = folder / "operator"
    root_digest = certificates.create_authority(authority, endpoint.federation, now=now)
    kinds = {
        "server": (HOST, certificates.SERVER),
        "submitter": (SUBMITTER, certificates.SUBMITTER),
        **{name: (name, certificates.SITE) for name in sites},
    }
    for place, (name, kind) in kinds.items():
        keys = folder / place / "keys"
        asked = certificates.request(keys, name)
        approval = certificates.approve(
            authority, asked, name=name, kind=kind, now=now, hosts=("127.0.0.1",) if kind == "server" else ()
        )
        certificates.accept(keys, approval.joined(), root_digest)
    folders.write_server_folder(folder / "server" / "nvflare", folder / "server" / "keys", endpoint)
    folders.write_submitter_folder(
        folder / "submitter" / "nvflare", folder / "submitter" / "keys", endpoint, name=SUBMITTER
    )
    for name in sites:
        folders.write_site_folder(folder / name / "nvflare", folder / name / "keys", endpoint, name=name)
    return Machines(folder=folder, endpoint=endpoint, sites=tuple(sites))
