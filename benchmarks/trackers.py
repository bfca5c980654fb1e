"""Measure how long 1,000 rounds take in every tracker: `python -m benchmarks.trackers` prints a table.

Rounds are logged one by one, as a run does. Import and begin are listed apart: they are paid once a start.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from ffm_secure.records import RoundRecord
from ffm_secure.registry import TRACKERS
from ffm_secure.tracking.trackers import Trackers

ROUNDS = 1000


def record(number: int) -> RoundRecord:
    """Return one round with every number that is drawn."""
    return RoundRecord(
        round=number,
        phase="private",
        cohort=tuple(range(20)),
        survivors=tuple(range(18)),
        dropped={18: "train", 19: "upload"},
        loss=2.0 / number,
        metric=1.0 - 1.0 / number,
        metric_name="accuracy",
        epsilon_spent=0.001 * number,
        bytes_up=1_000_000,
        bytes_down=2_000_000,
        seconds=1.5,
        client_seconds=1.0,
        norm=0.25,
        alignment=0.5,
    )


def seconds(kind: str, folder: Path) -> tuple[float, float, float]:
    """Return wall seconds until the first round, wall seconds of all rounds, and CPU seconds of them."""
    began = time.perf_counter()
    with Trackers([kind], folder, name="benchmark", run_id=bytes(16)) as trackers:
        trackers.begin(())
        start = time.perf_counter() - began
        began, worked = time.perf_counter(), time.process_time()
        for number in range(1, ROUNDS + 1):
            trackers.round_finished(record(number))
        assert not trackers.problems
        return start, time.perf_counter() - began, time.process_time() - worked


def main() -> None:
    """Print one line a tracker."""
    print(f"| tracker | until the first round | {ROUNDS:,} rounds, wall s | CPU s |\n|---|---|---|---|")
    for kind in TRACKERS:
        with tempfile.TemporaryDirectory() as folder:
            start, wall, cpu = seconds(kind, Path(folder))
        print(f"| {kind} | {start:.2f} | {wall:.2f} | {cpu:.2f} |")


if __name__ == "__main__":
    main()
