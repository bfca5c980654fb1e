"""A site's relay alone, where its service is another container: `python -m ffm_secure.engines.nvflare.relay`.

The relay needs the engine's folder and the network; the service needs the site's folder, the rows and no
network. Both share the engine's folder, which holds the socket between them.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from ffm_secure.engines.nvflare import processes
from ffm_secure.engines.nvflare.folders import SITE_SOCKET
from ffm_secure.errors import StoreError
from ffm_secure.transport.local_socket import Gone, connect

_LOOK_EVERY = 1.0  # seconds


def name_of(engine: Path) -> str:
    """Return the name that a site's certificate is for, as its engine folder has it.

    Raises:
      StoreError: the folder is none of a site.
    """
    path = engine / "startup" / "fed_client.json"
    try:
        return str(json.loads(path.read_bytes())["client"]["fqsn"])
    except (OSError, ValueError, KeyError, TypeError):
        raise StoreError(
            f"{path}: is missing or damaged; enrol the site with: ffm-secure site enrol FOLDER APPROVAL"
        ) from None


def serve_relay(engine: Path, *, should_stop: Callable[[], bool]) -> None:
    """Run the relay of an engine folder until `should_stop`."""
    relay, pause = processes.start_site(engine, name=name_of(engine)), threading.Event()
    try:
        while not should_stop():
            pause.wait(_LOOK_EVERY)
    finally:
        relay.kill()


def is_served(engine: Path) -> bool:
    """Tell whether the service of a site answers at its socket."""
    try:
        connect(engine / SITE_SOCKET).close()
    except Gone:
        return False
    return True


def main() -> int:
    """Run the relay until a signal, or look once whether the service is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the site's folder of the engine, named nvflare")
    parser.add_argument("--check", action="store_true", help="exit 0 where the service answers, 1 where not")
    words = parser.parse_args()
    if words.check:
        return 0 if is_served(words.folder) else 1
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: asked.append(received))
    try:
        serve_relay(words.folder.resolve(), should_stop=lambda: bool(asked))
    except StoreError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
