"""Differential privacy: events, accountants and the ledger; clipping, noise, sampling and per-sample gradients."""

from __future__ import annotations

from defenses.dp.accountant import Accountant, EpsilonBound, epsilon
from defenses.dp.clip import AdaptiveCount, Clipping, clip_vector
from defenses.dp.discrete import discrete_gaussian, skellam
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
from defenses.dp.expanded import ExpandedParameter
from defenses.dp.ledger import Budget, Charge, Entry, Ledger, Reservation
from defenses.dp.mechanism import ClientMechanism, RecordMechanism, RecordRun
from defenses.dp.noise import add_gaussian, gaussian
from defenses.dp.per_sample import ClippedSum, PerSampleEngine
from defenses.dp.probe import ProbeReport, probe_sensitivity
from defenses.dp.sampling import balanced_schedule, fixed_size_sample, participation_cap, poisson_sample

__all__ = [
    "Accountant",
    "AdaptiveCount",
    "Budget",
    "Charge",
    "ClientMechanism",
    "ClippedSum",
    "Clipping",
    "Entry",
    "EpsilonBound",
    "Event",
    "ExpandedParameter",
    "GaussianEvent",
    "Ledger",
    "MatrixFactorizationEvent",
    "NonPrivateEvent",
    "PerSampleEngine",
    "ProbeReport",
    "RecordMechanism",
    "RecordRun",
    "Reservation",
    "SkellamEvent",
    "TuningEvent",
    "add_gaussian",
    "balanced_schedule",
    "clip_vector",
    "discrete_gaussian",
    "epsilon",
    "fixed_size_sample",
    "from_dict",
    "from_json",
    "gaussian",
    "participation_cap",
    "poisson_sample",
    "probe_sensitivity",
    "skellam",
]
