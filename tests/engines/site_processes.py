"""The services of sites as processes of their own, forked from one that has imported the package.

`python -m tests.engines.site_processes` serves, for every line `FOLDER DOOR` it reads, a site's folder at the
folder of its relay, says its number when it is ready, and ends all of them with its input. With `--relay`
each brings its relay with it, as `ffm-secure site start` does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

import torch

from ffm_secure.engines.nvflare.running import serve_site
from ffm_secure.engines.nvflare.site_service import serve
from ffm_secure.site.service import open_session

ROOT = Path(__file__).resolve().parents[2]


class SiteProcesses:
    """Serve the folders of sites, by folder, at the folders of their relays."""

    def __init__(self, places: Mapping[Path, Path], *, relay: bool = False) -> None:
        self._doors = dict(places)
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, *(["--relay"] if relay else [])],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.numbers: dict[Path, int] = {}
        for place in places:
            self._ask(place)
        while len(self.numbers) < len(places):
            self._note()

    def start(self, place: Path, *, wait: bool = True) -> None:
        """Start one that was killed, and wait until it is ready."""
        self._ask(place)
        if wait:
            self._await(place)

    def kill(self, place: Path) -> None:
        """End one as a power cut does."""
        self._await(place)
        number = self.numbers.pop(place)
        os.kill(number, signal.SIGKILL)
        while Path(f"/proc/{number}").exists():
            time.sleep(0.005)

    def close(self) -> None:
        """End all of them."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(120)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _await(self, place: Path) -> None:
        while place not in self.numbers:
            self._note()

    def _ask(self, place: Path) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{place} {self._doors[place]}\n")
        self._process.stdin.flush()

    def _note(self) -> None:
        assert self._process.stdout is not None
        number, _, place = self._process.stdout.readline().strip().partition(" ")
        self.numbers[Path(place)] = int(number)


def live(place: Path, door: Path, *, relay: bool) -> None:
    session = open_session(place)
    session.prepare()
    ready = f"{os.getpid()} {place}\n".encode()
    if relay:
        os.write(sys.stdout.fileno(), ready)
        serve_site(place, session.name, session.handle, session.allows, should_stop=lambda: False)
    serve(door, session.handle, session.allows)
    os.write(sys.stdout.fileno(), ready)
    threading.Event().wait()


def main() -> None:
    torch.set_num_threads(1)
    relay = "--relay" in sys.argv
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    children = []
    for line in sys.stdin:
        place, _, door = line.strip().partition(" ")
        child = os.fork()
        if child == 0:
            try:
                live(Path(place), Path(door), relay=relay)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        children.append(child)
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    os._exit(0)  # taking libraries apart takes a busy machine longer than anybody waits


if __name__ == "__main__":
    main()
