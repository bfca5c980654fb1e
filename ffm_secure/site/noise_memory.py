"""A site's noise with a memory: its secret and the rounds it was drawn for are kept at home."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from defenses.dp import BandedShares, NoiseStream
from defenses.random_source import RandomSource
from defenses.replay_guard import ReplayGuard
from ffm_secure.agreed.run_spec import RunSpec
from ffm_secure.records import RoundPlan
from ffm_secure.site.identity import open_noise


class NoiseMemory:
    """Hand out one site's noise of a round, once.

    Guarantee: a row is drawn for one round and attempt only, in this process and the next, and that is on the
    disk before the row is returned: two updates under one row would differ by what they hide. A site that is
    started anew goes on with the noise it began, for the secret is kept.
    """

    def __init__(self, shares: BandedShares, key: bytes, guard: ReplayGuard | None) -> None:
        self._shares, self._guard = shares, guard
        self._source = RandomSource(key, private=guard is not None)
        self._stream: NoiseStream | None = None
        self._run = b""

    def __repr__(self) -> str:
        return "NoiseMemory(<hidden>)"

    @classmethod
    def at(cls, place: Path, shares: BandedShares) -> NoiseMemory:
        """Open what a site keeps in its folder, or begin it.

        Raises:
          StoreError: secret or memory is missing, damaged, or readable by others.
        """
        return cls(shares, *open_noise(place, RandomSource.system()))

    @classmethod
    def forgetful(cls, shares: BandedShares) -> NoiseMemory:
        """Return noise that lives as long as the process."""
        return cls(shares, RandomSource.system().random_bytes(32), ReplayGuard.in_memory())

    @classmethod
    def replayed(cls, shares: BandedShares, *, seed: int, site: int) -> NoiseMemory:
        """Return noise that a test can draw again; nothing is claimed for it."""
        source = RandomSource.seeded(seed).derive("noise with a memory", site)
        return cls(shares, source.random_bytes(32), None)

    def row(self, plan: RoundPlan) -> npt.NDArray[np.float64]:
        """Return this site's noise of a round [d], in levels.

        Raises:
          ProtocolError: it was drawn before.
        """
        if self._guard is None:  # a test plays a killed round again to the bit
            return self._of(b"").row(plan.round)
        self._guard.enter(plan.run_id, plan.round, plan.attempt)
        return self._of(plan.run_id).row(plan.round, plan.attempt)

    def _of(self, run: bytes) -> NoiseStream:
        if self._stream is None or self._run != run:
            source = self._source.derive("noise with a memory", run.hex())
            self._stream, self._run = NoiseStream(self._shares, source), run
        return self._stream


def noise_of(spec: RunSpec, site: int, place: Path | None) -> NoiseMemory | None:
    """Return a site's noise, where the noise of a run has a memory; `place` is its folder, None to forget.

    Raises:
      StoreError: what the site keeps cannot be used.
    """
    noise = spec.mechanism.client_level
    if noise is None or noise.correlated is None:
        return None
    if not spec.has_dp_guarantee:
        return NoiseMemory.replayed(noise.correlated, seed=spec.config.seed, site=site)
    if place is None:
        return NoiseMemory.forgetful(noise.correlated)
    return NoiseMemory.at(place, noise.correlated)
