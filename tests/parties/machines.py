"""Sites as processes of their own on loopback.

`python -m tests.parties.machines` is a nursery: it has imported the package and done nothing else,
and forks a process for every line `PORT FOLDER` it reads, so that a site costs what a site costs.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from ffm_secure.site.service import open_session
from ffm_secure.site.session import SiteSession
from ffm_secure.transport.courier import Lost, Reply

ROOT = Path(__file__).resolve().parents[2]
_HEAD = struct.Struct("<III")  # request, bytes of the stage, bytes of the content


def write_frame(connection: socket.socket, number: int, stage: str, content: bytes | memoryview) -> None:
    words = stage.encode()
    connection.sendall(_HEAD.pack(number, len(words), len(content)) + words)
    connection.sendall(content)


def read_frame(connection: socket.socket) -> tuple[int, str, bytes]:
    number, words, content = _HEAD.unpack(exactly(connection, _HEAD.size))
    return number, exactly(connection, words).decode(), exactly(connection, content)


def exactly(connection: socket.socket, size: int) -> bytes:
    parts = []
    while size:
        part = connection.recv(min(size, 1 << 20))
        if not part:
            raise ConnectionError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


class Nursery:
    """The process that sites are forked from."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.parties.machines"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def raise_site(self, folder: Path, port: int) -> int:
        """Fork a site's process and return its number."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(f"{port} {folder}\n")
            self._process.stdin.flush()
            return int(self._process.stdout.readline())

    def close(self) -> None:
        """End the nursery; whom it forked lives on."""
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()


class Machine:
    """One site's process, and the connection to it."""

    def __init__(self, folder: Path, nursery: Nursery) -> None:
        self.folder, self.nursery = folder, nursery
        self.answers: dict[int, queue.SimpleQueue[bytes | None]] = {}
        self.connection: socket.socket | None = None
        self.process = 0

    def start(self) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        listener.settimeout(300)
        self.process = self.nursery.raise_site(self.folder, listener.getsockname()[1])
        self.connection, _ = listener.accept()
        self.connection.settimeout(None)
        listener.close()
        threading.Thread(target=self._listen, args=(self.connection,), daemon=True).start()

    def _listen(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                number, _, content = read_frame(connection)
                waiting = self.answers.pop(number, None)
                if waiting is not None:
                    waiting.put(content)
        for waiting in list(self.answers.values()):
            waiting.put(None)
        self.answers.clear()

    def ask(self, number: int, stage: str, message: bytes) -> queue.SimpleQueue[bytes | None]:
        waiting: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.answers[number] = waiting
        try:
            if self.connection is None:
                raise ConnectionError
            write_frame(self.connection, number, stage, message)
        except OSError:
            waiting.put(None)
        return waiting

    def kill(self) -> None:
        """End it as a power cut does."""
        if self.process:
            os.kill(self.process, signal.SIGKILL)
            while Path(f"/proc/{self.process}").exists():
                time.sleep(0.01)
        if self.connection is not None:
            self.connection.close()
        self.process, self.connection = 0, None


class Machines:
    """Carry bytes to the processes of sites; who has none is lost at once, who is slow is waited for."""

    def __init__(self, folders: Mapping[int, Path]) -> None:
        self.nursery = Nursery()
        self.machines = {number: Machine(folder, self.nursery) for number, folder in folders.items()}
        self.before: Callable[[str], None] = lambda stage: None
        self._count = 0

    def start(self) -> None:
        starting = [threading.Thread(target=machine.start) for machine in self.machines.values()]
        for thread in starting:
            thread.start()
        for thread in starting:
            thread.join()

    def send(self, stage: str, messages: Mapping[int, bytes]) -> Iterator[Reply]:
        self.before(stage)
        waiting = {}
        for site in messages:
            self._count += 1
            waiting[site] = self.machines[site].ask(self._count, stage, messages[site])
        for site, answer in waiting.items():
            content = answer.get()
            yield Reply(site=site, content=Lost(stage=stage) if content is None else content)

    def seconds_at_sites(self) -> float:
        return 0.0

    def close(self) -> None:
        for machine in self.machines.values():
            machine.kill()
        self.nursery.close()


def serve(session: SiteSession, port: int) -> None:
    """Connect outwards, as sites do, and answer until the other end has gone."""
    connection = socket.create_connection(("127.0.0.1", port))
    writing = threading.Lock()

    def answer(number: int, stage: str, content: bytes) -> None:
        reply = session.handle(stage, content)
        with writing, contextlib.suppress(OSError):
            write_frame(connection, number, stage, reply)

    with contextlib.suppress(OSError):
        while True:
            threading.Thread(target=answer, args=read_frame(connection), daemon=True).start()


def live(folder: Path, port: int) -> None:
    session = open_session(folder)
    session.prepare()
    serve(session, port)


def main() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        port, _, folder = line.strip().partition(" ")
        child = os.fork()
        if child == 0:
            try:
                live(Path(folder), int(port))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        print(child, flush=True)


if __name__ == "__main__":
    main()
