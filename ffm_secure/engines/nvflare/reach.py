"""Whether the federation's one port can be listened at, and whether it answers: said before anybody waits."""

from __future__ import annotations

import errno
import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from ffm_secure.engines.nvflare.enrolment import ENGINE
from ffm_secure.errors import StoreError
from ffm_secure.transport.local_socket import wait_until

_FREED: Final = 10.0  # seconds that the port of a server that was killed may take to be free
_ANSWERS: Final = 3.0  # seconds
_LISTENS: Final = 60.0  # seconds until a server listens
_FALLS: Final = 2
_SHOWN: Final = 600  # letters
_LISTENING: Final = "0A"  # in the system's table of connections


def require_port(server: Path) -> None:
    """Refuse to start a server whose port another program of this machine has.

    Raises:
      StoreError: with who may have it, and what to do.
    """
    _, port = address_of(server / "startup" / "fed_server.json")
    if not wait_until(lambda: _is_free(port), _FREED, 0.2):
        raise StoreError(
            f"port {port} of this machine is in use: another run of this coordinator, or another program; "
            "stop that one first, or make a coordinator with another --port"
        )


def require_listening(server: Path, falls: Callable[[], int], *, seconds: float = _LISTENS) -> None:
    """Wait until a server that was started listens, or time is over: a slow machine's may do so later.

    Raises:
      StoreError: it ended by itself, twice; with the last thing it said.
    """
    _, port = address_of(server / "startup" / "fed_server.json")
    ends = time.monotonic() + seconds
    while time.monotonic() < ends and not _is_listened_at(port):
        if falls() >= _FALLS:
            output = server / "output.txt"
            raise StoreError(
                f"the engine's server ends as soon as it is started: {_last_line(output)}; all of it is in "
                f"{output}"
            )
        time.sleep(0.1)


def _is_listened_at(port: int) -> bool:
    """Look in the system's own table: to try the port could take it from the server that is about to."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            rows = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            _, local, _, state = row.split()[:4]
            if state == _LISTENING and int(local.rpartition(":")[2], 16) == port:
                return True
    return False


def _last_line(path: Path) -> str:
    try:
        lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    return lines[-1][-_SHOWN:] if lines else "it said nothing"


def coordinator_words(place: Path) -> str:
    """Say whether the coordinator of a site answers, and who can do what where it does not."""
    host, port = address_of(place / ENGINE / "startup" / "fed_client.json")
    try:
        socket.create_connection((host, port), timeout=_ANSWERS).close()
    except OSError as error:
        return (
            f"coordinator: {host}:{port} does not answer ({_reason(error)}); it does while a run is under "
            "way, unless something between blocks the port"
        )
    return f"coordinator: {host}:{port} answers"


def _reason(error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return "its name is unknown here"
    if isinstance(error, TimeoutError):
        return f"not within {_ANSWERS:.0f} s"
    return error.strerror or "cannot be reached"


def address_of(path: Path) -> tuple[str, int]:
    """Return the host and the port at which the federation meets, as an engine folder has them.

    Raises:
      StoreError: the file is missing or damaged.
    """
    try:
        target = str(json.loads(path.read_bytes())["servers"][0]["service"]["target"])
        host, _, port = target.rpartition(":")
        return host, int(port)
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        raise StoreError(f"{path}: is missing or damaged; enrol again with the operator's approval") from None


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
            listener.listen(1)
        except OSError as error:
            return error.errno not in (errno.EADDRINUSE, errno.EACCES)
    return True
