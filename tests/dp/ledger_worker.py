"""A process that reserves until the budget is spent or it is killed;
every paid round goes to its own log first.
"""

from __future__ import annotations

import os

from defenses.dp.events import GaussianEvent
from defenses.dp.ledger import Ledger
from defenses.dp.ledger_entries import Charge
from defenses.errors import BudgetExceeded


def main(path: str, log: str, name: str) -> None:
    """Write one line to `log` after each reservation, the instant data would be touched."""
    event = GaussianEvent(
        unit="record",
        adjacency="add_remove",
        sampling="full",
        sampling_rate=1.0,
        noise_multiplier=20.0,
        steps=1,
        clip_norm=1.0,
        release="round",
    )
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with Ledger.open(path, create=False) as ledger:
        os.write(stream, b"ready\n")
        for number in range(10_000):
            try:
                charge = Charge(owner="o", dataset="d", event=event, run=name, round=number, release="r")
                reserved = ledger.reserve([charge])
            except BudgetExceeded:
                os.write(stream, b"refused\n")
                return
            os.write(stream, f"paid {reserved[0].sequence}\n".encode())
            ledger.spend(reserved)


def create(path: str) -> None:
    """Open a ledger that may not exist yet, at the same time as another process."""
    with Ledger.open(path) as ledger:
        ledger.set_budget("o", "d", "record", 1.0, 1e-5)
