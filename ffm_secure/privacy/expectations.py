"""What noise alone does to an update, from public numbers: whether anything can be learned is said before a
run.
"""

from __future__ import annotations

import math

import numpy as np

from defenses.dp import RecordMechanism
from ffm_secure.config.compressed import value_bits
from ffm_secure.config.run_file import Lifecycle, RunConfig
from ffm_secure.privacy.mechanism import ClientNoise, Mechanism, SumNoise

ROOM = 4.0  # standard deviations of noise that a bound should leave room for


def site_noise_variance(mechanism: Mechanism, lifecycle: Lifecycle) -> float:
    """Return the variance of the noise in one coordinate of a site's update, from public numbers.

    Exact for noise in shares and for plain steps; 0 where an optimizer at the sites mixes the noise with
    gradients.
    """
    if mechanism.sum_level is not None:
        return mechanism.sum_level.share_deviation**2
    if mechanism.client_level is not None:
        return mechanism.client_level.share_deviation**2
    if mechanism.record_level is None or lifecycle.optimizer != "sgd":
        return 0.0
    return update_noise(mechanism.record_level, lifecycle) ** 2


def update_noise(mechanism: RecordMechanism, lifecycle: Lifecycle) -> float:
    """Return about how large noise alone makes one coordinate of a site's update: a standard deviation.

    Exact for plain steps and momentum without weight decay; for Adam, whose steps have the size of the
    learning rate whatever the gradient, a random walk of such steps.
    """
    if lifecycle.optimizer != "sgd":
        return lifecycle.learning_rate * math.sqrt(mechanism.steps)
    step = mechanism.gradient_noise_multiplier() * mechanism.clip_norm / mechanism.expected_batch_size
    momentum = lifecycle.momentum
    left = np.arange(1, mechanism.steps + 1)  # steps a step's noise goes on acting in
    reach = (1.0 - momentum**left) / (1.0 - momentum)
    return lifecycle.learning_rate * step * float(np.sqrt(np.sum(reach**2)))


def share_cut(noise: float, bound: float) -> float:
    """Return the share of coordinates of pure noise that lie beyond a bound."""
    if noise > 0:
        return math.erfc(bound / (noise * math.sqrt(2)))
    return 0.0


def bound_warnings(config: RunConfig, mechanism: RecordMechanism | None) -> list[str]:
    """Warn of a coordinate bound that noise alone fills,
    and of one so wide that rounding drowns the update.
    """
    if config.privacy.unit == "none":
        return _step_warnings(config)
    if mechanism is None or mechanism.noise_multiplier == 0:
        return []
    protection = config.protection
    noise = update_noise(mechanism, config.federation.lifecycle)
    cut = share_cut(noise, protection.coordinate_bound)
    if cut > 0.05:
        return [
            (
                f"protection.coordinate_bound = {protection.coordinate_bound:g}: noise alone makes a "
                f"coordinate of an update about {noise:.2g} ({noise / protection.coordinate_bound:.2g} x "
                f"the bound), so {_share(cut)} of the coordinates are cut at the bound and little or "
                f"nothing can be learned; raise it to {ROOM * noise:.2g} or more"
            )
        ]
    bits = value_bits(config)
    level = 2.0 * protection.coordinate_bound / 2**bits
    if level > noise:
        return [
            (
                f"protection.coordinate_bound = {protection.coordinate_bound:g} with value_bits = "
                f"{bits}: one level is {level:.2g}, more than the noise of {noise:.2g}, "
                "so updates are lost in rounding; lower the bound to "
                f"{max(ROOM * noise, 1e-9):.2g}, or raise value_bits"
            )
        ]
    return []


def _step_warnings(config: RunConfig) -> list[str]:
    """Warn of a coordinate bound below one step of an optimizer whose steps have the size of its rate."""
    lifecycle, bound = config.federation.lifecycle, config.protection.coordinate_bound
    if lifecycle.optimizer == "sgd" or lifecycle.learning_rate <= bound:
        return []
    return [
        f"protection.coordinate_bound = {bound:g}: one step of {lifecycle.optimizer} moves a coordinate by "
        f"about its learning rate of {lifecycle.learning_rate:g}, so updates are cut at the bound and little "
        f"or nothing can be learned; raise it to {ROOM * lifecycle.learning_rate:.2g} or more"
    ]


