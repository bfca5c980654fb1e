"""The finest grid on which a sum of noisy whole numbers fits a field of few bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

_ROOM = 42.0  # nats: noise pushes a coordinate of a sum beyond its tail with probability below 2 exp(-42)
FEWEST_LEVELS = 8  # that the bound on one unit is cut into; on a coarser grid rounding is most of the noise


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What one site puts into one coordinate: at most `largest` levels, and noise of some variance."""

    largest: int
    variance: float


def reach(demand: Demand, clients: int) -> int:
    """Return what a coordinate of a sum over so many sites practically never exceeds, in levels.

    Guarantee: it is exceeded with probability below 1e-18. Then the number that is opened is wrong, and the
    check on the sum mostly refuses it; noise, bound and charge are as they were.
    Source: Bernstein's inequality for Skellam noise (a difference of Poisson variables), as in
    docs/fewer_bytes.md.
    """
    variance, linear = clients * demand.variance, _ROOM / 3
    return clients * demand.largest + math.ceil(linear + math.sqrt(linear**2 + 2 * _ROOM * variance))


def fits(demand: Demand, *, clients: int, field_bits: int) -> bool:
    """Tell whether sums stay inside a field."""
    return reach(demand, clients) < 1 << (field_bits - 1)


def finest_levels(demand_of: Callable[[int], Demand], *, most: int, clients: int, field_bits: int) -> int:
    """Return the most levels, up to `most`, that the bound on one unit may be cut into; 1 where none fit.

    Assumes: more levels demand more room.
    """
    low, high = 1, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        if fits(demand_of(middle), clients=clients, field_bits=field_bits):
            low = middle
        else:
            high = middle
    return low
