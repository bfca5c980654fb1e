"""Noise in shares with a memory: what a site adds in a round takes back a part of what it added before.

The opened sums of a run are then those of a banded matrix factorisation (`defenses/dp/matrix.py`): prefix
sums, which are what a model is made of, carry less noise than independent noise of the same price leaves.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from defenses.dp import matrix
from defenses.dp.events import Event, NonPrivateEvent
from defenses.dp.noise import WIDENING, gaussian
from defenses.errors import ParameterError
from defenses.random_source import RandomSource

Reals = npt.NDArray[np.float64]

_LEAST_LEVELS = 16.0  # of a share's fresh noise: rounding it tells then less than exp(-5000) of anything


@dataclass(frozen=True, slots=True, kw_only=True)
class BandedShares:
    """Describe the noise of sums in which every client's part is one vector, bounded once a turn.

    `noise_multiplier` is the fresh noise of the whole opened sum over `l2_sensitivity`, the bound on one
    client's rounded vector in integer levels. A client's turns are at least `separation` rounds apart, and
    the noise reaches back one round less than that, so what a client changes in two turns does not overlap.

    Guarantee: where `honest_survivors` honest sites are in every opened sum of the run, `event` is what one
    turn costs; turns compose as the events do. Rounds in which a client only adds noise cost it nothing.
    Assumes: every round's noise is drawn from one stream and released once (`NoiseStream`).
    Source: docs/shared_noise.md, "Noise with a memory".
    """

    noise_multiplier: float
    l2_sensitivity: float
    honest_survivors: int
    separation: int
    dimension: int

    def __post_init__(self) -> None:
        if self.separation < 2 or self.honest_survivors < 1 or self.dimension < 1:
            raise ParameterError(
                f"separation = {self.separation}, honest_survivors = {self.honest_survivors}, dimension = "
                f"{self.dimension}: at least 2, 1 and 1"
            )
        if not (self.l2_sensitivity > 0 and math.isfinite(self.l2_sensitivity)):
            raise ParameterError(f"l2_sensitivity = {self.l2_sensitivity}: must be positive and finite")
        if not self.noise_multiplier >= 0:
            raise ParameterError(f"noise_multiplier = {self.noise_multiplier}: must not be negative")
        if self.noise_multiplier > 0 and self.fresh_deviation < _LEAST_LEVELS:
            raise ParameterError(
                f"a share of the noise is {self.fresh_deviation:.3g} levels, below {_LEAST_LEVELS:g}; raise "
                "value_bits"
            )

    @property
    def coefficients(self) -> matrix.Coefficients:
        """Return the bands: as many as turns are apart."""
        return matrix.square_root_coefficients(self.separation)

    @property
    def fresh_deviation(self) -> float:
        """Return the deviation of the fresh part of one site's share, in levels."""
        whole = self.noise_multiplier * self.l2_sensitivity
        return whole / math.sqrt(self.honest_survivors) * WIDENING

    @property
    def share_deviation(self) -> float:
        """Return the deviation of one site's share in a late round, in levels: fresh and old parts."""
        return self.fresh_deviation * matrix.deviation_over_fresh(self.coefficients)

    def event(self, release: str, *, clip_norm: float) -> Event:
        """Return what one turn costs."""
        if self.noise_multiplier == 0:
            return NonPrivateEvent(reason=f"{release}: noise_multiplier is 0")
        return matrix.event(
            coefficients=self.coefficients,
            noise_multiplier=self.noise_multiplier,
            steps=self.separation,
            min_separation=self.separation,
            clip_norm=clip_norm,
            release=release,
        )


class NoiseStream:
    """One site's noise, round after round, of which it remembers `separation` - 1 vectors.

    Guarantee: a function of the source, the round and the attempt, so a stream that is opened again goes on
    with the same noise. A second attempt at a round has noise of its own, which no later round takes back.
    """

    def __init__(self, shares: BandedShares, source: RandomSource) -> None:
        self._shares, self._source = shares, source
        self._newest = 0
        self._memory: deque[Reals] = deque(maxlen=shares.separation - 1)  # newest first

    def __repr__(self) -> str:
        return "NoiseStream(<hidden>)"

    def row(self, round: int, attempt: int = 0) -> Reals:
        """Return the noise of a round, float64 [d], in levels; rounds are counted from 1."""
        if round < 1 or attempt < 0:
            raise ParameterError(f"round = {round}, attempt = {attempt}: at least 1 and 0")
        if attempt:
            return self._fresh("attempt", round, attempt)
        if round <= self._newest:
            self._newest = 0
            self._memory.clear()
        while self._newest < round:
            self._newest += 1
            fresh = self._fresh("round", self._newest)
            self._memory.appendleft(matrix.correlate(self._shares.coefficients, fresh, tuple(self._memory)))
        return self._memory[0].copy()

    def _fresh(self, *labels: str | int) -> Reals:
        deviation, dimension = self._shares.fresh_deviation, self._shares.dimension
        return gaussian(dimension, std=deviation, source=self._source.derive(*labels))
