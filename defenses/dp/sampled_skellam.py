"""Renyi moments of a sum with Skellam noise in which every record joins by chance, for both directions.

With the record the release is P = (1 - q) P0 + q P1, without it Q = P0, where P1 is P0 moved by an integer
vector within the bounds. At an integer order a the binomial theorem gives

    E_Q (P/Q)^a = sum_k C(a, k) (1 - q)^(a - k) q^k E_P0 (P1/P0)^k,

and the moments on the right are those of Skellam noise without sampling. The other direction, E_P (Q/P)^a, is
never larger: Skellam noise is symmetric, so x -> shift - x swaps P0 and P1. Derived in docs/shared_noise.md.

Source: Mironov, Talwar, Zhang, arXiv 1908.10530 (sampling, reflection); Agarwal, Kairouz, Liu, arXiv
2110.04995, theorem 3.5 (Skellam noise).
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from scipy.special import gammaln

from defenses.dp.events import SampledSkellamEvent
from defenses.dp.orders import ORDERS
from defenses.dp.pairs import Floats, Integers

# Above this order the binomial sum is replaced by one term, E (P/Q)^a <= 1 - q + q E (P1/P0)^a.
_LARGEST_SUM = 2048
# Sums of a few thousand positive terms in logarithms are off by far less; every log-moment is rounded up.
_ROUNDING = 1e-12


def log_moments(event: SampledSkellamEvent) -> Floats:
    """Return log E exp(order * loss) of one step at the common `ORDERS`; it holds for both directions.

    Integer Renyi orders are joined by chords: a log-moment is convex in the order, so chords lie above it.
    """
    return _curve(
        event.l1_sensitivity,
        event.l2_sensitivity,
        event.variance,
        event.sampling_rate,
        event.records_per_person,
    )


@lru_cache(maxsize=1024)
def _curve(l1: float, l2: float, variance: float, rate: float, records: int) -> Floats:
    below = np.floor(ORDERS)
    share = ORDERS - below
    wanted = np.unique(np.concatenate([below, below + 1]))
    values = np.array([_moment(order, l1, l2, variance, rate, records) for order in wanted])
    at_below = values[np.searchsorted(wanted, below)]
    at_above = values[np.searchsorted(wanted, below + 1)]
    curve = (1 - share) * at_below + share * at_above
    curve.setflags(write=False)
    return np.asarray(curve, dtype=np.float64)


def _moment(order: float, l1: float, l2: float, variance: float, rate: float, records: int) -> float:
    """Return a bound of the log-moment at one integer order, for a person with so many records.

    Given which of the person's records joined, joint convexity leaves one pair for every number of them: with
    probability 1 - (1 - q)^k at least one joined, and j of them move the sum by at most j bounds.
    """
    if order <= 0:
        return 0.0
    if records == 1:
        return _two_point(order, l1, l2, variance, rate)
    if rate == 1.0:
        return _two_point(order, records * l1, records * l2, variance, 1.0)
    some = -math.expm1(records * math.log1p(-rate))
    numbers = np.arange(1, records + 1)
    weights = _log_binomial(records, numbers) + numbers * math.log(rate)
    weights = weights + (records - numbers) * math.log1p(-rate) - math.log(some)
    parts = [_two_point(order, number * l1, number * l2, variance, some) for number in numbers]
    return _log_sum(weights + np.array(parts)) + _ROUNDING


def _two_point(order: float, l1: float, l2: float, variance: float, rate: float) -> float:
    """Return the log-moment of (1 - q) P0 + q P1 against P0, for a shift within the bounds."""
    whole = float(skellam_log_moment(np.array([order]), l1, l2, variance)[0])
    if rate >= 1.0:
        return whole
    simple = float(np.logaddexp(math.log1p(-rate), math.log(rate) + whole))
    if order + 1 > _LARGEST_SUM:
        return simple + _ROUNDING
    power = int(order) + 1
    terms = np.arange(power + 1)
    moments = np.zeros(power + 1)
    moments[2:] = skellam_log_moment(terms[2:] - 1.0, l1, l2, variance)
    logs = _log_binomial(power, terms) + (power - terms) * math.log1p(-rate) + terms * math.log(rate)
    return max(0.0, min(simple, _log_sum(logs + moments))) + _ROUNDING * power


def skellam_log_moment(order: Floats, l1: float, l2: float, variance: float) -> Floats:
    """Return the bound of Skellam noise without sampling at integer Renyi orders 1 + `order`.

    Source: Agarwal, Kairouz, Liu, arXiv 2110.04995, theorem 3.5 (in integer units).
    """
    alpha = order + 1
    first = alpha * l2**2 / (2 * variance)
    second = ((2 * alpha - 1) * l2**2 + 6 * l1) / (4 * variance**2)
    return np.asarray(order * (first + np.minimum(second, 3 * l1 / (2 * variance))), dtype=np.float64)


def _log_binomial(total: int, chosen: Floats | Integers) -> Floats:
    logs = gammaln(total + 1) - gammaln(chosen + 1) - gammaln(total - chosen + 1)
    return np.asarray(logs, dtype=np.float64)


def _log_sum(exponents: Floats) -> float:
    peak = float(exponents.max())
    return peak + math.log(float(np.exp(exponents - peak).sum()))
