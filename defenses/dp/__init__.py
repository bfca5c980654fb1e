"""Differential privacy: events, accountants and the ledger; clipping, noise, sampling and per-sample
gradients.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from defenses.foreign import LazyName

if TYPE_CHECKING:
    from defenses.dp.accountant import Accountant, EpsilonBound, epsilon
    from defenses.dp.correlated import BandedShares, NoiseStream
    from defenses.dp.clip import AdaptiveCount, Clipping, clip_vector
    from defenses.dp.discrete import discrete_gaussian, skellam
    from defenses.dp.events import (
        Event,
        GaussianEvent,
        MatrixFactorizationEvent,
        NonPrivateEvent,
        SampledSkellamEvent,
        SkellamEvent,
        TuningEvent,
        from_dict,
        from_json,
    )
    from defenses.dp.expanded import ExpandedParameter
    from defenses.dp.ledger import Ledger
    from defenses.dp.ledger_entries import Budget, Charge, Entry, Reservation
    from defenses.dp.ledger_withdrawals import Withdrawal
    from defenses.dp.mechanism import ClientMechanism, RecordMechanism, RecordRun
    from defenses.dp.noise import add_gaussian, gaussian
    from defenses.dp.per_sample import ClippedSum, PerSampleEngine
    from defenses.dp.probe import ProbeReport, probe_sensitivity
    from defenses.dp.records import RecordKey, Records, name_persons, name_records
    from defenses.dp.moments import MomentRows
    from defenses.dp.shared import SumMechanism, smallest_multiplier
    from defenses.dp.sampling import balanced_schedule, fixed_size_sample, participation_cap, poisson_sample
    from defenses.dp.trainer import PrivateSteps

__all__ = [
    "Accountant",
    "AdaptiveCount",
    "BandedShares",
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
    "MomentRows",
    "NoiseStream",
    "NonPrivateEvent",
    "PerSampleEngine",
    "PrivateSteps",
    "ProbeReport",
    "RecordKey",
    "RecordMechanism",
    "RecordRun",
    "Records",
    "Reservation",
    "SampledSkellamEvent",
    "SkellamEvent",
    "SumMechanism",
    "TuningEvent",
    "Withdrawal",
    "add_gaussian",
    "balanced_schedule",
    "clip_vector",
    "discrete_gaussian",
    "epsilon",
    "fixed_size_sample",
    "from_dict",
    "from_json",
    "gaussian",
    "name_persons",
    "name_records",
    "participation_cap",
    "poisson_sample",
    "probe_sensitivity",
    "skellam",
    "smallest_multiplier",
]


_HOMES = {
    "Accountant": "accountant",
    "AdaptiveCount": "clip",
    "BandedShares": "correlated",
    "Budget": "ledger_entries",
    "Charge": "ledger_entries",
    "ClientMechanism": "mechanism",
    "ClippedSum": "per_sample",
    "Clipping": "clip",
    "Entry": "ledger_entries",
    "EpsilonBound": "accountant",
    "Event": "events",
    "ExpandedParameter": "expanded",
    "GaussianEvent": "events",
    "Ledger": "ledger",
    "MatrixFactorizationEvent": "events",
    "MomentRows": "moments",
    "NoiseStream": "correlated",
    "NonPrivateEvent": "events",
    "PerSampleEngine": "per_sample",
    "PrivateSteps": "trainer",
    "ProbeReport": "probe",
    "RecordKey": "records",
    "RecordMechanism": "mechanism",
    "RecordRun": "mechanism",
    "Records": "records",
    "Reservation": "ledger_entries",
    "SampledSkellamEvent": "events",
    "SkellamEvent": "events",
    "SumMechanism": "shared",
    "TuningEvent": "events",
    "Withdrawal": "ledger_withdrawals",
    "add_gaussian": "noise",
    "balanced_schedule": "sampling",
    "clip_vector": "clip",
    "discrete_gaussian": "discrete",
    "epsilon": "accountant",
    "fixed_size_sample": "sampling",
    "from_dict": "events",
    "from_json": "events",
    "gaussian": "noise",
    "name_persons": "records",
    "name_records": "records",
    "participation_cap": "sampling",
    "poisson_sample": "sampling",
    "probe_sensitivity": "probe",
    "skellam": "discrete",
    "smallest_multiplier": "shared",
}


def __getattr__(name: str) -> LazyName:
    """Load a name's module when it is first asked for: events, accountants and ledgers work without loading
    torch.
    """
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"defenses.dp.{_HOMES[name]}"), name)
