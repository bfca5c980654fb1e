"""What bounds and noises the answer to a query: one bounded vector a record, summed, on this run's integer
grid.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from defenses.dp import ClientMechanism, Event, MomentRows, NonPrivateEvent, SumMechanism, smallest_multiplier
from defenses.random_source import RandomSource
from ffm_secure.config import compatibility
from ffm_secure.config.run_file import RunConfig
from ffm_secure.privacy.mechanism import ClientNoise, Mechanism, MechanismOutput
from ffm_secure.queries.base import Answers, Query

_FINE = 64.0  # how many times longer than all rounding errors together one record's vector may be, in levels
_LARGEST_SITE = 16  # how many times the public size of a client an honest site's data may be
_MOST_BITS = 32
_HEADROOM = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Total:
    """The sum of one site's bounded rows, before any noise. Private: it never leaves the site."""

    values: npt.NDArray[np.float64]  # [size]
    rows: int

    def __repr__(self) -> str:
        return "Total(private)"


class QueryNoise(Mechanism, Protocol):
    """Own what decides epsilon of one answer: a mechanism with a door for rows, not for updates."""

    @property
    def scale(self) -> float:
        """Return the integer levels in 1.0."""

    @property
    def value_bits(self) -> int:
        """Return the signed bits of one coordinate of one site's sum."""

    @property
    def noise_bound(self) -> int:
        """Return what one site's noise on one coordinate practically never exceeds, in levels."""

    def total(self, answers: Iterable[Answers]) -> Total:
        """Bound every row of the answers [n, size] and add them up; private."""

    def protect_total(self, total: Total, source: RandomSource) -> MechanismOutput:
        """Round to the grid and add this site's noise."""

    def deviation(self, survivors: int) -> float:
        """Return the standard deviation of the noise in the sum of so many honest sites, in real units."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordAnswers:
    """The unit record or person, or none: every record's vector is bounded, and the sum of all sites
    is noised.

    With `honest_survivors` 1 every site adds the whole noise; with more, its share of it.
    """

    query: str
    inner: SumMechanism
    value_bits: int
    reason: str = ""  # why nothing is guaranteed

    record_level = None
    client_level = None
    sum_level = None
    clips_records = False

    @property
    def noise_multiplier(self) -> float:
        """Return the noise of the opened sum over the bound on one record."""
        return self.inner.noise_multiplier

    @property
    def clip_norm(self) -> float:
        """Return the bound on one record's vector."""
        return self.inner.bound

    @property
    def adjacency(self) -> str:
        """Say between which neighbours the guarantee holds."""
        return "none" if self.reason else f"add or remove one {self.inner.unit}"

    @property
    def scale(self) -> float:
        """Return the integer levels in 1.0."""
        return self.inner.scale

    @property
    def noise_bound(self) -> int:
        """Return what one site's noise on one coordinate practically never exceeds, in levels."""
        return self.inner.noise_bound if self.noise_multiplier else 0

    def event(self, release: str) -> Event:
        """Return what one answer is charged as."""
        return NonPrivateEvent(reason=self.reason) if self.reason else self.inner.event(release)

    def digest(self) -> str:
        """Return the hash of everything that decides epsilon."""
        return hashlib.sha256(f"query {self.query}|{self.inner.digest()}|{self.reason}".encode()).hexdigest()

    def protect(self, update: Tensor, *, loss: float, weight: int, source: RandomSource) -> MechanismOutput:
        """Refuse: a query has no update."""
        raise TypeError("a query is answered by rows, not by an update")

    def total(self, answers: Iterable[Answers]) -> Total:
        """Bound every row and add them up."""
        return _bounded_total(answers, self.inner)

    def protect_total(self, total: Total, source: RandomSource) -> MechanismOutput:
        """Round to the grid and add this site's noise."""
        return MechanismOutput(values=self.inner.share(total.values, source), loss=0.0, weight=1)

    def deviation(self, survivors: int) -> float:
        """Return the standard deviation of noise and rounding in the sum of so many sites, in real units."""
        rounding = 0.0 if self.inner.whole_numbers else 0.25
        variance = self.inner.share_variance if self.noise_multiplier else 0.0
        return math.sqrt(survivors * (variance + rounding)) / self.scale

    def words(self, rounds: int) -> str:
        """Describe the noise of the opened sum."""
        if self.reason:
            return "no mechanism"
        shares = self.inner.honest_survivors
        where = "added whole by every site" if shares == 1 else f"in shares of {shares} honest sites"
        return (
            f"up to {rounds} answers to {self.query}: sums of vectors of norm at most {self.clip_norm:.4g}, "
            f"Skellam noise multiplier {self.noise_multiplier:.4f}, {where}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientAnswers:
    """The unit client: a client's mean over its records is one vector, bounded and noised as a whole update
    is.
    """

    query: str
    inner: ClientNoise
    rows: SumMechanism  # bounds single rows; its own noise is not used
    value_bits: int

    record_level = None
    client_level = None
    sum_level = None
    clips_records = False
    adjacency = "zero out one client"

    @property
    def noise_multiplier(self) -> float:
        """Return the noise of the opened sum over the bound on one client."""
        return self.inner.noise_multiplier

    @property
    def clip_norm(self) -> float:
        """Return the bound on one client's vector."""
        return self.inner.clip_norm

    @property
    def scale(self) -> float:
        """Return the integer levels in 1.0."""
        return self.inner.scale

    @property
    def noise_bound(self) -> int:
        """Return what one site's noise on one coordinate practically never exceeds, in levels."""
        return self.inner.noise_bound

    def event(self, release: str) -> Event:
        """Return what one answer is charged as."""
        return self.inner.event(release)

    def digest(self) -> str:
        """Return the hash of everything that decides epsilon."""
        return hashlib.sha256(f"query {self.query}|{self.inner.digest()}".encode()).hexdigest()

    def protect(self, update: Tensor, *, loss: float, weight: int, source: RandomSource) -> MechanismOutput:
        """Refuse: a query has no update."""
        raise TypeError("a query is answered by rows, not by an update")

    def total(self, answers: Iterable[Answers]) -> Total:
        """Bound every row and add them up."""
        return _bounded_total(answers, self.rows)

    def protect_total(self, total: Total, source: RandomSource) -> MechanismOutput:
        """Take the mean over the rows, bound it and add this client's share of the noise."""
        mean = torch.from_numpy(total.values / max(1, total.rows))
        return self.inner.protect(mean, loss=0.0, weight=1, source=source)

    def deviation(self, survivors: int) -> float:
        """Return the standard deviation of the noise in the sum of so many clients, in real units."""
        noise = self.inner
        levels = noise.inner.integer_sensitivity(scale=noise.scale, dimension=noise.dimension)
        share = noise.noise_multiplier * levels / math.sqrt(noise.inner.honest_survivors)
        return share * math.sqrt(survivors) / noise.scale

    def words(self, rounds: int) -> str:
        """Describe the noise of the opened sum."""
        return f"{self.query}: {self.inner.words(rounds)}"


def _bounded_total(answers: Iterable[Answers], inner: SumMechanism) -> Total:
    """Add up bounded rows part by part."""
    values, count = np.zeros(inner.dimension), 0
    for part in answers:
        rows = part if isinstance(part, MomentRows) else part.detach().to("cpu", torch.float64).numpy()
        values += inner.bounded_sum(rows)
        count += len(rows)
    return Total(values=values, rows=count)


def calibrate_query(
    config: RunConfig, query: Query, *, epsilon: float, public_client_size: int, answers: int = 1
) -> QueryNoise:
    """Choose the smallest noise with which all answers of one owner, spare ones included, cost `epsilon`.

    `answers` is how often one owner answers where no attempt is lost.
    """
    paid = answers_paid(config, answers)
    if config.privacy.unit == "client":
        return _client_answers(config, query, epsilon, paid)
    return _record_answers(config, query, epsilon, public_client_size, paid)


def answers_paid(config: RunConfig, answers: int = 1) -> int:
    """Return the most answers to one query an owner pays for: those of the plan, and the spare attempts."""
    return answers + config.privacy.spare_rounds


def _record_answers(
    config: RunConfig, query: Query, epsilon: float, public_client_size: int, paid: int
) -> RecordAnswers:
    privacy = config.privacy
    rows = _LARGEST_SITE * public_client_size
    scale = 1.0 if query.whole_numbers else _scale(query, rows)
    bits = min(_MOST_BITS, max(2, 2 + math.ceil(math.log2(rows * query.bound * scale))))

    def mechanism(multiplier: float) -> SumMechanism:
        return SumMechanism(
            noise_multiplier=multiplier,
            bound=query.bound,
            scale=scale,
            dimension=query.size,
            honest_survivors=honest_shares(config),
            unit="person" if privacy.unit == "person" else "record",
            records_per_person=privacy.records_per_person,
            whole_numbers=query.whole_numbers,
            largest=(1 << (bits - 1)) - 1,
        )

    if privacy.unit == "none":
        return RecordAnswers(query=query.name, inner=mechanism(0.0), value_bits=bits, reason=privacy.reason)
    multiplier = smallest_multiplier(
        lambda noise: mechanism(noise).event("calibration"),
        epsilon=epsilon * (1 - _HEADROOM),
        delta=privacy.delta,
        count=paid,
    )
    return RecordAnswers(query=query.name, inner=mechanism(multiplier), value_bits=bits)


def _scale(query: Query, rows: int) -> float:
    """Return the levels in 1.0: fine enough that rounding costs little, coarse enough for the ring."""
    fine = _FINE * math.sqrt(query.size) / query.bound
    return float(min(fine, 2.0 ** (_MOST_BITS - 2) / (rows * query.bound)))


def honest_shares(config: RunConfig) -> int:
    """Return how many honest sites share the noise of a sum: one, where each adds the whole of it."""
    if config.privacy.noise_shares != "sum":
        return 1
    return max(1, compatibility.honest_survivors(config))


def _client_answers(config: RunConfig, query: Query, epsilon: float, paid: int) -> ClientAnswers:
    privacy, protection = config.privacy, config.protection
    scale = ((1 << (protection.value_bits - 1)) - 1) / query.bound
    honest = compatibility.honest_survivors(config)

    def noise(multiplier: float) -> ClientNoise:
        inner = ClientMechanism(
            noise_multiplier=multiplier, clip_norm=query.bound, honest_survivors=honest, participations=1
        )
        return ClientNoise(inner=inner, scale=scale, dimension=query.size)

    multiplier = smallest_multiplier(
        lambda value: noise(value).event("calibration"),
        epsilon=epsilon * (1 - _HEADROOM),
        delta=privacy.delta,
        count=paid,
    )
    rows = SumMechanism(
        noise_multiplier=0.0, bound=query.bound, scale=1.0, dimension=query.size, honest_survivors=1
    )
    return ClientAnswers(
        query=query.name, inner=noise(multiplier), rows=rows, value_bits=protection.value_bits
    )
