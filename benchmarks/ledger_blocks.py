"""What a ledger of a million records costs: opening it, finding every record of a run, and charging a round.

    python -m benchmarks.ledger_blocks [--records 1000000] [--quick]

Times are CPU seconds of one process on a ledger that exists; memory is the growth of the process beyond what
it had after imports. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from defenses.dp.events import GaussianEvent
from defenses.dp.ledger import Ledger
from defenses.dp.ledger_entries import Charge
from defenses.dp.records import RecordKey, Records, canonical_text, name_records

DELTA = 1e-7


def main() -> None:
    """Build a ledger in one process, measure it in another."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--quick", action="store_true", help="20,000 records")
    parser.add_argument("--json", action="store_true", help="as always, one JSON object is the last line")
    parser.add_argument("--worker", nargs=2, metavar=("FOLDER", "STEP"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    count = 20_000 if options.quick else options.records
    if options.worker:
        folder, step = options.worker
        print(json.dumps(_STEPS[step](Path(folder) / "ledger.sqlite", count)))
        return
    with tempfile.TemporaryDirectory() as folder:
        steps = {step: _in_process(folder, step, count) for step in _STEPS}
    for step, figures in steps.items():
        print(step, ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
    print(json.dumps({"benchmark": "ledger blocks", "records": count, **steps}))


def _in_process(folder: str, step: str, count: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.ledger_blocks", "--records", str(count)]
    completed = subprocess.run(
        [*command, "--worker", folder, step], check=True, capture_output=True, text=True
    )
    return dict(json.loads(completed.stdout.splitlines()[-1]))


def _rows(count: int) -> Records:
    """Return names as a run has them: evenly spread digests, in the order of a file."""
    draws = np.random.default_rng(7).integers(1, 2**52, size=count, dtype=np.uint64)
    return name_records(draws << np.uint64(12))


def _event() -> GaussianEvent:
    return GaussianEvent(
        unit="record",
        adjacency="add_remove",
        sampling="poisson",
        sampling_rate=0.001,
        noise_multiplier=1.0,
        steps=10,
        clip_norm=1.0,
        release="update",
    )


def _charge(blocks: tuple[int, ...], round_number: int) -> Charge:
    return Charge(
        owner="site",
        dataset="rows",
        event=_event(),
        run="run",
        round=round_number,
        release="update",
        blocks=blocks,
    )


def _build(path: Path, count: int) -> dict[str, float]:
    began = time.process_time()
    texts = [
        canonical_text(f"Row {number} of the table, as long as a short note") for number in range(20_000)
    ]
    RecordKey.public().contents(texts)
    naming = (time.process_time() - began) * count / 20_000
    rows = _rows(count)
    began = time.process_time()
    with Ledger.open(path) as ledger:
        ledger.grant("record", 8.0, DELTA)
        ledger.record_key()
        (blocks,) = ledger.blocks_for([rows])
        opening = time.process_time() - began
        for round_number in range(10):
            ledger.reserve([_charge(blocks, round_number)])
    return {"naming_seconds": naming, "first_opening_seconds": opening}


def _again(path: Path, count: int) -> dict[str, float]:
    return _measure(path, _rows(count))


def _appended(path: Path, count: int) -> dict[str, float]:
    rows, more = _rows(count), _rows(count + 1000)
    return _measure(
        path, Records(keys=np.union1d(rows.keys, more.keys[-1000:]), cells=np.zeros((count + 1000, 0), "u8"))
    )


def _half(path: Path, count: int) -> dict[str, float]:
    return _measure(path, _rows(count).take(np.arange(0, count, 2)))


def _measure(path: Path, rows: Records) -> dict[str, float]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    with Ledger.open(path, create=False) as ledger:
        (blocks,) = ledger.blocks_for([rows])
        opened = time.process_time()
        ledger.spend(ledger.reserve([_charge(blocks, 11)]))
        ended = time.process_time()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    figures = {"open_seconds": opened - began, "charge_seconds": ended - opened, "memory_mib": grown / 1024}
    return {**figures, "blocks": float(len(blocks))}


_STEPS: dict[str, Any] = {
    "build": _build,
    "the same rows": _again,
    "1,000 more rows": _appended,
    "half the rows": _half,
}

if __name__ == "__main__":
    main()
