"""How far wide Skellam noise is from rounded Gaussian noise: near enough for its loss distribution.

Three laws stand behind one another: Skellam noise of variance V; the discrete Gaussian of the same V; and
Gaussian noise of variance V - 9 rounded at random to the integers, which is post-processing of a Gaussian.
For |k| up to B sqrt(V) the first two differ by a factor of exp(+-z), z about B^4 / (24 V): with 19 bits below
the bound that is 1e-8. Over n coordinates such factors add up like the square root of n. Derived in
docs/shared_noise.md.

Source: Amos, Math. Comp. 28 (1974), p. 241, inequality 16 (ratios of Bessel functions); Hoeffding 1963,
theorem 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from defenses.dp.events import GaussianEvent, SampledSkellamEvent

ROUNDING_VARIANCE = 9.0  # of the random rounding to integers, whose ripple is then below 1e-75
_RIPPLE = 1e-70  # what the ripple adds per coordinate, generously
_LEAST_VARIANCE = 1e4  # below it the bounds here say nothing useful, and Renyi moments are used alone


def gaussian_stand_in(event: SampledSkellamEvent) -> GaussianEvent | None:
    """Return the Gaussian event that a release is near to; None where its noise is too narrow for that."""
    if event.variance < _LEAST_VARIANCE:
        return None
    return GaussianEvent(
        unit=event.unit,
        records_per_person=event.records_per_person,
        adjacency=event.adjacency,
        sampling="poisson" if event.sampling_rate < 1.0 else "full",
        sampling_rate=event.sampling_rate,
        noise_multiplier=math.sqrt(event.variance - ROUNDING_VARIANCE) / event.l2_sensitivity,
        steps=event.steps,
        clip_norm=1.0,
        release=event.release,
    )


def log_gap(events: Mapping[SampledSkellamEvent, int], tail: float) -> float:
    """Return x such that each law of all these releases is at most e^x times the other plus `tail`.

    It holds for Skellam noise against rounded Gaussian noise and the other way round.
    """
    counts = {event: count * event.steps * event.dimension for event, count in events.items()}
    numbers = sum(counts.values())
    # Half of `tail` is for coordinates beyond B deviations, half for an unusual sum of log-ratios.
    room = math.log(8 * numbers / tail)
    mean, squared_width = 0.0, 0.0
    for event, number in counts.items():
        reach = _reach(room, event.variance)
        width = _log_ratio_range(reach, event.variance)
        # Of a law and its log-ratio x to another: E x <= e^w w^2 / 2, and what is cut off at the tails.
        mean += number * (0.5 * math.exp(width) * width**2 + 2 * math.exp(-room) + 2 * _RIPPLE)
        squared_width += number * width**2
    return mean + math.sqrt(2 * squared_width * math.log(2 / tail))


def _reach(room: float, variance: float) -> float:
    """Return how many deviations leave at most exp(-room) of either law on one side (Bernstein's
    inequality).
    """
    linear = room / (3 * math.sqrt(variance))
    return linear + math.sqrt(linear**2 + 2 * room)


def _log_ratio_range(reach: float, variance: float) -> float:
    """Bound |log P_skellam(k) / P_discrete_gaussian(k)| for |k| <= reach * sqrt(variance)."""
    above = reach**4 / 24 + 0.5 * (1 + 1 / math.sqrt(variance))
    below = reach**2 / 2 + reach / (2 * math.sqrt(variance)) + (3 + 1 / variance) / 24
    return max(above, below) / variance
