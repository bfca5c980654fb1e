"""Epsilon by dp-accounting, an accountant that nobody of this project wrote; imported here alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from defenses.dp import Event, GaussianEvent


def is_there() -> bool:
    """Tell whether dp-accounting is installed."""
    return importlib.util.find_spec("dp_accounting") is not None


def epsilon(events: Sequence[tuple[Event, int]], delta: float) -> float | None:
    """Return what dp-accounting says of these events; None where it has no such event.

    Assumes: add or remove one record, which is what its accountant is asked for.
    """
    from dp_accounting import dp_event, pld

    accountant = pld.PLDAccountant()
    for event, count in events:
        if not isinstance(event, GaussianEvent) or event.records_per_person != 1:
            return None
        if event.sampling == "fixed_size" or event.adjacency != "add_remove":
            return None
        release = dp_event.GaussianDpEvent(event.noise_multiplier)
        if event.sampling == "poisson":
            release = dp_event.PoissonSampledDpEvent(event.sampling_rate, release)
        accountant.compose(dp_event.SelfComposedDpEvent(release, event.steps * count))
    return float(accountant.get_epsilon(delta))
