"""Differential privacy: events, accountants and the ledger; clipping, noise, sampling and per-sample gradients."""

from __future__ import annotations

from defenses.dp.accountant import Accountant, EpsilonBound, epsilon
from defenses.dp.events import (
    Event,
    GaussianEvent,
    MatrixFactorizationEvent,
    NonPrivateEvent,
    SkellamEvent,
    TuningEvent,
    from_dict,
    from_json,
)
from defenses.dp.ledger import Budget, Charge, Entry, Ledger, Reservation

__all__ = [
    "Accountant",
    "Budget",
    "Charge",
    "Entry",
    "EpsilonBound",
    "Event",
    "GaussianEvent",
    "Ledger",
    "MatrixFactorizationEvent",
    "NonPrivateEvent",
    "Reservation",
    "SkellamEvent",
    "TuningEvent",
    "epsilon",
    "from_dict",
    "from_json",
]
