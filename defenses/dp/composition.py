"""Composition of privacy-loss distributions by one exponentially tilted, bounded Fourier transform.

Every mass is multiplied by e^(tilt * loss) and renormalised before the transform, so that rounding errors
are relative to the losses that decide delta, not to the bulk. What could make the result too small is bounded
and added to it:

* rounding of the forward and inverse transforms and of the powers (`drift`, the accumulated log of the factor
  by which a coefficient may be off; every coefficient of a transform of masses summing to one errs by at most
  a few ulp times log2 n);
* losses above the top of the window (`tail`, a Chernoff bound from the same discrete distributions);
* losses that were given up on (`infinity`).

Losses that fall below the window wrap around to larger losses and only make the result larger.

Source: Koskela, Jalko, Honkela, arXiv 1906.03049 (Fourier accountant); Higham, Accuracy and Stability,
section 24.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from defenses.dp.orders import ORDERS
from defenses.dp.pairs import Floats, Integers, MixturePair
from defenses.dp.pld import bulk, discretise
from defenses.dp.rdp import renyi_epsilon

Complexes = npt.NDArray[np.complex128]

ULP = 2.0**-52
LARGEST_SIZE = 1 << 21
SMALLEST_SIZE = 1 << 9
# Coefficients this small are dropped (denormal numbers are slow); `_inverse_error` adds more than all of
# them.
NEGLIGIBLE = 1e-150
# From this many repetitions on, low coefficients are computed relative to one.
MANY, SHARP_FREQUENCIES, SHARP_MASSES = 20_000, 4096, 256
# Share of delta that losses above the window, and those given up on, may cost.
TAIL_SHARE = 2e-4
COARSE_GROWTH = 0.1


@dataclass(frozen=True, slots=True)
class Direction:
    """The window and the tilt of one direction: remove (forward) or add (backward).

    `saddle` is the order at which moments tell most about delta; the discretisation is judged there.
    """

    tilt: float
    tail_tilt: float
    saddle: float
    size: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The grid one composition runs on; chosen from the events and the target, kept while both stay near."""

    spacing: float
    growth: float
    cut: float
    delta: float
    directions: tuple[Direction, Direction]


@dataclass(frozen=True, slots=True)
class Moments:
    """log E exp(order * loss) of one step at every order of `ORDERS`, both directions; used to choose, not to
    prove.
    """

    forward: Floats
    backward: Floats


@dataclass(slots=True)
class Running:
    """The composed transform of one direction, as far as it has been multiplied."""

    transform: Complexes
    drift: Floats
    log_moment: float = 0.0
    log_tail_moment: float = 0.0
    log_surplus: float = 0.0
    infinity: float = 0.0
    steps: float = 0.0

    def copy(self) -> Running:
        """Return an independent copy."""
        return Running(
            self.transform.copy(),
            self.drift.copy(),
            self.log_moment,
            self.log_tail_moment,
            self.log_surplus,
            self.infinity,
            self.steps,
        )


@dataclass(frozen=True, slots=True)
class Curve:
    """An upper bound of delta at the losses 0, spacing, 2 spacing, ...; `masses` and `log_shadows` are suffix
    sums.

    Between two points delta is `masses[i] - e^epsilon * shadows[i] + constant` with the sums to the right.
    `noise` is the share of the mass above each point that only bounds rounding errors, `excess` an estimate
    of what the grid adds to epsilon.
    """

    spacing: float
    deltas: Floats
    masses: Floats
    log_shadows: Floats
    constant: float
    excess: float
    noise: Floats
    steps: float


def moments_of(pair: MixturePair, cut: float) -> Moments:
    """Return the log-moments of one step from a coarse grid."""
    grid = discretise(pair, spacing=max(bulk(pair) / 4, 1e-300), growth=COARSE_GROWTH, tail=cut)
    losses = grid.indices * grid.spacing
    return Moments(_log_moments(grid.forward, losses), _log_moments(grid.backward, -losses))


def _log_moments(masses: Floats, losses: Floats) -> Floats:
    used = masses > 0
    exponents = np.log(masses[used])[None, :] + ORDERS[:, None] * losses[used][None, :]
    peak = exponents.max(axis=1)
    result = peak + np.log(np.exp(exponents - peak[:, None]).sum(axis=1))
    return np.asarray(result, dtype=np.float64)


