"""One object owns sampler, bound, noise and accounting event, so an event cannot describe what is not
running.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from defenses.dp.clip import AdaptiveCount, Clipping, ClippingKind, clip_vector
from defenses.dp.discrete import Integers, skellam
from defenses.dp.events import Adjacency, Event, GaussianEvent, NonPrivateEvent, SkellamEvent
from defenses.dp.mechanism_digest import digest_of
from defenses.dp.noise import WIDENING, add_gaussian, gaussian
from defenses.dp.per_sample import ClippedSum
from defenses.dp.sampling import Indices, fixed_size_sample, poisson_sample
from defenses.errors import BudgetExceeded, NotPrivateError, ParameterError
from defenses.random_source import RandomSource

RecordSampling = Literal["poisson", "full", "fixed_size"]
_MOST_REDRAWS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordMechanism:
    """Describe differentially private training on records: everything that decides epsilon, and nothing else.

    `noise_multiplier` is the noise over the bound on one record, for the whole step (with adaptive clipping
    that includes the count). `expected_batch_size` is the public constant every noisy sum is divided by.
    `sampling_rate` 1 with `full` sampling gives no amplification; `fixed_size` draws exactly round(rate *
    population) records and needs the adjacency `replace_one` or `zero_out`.

    Guarantee: `event` is made from the same fields that `sample` and `privatise` run on; `start` hands out at
    most `steps` steps. The divisor never depends on the data.
    """

    sampling_rate: float
    noise_multiplier: float
    clip_norm: float
    expected_batch_size: float
    steps: int
    records_per_person: int = 1
    adjacency: Adjacency = "add_remove"
    clipping: ClippingKind = "flat"
    sampling: RecordSampling = "poisson"
    quantile: float = 0.5
    clip_learning_rate: float = 0.2
    count_noise: float = 0.0

    def __post_init__(self) -> None:
        if not self.noise_multiplier >= 0:
            raise ParameterError(f"noise_multiplier = {self.noise_multiplier}: must not be negative")
        if not self.expected_batch_size > 0:
            raise ParameterError(
                f"expected_batch_size = {self.expected_batch_size}: must be a positive constant"
            )
        if not 0 < self.sampling_rate <= 1:
            raise ParameterError(f"sampling_rate = {self.sampling_rate}: must lie in (0, 1]")
        if self.steps < 1:
            raise ParameterError(f"steps = {self.steps}: must be at least 1")
        self.gradient_noise_multiplier()
        if self.noise_multiplier > 0:
            self.event("check")

    @property
    def bound(self) -> Clipping:
        """Return the clipping of the first step (of every step, unless it adapts)."""
        return Clipping(
            kind=self.clipping,
            clip_norm=self.clip_norm,
            quantile=self.quantile,
            learning_rate=self.clip_learning_rate,
        )

    def gradient_noise_multiplier(self) -> float:
        """Return the noise multiplier of the gradient alone; above the stated one when a count is released
        with it.
        """
        if self.clipping != "adaptive":
            return self.noise_multiplier
        return AdaptiveCount(total=self.noise_multiplier, count_noise=self.count_noise).gradient

    def event(self, release: str) -> Event:
        """Return the event of all `steps` steps: what a ledger reserves before data are touched."""
        return self._event(release, self.steps)

    def _event(self, release: str, steps: int) -> Event:
        if self.noise_multiplier == 0:
            return NonPrivateEvent(reason=f"{release}: noise_multiplier is 0")
        return GaussianEvent(
            unit="person" if self.records_per_person > 1 else "record",
            records_per_person=self.records_per_person,
            adjacency=self.adjacency,
            sampling=self.sampling,
            sampling_rate=self.sampling_rate,
            noise_multiplier=self.noise_multiplier,
            steps=steps,
            clip_norm=self.clip_norm,
            release=release,
        )

    def sample(self, population: int, source: RandomSource) -> Indices:
        """Draw the records of one step. The result may be empty; the step then releases noise alone."""
        if self.sampling == "full":
            return np.arange(population, dtype=np.int64)
        if self.sampling == "fixed_size":
            return fixed_size_sample(population, size=round(self.sampling_rate * population), source=source)
        return poisson_sample(population, rate=self.sampling_rate, source=source)

    def privatise(
        self,
        clipped_sum: Mapping[str, Tensor] | ClippedSum,
        source: RandomSource,
        *,
        clip_norm: float | None = None,
    ) -> dict[str, Tensor]:
        """Return (sum + N(0, (noise_multiplier * clip_norm)^2)) / expected_batch_size, by parameter.

        Zeros in, for an empty batch, give noise out. `clip_norm` is for an adaptive bound that has moved.
        """
        bound = self.clip_norm if clip_norm is None else clip_norm
        gradients = clipped_sum
        if isinstance(clipped_sum, ClippedSum):
            if clipped_sum.clip != replace(self.bound, clip_norm=bound):
                raise NotPrivateError(
                    f"the sum was clipped as {clipped_sum.clip.kind} at {clipped_sum.clip.clip_norm}, the "
                    f"mechanism states {self.clipping} at {bound}"
                )
            gradients = clipped_sum.gradients
        assert isinstance(gradients, Mapping)
        std = self.gradient_noise_multiplier() * bound * WIDENING
        noisy = {}
        for name, value in sorted(gradients.items()):
            noisy[name] = add_gaussian(value, std=std, source=source, divisor=self.expected_batch_size)
        return {name: noisy[name] for name in gradients}

    def start(self) -> RecordRun:
        """Open the run that draws, bounds and releases at most `steps` steps."""
        return RecordRun(self)

    def digest(self) -> str:
        """Return a hash of everything that decides epsilon; changing speed settings cannot change it."""
        return digest_of("record", asdict(self))


class RecordRun:
    """Run the steps of a `RecordMechanism`: sample, then privatise, in turn, never more than stated.

    `private` turns False for good once a replayable source was used; such a run must be reported as not
    private.

    Guarantee: every `sample` is followed by exactly one `privatise` of a sum with the current bound; `event`
    covers the steps begun, so a sampled step counts as spent even if it is never released.
    """

    def __init__(self, mechanism: RecordMechanism) -> None:
        self.mechanism = mechanism
        self.bound = mechanism.bound
        self.private = True
        self._begun = 0
        self._open = False

    @property
    def steps_taken(self) -> int:
        """Return how many steps have been begun."""
        return self._begun

    def sample(self, population: int, source: RandomSource) -> Indices:
        """Begin a step: draw its records.

        Raises: BudgetExceeded after the last stated step; ParameterError when the previous step was not
        released.
        """
        if self._open:
            raise ParameterError(
                "the last batch was never privatised; every sampled step must release its noise"
            )
        if self._begun >= self.mechanism.steps:
            raise BudgetExceeded(f"all {self.mechanism.steps} steps of this mechanism are used")
        self._begun += 1
        self._open = True
        self.private &= source.private
        return self.mechanism.sample(population, source)

    def privatise(self, clipped_sum: ClippedSum, source: RandomSource) -> dict[str, Tensor]:
        """Release the step: noisy sum over the public divisor. Moves an adaptive bound, by its own noisy
        count.
        """
        if not self._open:
            raise NotPrivateError(
                "privatise before sample: the event would describe a sampler that did not run"
            )
        self.private &= source.private
        released = self.mechanism.privatise(clipped_sum, source, clip_norm=self.bound.clip_norm)
        if self.bound.kind == "adaptive":
            centred = clipped_sum.within - clipped_sum.batch_size / 2
            noise = gaussian(1, std=self.mechanism.count_noise * WIDENING, source=source)[0]
            # rounding to 1/16 keeps the low bits of the float noise inside, as for gradients
            noisy = round(16 * (centred + noise)) / 16
            self.bound = self.bound.follow(noisy / self.mechanism.expected_batch_size + 0.5)
        self._open = False
        return released

    def event(self, release: str) -> Event | None:
        """Return the event of the steps begun so far, None before the first."""
        return self.mechanism._event(release, self._begun) if self._begun else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientMechanism:
    """Describe client-level privacy: each client's whole update is one vector, bounded once, noised in
    shares.

    `noise_multiplier` is the noise of the whole opened sum over the bound on one client. Every client adds
    variance (noise_multiplier * clip_norm)^2 / honest_survivors, so the sum holds enough as soon as
    `honest_survivors` clients whose shares no colluder knows are in it. `participations` is the most rounds
    one client takes part in (`participation_cap`); no amplification by sampling is claimed.

    For the integer ring, `scale` is the number of integer steps in 1.0 and `dimension` the length of the
    vector: an update of norm C, scaled and rounded at random to a neighbouring integer in every coordinate,
    has norm at most C * scale + sqrt(dimension), and that is the sensitivity noise and event are built on.
    With `redraws`, a probability, the rounding is drawn again until the integers are within a smaller norm,
    which a single draw exceeds at most that often and which then is the sensitivity (docs/fewer_bytes.md); at
    0 no rounding is redrawn.

    Guarantee: with at least `honest_survivors` honest clients in every opened sum, the stated multiplier
    holds.
    """

    noise_multiplier: float
    clip_norm: float
    honest_survivors: int
    participations: int
    adjacency: Adjacency = "zero_out"
    redraws: float = 0.0

    def __post_init__(self) -> None:
        if not self.noise_multiplier >= 0:
            raise ParameterError(f"noise_multiplier = {self.noise_multiplier}: must not be negative")
        if not self.clip_norm > 0:
            raise ParameterError(f"clip_norm = {self.clip_norm}: must be positive")
        if not 0 <= self.redraws < 1:
            raise ParameterError(f"redraws = {self.redraws}: must be a probability below 1")
        if self.honest_survivors < 1 or self.participations < 1:
            raise ParameterError(
                f"honest_survivors = {self.honest_survivors}, participations = "
                f"{self.participations}: at least 1 each"
            )

    def clip(self, update: Tensor) -> Tensor:
        """Bound a whole update vector in L2."""
        return clip_vector(update, clip_norm=self.clip_norm)

    def event(self, release: str) -> Event:
        """Return the event of float Gaussian shares over all participations."""
        if self.noise_multiplier == 0:
            return NonPrivateEvent(reason=f"{release}: noise_multiplier is 0")
        return GaussianEvent(
            unit="client",
            adjacency=self.adjacency,
            sampling="full",
            sampling_rate=1.0,
            noise_multiplier=self.noise_multiplier,
            steps=self.participations,
            clip_norm=self.clip_norm,
            release=release,
        )

    def add_share(self, update: Tensor, source: RandomSource) -> Tensor:
        """Clip the update and add this client's float share of the noise."""
        std = self.noise_multiplier * self.clip_norm / math.sqrt(self.honest_survivors) * WIDENING
        return add_gaussian(self.clip(update), std=std, source=source)

    def integer_sensitivity(self, *, scale: float, dimension: int) -> float:
        """Return the L2 bound on one client's rounded vector, in integer steps."""
        if not scale > 0 or dimension < 1:
            raise ParameterError(f"scale = {scale}, dimension = {dimension}: both must be positive")
        levels, root = self.clip_norm * scale, math.sqrt(dimension)
        if not self.redraws:
            return levels + root
        # E |R|^2 <= levels^2 + d/4, and it is beyond that by `room` with probability `redraws` (Hoeffding)
        room = math.sqrt(-2 * math.log(self.redraws)) * (levels + root / 2)
        return min(levels + root, math.sqrt(levels**2 + dimension / 4 + room))

    def integer_share(self, update: Tensor, *, scale: float, source: RandomSource) -> Integers:
        """Clip the update, round it at random to the grid and add this client's Skellam share, as int64."""
        bounded = clip_vector(
            update.detach().to("cpu", torch.float64).reshape(-1), clip_norm=self.clip_norm
        ).numpy()
        rounded = self._rounded(bounded * scale, scale, source)
        if self.noise_multiplier == 0:
            return rounded
        variance = self._integer_variance(scale, len(rounded)) / self.honest_survivors
        return rounded + skellam(len(rounded), variance=variance, source=source)

    def _rounded(self, levels: npt.NDArray[np.float64], scale: float, source: RandomSource) -> Integers:
        """Round every number up or down at random, drawn again where redraws keep the norm in its bound."""
        grid = np.floor(levels)
        fraction, whole = levels - grid, grid.astype(np.int64)
        if not self.redraws:
            return whole + (source.uniform(len(grid)) < fraction)
        longest = self.integer_sensitivity(scale=scale, dimension=len(grid)) ** 2
        for _ in range(_MOST_REDRAWS):
            rounded = whole + (source.uniform(len(grid)) < fraction)
            if float(np.square(rounded, dtype=np.float64).sum()) <= longest:
                return rounded
        return np.zeros_like(whole)  # a bounded update too, with probability `redraws` to the power of 32

    def integer_event(self, release: str, *, scale: float, dimension: int) -> Event:
        """Return the event of Skellam shares over all participations, in integer steps."""
        if self.noise_multiplier == 0:
            return NonPrivateEvent(reason=f"{release}: noise_multiplier is 0")
        l2 = self.integer_sensitivity(scale=scale, dimension=dimension)
        # replacing a client removes one rounded vector and adds another
        change = 2 * l2 if self.adjacency == "replace_one" else l2
        return SkellamEvent(
            unit="client",
            adjacency=self.adjacency,
            # an integer is at most its own square, so the L1 norm of an integer vector is at most its squared
            # L2 norm
            l1_sensitivity=max(change, min(math.sqrt(dimension) * change, change**2)),
            l2_sensitivity=change,
            variance=self._integer_variance(scale, dimension),
            scale=scale,
            steps=self.participations,
            release=release,
        )

    def _integer_variance(self, scale: float, dimension: int) -> float:
        return (self.noise_multiplier * self.integer_sensitivity(scale=scale, dimension=dimension)) ** 2

    def digest(self) -> str:
        """Return a hash of everything that decides epsilon."""
        values = asdict(self)
        if not self.redraws:
            del values["redraws"]  # as it was before there were any
        return digest_of("client", values)