def sum_warnings(config: RunConfig, noise: SumNoise | None) -> list[str]:
    """Warn where rounding is a large part of the bound on one record, and where noise in shares drowns
    the records.
    """
    if noise is None:
        return []
    inner, warnings = noise.inner, []
    rounding = inner.l2_sensitivity / (inner.bound * inner.scale)
    if rounding > 1.05:
        warnings.append(
            f"a grid of {noise.levels:.0f} levels: rounding {inner.dimension:,} numbers makes the bound on "
            f"one record {rounding:.2f} x as large, and the noise with it; raise protection.value_bits or "
            "compression.field_bits, or send fewer numbers"
        )
    steps = config.federation.rounds
    signal = inner.bound * config.federation.lifecycle.batch_size * config.federation.cohort * steps
    walk = noise.share_deviation * math.sqrt(inner.dimension * steps * config.federation.cohort)
    if walk > signal:
        warnings.append(
            f"noise of {noise.noise_multiplier:.3g} x clip in the opened sum carries the "
            f"{inner.dimension:,} trained numbers "
            f"{walk / signal:.2g} x as far as all records could if every one agreed: expect to learn "
            "nothing; train fewer "
            "numbers, in larger batches or cohorts, or give privacy.epsilon more"
        )
    return warnings


def walk_ratio(mechanism: RecordMechanism, *, rounds: int, cohort: int, size: int) -> float:
    """Return how far the noise of a whole run carries a model [size], over the furthest its records could.

    The records move it furthest when every clipped gradient of every step points the same way: steps x clip.
    The noise of as many steps, averaged over the cohort, adds up to a random walk.
    """
    steps = mechanism.steps * rounds
    noise = mechanism.gradient_noise_multiplier() * math.sqrt(size * steps / cohort)
    return noise / (mechanism.expected_batch_size * steps)


def noise_warnings(config: RunConfig, mechanism: RecordMechanism | None, *, size: int) -> list[str]:
    """Warn where noise carries the model further than the records ever could."""
    if mechanism is None or mechanism.noise_multiplier == 0:
        return []
    federation = config.federation
    ratio = walk_ratio(mechanism, rounds=federation.rounds, cohort=federation.cohort, size=size)
    if ratio <= 1.0:
        return []
    return [
        (
            f"noise of {mechanism.noise_multiplier:.3g} x clip carries the {size:,} trained numbers "
            f"{ratio:.2g} x as far as all records could if every one agreed: expect to learn nothing; "
            "train fewer numbers, in larger batches or cohorts, or give privacy.epsilon more"
        )
    ]


def client_warnings(config: RunConfig, noise: ClientNoise | None) -> list[str]:
    """Warn where the noise of whole clients carries the model further than the clients ever could."""
    if noise is None or noise.noise_multiplier == 0:
        return []
    rounds, cohort = config.federation.rounds, config.federation.cohort
    walk = noise.share_deviation * math.sqrt(noise.dimension * rounds * cohort)
    ratio = walk / (noise.clip_norm * cohort * rounds)
    warnings = []
    rounding = noise.inner.integer_sensitivity(scale=noise.scale, dimension=noise.dimension) / noise.levels
    if rounding > 1.05:
        warnings.append(
            f"a grid of {noise.levels:.0f} levels: rounding {noise.dimension:,} numbers makes the bound on "
            f"one client {rounding:.2f} x as large, and the noise with it; raise protection.value_bits or "
            "compression.field_bits, or send fewer numbers"
        )
    if ratio <= 1.0:
        return warnings
    return [
        *warnings,
        f"noise of {noise.noise_multiplier:.3g} x clip carries the {noise.dimension:,} trained numbers "
        f"{ratio:.2g} x as far as all clients could if every one agreed: expect to learn nothing; train "
        "fewer numbers, with larger cohorts, or give privacy.epsilon more",
    ]


def _share(cut: float) -> str:
    if cut > 0.995:
        return "all"
    return f"{cut:.0%}"