def make_plan(
    forward: Floats,
    backward: Floats,
    *,
    steps: float,
    delta: float,
    cut: float,
    accuracy: float,
    known: tuple[float, float] | None = None,
    margin: float = 1.02,
) -> Plan:
    """Choose grid, windows and tilts for composed log-moments and a target delta.

    `accuracy` is the share of epsilon the discretisation may cost, `known` the epsilons of both directions on
    an earlier grid, `margin` how much wider than estimated the windows are made.
    """
    epsilons = known or (renyi_epsilon(forward, delta)[0], renyi_epsilon(backward, delta)[0])
    windows = [
        _window(forward, backward, delta, epsilons[0], steps),
        _window(backward, forward, delta, epsilons[1], steps),
    ]
    # Moving mass to cell ends adds at most spacing^2 / 6 of variance a step: (1 + order) / 12 of it to
    # epsilon.
    largest_saddle = max(saddle for (_, _, saddle, _) in windows)
    spacing = math.sqrt(12 * accuracy * max(*epsilons, 1e-300) / ((1 + largest_saddle) * steps))
    widest = margin * max(width for *_, width in windows)
    spacing = max(min(spacing, widest / SMALLEST_SIZE), widest / LARGEST_SIZE)
    directions = []
    for tilt, tail_tilt, saddle, width in windows:
        directions.append(
            Direction(
                tilt=tilt,
                tail_tilt=tail_tilt,
                saddle=saddle,
                size=1 << max(9, math.ceil(math.log2(margin * width / spacing + 8))),
            )
        )
    growth = min(0.3, 0.03 * math.sqrt(accuracy / 2.5e-4))
    return Plan(spacing, growth, cut, delta, (directions[0], directions[1]))


