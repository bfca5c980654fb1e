"""Log rounds until killed: `python -m tests.tracking.log_rounds KIND FOLDER FIRST LAST WAIT` prints each."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from ffm_secure.tracking.trackers import Trackers
from tests.tracking.helpers import RUN_ID, record, rounds

ATTEMPTS: list[str] = []
WATCHED = ("socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.sendmsg", "socket.gethostbyname")


def watch_the_network() -> None:
    """Note every attempt to reach another machine, on any thread."""
    sys.addaudithook(
        lambda event, values: (
            ATTEMPTS.append(f"{event} {values}") if event in WATCHED and not stays_here(values) else None
        )
    )


def stays_here(values: tuple[object, ...]) -> bool:
    """Tell a socket that is a file of this machine's: it has a path for an address."""
    return len(values) > 1 and isinstance(values[1], str) and values[1].startswith("/")


def main(kind: str, folder: Path, first: int, last: int, wait: float) -> None:
    watch_the_network()
    with Trackers([kind], folder, name="demo", run_id=RUN_ID) as trackers:
        trackers.begin(rounds(first - 1))
        for number in range(first, last + 1):
            trackers.round_finished(record(number))
            print(number, flush=True)
        assert not trackers.problems, trackers.problems
    time.sleep(wait)  # long enough for a reporting thread to try
    print("attempts", ATTEMPTS)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))
