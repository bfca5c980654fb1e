"""The accountant as a calculator: plain numbers in, one readable dictionary out, all mistakes reported at
once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

from defenses.dp.accountant import LARGEST_DELTA, SMALLEST_DELTA, Accountant
from defenses.dp.calibration import noise_multiplier
from defenses.dp.events import (
    ADJACENCIES,
    MOST_RECORDS,
    SAMPLINGS,
    UNITS,
    Adjacency,
    GaussianEvent,
    Sampling,
    TuningEvent,
    Unit,
)
from defenses.errors import ParameterError

Segment = tuple[float, float, int]


def epsilon_report(
    segments: Sequence[Segment],
    delta: float,
    *,
    sampling: str = "poisson",
    adjacency: str = "add_remove",
    unit: str = "record",
    records_per_person: int = 1,
) -> dict[str, Any]:
    """Return epsilon of segments (sampling rate, noise multiplier, steps) composed one after the other.

    Raises: ParameterError listing every problem with every argument.
    """
    problems = _common_problems(delta, sampling, adjacency, unit, records_per_person)
    problems += [] if segments else ["segments: at least one (q, sigma, steps) is needed"]
    events = []
    for number, segment in enumerate(segments, start=1):
        try:
            rate, sigma, steps = segment
            events.append(_event(rate, sigma, steps, sampling, adjacency, unit, records_per_person))
        except ParameterError as error:
            for part in str(error).split("; "):
                if not _is_common(part):
                    problems.append(f"segment {number}: {part}")
        except (TypeError, ValueError):
            problems.append(f"segment {number} = {segment!r}: must be q, sigma, steps")
    _refuse(problems)
    accountant = Accountant()
    for event in events:
        accountant.compose(event)
    bound = accountant.epsilon(delta)
    return {
        "epsilon": bound.epsilon,
        "delta": delta,
        **_statement(unit, adjacency, sampling, records_per_person),
        "accountant": bound.accountant,
        "slack": bound.slack,
        "segments": [{"q": e.sampling_rate, "sigma": e.noise_multiplier, "steps": e.steps} for e in events],
    }


def tuned_report(segments: Sequence[Segment], delta: float, law: str, stopping: float) -> dict[str, Any]:
    """Return epsilon of releasing only the best of a random number of runs of these segments.

    `law` is 'poisson' (`stopping` runs on average) or 'geometric' (after each run the search ends with
    probability `stopping`); the number is drawn before any run is looked at.
    Raises: ParameterError listing every problem.
    Source: Papernot, Steinke, arXiv 2110.03620, theorems 2 and 6.
    """
    alone = epsilon_report(segments, delta)
    parts = []
    for q, sigma, steps in segments:
        parts.append(_event(q, sigma, steps, "poisson", "add_remove", "record", 1))
    event = TuningEvent(
        base=tuple(parts),
        distribution="poisson" if law == "poisson" else "truncated_negative_binomial",
        stopping=stopping,
        release="the best run",
    )
    accountant = Accountant()
    accountant.compose(event)
    bound = accountant.epsilon(delta)
    chosen = {"epsilon": bound.epsilon, "one_run": alone["epsilon"], "runs": f"{law}, {stopping:g}"}
    return {**alone, **chosen, "accountant": bound.accountant, "slack": bound.slack}


def sigma_report(
    *,
    epsilon: float,
    delta: float,
    sampling_rate: float,
    steps: int,
    history: Sequence[Segment] = (),
    sampling: str = "poisson",
    adjacency: str = "add_remove",
    unit: str = "record",
    records_per_person: int = 1,
) -> dict[str, Any]:
    """Return the noise multiplier that reaches a target epsilon, given segments already spent.

    Raises: ParameterError listing every problem; BudgetExceeded when the history leaves nothing.
    """
    problems = _common_problems(delta, sampling, adjacency, unit, records_per_person)
    if not isinstance(epsilon, (int, float)) or isinstance(epsilon, bool) or not 0 < epsilon < math.inf:
        problems.append(f"epsilon = {epsilon!r}: must be a finite number above 0")
    past = []
    for number, (rate, sigma, count) in enumerate([*history, (sampling_rate, 1.0, steps)]):
        name = f"history {number + 1}: " if number < len(history) else ""
        try:
            past.append(_event(rate, sigma, count, sampling, adjacency, unit, records_per_person))
        except ParameterError as error:
            for part in str(error).split("; "):
                if not _is_common(part):
                    problems.append(name + part)
    _refuse(problems)
    sigma = noise_multiplier(
        epsilon=epsilon,
        delta=delta,
        sampling_rate=sampling_rate,
        steps=steps,
        sampling=cast(Sampling, sampling),
        adjacency=cast(Adjacency, adjacency),
        records_per_person=records_per_person,
        unit=cast(Unit, unit),
        history=past[:-1],
    )
    reached = epsilon_report(
        [*history, (sampling_rate, sigma, steps)],
        delta,
        sampling=sampling,
        adjacency=adjacency,
        unit=unit,
        records_per_person=records_per_person,
    )
    return {"sigma": sigma, "target_epsilon": epsilon, **reached}


def _event(
    rate: float, sigma: float, steps: int, sampling: str, adjacency: str, unit: str, records: int
) -> GaussianEvent:
    return GaussianEvent(
        unit=cast(Unit, unit),
        records_per_person=records,
        adjacency=cast(Adjacency, adjacency),
        sampling=cast(Sampling, sampling),
        sampling_rate=rate,
        noise_multiplier=sigma,
        steps=steps,
        clip_norm=1.0,
        release="calculator",
    )


def _common_problems(delta: object, sampling: str, adjacency: str, unit: str, records: object) -> list[str]:
    problems = []
    if not isinstance(delta, float) or not SMALLEST_DELTA <= delta <= LARGEST_DELTA:
        problems.append(f"delta = {delta!r}: must lie between {SMALLEST_DELTA:g} and {LARGEST_DELTA:g}")
    for name, value, allowed in (
        ("sampling", sampling, SAMPLINGS),
        ("adjacency", adjacency, ADJACENCIES),
        ("unit", unit, UNITS),
    ):
        if value not in allowed:
            problems.append(f"{name} = {value!r}: must be one of {', '.join(map(repr, allowed))}")
    if not isinstance(records, int) or isinstance(records, bool) or not 1 <= records <= MOST_RECORDS:
        problems.append(f"records_per_person = {records!r}: must be an integer from 1 to {MOST_RECORDS}")
    return problems


def _is_common(problem: str) -> bool:
    """Problems with arguments every segment shares are reported once."""
    return (
        problem.startswith(("sampling = ", "adjacency = '", "unit = ", "records_per_person = "))
        and "must be" in problem
    )


def _statement(unit: str, adjacency: str, sampling: str, records: int) -> dict[str, Any]:
    return {"unit": unit, "records_per_person": records, "adjacency": adjacency, "sampling": sampling}


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ParameterError("; ".join(problems))