def _window(
    own: Floats, other: Floats, delta: float, epsilon: float, steps: float
) -> tuple[float, float, float, float]:
    """Return tilt, the order of the tail bound, the saddle and the width of the window.

    Three conditions bound the width from below: the top is inside; what wraps from above has lost less than
    the tilt adds; what wraps from below is small before or after the tilt. Among the tilts that keep rounding
    errors far below delta the one with the narrowest window is taken.
    """
    needed = math.log(1 / (TAIL_SHARE * delta))
    # Far beyond 2 log(1/delta) / epsilon an order tells nothing more and costs digits.
    largest = 20 * needed / max(epsilon, 1e-300)
    sensible = np.isfinite(own) & (largest >= ORDERS)
    own, other = np.where(sensible, own, np.inf), np.where(np.isfinite(other), other, np.inf)
    tail_tilt, top = _smallest_order((own + needed) / ORDERS)
    gaps = ORDERS[None, :] - ORDERS[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        above = np.where(gaps > 0, ((own - 0.7 * ORDERS * epsilon) + needed)[None, :] / gaps, np.inf).min(
            axis=1
        )
        # E_P e^(-s loss) = E_Q e^(-(s - 1) loss): the moments of the other direction bound what wraps from
        # below.
        low = (other + (1 + ORDERS) * top + needed)[None, :] / (1 + ORDERS[None, :] + ORDERS[:, None])
    widths = np.maximum(np.maximum(above, np.minimum(low.min(axis=1), needed / ORDERS)), top)
    rounding = own - ORDERS * epsilon + math.log(2e-14 * (10 + steps))
    rounding = np.where(np.isfinite(widths), rounding, np.inf)
    fine = rounding <= max(math.log(1e-4 * delta), float(rounding.min()) + 1.0)
    tilt, width = _smallest_order(np.where(fine, widths, np.inf))
    saddle = float(ORDERS[int(np.argmin(own - ORDERS * epsilon))])
    return tilt, tail_tilt, saddle, width


def wrapped_mass(own: Floats, other: Floats, side: Direction, curve: Curve, epsilon: float) -> float:
    """Bound the probability that came round the window and may have raised delta near `epsilon`; from
    log-moments.

    A history that grows beyond what its grid was made for loses its ends: what falls below the window comes
    back at the top, what rises above it comes back in the middle. `_window` keeps both below a share of
    delta; this asks again.
    """
    width, top = curve.spacing * side.size, curve.spacing * len(curve.deltas)
    finite = np.isfinite(own) & np.isfinite(other)
    orders, own, other = ORDERS[finite], own[finite], other[finite]
    below = float(np.min(other + (1 + orders) * (top - width), initial=0.0)) - side.tilt * width
    above = own - orders * (width + 0.7 * epsilon) + side.tilt * width
    above_mass = float(np.min(above[orders > side.tilt], initial=0.0))
    return math.exp(min(below, 0.0)) + math.exp(min(above_mass, 0.0))


def _smallest_order(values: Floats) -> tuple[float, float]:
    """Return the smallest order whose value is within a tenth of the least, and that value."""
    index = int(np.argmax(values <= 1.1 * values.min()))
    return float(ORDERS[index]), float(values[index])


def start(plan: Plan) -> tuple[Running, Running]:
    """Return the transforms of nothing released."""
    both = []
    for side in plan.directions:
        both.append(Running(np.ones(side.size // 2 + 1, dtype=np.complex128), np.zeros(side.size // 2 + 1)))
    return both[0], both[1]


def multiply(running: tuple[Running, Running], plan: Plan, pair: MixturePair, count: int) -> None:
    """Compose `count` steps of a pair into both transforms, in place."""
    grid = discretise(pair, spacing=plan.spacing, growth=plan.growth, tail=plan.cut)
    losses = grid.indices * grid.spacing
    remove, add = plan.directions
    _multiply(running[0], remove, grid.forward, losses, grid.indices, count)
    _multiply(running[1], add, grid.backward, -losses, -grid.indices, count)
    running[0].infinity += count * grid.forward_infinity
    running[1].infinity += count * grid.backward_infinity
    for state, side, masses, signed, own, other in (
        (running[0], remove, grid.forward, losses, grid.coarse_forward, grid.coarse_backward),
        (running[1], add, grid.backward, -losses, grid.coarse_backward, grid.coarse_forward),
    ):
        state.log_surplus += count * (
            _tilt(masses, signed, side.saddle)[0] - _coarse_moment(own, other, side.saddle)
        )


def _multiply(
    state: Running, side: Direction, masses: Floats, losses: Floats, indices: Integers, count: int
) -> None:
    log_moment, tilted = _tilt(masses, losses, side.tilt)
    folded = np.bincount(indices % side.size, weights=tilted, minlength=side.size)
    transform = np.fft.rfft(folded)
    noise = _transform_error(side.size)
    # A coefficient below the noise is replaced by the noise, so that its relative error stays bounded by a
    # constant.
    lost = np.abs(transform) < noise
    transform[lost] = noise
    drift = count * (np.log1p((1 + 2 * lost) * noise / np.abs(transform)) + 4 * ULP)
    factor = _power(transform, count)
    if count >= MANY:
        _sharpen(factor, drift, tilted, indices, side.size, count)
    state.drift += drift + 4 * ULP
    state.transform *= factor
    state.transform[np.abs(state.transform) < NEGLIGIBLE] = 0.0
    state.log_moment += count * log_moment
    state.log_tail_moment += count * _tilt(masses, losses, side.tail_tilt)[0]
    state.steps += count


def _sharpen(
    factor: Complexes, drift: Floats, masses: Floats, indices: Integers, size: int, count: int
) -> None:
    """Recompute the lowest coefficients of a high power from 1 minus the coefficient, in place.

    An error of one ulp in a coefficient grows with the number of steps. The heaviest masses are therefore
    summed as m (e^(-i t) - 1), whose errors are relative to the difference from one; only the light rest goes
    through a transform.
    """
    relevant = np.nonzero(np.abs(factor[:SHARP_FREQUENCIES]) > 1e-20)[0]
    frequencies = np.arange(int(relevant[-1]) + 1 if len(relevant) else 1)
    heavy = np.argsort(masses)[-SHARP_MASSES:]
    rest = masses.copy()
    rest[heavy] = 0.0
    light = float(rest.sum())
    phases = (indices[heavy][None, :] * frequencies[:, None]) % size
    half = np.pi / size * np.where(phases > size // 2, phases - size, phases)
    sines = np.sin(half)
    tail = np.fft.rfft(np.bincount(indices % size, weights=rest, minlength=size))[: len(frequencies)]
    real = -2 * (sines**2) @ masses[heavy] + (tail.real - light)
    imaginary = -2 * (sines * np.cos(half)) @ masses[heavy] + tail.imag
    wrong = 8 * ULP * (np.abs(sines) @ masses[heavy]) + 2 * _transform_error(size) * light + 2 * ULP
    magnitude = np.hypot(1 + real, imaginary)
    good = magnitude > 1e-3
    logs = 0.5 * np.log1p(2 * real[good] + real[good] ** 2 + imaginary[good] ** 2)
    angles = np.arctan2(imaginary[good], 1 + real[good])
    factor[: len(frequencies)][good] = np.exp(count * (logs + 1j * angles))
    arithmetic = 8 * ULP * (1 + count * (np.abs(logs) + np.abs(angles)))
    drift[: len(frequencies)][good] = count * np.log1p(wrong[good] / magnitude[good]) + arithmetic


def _transform_error(size: int) -> float:
    """Bound the error of any coefficient of a transform of masses that sum to one: 6 units of roundoff a
    level.
    """
    return 3 * ULP * (math.log2(size) + 1)


def _tilt(masses: Floats, losses: Floats, tilt: float) -> tuple[float, Floats]:
    """Return log sum m e^(tilt l) and the normalised tilted masses."""
    exponents = tilt * losses
    peak = float(exponents[masses > 0].max())
    tilted = masses * np.exp(np.minimum(exponents - peak, 0.0))
    total = float(tilted.sum())
    return peak + math.log(total), tilted / total


def _coarse_moment(masses: Floats, others: Floats, tilt: float) -> float:
    """Return log sum m (m / o)^tilt, a lower bound of the log-moment of the exact loss."""
    used = (masses > 1e-290) & (others > 1e-290)
    logs = np.log(masses[used])
    exponents = logs + tilt * (logs - np.log(others[used]))
    peak = float(exponents.max())
    return peak + math.log(float(np.exp(exponents - peak).sum()))


def _power(base: Complexes, exponent: int) -> Complexes:
    """Raise every coefficient to an integer power by repeated squaring; magnitudes never exceed one."""
    result, square = np.ones_like(base), base.copy()
    while True:
        if exponent & 1:
            result *= square
        exponent >>= 1
        if not exponent:
            return result
        square *= square
        square[np.abs(square) < NEGLIGIBLE] = 0.0


def curve_of(state: Running, side: Direction, plan: Plan) -> Curve:
    """Invert the transform and sum it to an upper bound of delta over epsilon >= 0."""
    composed = np.fft.irfft(state.transform, n=side.size)
    error = _inverse_error(state, side.size)
    # The top of the window: what lies above is bounded by a moment of the very distribution that was
    # transformed.
    needed = math.log(1 / (TAIL_SHARE * plan.delta))
    reach = (state.log_tail_moment + needed) / (side.tail_tilt * plan.spacing)
    count = min(max(math.ceil(reach), 1), side.size - 1)
    indices = np.arange(1, count + 1)
    tilted = np.maximum(composed[indices % side.size], 0.0) + error
    losses = indices * plan.spacing
    # Every mass of a step is off by a few ulp of itself, so every composed mass by a factor that grows with
    # the steps.
    rounding = 8 * ULP * state.steps
    log_masses = np.minimum(np.log(tilted) + state.log_moment - side.tilt * losses + rounding, 600.0)
    masses = np.exp(log_masses)
    mass_above = np.cumsum(masses[::-1])[::-1]
    # Sums of m e^-l run over many decades; they are kept relative to their first member.
    weighted = log_masses - losses
    shift = float(weighted.max())
    with np.errstate(divide="ignore"):
        log_shadows = np.log(np.cumsum(np.exp(weighted - shift)[::-1])[::-1]) + shift
    starts = np.arange(count) * plan.spacing
    inner = mass_above - np.exp(log_shadows + starts)
    tail = math.exp(min(0.0, state.log_tail_moment - side.tail_tilt * count * plan.spacing))
    constant = tail + state.infinity
    deltas = np.maximum(inner, 0.0) + (64 + count) * ULP * mass_above + constant
    noise = np.cumsum((masses * (error / tilted))[::-1])[::-1] / np.maximum(mass_above, 1e-300)
    excess = max(0.0, state.log_surplus) / side.saddle
    return Curve(plan.spacing, deltas, mass_above, log_shadows, constant, excess, noise, state.steps)


def _inverse_error(state: Running, size: int) -> float:
    """Bound how far any tilted mass may be off after the inverse transform."""
    magnitudes = np.abs(state.transform)
    magnitudes[1:] *= 2
    wrong = float((magnitudes * np.expm1(np.minimum(state.drift, 300.0))).sum())
    rounding = _transform_error(size) * float(magnitudes.sum())
    return (wrong + rounding) / size + 1e-130


def epsilon_of(curve: Curve, delta: float) -> float:
    """Return the smallest epsilon whose bound is at most delta, rounded up; infinity if the window holds
    none.
    """
    reached = np.nonzero(curve.deltas <= delta)[0]
    if len(reached) == 0:
        return math.inf
    first = int(reached[0])
    slack = 32 * ULP * curve.steps
    if first == 0:
        return slack
    above, constant = curve.masses[first - 1] * (1 + (64 + len(curve.masses)) * ULP), curve.constant
    gain = above + constant - delta
    epsilon = first * curve.spacing
    if gain > 0:
        epsilon = min(epsilon, math.log(gain) - float(curve.log_shadows[first - 1]))
    return max(epsilon, (first - 1) * curve.spacing) * (1 + 1e-12) + slack


def delta_of(curve: Curve, epsilon: float) -> float:
    """Return the bound on delta at epsilon, rounded up; 1 beyond the window."""
    position = math.floor(max(0.0, epsilon - 32 * ULP * curve.steps) / curve.spacing)
    if position >= len(curve.deltas):
        return min(1.0, curve.constant) if len(curve.deltas) else 1.0
    return min(1.0, float(curve.deltas[position]))


def noise_at(curve: Curve, epsilon: float) -> float:
    """Return the share of delta just above epsilon that only bounds rounding errors."""
    index = min(int(epsilon / curve.spacing), len(curve.noise) - 1)
    return float(curve.noise[index])
