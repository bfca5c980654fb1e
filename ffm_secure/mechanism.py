"""From the `[privacy]` table to one mechanism object, its event, and the vector code its noise fits into."""

from __future__ import annotations

import hashlib

from defenses.dp import ClientMechanism, Event, NonPrivateEvent, RecordMechanism, noise_multiplier
from ffm_secure import plan
from ffm_secure.config import RunConfig
from ffm_secure.vector import VectorCode, grid_code, real_code

Mechanism = RecordMechanism | ClientMechanism | None


def build(config: RunConfig, *, size: int, nominal: int, largest_client: int) -> tuple[Mechanism, VectorCode]:
    """Calibrate the noise to the whole run and prove that its sums fit the ring.

    Guarantee: `participation_cap` rounds of the returned mechanism's event cost at most the budget; more are refused by the
    ledger. Divisors and rates come from the run file and public sizes only.
    """
    privacy, protection, federation = config.privacy, config.protection, config.federation
    if privacy.unit == "client":
        made = _client_mechanism(config, size)
        code = grid_code(
            size=size,
            clients=federation.cohort,
            value_bits=protection.value_bits,
            bound=privacy.clip_norm,
            grid_scale=made.scale,
            noise_bound=made.noise_bound,
        )
        return made, code
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
    return _record_mechanism(config, nominal), code


def _record_mechanism(config: RunConfig, nominal: int) -> RecordMechanism:
    privacy = config.privacy
    steps, rate = plan.local_steps(config, nominal), plan.sampling_rate(config, nominal)
    cap = max(1, plan.participation_cap(config))
    sigma = noise_multiplier(
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        sampling_rate=rate,
        steps=steps * cap,
        sampling="poisson" if rate < 1 else "full",
        adjacency="add_remove",
        records_per_person=privacy.records_per_person,
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


def _client_mechanism(config: RunConfig, size: int) -> ClientMechanism:
    raise NotImplementedError


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
