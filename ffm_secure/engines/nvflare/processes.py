"""Start the engine's long-lived processes, so that none outlives the process that started it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import ffm_secure
from ffm_secure.engines.nvflare.folders import HEARTBEAT_SECONDS, write_server_resources

_SERVER: Final = "nvflare.private.fed.app.server.server_train"
_CLIENT: Final = "nvflare.private.fed.app.client.client_train"
_PAUSE: Final = 2.0  # seconds before a process that ended is started again
_JOB: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# Pieces of messages go back to the system when they are let go of, whichever thread had them.
_LET_GO: Final = {"MALLOC_ARENA_MAX": "4", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
_DIE_WITH_PARENT: Final = 1  # PR_SET_PDEATHSIG
_CONTROL: Final = ctypes.CDLL(None, use_errno=True).prctl


class Process:
    """One process of the engine, started again when it ends by itself.

    Guarantee: it ends when this process ends, however that happens; a thread of its own starts it, because
    the system watches the thread that did.
    """

    def __init__(
        self, command: Sequence[str], folder: Path, *, settings: Mapping[str, str] | None = None
    ) -> None:
        self._command, self._folder, self._settings = tuple(command), folder, dict(settings or {})
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._begun = threading.Event()
        self.falls = 0  # how often it has ended by itself
        self._guard = threading.Thread(target=self._keep, name=f"process in {folder.name}", daemon=True)
        self._guard.start()
        self._begun.wait()

    @property
    def number(self) -> int:
        """Return the process's number."""
        return 0 if self._process is None else self._process.pid

    def kill(self) -> None:
        """End it and everything it started, at once: nothing in it is worth a farewell."""
        self._stopping.set()
        process = self._process
        if process is not None:
            for number in (process.pid, *_descendants(process.pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
        self._guard.join(10.0)

    def _keep(self) -> None:
        try:
            while not self._stopping.is_set():
                self._process = self._start()
                self._begun.set()
                self._process.wait()
                self.falls += 1
                self._stopping.wait(_PAUSE)
        finally:
            self._begun.set()

    def _start(self) -> subprocess.Popen[bytes]:
        _sweep(self._folder)
        environment = {**os.environ, **_LET_GO, "PYTHONPATH": _import_path(), **self._settings}
        with open(self._folder / "output.txt", "ab", opener=_private) as output:
            return subprocess.Popen(
                self._command,
                cwd=self._folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                umask=0o077,
                preexec_fn=_die_with_parent,
            )


def start_server(folder: Path) -> Process:
    """Start the coordinator's server, which listens on the federation's port."""
    write_server_resources(folder)
    return Process(_command(_SERVER, folder, "fed_server.json", "org=ffm-secure"), folder)


def start_site(folder: Path, *, name: str) -> Process:
    """Start a site's relay, which connects outwards alone."""
    words = (f"uid={name}", "org=ffm-secure", f"heart_beat_interval={HEARTBEAT_SECONDS}")
    return Process(_command(_CLIENT, folder, "fed_client.json", *words), folder)


def _command(module: str, folder: Path, words: str, *settings: str) -> tuple[str, ...]:
    common = ("-m", str(folder), "-s", words, "--set", "secure_train=true", "config_folder=")
    return (sys.executable, "-u", "-m", module, *common, *settings)


def _import_path() -> str:
    """Let the engine's processes import the installation that this process runs."""
    places = (str(Path(ffm_secure.__file__).parents[1]), os.environ.get("PYTHONPATH", ""))
    return os.pathsep.join(place for place in places if place)


def _sweep(folder: Path) -> None:
    """Take away what earlier jobs left: the engine never goes on with one, and nothing here reads them."""
    left = [place for place in folder.iterdir() if place.is_dir() and _JOB.fullmatch(place.name)]
    for place in (*left, folder / "jobs", folder / "snapshots"):
        shutil.rmtree(place, ignore_errors=True)


def _descendants(number: int) -> list[int]:
    """Return the processes that a process started, and those that they started."""
    children: dict[int, list[int]] = {}
    for place in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(place.name))
    everybody, waiting = [], [number]
    while waiting:
        below = children.get(waiting.pop(), [])
        everybody += below
        waiting += below
    return everybody


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def _die_with_parent() -> None:
    """Ask the system to end this process when the one that started it ends, however that happens."""
    _CONTROL(_DIE_WITH_PARENT, signal.SIGKILL)
