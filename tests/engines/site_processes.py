"""The services of sites as processes of their own, forked from one that has imported the package.

`python -m tests.engines.site_processes FOLDER=DOOR ...` serves every site's folder at the folder of its relay
until its input ends.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import torch

from ffm_secure.engines.nvflare.site_service import serve
from ffm_secure.site.folder import SiteFolder
from ffm_secure.site.service import open_session

ROOT = Path(__file__).resolve().parents[2]


class SiteProcesses:
    """Serve the folders of sites, by folder, at the folders of their relays."""

    def __init__(self, places: Mapping[Path, Path]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, *(f"{place}={door}" for place, door in places.items())],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.numbers = [int(self._process.stdout.readline()) for _ in places]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        assert self._process.stdout is not None
        self._process.stdout.close()


def live(place: Path, door: Path, ready: int) -> None:
    session = open_session(place)
    session.prepare()
    serve(door, session.handle, lambda run: run in SiteFolder(place=place).allowed())
    os.write(ready, f"{os.getpid()}\n".encode())
    threading.Event().wait()


def main() -> None:
    torch.set_num_threads(1)
    children = []
    for words in sys.argv[1:]:
        place, _, door = words.partition("=")
        child = os.fork()
        if child == 0:
            live(Path(place), Path(door), sys.stdout.fileno())
        children.append(child)
    sys.stdin.read()
    for child in children:
        os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    main()
