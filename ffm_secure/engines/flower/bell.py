"""A word between the coordinator's process and its gate, so that nobody has to look again and again.

The engine has no way to say that a message waits: a node asks for it, several times a second where it is to
be quick, and each question costs the server as much as an answer. The gate holds a node's question until the
coordinator's process says that it has sent something to it, and says in turn when a site has sent something.
Nothing depends on a word that was lost: both look again after a while by themselves.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path
from typing import Final

SOCKET: Final = "gate.sock"
_AGAIN: Final = 1.0  # seconds before the gate is looked for again


class Bell:
    """The coordinator's end. Safe to use from several threads."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / SOCKET
        self._changed = threading.Condition()
        self._rung = 0
        self._connection: socket.socket | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="bell", daemon=True)
        self._thread.start()

    @property
    def rung(self) -> int:
        """Return how often a site has sent something, for `wait`."""
        return self._rung

    def ring(self, name: str) -> None:
        """Say that something was sent to a site, by the name in its certificate."""
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.sendall(name.encode() + b"\n")

    def wait(self, since: int, seconds: float) -> None:
        """Wait until a site has sent something since, or so many seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._rung != since, seconds)

    def close(self) -> None:
        """End the connection."""
        self._closing.set()
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join(5.0)

    def _listen(self) -> None:
        while not self._closing.is_set():
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(self._path))
                self._connection = connection
                while connection.recv(4096):
                    with self._changed:
                        self._rung += 1
                        self._changed.notify_all()
            self._connection = None
            self._closing.wait(_AGAIN)
