"""Renyi differential privacy: log-moments of every event, conversion, and the price of choosing the best of
many runs.

Used for what has no loss distribution here (Skellam noise, random stopping), as a fallback and as a
cross-check. All curves are log E exp(order * loss) = order * D_(1 + order), at the common `ORDERS`.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from defenses.dp.events import (
    Event,
    GaussianEvent,
    MatrixFactorizationEvent,
    NonPrivateEvent,
    SampledSkellamEvent,
    SkellamEvent,
    TuningEvent,
)
from defenses.dp.orders import ORDERS
from defenses.dp.pairs import Floats, MixturePair, mechanism_of
from defenses.dp.sampled_skellam import log_moments as sampled_skellam_log_moments
from defenses.dp.sampled_skellam import skellam_log_moment
from defenses.errors import ParameterError

_TIGHTENING: Floats = ORDERS * np.log(ORDERS) - (1 + ORDERS) * np.log1p(ORDERS)
_MOST_PANELS = 40_000
_PANEL_NODES, _PANEL_WEIGHTS = np.polynomial.legendre.leggauss(16)
# Quadrature and summation err by a few ulp of a moment near one; every log-moment is rounded up by this much.
_ROUNDING = 2e-14


def renyi_epsilon(log_moments: Floats, delta: float) -> tuple[float, int]:
    """Return the best epsilon over `ORDERS` and the index of its order.

    Source: Canonne, Kamath, Steinke, arXiv 2004.00010, proposition 12.
    """
    with np.errstate(invalid="ignore"):
        values = (log_moments + math.log(1 / delta) + _TIGHTENING) / ORDERS
    values = np.where(np.isnan(values), np.inf, values)
    best = int(np.argmin(values))
    return float(max(values[best], 0.0)), best


def renyi_log_delta(log_moments: Floats, epsilon: float) -> float:
    """Return log delta at epsilon, the best over `ORDERS`; at most 0."""
    with np.errstate(invalid="ignore"):
        values = log_moments - ORDERS * epsilon + _TIGHTENING
    return float(min(0.0, np.where(np.isnan(values), np.inf, values).min()))


def event_log_moments(event: Event) -> tuple[Floats, Floats]:
    """Return the log-moments of one event for both directions (removing and adding).

    Raises: ParameterError for an event without a Renyi curve.
    """
    if isinstance(event, NonPrivateEvent):
        return np.full(len(ORDERS), np.inf), np.full(len(ORDERS), np.inf)
    if isinstance(event, SkellamEvent):
        curve = _skellam_log_moments(event)
        return curve, curve
    if isinstance(event, SampledSkellamEvent):
        curve = event.steps * sampled_skellam_log_moments(event)
        return curve, curve
    if isinstance(event, TuningEvent):
        curve = _tuning_log_moments(event)
        return curve, curve
    if isinstance(event, (GaussianEvent, MatrixFactorizationEvent)):
        mechanism = mechanism_of(event)
        gaussian = ORDERS * (1 + ORDERS) * mechanism.mu_squared / 2
        if mechanism.pair is None:
            return gaussian, gaussian
        forward, backward = pair_log_moments(mechanism.pair)
        return gaussian + mechanism.steps * forward, gaussian + mechanism.steps * backward
    raise ParameterError(f"kind = {event.kind!r}: this event has no Renyi curve")


@lru_cache(maxsize=4096)
def pair_log_moments(pair: MixturePair) -> tuple[Floats, Floats]:
    """Return the log-moments of one step for both directions, by Gauss-Legendre quadrature; infinity at huge
    orders.
    """
    forward = np.array([_moment(pair, order, backward=False) for order in ORDERS])
    backward = np.array([_moment(pair, order, backward=True) for order in ORDERS])
    forward.setflags(write=False)
    backward.setflags(write=False)
    return forward, backward


def _moment(pair: MixturePair, order: float, *, backward: bool) -> float:
    shifts_up, shifts_down = len(pair.up) - 1, len(pair.down) - 1
    reach = (1 + order) * max(shifts_up, shifts_down)
    low, high = -(reach if backward or shifts_down else 0) - 14 * pair.sigma, reach + 14 * pair.sigma
    if backward and not shifts_down:
        low, high = -order * shifts_up - 14 * pair.sigma, 14 * pair.sigma + shifts_up
    width = min(pair.sigma / 2, pair.sigma**2)
    panels = math.ceil((high - low) / width)
    if panels > _MOST_PANELS:
        return math.inf
    if pair.symmetric:
        return _symmetric_moment(pair, order, width, max(panels, 64))
    edges = np.linspace(low, high, panels + 1)
    log_p, log_q, log_weights = _log_masses(pair, edges)
    own, other = (log_q, log_p) if backward else (log_p, log_q)
    return max(0.0, _log_sum(own + log_weights + order * (own - other))) + _ROUNDING


def _symmetric_moment(pair: MixturePair, order: float, width: float, panels: int) -> float:
    """Integrate losses above zero and their mirror image; the rest of the probability has loss zero."""
    middle = 0.5
    edges = middle + width * np.arange(panels + math.ceil(28 * pair.sigma / width) + 1)
    log_p, log_q, log_weights = _log_masses(pair, edges)
    up = log_p + log_weights + order * (log_p - log_q)
    down = log_q + log_weights - order * (log_p - log_q)
    rest = 1.0 - math.exp(_log_sum(log_p + log_weights)) - math.exp(_log_sum(log_q + log_weights))
    parts = np.array([_log_sum(up), _log_sum(down), math.log(max(rest, 1e-300))])
    return max(0.0, _log_sum(parts)) + _ROUNDING


def _log_masses(pair: MixturePair, edges: Floats) -> tuple[Floats, Floats, Floats]:
    half = np.diff(edges) / 2
    nodes = ((edges[:-1] + edges[1:]) / 2)[:, None] + half[:, None] * _PANEL_NODES[None, :]
    outputs = nodes.ravel()
    log_weights = np.log((half[:, None] * _PANEL_WEIGHTS[None, :]).ravel())
    centre = -0.5 * (outputs / pair.sigma) ** 2 - math.log(pair.sigma * math.sqrt(2 * math.pi))
    up, down = pair.log_ratios(outputs)
    return centre + up, centre + down, log_weights


def _log_sum(exponents: Floats) -> float:
    peak = float(exponents.max())
    return peak + math.log(float(np.exp(exponents - peak).sum()))


def _skellam_log_moments(event: SkellamEvent) -> Floats:
    """Return the curve at integer Renyi orders, joined by chords (a log-moment is convex, so chords lie above
    it).
    """

    def at(order: Floats) -> Floats:
        return skellam_log_moment(order, event.l1_sensitivity, event.l2_sensitivity, event.variance)

    below = np.floor(ORDERS)
    share = ORDERS - below
    curve = event.steps * ((1 - share) * at(below) + share * at(below + 1))
    return np.asarray(curve, dtype=np.float64)


def _tuning_log_moments(event: TuningEvent) -> Floats:
    total = [np.zeros(len(ORDERS)), np.zeros(len(ORDERS))]
    for part in event.base:
        for side, moments in enumerate(event_log_moments(part)):
            total[side] = total[side] + moments
    base = np.maximum(total[0], total[1])
    if event.distribution == "poisson":
        return _poisson_stopping(base, event.stopping)
    return _negative_binomial_stopping(base, event.stopping, event.shape)


def _negative_binomial_stopping(base: Floats, stopping: float, shape: float) -> Floats:
    """Source: Papernot, Steinke, arXiv 2110.03620, theorem 2."""
    if shape == 0:
        mean = (1 / stopping - 1) / math.log(1 / stopping)
    else:
        mean = shape * (1 - stopping) / (stopping * -math.expm1(shape * math.log(stopping)))
    # At Renyi order 1 + o: (1 - 1/(1+o)) * base / o + log(1/stopping) / (1+o).
    extra = (1 + shape) * float(np.min((base + math.log(1 / stopping)) / (1 + ORDERS)))
    # The extra order may also be 1, where only log(1/stopping) remains.
    extra = min(extra, (1 + shape) * math.log(1 / stopping))
    return np.asarray(base + ORDERS * extra + max(0.0, math.log(mean)), dtype=np.float64)


def _poisson_stopping(base: Floats, mean: float) -> Floats:
    """Source: Papernot, Steinke, arXiv 2110.03620, theorem 6."""
    deltas = np.array([math.exp(renyi_log_delta(base, math.log1p(1 / order))) for order in ORDERS])
    return np.asarray(base + ORDERS * mean * deltas + max(0.0, math.log(mean)), dtype=np.float64)
