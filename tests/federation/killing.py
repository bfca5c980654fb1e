"""Kill a run at random moments: `python -m tests.federation.killing RUN.toml FOLDER KILLS SEED SPAN` prints
how many hit.

Every attempt is a process of its own that dies by SIGKILL. It is forked from one that has imported the
package and done nothing else, so that an attempt costs what the run costs, and twenty of them are affordable.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from ffm_secure.config import run_file as config
from ffm_secure.engines import simulation
from ffm_secure.federation import run
from ffm_secure.storage.run_directory import Store

EARLY = 0.2  # the share of kills that do not wait for the first round


def learn(file: Path, folder: Path, ready: int) -> None:
    """Do what `ffm-secure run` does, and say when the loop begins."""
    made = config.load(file)
    built = simulation.build(simulation.prepare(made, Path.cwd(), folder), folder)
    with Store.open(folder, made) as store:
        os.write(ready, b".")
        run(built.server, built.courier, store, start=built.begin(store))


def attempt(file: Path, folder: Path, *, wait: bool, seconds: float) -> bool:
    """Start the run, kill it after a while; tell whether it was still running."""
    listening, ready = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            learn(file, folder, ready)
            code = 0
        finally:
            os._exit(code)
    os.close(ready)
    if wait:
        os.read(listening, 1)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(listening)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("the run failed by itself")
    return os.WIFSIGNALED(status)


def main(file: Path, folder: Path, kills: int, seed: int, span: float) -> None:
    """Kill, again and again, then let the run finish."""
    torch.set_num_threads(1)
    chance, hits = random.Random(seed), 0
    for _ in range(kills):
        early = chance.random() < EARLY
        hits += attempt(file, folder, wait=not early, seconds=chance.uniform(0.0, span))
    learn(file, folder, os.open(os.devnull, os.O_WRONLY))
    print(hits)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))
