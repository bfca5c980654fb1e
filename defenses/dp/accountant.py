"""Epsilon of everything released so far, and of what would be released next."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.special import log_ndtr

from defenses.dp import composition
from defenses.dp.composition import Curve, Moments, Plan, Running
from defenses.dp.events import (
    Event,
    GaussianEvent,
    MatrixFactorizationEvent,
    NonPrivateEvent,
    SampledSkellamEvent,
    SkellamEvent,
    Statement,
    TuningEvent,
    statement_of,
)
from defenses.dp.orders import ORDERS
from defenses.dp.pairs import Floats, Mechanism, MixturePair, gaussian_pair, mechanism_of
from defenses.dp.pld import LossTooLarge
from defenses.dp.rdp import event_log_moments, renyi_epsilon, renyi_log_delta
from defenses.dp.skellam_gap import gaussian_stand_in, log_gap
from defenses.errors import ParameterError

SMALLEST_DELTA, LARGEST_DELTA = 1e-30, 0.5
ACCURACY = 1e-4
_REMEMBERED_TARGETS = 3
# Of delta, what the Gaussians get that integer noise is near to; and, of delta again, what the nearness may
# fail by.
INTEGER_SHARE, INTEGER_TAIL = 0.99, 1e-30
LARGEST_GAP = 5e-3
# Share of delta that may have come round the window before a grid counts as outgrown; a fresh grid has half
# of it at most.
_WRAPPED_SHARE = 2.5 * composition.TAIL_SHARE


@dataclass(frozen=True, slots=True, kw_only=True)
class EpsilonBound:
    """An upper bound of epsilon at delta.

    `accountant` names the method ('pld', 'rdp', 'gaussian', or 'none' when there is nothing to bound).
    `slack` estimates how much of epsilon is numerical; the bound holds without it.
    """

    epsilon: float
    delta: float
    accountant: str
    slack: float


@dataclass(slots=True)
class _Composition:
    """A plan, the transforms multiplied so far with their log-moments,
    and how many log entries they contain.
    """

    plan: Plan
    running: tuple[Running, Running]
    moments: tuple[Floats, Floats]
    included: int

    def copy(self) -> _Composition:
        running = (self.running[0].copy(), self.running[1].copy())
        return _Composition(self.plan, running, self.moments, self.included)

    def multiply(self, pair: MixturePair, count: int) -> None:
        composition.multiply(self.running, self.plan, pair, count)
        step = _cached_moments(pair, self.plan.cut)
        forward, backward = self.moments
        self.moments = (forward + count * step.forward, backward + count * step.backward)


class Accountant:
    """Compose events as they happen and bound the epsilon of all of them.

    Both directions (a record added, a record removed) are composed on their own and the larger epsilon is
    reported.
    All roundings go up: the discrete losses dominate the true ones, truncated mass and every rounding error
    of the transform are added to delta. Full participations of Gaussian mechanisms are merged exactly. The
    transforms of the past are kept, so that one further event costs one product.

    Guarantee: `epsilon(delta)` is never below the true epsilon of the composition of dominating pairs, and
    within 1e-3 relative above it for epsilon above 1e-4 (losses too large for doubles fall back to Renyi
    accounting, which is valid but looser). A `NonPrivateEvent` makes it infinite.
    Assumes: all events concern the same data owner. Events of another unit, adjacency or number of records a
    person are refused. They may be chosen adaptively.
    Source: see `defenses.dp.pld` and `defenses.dp.composition`.
    """

    def __init__(self) -> None:
        self._counts: dict[MixturePair, int] = {}
        self._log: list[tuple[MixturePair, int]] = []
        self._mu_squared = 0.0
        self._renyi_only: dict[Event, int] = {}
        self._integer: dict[SampledSkellamEvent, int] = {}  # accounted by Gaussians that they are near to
        self._events: dict[Event, int] = {}
        self._infinite = False
        self._statement: Statement | None = None
        self._compositions: dict[float, _Composition] = {}
        self._trial: tuple[Event, float, _Composition] | None = None

    def compose(self, event: Event, count: int = 1) -> None:
        """Add `count` repetitions of an event to the history."""
        if not isinstance(count, int) or count < 1:
            raise ParameterError(f"count = {count!r}: must be a positive integer")
        statement = statement_of(event)
        if statement is not None and self._statement not in (None, statement):
            raise ParameterError(
                f"{statement}: cannot be added to a history of {self._statement}; keep one accountant each"
            )
        self._statement = self._statement or statement
        if isinstance(event, (GaussianEvent, MatrixFactorizationEvent)):
            self._compose_mechanism(mechanism_of(event), count)
        elif isinstance(event, SampledSkellamEvent):
            self._compose_integer(event, count)
        elif isinstance(event, (SkellamEvent, TuningEvent)):
            self._renyi_only[event] = self._renyi_only.get(event, 0) + count
        elif isinstance(event, NonPrivateEvent):
            self._infinite = True
        else:
            raise ParameterError(f"{event!r}: no accountant knows this event")
        self._events[event] = self._events.get(event, 0) + count
        if self._trial is not None:
            trial_event, delta, grown = self._trial
            if trial_event == event and count == 1 and grown.included == len(self._log):
                self._remember(delta, grown)
            self._trial = None

    def _compose_integer(self, event: SampledSkellamEvent, count: int) -> None:
        stand_in = gaussian_stand_in(event)
        if stand_in is None:
            self._renyi_only[event] = self._renyi_only.get(event, 0) + count
            return
        self._integer[event] = self._integer.get(event, 0) + count
        self._compose_mechanism(mechanism_of(stand_in), count)

    def _compose_mechanism(self, mechanism: Mechanism, count: int) -> None:
        self._mu_squared += mechanism.mu_squared * count
        if mechanism.pair is not None:
            steps = mechanism.steps * count
            self._counts[mechanism.pair] = self._counts.get(mechanism.pair, 0) + steps
            self._log.append((mechanism.pair, steps))

    def copy(self) -> Accountant:
        """Return an independent accountant with the same history."""
        twin = self._copy_for(tuple(self._compositions))
        if self._trial is not None:
            event, delta, grown = self._trial
            twin._trial = (event, delta, grown.copy())
        return twin

    def _copy_for(self, deltas: tuple[float, ...]) -> Accountant:
        twin = Accountant()
        twin._counts, twin._log = dict(self._counts), list(self._log)
        twin._mu_squared, twin._infinite, twin._statement = self._mu_squared, self._infinite, self._statement
        twin._renyi_only, twin._events = dict(self._renyi_only), dict(self._events)
        twin._integer = dict(self._integer)
        twin._compositions = {
            delta: self._compositions[delta].copy() for delta in deltas if delta in self._compositions
        }
        return twin

    def epsilon(self, delta: float) -> EpsilonBound:
        """Return the upper bound of epsilon at delta for everything composed."""
        _check_delta(delta)
        if self._integer and not self._renyi_only and not self._infinite:
            return self._integer_epsilon(delta)
        return self._plain_epsilon(delta)

    def _integer_epsilon(self, delta: float) -> EpsilonBound:
        """Return the smaller of two bounds: by Renyi moments, and by Gaussians near to the integer noise.

        With every law at most e^gap times the other plus `tail`, (epsilon, d) of the Gaussians is
        (epsilon + 2 gap, e^gap d + tail (1 + e^(epsilon + gap))) of the integers.
        """
        renyi = self._renyi_bound(delta)
        tail = INTEGER_TAIL * delta
        gap = log_gap(self._integer, tail)
        if gap > LARGEST_GAP:
            return renyi
        near = self._plain_epsilon(INTEGER_SHARE * delta)
        value = near.epsilon + 2 * gap
        spent = INTEGER_SHARE * math.exp(gap) + INTEGER_TAIL * (1 + math.exp(min(value, 700.0)))
        if spent > 1.0 or value >= renyi.epsilon:
            return renyi
        return EpsilonBound(
            epsilon=value, delta=delta, accountant=near.accountant, slack=near.slack + 2 * gap
        )

    def _plain_epsilon(self, delta: float) -> EpsilonBound:
        simple = self._simple_epsilon(delta)
        if simple is not None:
            return simple
        try:
            return self._pld_epsilon(delta, ACCURACY)
        except LossTooLarge:
            return self._renyi_bound(delta)

    def epsilon_with(self, event: Event, delta: float) -> EpsilonBound:
        """Return what `epsilon` would say after one more event, without adding it."""
        _check_delta(delta)
        integer = self._integer or isinstance(event, SampledSkellamEvent)
        target = INTEGER_SHARE * delta if integer else delta
        known = self._compositions.get(target)
        if known is None and self._counts and not self._renyi_only:
            self._plain_epsilon(target)
        if known is not None:
            self._catch_up(known)
        trial = self._copy_for((target,))
        trial.compose(event)
        result = trial.epsilon(delta)
        grown = trial._compositions.get(target)
        if grown is not None and (known is None or grown.plan is not known.plan):
            # The trial needed a new grid; if this event is composed next, its transforms are taken over.
            self._trial = (event, target, grown)
        return result

    def delta(self, epsilon: float) -> float:
        """Return the upper bound of delta at epsilon for everything composed."""
        if not isinstance(epsilon, (int, float)) or not epsilon >= 0:
            raise ParameterError(f"epsilon = {epsilon!r}: must be a number of at least 0")
        if self._infinite or math.isinf(epsilon):
            return 1.0 if self._infinite else 0.0
        if self._integer and not self._renyi_only:
            return self._integer_delta(epsilon)
        return self._plain_delta(epsilon)

    def _integer_delta(self, epsilon: float) -> float:
        renyi = math.exp(max(renyi_log_delta(moments, epsilon) for moments in self._renyi_moments()))
        tail = math.sqrt(SMALLEST_DELTA) * INTEGER_TAIL * math.exp(-min(epsilon, 500.0))
        gap = log_gap(self._integer, tail)
        if gap > LARGEST_GAP or epsilon <= 2 * gap:
            return min(1.0, renyi)
        near = self._plain_delta(epsilon - 2 * gap)
        return min(1.0, renyi, math.exp(gap) * near + tail * (1 + math.exp(min(epsilon, 500.0))))

    def _plain_delta(self, epsilon: float) -> float:
        if not self._counts and not self._renyi_only:
            if self._mu_squared:
                return gaussian_delta(math.sqrt(self._mu_squared), epsilon)
            return 0.0
        if self._renyi_only:
            return min(
                1.0, math.exp(max(renyi_log_delta(moments, epsilon) for moments in self._renyi_moments()))
            )
        return self._pld_delta(epsilon)

    def _simple_epsilon(self, delta: float) -> EpsilonBound | None:
        if self._infinite:
            return EpsilonBound(epsilon=math.inf, delta=delta, accountant="none", slack=0.0)
        if not self._events:
            return EpsilonBound(epsilon=0.0, delta=delta, accountant="none", slack=0.0)
        if self._renyi_only:
            return self._renyi_bound(delta)
        if not self._counts:
            value = gaussian_epsilon(math.sqrt(self._mu_squared), delta)
            return EpsilonBound(epsilon=value, delta=delta, accountant="gaussian", slack=value * 1e-9)
        return None

    def _pld_epsilon(self, delta: float, accuracy: float) -> EpsilonBound:
        known, refinement, margin = self._compositions.get(delta), 1.0, 1.02
        bracket: tuple[float, float] | None = None
        best = EpsilonBound(epsilon=math.inf, delta=delta, accountant="pld", slack=0.0)
        for _ in range(5):
            if known is None:
                known = self._build(
                    self._plan(
                        delta, accuracy * refinement, bracket, margin, grown=delta in self._compositions
                    )
                )
            self._catch_up(known)
            curves = self._curves(known)
            values = [composition.epsilon_of(curve, delta) for curve in curves]
            worst = int(values[1] > values[0])
            value, excess = values[worst], curves[worst].excess
            fits = all(curve.constant <= 0.01 * delta for curve in curves) and math.isfinite(value)
            # A history that outgrew its grid wraps around: what left at one end comes back at the other, and
            # the bound,
            # though still valid, drifts upwards. Then the grid is made anew.
            fits = fits and self._wrapped_mass(known, curves, values) <= _WRAPPED_SHARE * delta
            quiet = fits and composition.noise_at(curves[worst], value) <= 3e-4
            stuck = quiet and value > best.epsilon * (1 - accuracy)
            if value < best.epsilon:
                best = EpsilonBound(epsilon=value, delta=delta, accountant="pld", slack=excess + 1e-5 * value)
            if stuck or (quiet and excess <= 2.5 * accuracy * value):
                break
            if quiet and value > 0:
                refinement = min(1.0, refinement * max(0.02, accuracy * value / excess))
            bracket = (values[0], values[1]) if fits else None
            margin *= 1.0 if fits else 1.2
            known = None
        if known is not None:
            self._remember(delta, known)
        return best if math.isfinite(best.epsilon) else self._renyi_bound(delta)

    def _pld_delta(self, epsilon: float) -> float:
        guess = math.exp(max(renyi_log_delta(moments, epsilon) for moments in self._renyi_moments()))
        best = guess
        try:
            for _ in range(6):
                target = min(max(best, SMALLEST_DELTA), LARGEST_DELTA)
                known = self._build(self._plan(target, ACCURACY, (epsilon, epsilon), 1.02, grown=False))
                value = max(composition.delta_of(curve, epsilon) for curve in self._curves(known))
                settled = value >= 0.2 * best
                best = min(best, value)
                if settled:
                    break
        except LossTooLarge:
            return min(1.0, guess)
        return min(1.0, best)

    def _plan(
        self, delta: float, accuracy: float, known: tuple[float, float] | None, margin: float, *, grown: bool
    ) -> Plan:
        # A history that outgrew its grid will grow on: leave room, so that rebuilding stays rare.
        room = 1.4 if grown else 1.0
        steps = room * float(sum(self._counts.values()) + 1)
        cut = 10.0 ** math.floor(math.log10(composition.TAIL_SHARE * delta / steps))
        forward, backward = self._log_moments(cut)
        return composition.make_plan(
            forward * room,
            backward * room,
            steps=steps,
            delta=delta,
            cut=cut,
            accuracy=accuracy,
            known=known,
            margin=margin,
        )

    def _log_moments(self, cut: float) -> tuple[Floats, Floats]:
        gaussian = ORDERS * (1 + ORDERS) * self._mu_squared / 2
        forward, backward = gaussian.copy(), gaussian.copy()
        for pair, count in self._counts.items():
            moments = _cached_moments(pair, cut)
            forward += count * moments.forward
            backward += count * moments.backward
        return forward, backward

    def _build(self, plan: Plan) -> _Composition:
        nothing = np.zeros(len(ORDERS))
        result = _Composition(plan, composition.start(plan), (nothing, nothing), len(self._log))
        for pair, count in self._counts.items():
            result.multiply(pair, count)
        return result

    def _catch_up(self, known: _Composition) -> None:
        for pair, count in self._log[known.included :]:
            known.multiply(pair, count)
        known.included = len(self._log)

    def _wrapped_mass(self, known: _Composition, curves: list[Curve], values: list[float]) -> float:
        gaussian = ORDERS * (1 + ORDERS) * self._mu_squared / 2
        forward, backward = known.moments[0] + gaussian, known.moments[1] + gaussian
        sides = ((forward, backward), (backward, forward))
        return max(
            composition.wrapped_mass(own, other, side, curve, value)
            for (own, other), side, curve, value in zip(
                sides, known.plan.directions, curves, values, strict=True
            )
        )

    def _curves(self, known: _Composition) -> list[Curve]:
        running = known.running
        if self._mu_squared:
            running = (running[0].copy(), running[1].copy())
            composition.multiply(running, known.plan, gaussian_pair(math.sqrt(self._mu_squared)), 1)
        curves: list[Curve] = []
        for state, side in zip(running, known.plan.directions):
            curves.append(composition.curve_of(state, side, known.plan))
        return curves

    def _remember(self, delta: float, known: _Composition) -> None:
        self._compositions.pop(delta, None)
        self._compositions[delta] = known
        while len(self._compositions) > _REMEMBERED_TARGETS:
            del self._compositions[next(iter(self._compositions))]

    def _renyi_moments(self) -> tuple[Floats, Floats]:
        total = [np.zeros(len(ORDERS)), np.zeros(len(ORDERS))]
        for event, count in self._events.items():
            for side, moments in enumerate(event_log_moments(event)):
                total[side] = total[side] + count * moments
        return total[0], total[1]

    def _renyi_bound(self, delta: float) -> EpsilonBound:
        value = max(renyi_epsilon(moments, delta)[0] for moments in self._renyi_moments())
        return EpsilonBound(epsilon=value * (1 + 1e-9), delta=delta, accountant="rdp", slack=value * 1e-9)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return epsilon of one Gaussian release with sensitivity over standard deviation `mu`, rounded up.

    Source: Balle, Wang, arXiv 1805.06530, theorem 8 (the exact curve), inverted by bisection.
    """
    low, high = 0.0, 1.0 + mu * mu
    while gaussian_delta(mu, high) > delta:
        low, high = high, 2 * high
    for _ in range(200):
        middle = 0.5 * (low + high)
        if not low < middle < high:
            break
        low, high = (low, middle) if gaussian_delta(mu, middle) <= delta else (middle, high)
    return high * (1 + 1e-12)


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Return delta of one Gaussian release with sensitivity over standard deviation `mu`, rounded up."""
    above = float(log_ndtr(-epsilon / mu + mu / 2))
    below = epsilon + float(log_ndtr(-epsilon / mu - mu / 2))
    # The difference loses digits when both terms are close; a few ulp of the larger one cover it.
    return math.exp(above) * min(1.0, -math.expm1(min(0.0, below - above)) + 1e-14 * (1 + abs(above)))


@lru_cache(maxsize=8192)
def _cached_moments(pair: MixturePair, cut: float) -> Moments:
    return composition.moments_of(pair, cut)


def _check_delta(delta: float) -> None:
    if not isinstance(delta, (int, float)) or not SMALLEST_DELTA <= delta <= LARGEST_DELTA:
        raise ParameterError(f"delta = {delta!r}: must lie between {SMALLEST_DELTA:g} and {LARGEST_DELTA:g}")


def composed(counts: Iterable[tuple[Event, int]], delta: float) -> float:
    """Return the upper bound of epsilon at delta for events that came so often each; 0 for none.

    >>> composed([], 1e-5)
    0.0
    """
    accountant = Accountant()
    for event, count in counts:
        if isinstance(event, NonPrivateEvent):
            return math.inf  # whatever unit the others are of
        accountant.compose(event, count)
    return accountant.epsilon(delta).epsilon


def epsilon(events: Iterable[Event], delta: float) -> EpsilonBound:
    """Return the upper bound of epsilon at delta for all events together."""
    accountant = Accountant()
    for event in events:
        accountant.compose(event)
    return accountant.epsilon(delta)
