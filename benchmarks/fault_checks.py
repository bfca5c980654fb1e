"""What must hold after `benchmarks.faults`: every sum, every ledger, every number of a round."""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.fault_parties import COORDINATOR, OBSERVED
from defenses.dp import Ledger
from ffm_secure import record_codec
from ffm_secure.config.federated import run_digest
from ffm_secure.config.run_file import RunConfig
from ffm_secure.records import RoundRecord
from ffm_secure.site.own_record import OBSERVATIONS, record_folder
from ffm_secure.storage.observations import read_observations

NAME = "test"


def records_of(folder: Path) -> tuple[RoundRecord, ...]:
    """Read the finished rounds of a run; a torn last line is one that is being written."""
    path = folder / "rounds.jsonl"
    if not path.is_file():
        return ()
    lines = path.read_bytes().split(b"\n")[:-1]
    return tuple(record_codec.from_bytes(RoundRecord, line, "a record") for line in lines)


def sealed_by(place: Path, config: RunConfig, names: Sequence[str]) -> dict[tuple[int, int], np.ndarray]:
    """Return what every site put into every round, as it kept it itself."""
    digest, sealed = run_digest(config), {}
    for site, name in enumerate(names):
        folder = record_folder(place / name, digest) / OBSERVATIONS
        for description, tensors in read_observations(folder):
            if description.own == site:
                sealed[(description.round, site)] = tensors["values"].numpy()
    return sealed


def check_sums(
    place: Path, config: RunConfig, names: Sequence[str], records: Sequence[RoundRecord]
) -> dict[str, int]:
    """Compare every opened sum with what its survivors sealed, in whole steps of the grid."""
    sealed = sealed_by(place, config, names)
    opened = {}
    run_folder = place / COORDINATOR / "runs" / NAME
    for description, tensors in read_observations(run_folder / OBSERVED):
        opened[description.round] = tensors["values"].numpy()
    step = config.protection.coordinate_bound / ((1 << (config.protection.value_bits - 1)) - 1)
    exact, wrong = 0, []
    for record in records:
        if record.aborted:
            continue
        total = np.sum([sealed[(record.round, site)] for site in record.survivors], axis=0)
        apart = np.abs(total - opened[record.round]).max() / step
        exact += apart < 1e-3
        if apart >= 1e-3:
            wrong.append((record.round, float(apart)))
    if wrong:
        raise AssertionError(f"sums that are not the sum: {wrong[:5]}")
    updates = Counter(hashlib.sha256(values.tobytes()).digest() for values in sealed.values())
    if max(updates.values()) > 1:
        raise AssertionError("an update was sealed twice")
    return {"sums_exact": int(exact), "updates": len(updates), "numbers": len(next(iter(opened.values())))}


def check_ledgers(
    place: Path, names: Sequence[str], records: Sequence[RoundRecord], attempts: Mapping[int, int]
) -> dict[str, float]:
    """Compare every ledger with what was released: each round once an attempt, no more and no less."""
    released: dict[int, set[int]] = {site: set() for site in range(len(names))}
    for record in records:
        for site in record.survivors:
            released[site].add(record.round)
    entries, largest, runs = 0, 0.0, set[str]()
    for site, name in enumerate(names):
        with Ledger.open(place / name / "ledger.sqlite", create=False) as ledger:
            ledger.verify()
            charged = Counter[int]()
            for entry in ledger.entries():
                if entry.kind == "reserve":
                    charged[entry.round] += 1
                    runs.add(entry.run)
            epsilon = ledger.epsilon_of(ledger.blocks(), "record", 1e-5)
        if not released[site] <= set(charged):
            raise AssertionError(f"{name}: released and not charged: {sorted(released[site] - set(charged))}")
        too_often = {number for number, times in charged.items() if times > 1 + attempts.get(number, 0)}
        if too_often:
            raise AssertionError(f"{name}: charged more often than it was tried: {sorted(too_often)}")
        entries += sum(charged.values())
        largest = max(largest, epsilon)
    if len(runs) != 1:
        raise AssertionError(f"{len(runs)} runs where there was one")
    return {"charges": entries, "largest_epsilon": largest}


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return how long something took."""
    if not values:
        return {"count": 0}
    return {
        "count": len(values),
        "median": statistics.median(values),
        "least": min(values),
        "most": max(values),
    }
