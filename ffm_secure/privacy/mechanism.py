"""What bounds and noises an update, as one object: the bound, the noise, the event and its words cannot
disagree.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from defenses.dp import (
    BandedShares,
    ClientMechanism,
    Clipping,
    Event,
    NonPrivateEvent,
    RecordMechanism,
    SumMechanism,
)
from defenses.random_source import RandomSource
from ffm_secure.config import compatibility
from ffm_secure.config.run_file import RunConfig
from ffm_secure.privacy.field import Demand


@dataclass(frozen=True, slots=True, kw_only=True)
class MechanismOutput:
    """What a mechanism lets out of an update: bounded and noised, or plain where the run promises no privacy.

    `values` is float64 [d] for an update that was privatised while learning (or not at all), int64 [d] on the
    grid where the noise is discrete. Made by a mechanism's `protect` alone; `VectorCodec.quantise` accepts
    nothing else.
    """

    values: npt.NDArray[np.float64] | npt.NDArray[np.int64]
    loss: float  # nats; 0 where the loss is private
    weight: int


class Mechanism(Protocol):
    """Own what decides epsilon in one round of one site."""

    @property
    def noise_multiplier(self) -> float:
        """Return the noise over the bound; 0 without noise."""

    @property
    def clip_norm(self) -> float:
        """Return the L2 bound on what is protected; infinity without one."""

    @property
    def record_level(self) -> RecordMechanism | None:
        """Return what clips and noises every local step, where the record or the person is the unit."""

    @property
    def client_level(self) -> ClientNoise | None:
        """Return what clips and noises the whole update, where the client is the unit."""

    @property
    def sum_level(self) -> SumNoise | None:
        """Return what bounds every record and noises the sum of all sites in shares, where the run asks
        for it.
        """

    @property
    def clips_records(self) -> bool:
        """Tell whether every record's gradient is bounded on its own."""

    @property
    def adjacency(self) -> str:
        """Say between which neighbours the guarantee holds."""

    def event(self, release: str) -> Event:
        """Return what one round is charged as."""

    def digest(self) -> str:
        """Return the hash of everything that decides epsilon."""

    def protect(self, update: Tensor, *, loss: float, weight: int, source: RandomSource) -> MechanismOutput:
        """Return an update [d] that may be sealed, with the bound and noise that belong to a whole update."""

    def words(self, rounds: int) -> str:
        """Describe `rounds` rounds in one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NoMechanism:
    """Guarantee nothing: a round is charged as infinite."""

    reason: str = "no privacy unit"

    noise_multiplier = 0.0
    clip_norm = math.inf
    record_level = None
    client_level = None
    sum_level = None
    clips_records = False
    adjacency = "none"

    def event(self, release: str) -> Event:
        """Return an event without a bound."""
        return NonPrivateEvent(reason=self.reason)

    def digest(self) -> str:
        """Return the hash of nothing."""
        return hashlib.sha256(b"no mechanism").hexdigest()

    def protect(self, update: Tensor, *, loss: float, weight: int, source: RandomSource) -> MechanismOutput:
        """Pass the update on as it is."""
        return MechanismOutput(values=_float64(update), loss=0.0 if math.isnan(loss) else loss, weight=weight)

    def words(self, rounds: int) -> str:
        """Say that there is none."""
        return "no mechanism"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordNoise:
    """The record- or person-level mechanism: DP-SGD inside every local step; the update is its
    post-processing.
    """

    inner: RecordMechanism
    unit: str = "record"
    replay: RecordMechanism | None = None  # the same steps as a row of a stream's reservoir goes through them

    client_level = None
    sum_level = None
    clips_records = True

    @property
    def noise_multiplier(self) -> float:
        """Return the noise of a step over the bound on one record."""
        return self.inner.noise_multiplier

    @property
    def clip_norm(self) -> float:
        """Return the bound on one record's gradient."""
        return self.inner.clip_norm

    @property
    def record_level(self) -> RecordMechanism:
        """Return what clips and noises every step."""
        return self.inner

    @property
    def adjacency(self) -> str:
        """Say between which neighbours the guarantee holds."""
        return f"add or remove one {self.unit}"

    def event(self, release: str) -> Event:
        """Return the event of one round."""
        return self.inner.event(release)

    def digest(self) -> str:
        """Return the hash of everything that decides epsilon."""
        return _with_replay(self.inner.digest(), self.replay)

    def protect(self, update: Tensor, *, loss: float, weight: int, source: RandomSource) -> MechanismOutput:
        """Pass on what is private already; loss and count would be releases of their own and stay."""
        return MechanismOutput(values=_float64(update), loss=0.0, weight=1)

    def words(self, rounds: int) -> str:
        """Describe the steps, their sampling and their noise."""
        inner = self.inner
        return (
            f"up to {rounds} rounds x {inner.steps} steps of Poisson({inner.sampling_rate:.6g}) sampled "
            f"Gaussian, noise multiplier {inner.noise_multiplier:.4f}, clip {inner.clip_norm:g}, "
            f"{inner.clipping} clipping{_replay_words(self.replay)}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientNoise:
    """The client-level mechanism on this run's integer grid: one round of Skellam noise, shared by the honest
    survivors.
    """

    inner: ClientMechanism  # of one participation
    scale: float  # integer levels in 1.0
    dimension: int
    separation: int = 1  # rounds between two turns of a client to learn; above 1 the noise has a memory

    record_level = None
    sum_level = None
    clips_records = False
    adjacency = "zero out one client"

    @property
    def client_level(self) -> ClientNoise:
        """Return what clips and noises the whole update."""
        return self

    @property
    def noise_multiplier(self) -> float:
        """Return the noise of the opened sum over the bound on one client."""
        return self.inner.noise_multiplier

    @property
    def clip_norm(self) -> float:
        """Return the bound on one client's update."""
        return self.inner.clip_norm

    @property
    def noise_bound(self) -> int:
        """Return what one client's noise on one coordinate exceeds with probability below 1e-30 (12 standard
        deviations).
        """
        return 2 + math.ceil(12 * self.share_deviation * self.scale)

    @property
    def share_deviation(self) -> float:
        """Return the deviation of one client's share on one coordinate, in units of an update."""
        if self.correlated is not None:
            return self.correlated.share_deviation / self.scale
        levels = self.inner.integer_sensitivity(scale=self.scale, dimension=self.dimension)
        return self.noise_multiplier * levels / self.scale / math.sqrt(self.inner.honest_survivors)

    @property
    def levels(self) -> float:
        """Return how many levels the bound on one client is cut into."""
        return self.clip_norm * self.scale

    @property
    def demand(self) -> Demand:
        """Return what one client puts into one coordinate."""
        return Demand(largest=math.ceil(self.levels), variance=(self.share_deviation * self.scale) ** 2)

    @property
    def correlated(self) -> BandedShares | None:
        """Return the noise with a memory, where a run has it."""
        if self.separation == 1:
            return None
        return BandedShares(
            noise_multiplier=self.noise_multiplier,
            l2_sensitivity=self.inner.integer_sensitivity(scale=self.scale, dimension=self.dimension),
            honest_survivors=self.inner.honest_survivors,
            separation=self.separation,
            dimension=self.dimension,
        )

    def learns(self, client: int, round: int) -> bool:
        """Tell whether a client learns in a round; in the others it adds noise and reads no row."""
        return (client + round) % self.separation == 0

    def event(self, release: str) -> Event:
        """Return the event of one round in which a client learns."""
        if self.correlated is not None:
            return self.correlated.event(release, clip_norm=self.clip_norm)
        return self.inner.integer_event(release, scale=self.scale, dimension=self.dimension)

    def noisy_integers(self, update: Tensor, source: RandomSource) -> npt.NDArray[np.int64]:
        """Clip, round to the grid, add this client's share of the noise."""
        return self.inner.integer_share(update, scale=self.scale, source=source)

    def digest(self) -> str:
        """Return the hash of everything that decides epsilon."""
        text = f"{self.inner.digest()}|{self.scale!r}|{self.dimension}"
        if self.separation > 1:
            text += f"|banded {self.separation}"
        return hashlib.sha256(text.encode()).hexdigest()

    def protect_with(
        self, update: Tensor, noise: npt.NDArray[np.float64], source: RandomSource
    ) -> MechanismOutput:
        """Bound and round the whole update, and add this site's noise of the round [d], in levels.

        Assumes: `noise` is a row of this site's `NoiseStream`, released once.
        """
        bounded = replace(self.inner, noise_multiplier=0.0)
        rounded = bounded.integer_share(update, scale=self.scale, source=source)
        return MechanismOutput(values=rounded + np.rint(noise).astype(np.int64), loss=0.0, weight=1)

    def protect(self, update: Tensor, *, loss: float, weight: int, source: RandomSource) -> MechanismOutput:
        """Bound and noise the whole update on the integer grid."""
        if self.separation > 1:
            raise TypeError("noise with a memory comes from the site's stream, not from a fresh source")
        return MechanismOutput(values=self.noisy_integers(update, source), loss=0.0, weight=1)

    def words(self, rounds: int) -> str:
        """Describe the noise of the opened sum."""
        if self.separation > 1:
            return (
                f"up to {rounds} turns of Gaussian noise with a memory over "
                f"{self.inner.honest_survivors} honest sites, banded matrix factorisation with "
                f"{self.separation} bands, fresh noise multiplier "
                f"{self.noise_multiplier:.4f}, clip {self.clip_norm:g}, every client's turns "
                f"{self.separation} rounds apart"
            )
        return (
            f"up to {rounds} rounds of Skellam noise over the honest survivors, noise multiplier "
            f"{self.noise_multiplier:.4f}, clip {self.clip_norm:g}, every client of "
            "a cohort counted as taking part"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SumNoise:
    """The record- or person-level mechanism with noise in shares.

    A site sends the sum of its records' bounded gradients at the broadcast model, times the learning rate,
    with a share of Skellam noise on the integer grid.

    Guarantee: one record moves the sum of one round by at most `inner.bound`, rounding beside it; what is
    opened holds the noise that `event` charges. One site's upload alone is protected by masks only.
    """

    inner: SumMechanism  # of one round, in units of a site's update
    clipping: Clipping
    learning_rate: float
    expected_batch_size: float
    replay: SumMechanism | None = None  # the same sum as a row of a stream's reservoir goes through it

    record_level = None
    client_level = None
    clips_records = True

    @property
    def sum_level(self) -> SumNoise:
        """Return what bounds every record and noises the sum."""
        return self

    @property
    def noise_multiplier(self) -> float:
        """Return the noise of the opened sum over the bound on one record."""
        return self.inner.noise_multiplier

    @property
    def clip_norm(self) -> float:
        """Return the bound on one record's gradient."""
        return self.clipping.clip_norm

    @property
    def scale(self) -> float:
        """Return the integer levels in 1.0 of an update."""
        return self.inner.scale

    @property
    def noise_bound(self) -> int:
        """Return what one site's noise on one coordinate practically never exceeds, in levels."""
        return self.inner.noise_bound

    @property
    def share_deviation(self) -> float:
        """Return the deviation of one site's share on one coordinate, in units of an update."""
        return math.sqrt(self.inner.share_variance) / self.scale

    @property
    def levels(self) -> float:
        """Return how many levels the bound on one record is cut into."""
        return self.inner.bound * self.scale

    @property
    def demand(self) -> Demand:
        """Return what one site puts into one coordinate."""
        return Demand(largest=self.inner.largest, variance=self.inner.share_variance)

    @property
    def adjacency(self) -> str:
        """Say between which neighbours the guarantee holds."""
        return f"add or remove one {self.inner.unit}"

    def event(self, release: str) -> Event:
        """Return the event of one round."""
        return self.inner.event(release)

    def update_of(self, gradient_sum: Tensor) -> Tensor:
        """Turn a sum of bounded gradients [d] into an update [d], both float64."""
        return gradient_sum * (-self.learning_rate / self.expected_batch_size)

    def digest(self) -> str:
        """Return the hash of everything that decides epsilon."""
        text = f"{self.inner.digest()}|{self.clipping!r}|{self.learning_rate!r}|{self.expected_batch_size!r}"
        return _with_replay(hashlib.sha256(text.encode()).hexdigest(), self.replay)

    def protect(self, update: Tensor, *, loss: float, weight: int, source: RandomSource) -> MechanismOutput:
        """Round the site's sum to the grid and add this site's share of the noise."""
        return MechanismOutput(values=self.inner.share(_float64(update), source), loss=0.0, weight=1)

    def words(self, rounds: int) -> str:
        """Describe the sampling, and the noise of the opened sum."""
        inner = self.inner
        return (
            f"up to {rounds} rounds of one Poisson({inner.sampling_rate:.6g}) sampled sum with "
            "Skellam noise in shares of "
            f"{inner.honest_survivors} honest survivors, noise multiplier "
            f"{inner.noise_multiplier:.4f}, clip {self.clip_norm:g}, "
            f"{self.clipping.kind} clipping{_replay_words(self.replay)}"
        )


def replay_of(mechanism: Mechanism) -> RecordMechanism | SumMechanism | None:
    """Return what a row of a stream's reservoir goes through in one round; None without a reservoir."""
    if isinstance(mechanism, RecordNoise | SumNoise):
        return mechanism.replay
    return None


def replay_events(mechanism: Mechanism, config: RunConfig) -> tuple[Event, ...]:
    """Return what a row pays at most in later stages, beside its own stage's rounds."""
    replay = replay_of(mechanism)
    if replay is None:
        return ()
    return (replay.event(release="replay of one round"),) * compatibility.replay_rounds(config)


def _with_replay(digest: str, replay: RecordMechanism | SumMechanism | None) -> str:
    if replay is None:
        return digest
    return hashlib.sha256(f"{digest}|replay|{replay.digest()}".encode()).hexdigest()


def _replay_words(replay: RecordMechanism | SumMechanism | None) -> str:
    if replay is None:
        return ""
    return f", and in later stages by rows of the reservoir at Poisson({replay.sampling_rate:.6g})"


def _float64(update: Tensor) -> npt.NDArray[np.float64]:
    return update.detach().cpu().numpy().astype(np.float64)
