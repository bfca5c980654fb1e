"""A site's service with its relay, and a coordinator's courier with its server."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

from ffm_secure.engines.nvflare import processes
from ffm_secure.engines.nvflare.courier import NVFlareCourier, Patience
from ffm_secure.engines.nvflare.enrolment import ENGINE, SUBMITTER_NAME
from ffm_secure.engines.nvflare.reach import coordinator_words, require_listening, require_port
from ffm_secure.engines.nvflare.relay import serve_relay
from ffm_secure.engines.nvflare.site_service import Allows, Handle, serve
from ffm_secure.transport.courier import Deadline

__all__ = ["coordinator_words", "open_courier", "serve_site"]
_LOOK_EVERY = 1.0  # seconds


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
    """
    engine, pause = place / ENGINE, threading.Event()
    door = serve(engine, handle, allows)
    try:
        if with_relay:
            serve_relay(engine, should_stop=should_stop)
        while not should_stop():
            pause.wait(_LOOK_EVERY)
    finally:
        door.close()


@contextmanager
def open_courier(
    place: Path,
    sites: Sequence[str],
    run: str,
    *,
    deadline: Deadline,
    hosts: Mapping[str, str] = MappingProxyType({}),
    patience: Patience | None = None,
) -> Iterator[NVFlareCourier]:
    """Start a coordinator's server and carry for one run, by the digest that sites have allowed.

    `hosts` names the site whose relay carries for another.

    Raises:
      StoreError: another program has the port, or the server does not start.
    """
    require_port(place / ENGINE / "server")
    server = processes.start_server(place / ENGINE / "server")
    try:
        require_listening(place / ENGINE / "server", lambda: server.falls)
        courier = NVFlareCourier(
            server=place / ENGINE / "server",
            submitter=place / ENGINE / "submitter",
            submitter_name=SUBMITTER_NAME,
            sites=sites,
            hosts=hosts,
            run=run,
            patience=patience,
            deadline=deadline,
        )
        try:
            yield courier
        finally:
            courier.close()
    finally:
        server.kill()
