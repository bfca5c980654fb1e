"""What was released, in the words an accountant understands;
events are truth, epsilon is derived from them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from defenses.errors import ParameterError

EVENT_VERSION = 1

Unit = Literal["record", "person", "client"]
Adjacency = Literal["add_remove", "zero_out", "replace_one"]
Sampling = Literal["poisson", "full", "fixed_size"]

UNITS: tuple[str, ...] = ("record", "person", "client")
ADJACENCIES: tuple[str, ...] = ("add_remove", "zero_out", "replace_one")
SAMPLINGS: tuple[str, ...] = ("poisson", "full", "fixed_size")
STOPPINGS: tuple[str, ...] = ("truncated_negative_binomial", "poisson")
MOST_RECORDS = 1000
MOST_STEPS = 10**12


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Describe one kind of release; the base of every event.

    Guarantee: an event is immutable, equal to any event with the same fields, and survives a JSON round trip
    bit for bit. A value no accountant could price is refused when the event is made.
    """

    kind: ClassVar[str] = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields with the event's kind and format version, ready for JSON."""
        values: dict[str, Any] = {"version": EVENT_VERSION, "kind": self.kind}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple):
                value = [part.to_dict() for part in value]
            # 1 and 1.0 are equal events, so they must have one canonical text and one digest.
            values[field.name] = float(value) if field.type == "float" else value
        return values

    def to_json(self) -> str:
        """Return canonical JSON: sorted keys, no spaces, the shortest decimals that read back to the same
        floats.
        """
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)

    def digest(self) -> bytes:
        """Return the SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class GaussianEvent(Event):
    """`steps` releases of a clipped sum with Gaussian noise of standard deviation `noise_multiplier *
    clip_norm`.

    `poisson`: every record (or client) joins each step on its own with probability `sampling_rate`. `full`:
    it always takes part; this is also the event of one realised participation under a cap. `fixed_size`: each
    step draws without replacement a batch of a fixed share `sampling_rate` of a data set of public size.
    `records_per_person` belongs to the unit `person`: one person owns up to that many records, each clipped
    on its own.

    Assumes: the sum, not a mean over a realised batch, is released; divisors are public constants.
    """

    kind: ClassVar[str] = "gaussian"
    unit: Unit
    records_per_person: int = 1
    adjacency: Adjacency
    sampling: Sampling
    sampling_rate: float
    noise_multiplier: float
    steps: int
    clip_norm: float
    release: str

    def __post_init__(self) -> None:
        problems = _unit_problems(self.unit, self.adjacency)
        problems += _choice("sampling", self.sampling, SAMPLINGS)
        problems += _integer("records_per_person", self.records_per_person, 1, MOST_RECORDS)
        problems += _integer("steps", self.steps, 1, MOST_STEPS)
        problems += _positive("sampling_rate", self.sampling_rate, most=1.0)
        problems += _positive("noise_multiplier", self.noise_multiplier)
        problems += _positive("clip_norm", self.clip_norm) + _text("release", self.release)
        if not problems:
            problems = self._disagreements()
        _refuse(problems)

    def _disagreements(self) -> list[str]:
        problems = []
        if self.unit != "person" and self.records_per_person != 1:
            problems.append(
                f"records_per_person = {self.records_per_person}: only the unit 'person' owns several"
            )
        if self.sampling == "full" and self.sampling_rate != 1.0:
            problems.append(f"sampling_rate = {self.sampling_rate}: must be 1 when sampling is 'full'")
        if self.sampling == "fixed_size" and self.adjacency == "add_remove":
            problems.append(
                "adjacency = 'add_remove': fixed-size batches are accounted under 'replace_one' or 'zero_out'"
            )
        if self.sampling == "fixed_size" and self.records_per_person != 1:
            problems.append("records_per_person: several records a person need 'poisson' or 'full' sampling")
        return problems


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixFactorizationEvent(Event):
    """One whole run with correlated Gaussian noise, released step by step, without amplification by sampling.

    `sensitivity` is the largest change (in units of `clip_norm`) one unit can cause in the encoded stream
    under the participation pattern: at most `participations` times, at least `min_separation` steps apart.

    Source: Choquette-Choo et al., arXiv 2306.08153 (banded matrix factorisation), section 3.
    """

    kind: ClassVar[str] = "matrix_factorization"
    unit: Unit
    adjacency: Adjacency
    noise_multiplier: float
    sensitivity: float
    bands: int
    min_separation: int
    participations: int
    steps: int
    clip_norm: float
    release: str

    def __post_init__(self) -> None:
        problems = _unit_problems(self.unit, self.adjacency)
        problems += _positive("noise_multiplier", self.noise_multiplier) + _positive(
            "sensitivity", self.sensitivity
        )
        problems += _positive("clip_norm", self.clip_norm) + _text("release", self.release)
        for name in ("bands", "min_separation", "participations", "steps"):
            problems += _integer(name, getattr(self, name), 1, MOST_STEPS)
        if not problems and self.bands > self.min_separation:
            problems.append(
                f"bands = {self.bands}: at most min_separation = "
                f"{self.min_separation}, or the columns overlap"
            )
        if not problems and self.unit == "person":
            problems.append(
                "unit = 'person': account the person as a client, or clip the whole person's contribution"
            )
        _refuse(problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class SkellamEvent(Event):
    """`steps` releases of an integer sum with Skellam noise of total variance `variance` in every coordinate.

    All values are in integer (scaled) units: `l1_sensitivity` and `l2_sensitivity` bound the whole change one
    unit can cause under `adjacency`, rounding included; `scale` is the number of integer steps in one unit of
    the clipped real vector and is kept for the record. Only the variance of guaranteed honest survivors may
    be counted.

    Source: Agarwal, Kairouz, Liu, arXiv 2110.04995, theorem 3.5 (in integer units).
    """

    kind: ClassVar[str] = "skellam"
    unit: Unit
    adjacency: Adjacency
    l1_sensitivity: float
    l2_sensitivity: float
    variance: float
    scale: float
    steps: int
    release: str

    def __post_init__(self) -> None:
        problems = _unit_problems(self.unit, self.adjacency)
        for name in ("l1_sensitivity", "l2_sensitivity", "variance", "scale"):
            problems += _positive(name, getattr(self, name))
        problems += _integer("steps", self.steps, 1, MOST_STEPS) + _text("release", self.release)
        if not problems and self.l1_sensitivity < self.l2_sensitivity:
            problems.append(f"l1_sensitivity = {self.l1_sensitivity}: an L1 norm is never below the L2 norm")
        _refuse(problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledSkellamEvent(Event):
    """`steps` releases of an integer sum with Skellam noise, where every record joins on its own by chance.

    All values are in integer units. `l1_sensitivity` and `l2_sensitivity` bound the change by one record,
    rounding included, of a sum of `dimension` numbers; a person owns up to `records_per_person` of them.
    Every
    record joins each step with probability `sampling_rate`; 1 is a release of everybody's. Only the
    variance of guaranteed honest
    survivors may be counted.

    Source: docs/shared_noise.md, where both directions are derived.
    """

    kind: ClassVar[str] = "sampled_skellam"
    unit: Unit
    records_per_person: int = 1
    adjacency: Adjacency
    sampling_rate: float
    l1_sensitivity: float
    l2_sensitivity: float
    variance: float
    dimension: int
    scale: float
    steps: int
    release: str

    def __post_init__(self) -> None:
        problems = _choice("unit", self.unit, ("record", "person"))
        # Replacing a record removes one and adds another, which the derivation does not cover.
        problems += _choice("adjacency", self.adjacency, ("add_remove", "zero_out"))
        for name in ("l1_sensitivity", "l2_sensitivity", "variance", "scale"):
            problems += _positive(name, getattr(self, name))
        problems += _positive("sampling_rate", self.sampling_rate, most=1.0)
        problems += _integer("records_per_person", self.records_per_person, 1, MOST_RECORDS)
        problems += _integer("dimension", self.dimension, 1, MOST_STEPS)
        problems += _integer("steps", self.steps, 1, MOST_STEPS) + _text("release", self.release)
        if not problems and self.l1_sensitivity < self.l2_sensitivity:
            problems.append(f"l1_sensitivity = {self.l1_sensitivity}: an L1 norm is never below the L2 norm")
        if not problems and self.unit != "person" and self.records_per_person != 1:
            problems.append(
                f"records_per_person = {self.records_per_person}: only the unit 'person' owns several"
            )
        _refuse(problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningEvent(Event):
    """The best of a random number of private runs, when only the winner is released.

    The number of runs is drawn, before any run is looked at, from a truncated negative binomial law (`shape`
    > -1: 1 is geometric, 0 logarithmic) with parameter `stopping` in (0, 1), or from a Poisson law with mean
    `stopping`. Every candidate is one run of `base`.

    Source: Papernot, Steinke, arXiv 2110.03620, theorems 2 and 6.
    """

    kind: ClassVar[str] = "tuning"
    base: tuple[Event, ...]
    distribution: Literal["truncated_negative_binomial", "poisson"]
    stopping: float
    shape: float = 1.0
    release: str

    def __post_init__(self) -> None:
        problems = _choice("distribution", self.distribution, STOPPINGS) + _text("release", self.release)
        problems += _positive("stopping", self.stopping)
        if (
            not isinstance(self.base, tuple)
            or not self.base
            or not all(isinstance(part, Event) for part in self.base)
        ):
            problems.append("base: must be a non-empty tuple of events, one candidate run")
        if self.distribution == "truncated_negative_binomial" and not problems and self.stopping >= 1:
            problems.append(
                f"stopping = {self.stopping}: must be below 1 for a truncated negative binomial law"
            )
        if not _is_real(self.shape) or not -1 < self.shape < math.inf:
            problems.append(f"shape = {self.shape!r}: must be a number above -1")
        _refuse(problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class NonPrivateEvent(Event):
    """A release without a bound; every epsilon that contains it is infinite."""

    kind: ClassVar[str] = "non_private"
    reason: str

    def __post_init__(self) -> None:
        _refuse(_text("reason", self.reason))


KINDS: dict[str, type[Event]] = {
    known.kind: known
    for known in (
        GaussianEvent,
        MatrixFactorizationEvent,
        SkellamEvent,
        SampledSkellamEvent,
        TuningEvent,
        NonPrivateEvent,
    )
}


def from_dict(values: Mapping[str, Any]) -> Event:
    """Build the event that `to_dict` described.

    Raises: ParameterError for an unknown version or kind, an unknown or missing field, or a value that is
    refused.
    """
    if not isinstance(values, Mapping) or values.get("version") != EVENT_VERSION:
        raise ParameterError(f"version: this software reads events of version {EVENT_VERSION} only")
    known = KINDS.get(str(values.get("kind")))
    if known is None:
        raise ParameterError(
            f"kind = {values.get('kind')!r}: unknown event; known are {', '.join(sorted(KINDS))}"
        )
    fields_of_event = {}
    for name, value in values.items():
        if name not in ("version", "kind"):
            fields_of_event[name] = value
    names = {field.name for field in fields(known)}
    if set(fields_of_event) != names:
        raise ParameterError(
            f"{known.kind}: unknown fields {sorted(set(fields_of_event) - names)}, missing "
            f"{sorted(names - set(fields_of_event))}"
        )
    if known is TuningEvent and isinstance(fields_of_event["base"], list):
        fields_of_event["base"] = tuple(from_dict(part) for part in fields_of_event["base"])
    return known(**fields_of_event)


def from_json(text: str) -> Event:
    """Read an event back from `Event.to_json`."""
    try:
        values = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        raise ParameterError("an event must be one JSON object") from None
    return from_dict(values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """Whom an epsilon protects: only events that agree in all three can be added up."""

    unit: str
    adjacency: str
    records_per_person: int


def statement_of(event: Event) -> Statement | None:
    """Return whom an event's price protects; None for a release without any bound, which spoils every
    statement.

    Raises: ParameterError when the runs inside a tuning event protect different units.
    """
    if isinstance(event, NonPrivateEvent):
        return None
    if isinstance(event, TuningEvent):
        statements = {statement_of(part) for part in event.base} - {None}
        if len(statements) > 1:
            raise ParameterError(
                "base: all events of one candidate run must share unit, adjacency and records_per_person"
            )
        return next(iter(statements), None)
    records = event.records_per_person if isinstance(event, (GaussianEvent, SampledSkellamEvent)) else 1
    if isinstance(event, (GaussianEvent, MatrixFactorizationEvent, SkellamEvent, SampledSkellamEvent)):
        return Statement(unit=event.unit, adjacency=event.adjacency, records_per_person=records)
    raise ParameterError(f"kind = {event.kind!r}: unknown event")


def price_of(event: Event) -> str:
    """Return canonical JSON of the fields the price depends on;
    events that differ only in labels share it.
    """
    return json.dumps(
        _without_labels(event.to_dict()), sort_keys=True, separators=(",", ":"), allow_nan=False
    )


def _without_labels(values: Mapping[str, Any]) -> dict[str, Any]:
    priced = {}
    for name, value in values.items():
        if name not in ("release", "clip_norm", "scale", "reason"):
            priced[name] = value
    if isinstance(priced.get("base"), list):
        priced["base"] = [_without_labels(part) for part in priced["base"]]
    return priced


def _unit_problems(unit: object, adjacency: object) -> list[str]:
    return _choice("unit", unit, UNITS) + _choice("adjacency", adjacency, ADJACENCIES)


def _choice(name: str, value: object, allowed: tuple[str, ...]) -> list[str]:
    if isinstance(value, str) and value in allowed:
        return []
    return [f"{name} = {value!r}: must be one of {', '.join(map(repr, allowed))}"]


def _is_real(value: object) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def _positive(name: str, value: object, most: float = math.inf) -> list[str]:
    if isinstance(value, (int, float)) and _is_real(value) and 0 < value <= most:
        return []
    return [
        f"{name} = {value!r}: must be a finite number above 0"
        + (f" and at most {most:g}" if most < math.inf else "")
    ]


def _integer(name: str, value: object, least: int, most: int) -> list[str]:
    if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
        return []
    return [f"{name} = {value!r}: must be an integer from {least} to {most}"]


def _text(name: str, value: object) -> list[str]:
    if isinstance(value, str) and value.strip():
        return []
    return [f"{name} = {value!r}: must say what it is"]


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ParameterError("; ".join(problems))
