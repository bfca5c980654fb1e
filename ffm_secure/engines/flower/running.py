"""A site's service with its relay, and a coordinator's courier with its server and gate."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import flwr

from ffm_secure.engines.flower import processes
from ffm_secure.engines.flower.bell import Bell
from ffm_secure.engines.flower.courier import FlowerCourier, Patience
from ffm_secure.engines.flower.folders import (
    SECRET,
    read_gate_settings,
    write_gate_folder,
    write_relay_folder,
)
from ffm_secure.engines.flower.superlink import SuperLink
from ffm_secure.engines.nvflare.enrolment import ENGINE as ENROLLED
from ffm_secure.engines.nvflare.enrolment import relay_name
from ffm_secure.engines.nvflare.reach import coordinator_words, require_port
from ffm_secure.engines.nvflare.site_service import Allows, Handle, serve
from ffm_secure.errors import FfmError
from ffm_secure.transport.courier import Deadline

__all__ = ["coordinator_words", "open_courier", "serve_site"]
RELEASE: Final = "1.42"
_LOOK_EVERY = 1.0  # seconds
_FAREWELL = 2.5  # seconds in which a relay whose service has gone tells the coordinator's server so


def serve_site(
    place: Path,
    name: str,
    handle: Handle,
    allows: Allows,
    *,
    should_stop: Callable[[], bool],
    with_relay: bool = True,
) -> None:
    """Answer for a site until `should_stop`: its service in this process, its relay in another.

    Without a relay of its own, the service waits for one that somebody else runs (`relay.py`).

    Raises:
      FfmError: another release of the engine is installed.
      StoreError: the site was not enrolled.
    """
    require_release()
    folder, pause = write_relay_folder(place), threading.Event()
    door = serve(folder, handle, allows)
    relay = processes.start_relay(folder) if with_relay else None
    try:
        while not should_stop():
            pause.wait(_LOOK_EVERY)
    finally:
        door.close()
        if relay is not None:
            pause.wait(_FAREWELL)
            relay.kill()


@contextmanager
def open_courier(
    place: Path,
    sites: Sequence[str],
    run: str,
    *,
    deadline: Deadline,
    patience: Patience | None = None,
) -> Iterator[FlowerCourier]:
    """Start a coordinator's server and gate, and carry for one run, by the digest that sites have allowed.

    Raises:
      FfmError: another release of the engine is installed.
      StoreError: another program has the port.
    """
    require_release()
    require_port(place / ENROLLED / "server")
    folder = prepare(place, sites)
    server = processes.start_server(folder)
    gate = processes.start_gate(folder)
    try:
        courier = connect(folder, sites, run, deadline=deadline, patience=patience)
        try:
            yield courier
        finally:
            courier.close()
    finally:
        gate.kill()
        server.kill()


def prepare(place: Path, sites: Sequence[str]) -> Path:
    """Write what a coordinator's server and gate read, with a new secret between them; return the folder."""
    return write_gate_folder(
        place,
        inner=processes.free_port(),
        sites=[relay_name(name) for name in sites],
        secret=secrets.token_bytes(32),
    )


def connect(
    folder: Path,
    sites: Sequence[str],
    run: str,
    *,
    deadline: Deadline | None = None,
    patience: Patience | None = None,
) -> FlowerCourier:
    """Return a courier over the server of an engine folder."""
    link = SuperLink(read_gate_settings(folder).inner, folder, (folder / SECRET).read_bytes())
    return FlowerCourier(
        link=link, bell=Bell(folder), sites=sites, run=run, patience=patience, deadline=deadline
    )


def require_release() -> None:
    """Refuse another release of the engine than the one whose inner calls are tried.

    Raises:
      FfmError: with what to install.
    """
    installed = str(flwr.__version__)
    if not installed.startswith(f"{RELEASE}."):
        raise FfmError(
            f"flwr {installed} is installed, and this release works with flwr {RELEASE}: install it, in an "
            "environment of its own, with: pip install 'ffm-secure[flower]'"
        )
