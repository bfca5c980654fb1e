"""Epsilon by dp-accounting, an accountant that nobody of this project wrote; imported here alone."""

from __future__ import annotations

from collections.abc import Sequence

from defenses.dp import Event, GaussianEvent


def epsilon(events: Sequence[tuple[Event, int]], delta: float) -> float | None:
    """Return what dp-accounting says of these events; None where it is not installed or has no such event.

    Assumes: add or remove one record, which is what its accountant is asked for.
    """
    try:
        from dp_accounting import dp_event, pld
    except ImportError:
        return None
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
