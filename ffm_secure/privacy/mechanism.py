"""From the `[privacy]` table to one mechanism object, its event, and the vector code its noise fits into."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from defenses.dp import Accountant, ClientMechanism, Event, NonPrivateEvent, RecordMechanism
from defenses.dp.calibration import noise_multiplier
from defenses.errors import BudgetExceeded
from defenses.random_source import RandomSource
from ffm_secure.config import compatibility
from ffm_secure.config.run_file import RunConfig
from ffm_secure.protection.codec import VectorCodec, grid_code, real_code

# The ledger adds round by round on the grid it has, which may read a little higher than all rounds at once: without this
# headroom it could refuse the very last round of a run that was calibrated to the edge.
_HEADROOM = 1e-3


def build(
    config: RunConfig,
    *,
    size: int,
    nominal: int,
    largest_client: int,
    history: Sequence[Event] = (),
    multiplier: float = 0.0,
) -> tuple[Mechanism, VectorCodec]:
    """Calibrate the noise to the whole run and prove that its sums fit the ring.

    `multiplier` is the noise a run has begun with, and stays. `history` is what the owners' ledgers already hold; the new noise is chosen for what is left.
    Guarantee: `participation_cap` rounds of the returned mechanism's event, on top of the history, cost at most the budget; more
    are refused by the ledger. Divisors and rates come from the run file and public sizes only.
    """
    privacy, protection, federation = config.privacy, config.protection, config.federation
    if privacy.unit == "client":
        return _client_mechanism(config, size, history, multiplier)
    weights = largest_client if federation.weighting == "examples" else 1
    code = real_code(
        size=size,
        clients=federation.cohort,
        value_bits=protection.value_bits,
        bound=protection.coordinate_bound,
        max_weight=max(1, weights),
        carries_loss=privacy.unit == "none",
    )
    if privacy.unit == "none":
        return None, code
    return _record_mechanism(config, nominal, history, multiplier), code


def _record_mechanism(
    config: RunConfig, nominal: int, history: Sequence[Event], multiplier: float
) -> RecordMechanism:
    privacy = config.privacy
    steps, rate = compatibility.local_steps(config, nominal), compatibility.sampling_rate(config, nominal)
    cap = max(1, compatibility.participation_cap(config))
    sigma = multiplier or noise_multiplier(
        epsilon=privacy.epsilon * (1 - _HEADROOM),
        delta=privacy.delta,
        sampling_rate=rate,
        steps=steps * cap,
        sampling="poisson" if rate < 1 else "full",
        adjacency="add_remove",
        records_per_person=privacy.records_per_person,
        history=history,
    )
    return RecordMechanism(
        sampling_rate=rate,
        noise_multiplier=sigma,
        clip_norm=privacy.clip_norm,
        expected_batch_size=float(config.federation.lifecycle.batch_size),
        steps=steps,
        records_per_person=privacy.records_per_person,
        adjacency="add_remove",
        clipping=privacy.clipping,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientNoise:
    """The client-level mechanism on this run's integer grid: one round of Skellam noise, shared by the honest survivors."""

    inner: ClientMechanism  # of one participation
    scale: float  # integer levels in 1.0
    dimension: int

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
        """Return what one client's noise on one coordinate exceeds with probability below 1e-30 (12 standard deviations)."""
        deviation = self.noise_multiplier * self.inner.integer_sensitivity(
            scale=self.scale, dimension=self.dimension
        )
        return 2 + math.ceil(12 * deviation / math.sqrt(self.inner.honest_survivors))

    def event(self, release: str) -> Event:
        """Return the event of one round."""
        return self.inner.integer_event(release, scale=self.scale, dimension=self.dimension)

    def noisy_integers(self, update: Tensor, source: RandomSource) -> npt.NDArray[np.int64]:
        """Clip, round to the grid, add this client's share of the noise."""
        return self.inner.integer_share(update, scale=self.scale, source=source)

    def digest(self) -> str:
        """Return the hash of everything that decides epsilon."""
        return hashlib.sha256(f"{self.inner.digest()}|{self.scale!r}|{self.dimension}".encode()).hexdigest()


def _client_mechanism(
    config: RunConfig, size: int, history: Sequence[Event], multiplier: float
) -> tuple[ClientNoise, VectorCodec]:
    """Find the smallest noise on the grid that keeps the budget over every participation a client may have."""
    privacy, protection = config.privacy, config.protection
    scale = ((1 << (protection.value_bits - 1)) - 1) / privacy.clip_norm
    # A curious client knows its own share of the noise, so at least one share is never counted.
    honest = compatibility.minimum_survivors(config) - max(1, protection.colluding)
    cap = max(1, compatibility.participation_cap(config))

    def made(multiplier: float) -> ClientNoise:
        inner = ClientMechanism(
            noise_multiplier=multiplier,
            clip_norm=privacy.clip_norm,
            honest_survivors=honest,
            participations=1,
        )
        return ClientNoise(inner=inner, scale=scale, dimension=size)

    def spent(multiplier: float) -> float:
        accountant = Accountant()
        for event in history:
            accountant.compose(event)
        accountant.compose(made(multiplier).event("calibration"), count=cap)
        return accountant.epsilon(privacy.delta).epsilon

    low, high = (multiplier, multiplier) if multiplier else (1e-3, 1.0)
    while not multiplier and spent(high) > privacy.epsilon:
        if high > 1e6:
            raise BudgetExceeded(
                f"what the ledger already holds leaves nothing of epsilon {privacy.epsilon:g}"
            )
        low, high = high, 2 * high
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > privacy.epsilon else (low, middle)
    noise = made(high)
    code = grid_code(
        size=size,
        clients=config.federation.cohort,
        value_bits=protection.value_bits,
        bound=privacy.clip_norm,
        grid_scale=scale,
        noise_bound=noise.noise_bound,
    )
    return noise, code


Mechanism = RecordMechanism | ClientNoise | None


def event(mechanism: Mechanism, *, reason: str) -> Event:
    """Return what one round of the mechanism is charged as."""
    if mechanism is None:
        return NonPrivateEvent(reason=reason)
    return mechanism.event(release="update of one round")


def digest(mechanism: Mechanism) -> str:
    """Return the hash of everything that decides epsilon."""
    return mechanism.digest() if mechanism is not None else hashlib.sha256(b"no mechanism").hexdigest()


def multiplier(mechanism: Mechanism) -> float:
    """Return the noise multiplier, 0 without a mechanism."""
    return mechanism.noise_multiplier if mechanism is not None else 0.0
