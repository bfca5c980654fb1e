"""How much noise a budget asks for, given what the ledger already holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

from defenses.dp.accountant import Accountant
from defenses.dp.events import Adjacency, Event, GaussianEvent, Sampling, Unit
from defenses.errors import BudgetExceeded, ParameterError

LEAST_NOISE, MOST_NOISE = 1e-2, 1e6
_PRECISION = 2e-4


def noise_multiplier(
    *,
    epsilon: float,
    delta: float,
    sampling_rate: float,
    steps: int,
    sampling: Sampling = "poisson",
    adjacency: Adjacency = "add_remove",
    records_per_person: int = 1,
    unit: Unit | None = None,
    history: Sequence[Event] = (),
) -> float:
    """Return the smallest noise multiplier, rounded up, with which `steps` more steps stay within epsilon at
    delta.

    Guarantee: history and the new steps together have at most `epsilon` by the accountant of this package; a
    noise smaller by 1e-3 relative would not do.
    Raises: BudgetExceeded when the history alone leaves nothing; ParameterError for impossible arguments.
    """
    if not isinstance(epsilon, (int, float)) or not 0 < epsilon < math.inf:
        raise ParameterError(f"epsilon = {epsilon!r}: must be a finite number above 0")
    whose: Unit = unit or ("person" if records_per_person > 1 else "record")
    template = GaussianEvent(
        unit=whose,
        records_per_person=records_per_person,
        adjacency=adjacency,
        sampling=sampling,
        sampling_rate=sampling_rate,
        noise_multiplier=1.0,
        steps=steps,
        clip_norm=1.0,
        release="calibration",
    )
    return _solve(template, float(epsilon), float(delta), tuple(history))


@lru_cache(maxsize=256)
def _solve(template: GaussianEvent, epsilon: float, delta: float, history: tuple[Event, ...]) -> float:
    past = Accountant()
    for event in history:
        past.compose(event)
    spent = past.epsilon(delta).epsilon
    if spent >= epsilon:
        raise BudgetExceeded(
            f"epsilon = {epsilon:g} at delta = {delta:g}: the history already holds {spent:.4g}"
        )

    def excess(log_noise: float) -> float:
        event = _with_noise(template, math.exp(log_noise))
        reached = past.epsilon_with(event, delta).epsilon
        return math.log(max(reached, 1e-300) / epsilon) if math.isfinite(reached) else 50.0

    return math.exp(_smallest_sufficient(excess, 0.0))


def _with_noise(template: GaussianEvent, noise: float) -> GaussianEvent:
    return GaussianEvent(
        unit=template.unit,
        records_per_person=template.records_per_person,
        adjacency=template.adjacency,
        sampling=template.sampling,
        sampling_rate=template.sampling_rate,
        noise_multiplier=noise,
        steps=template.steps,
        clip_norm=1.0,
        release=template.release,
    )


def _smallest_sufficient(excess: Callable[[float], float], start: float) -> float:
    """Return a log-noise with non-positive excess, at most `_PRECISION` above the smallest such."""
    low, f_low, high, f_high = _bracket(excess, start)
    while high - low > _PRECISION:
        # False position in logarithms, kept away from both ends so that the bracket shrinks from both sides.
        share = f_low / (f_low - f_high) if f_low < 45 else 0.5
        step = (high - low) * min(max(share, 0.02), 0.98)
        guess = low + min(step + 0.4 * _PRECISION, (high - low) * 0.98)
        value = excess(guess)
        if value <= 0:
            high, f_high = guess, value
            probe = guess - 0.9 * _PRECISION
            if probe > low:
                below = excess(probe)
                if below > 0:
                    return high
                high, f_high = probe, below
        else:
            low, f_low = guess, value
    return high


def _bracket(excess: Callable[[float], float], start: float) -> tuple[float, float, float, float]:
    value = excess(start)
    step = math.log(2.0)
    if value > 0:
        low, f_low = start, value
        while True:
            high = low + step
            if high > math.log(MOST_NOISE):
                raise BudgetExceeded(f"even a noise multiplier of {MOST_NOISE:g} does not reach this epsilon")
            f_high = excess(high)
            if f_high <= 0:
                return low, f_low, high, f_high
            low, f_low, step = high, f_high, 1.6 * step
    high, f_high = start, value
    while True:
        low = max(high - step, math.log(LEAST_NOISE))
        f_low = excess(low)
        if f_low > 0:
            return low, f_low, high, f_high
        if low <= math.log(LEAST_NOISE):
            return low, 50.0, low, f_low
        high, f_high = low, f_low


def surviving_noise_multiplier(*, local_multiplier: float, survivors: int, colluding: int = 0) -> float:
    """Return the noise multiplier of a sum when each party added `local_multiplier` and only some noise
    counts.

    Noise of parties that dropped out is missing; noise of parties that collude with the observer is known to
    it. Use the fewest survivors whose sum may be opened.
    """
    honest = _honest(survivors, colluding)
    if not local_multiplier > 0:
        raise ParameterError(f"local_multiplier = {local_multiplier!r}: must be above 0")
    return local_multiplier * math.sqrt(honest)


def local_noise_multiplier(*, central_multiplier: float, survivors: int, colluding: int = 0) -> float:
    """Return what each party must add so that the fewest admitted survivors carry `central_multiplier`,
    rounded up.
    """
    if not central_multiplier > 0:
        raise ParameterError(f"central_multiplier = {central_multiplier!r}: must be above 0")
    return central_multiplier / math.sqrt(_honest(survivors, colluding)) * (1 + 1e-12)


def _honest(survivors: int, colluding: int) -> int:
    if not 0 <= colluding < survivors:
        raise ParameterError(
            f"survivors = {survivors}, colluding = {colluding}: at least one honest survivor is needed"
        )
    return survivors - colluding
