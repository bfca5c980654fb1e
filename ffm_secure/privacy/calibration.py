"""How much noise a run needs: the smallest that keeps the budget over all its rounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from defenses.dp import (
    ClientMechanism,
    Clipping,
    Event,
    RecordMechanism,
    SumMechanism,
    smallest_multiplier,
)
from defenses.dp.calibration import noise_multiplier
from ffm_secure.config import compatibility
from ffm_secure.config.groups import group_size
from ffm_secure.config.run_file import RunConfig
from ffm_secure.privacy.field import Demand, finest_levels
from ffm_secure.privacy.mechanism import (
    ClientNoise,
    Mechanism,
    NoMechanism,
    RecordNoise,
    SumNoise,
    replay_of,
)

# The ledger adds round by round on the grid it has, which may read a little higher than all rounds at once:
# without this
# headroom it could refuse the very last round of a run that was calibrated to the edge.
_HEADROOM = 1e-3
# Of a site's sum, how many bounds one coordinate may reach in a field of few bits; beyond it is cut.
_RECORDS_THAT_AGREE = 4
_REDRAWS = math.exp(-2.0)  # how often a rounding on a coarse grid is drawn again, at most


def calibrate(
    config: RunConfig,
    *,
    size: int,
    public_client_size: int,
    history: Sequence[Event] = (),
    multiplier: float = 0.0,
    turns: int = 0,
) -> Mechanism:
    """Choose the smallest noise that keeps the budget over the whole run; updates have `size` numbers.

    `multiplier` is the noise a run has begun with, and stays. A run that goes on beyond its last round gets
    new noise for what is left: `history` is what an owner has paid for in it, `turns` how often one may still
    take part.
    Guarantee: `paid_rounds` rounds of the returned mechanism's event, on top of the history, cost at most
    the budget; more are refused by the site. Divisors and rates come from the run file and public sizes only.
    Raises:
      BudgetExceeded: the history leaves nothing.
    """
    if config.privacy.unit == "none":
        return NoMechanism(reason=config.privacy.reason)
    if config.privacy.unit == "client":
        return _client_noise(config, size, history, multiplier, _cap(config, turns))
    if config.privacy.noise_shares == "sum":
        return _sum_noise(config, size, public_client_size, history, multiplier, _cap(config, turns))
    return _record_noise(config, public_client_size, history, multiplier, _cap(config, turns))


def _cap(config: RunConfig, turns: int) -> int:
    return max(1, compatibility.paid_rounds(config, turns))


def _record_noise(
    config: RunConfig, public_client_size: int, history: Sequence[Event], multiplier: float, cap: int
) -> RecordNoise:
    privacy = config.privacy
    steps = compatibility.local_steps(config, public_client_size)
    rate = compatibility.sampling_rate(config, public_client_size)
    again = compatibility.replay_rate(config, public_client_size)

    def mechanism(multiplier: float) -> RecordNoise:
        inner = RecordMechanism(
            sampling_rate=rate,
            noise_multiplier=multiplier,
            clip_norm=privacy.clip_norm,
            expected_batch_size=float(config.federation.lifecycle.batch_size),
            steps=steps,
            records_per_person=privacy.records_per_person,
            adjacency="add_remove",
            clipping=privacy.clipping,
        )
        return RecordNoise(
            inner=inner,
            unit="person" if privacy.unit == "person" else "record",
            replay=replace(inner, sampling_rate=again) if again else None,
        )

    if multiplier:
        return mechanism(multiplier)
    budget = privacy.epsilon * (1 - _HEADROOM)
    if again:
        return mechanism(_smallest(config, mechanism, budget, history, cap))
    sigma = noise_multiplier(
        epsilon=budget,
        delta=privacy.delta,
        sampling_rate=rate,
        steps=steps * cap,
        sampling="poisson" if rate < 1 else "full",
        adjacency="add_remove",
        records_per_person=privacy.records_per_person,
        history=history,
    )
    return mechanism(sigma)


def _client_noise(
    config: RunConfig, size: int, history: Sequence[Event], multiplier: float, cap: int
) -> ClientNoise:
    """Find the smallest noise on the grid that keeps the budget
    over every participation a client may have.
    """
    privacy = config.privacy

    def on_grid(multiplier: float, levels: int) -> ClientNoise:
        inner = ClientMechanism(
            noise_multiplier=multiplier,
            clip_norm=privacy.clip_norm,
            honest_survivors=compatibility.honest_survivors(config),
            participations=1,
            redraws=_REDRAWS if config.compression.field_bits else 0.0,
        )
        return ClientNoise(
            inner=inner,
            scale=levels / privacy.clip_norm,
            dimension=size,
            separation=compatibility.turns_apart(config),
        )

    def mechanism(multiplier: float) -> ClientNoise:
        levels = _levels_that_fit(config, lambda levels: on_grid(multiplier, levels).demand)
        return on_grid(multiplier, levels)

    return mechanism(multiplier or _smallest(config, mechanism, privacy.epsilon, history, cap))


def _sum_noise(
    config: RunConfig,
    size: int,
    public_client_size: int,
    history: Sequence[Event],
    multiplier: float,
    cap: int,
) -> SumNoise:
    """Find the smallest noise of the opened sum that keeps the budget over every round an owner may pay
    for.
    """
    privacy, lifecycle = config.privacy, config.federation.lifecycle
    rate = compatibility.sampling_rate(config, public_client_size)
    batch = float(lifecycle.batch_size)
    bound = lifecycle.learning_rate * privacy.clip_norm / batch
    again = compatibility.replay_rate(config, public_client_size)
    reach = largest_records(_drawn_at_once(config))
    if config.compression.field_bits:
        reach = min(reach, _RECORDS_THAT_AGREE)

    def on_grid(multiplier: float, levels: int) -> SumNoise:
        inner = SumMechanism(
            noise_multiplier=multiplier,
            bound=bound,
            scale=levels / bound,
            dimension=size,
            honest_survivors=compatibility.honest_survivors(config),
            sampling_rate=rate,
            unit="person" if privacy.unit == "person" else "record",
            records_per_person=privacy.records_per_person,
            largest=levels * reach,
        )
        return SumNoise(
            inner=inner,
            clipping=Clipping(kind=privacy.clipping, clip_norm=privacy.clip_norm),
            learning_rate=lifecycle.learning_rate,
            expected_batch_size=batch,
            replay=replace(inner, sampling_rate=again) if again else None,
        )

    def mechanism(multiplier: float) -> SumNoise:
        levels = _levels_that_fit(config, lambda levels: on_grid(multiplier, levels).demand)
        return on_grid(multiplier, levels)

    # Loss distributions, unlike Renyi moments, read a little higher when rounds are added one by one.
    budget = privacy.epsilon * (1 - _HEADROOM)
    return mechanism(multiplier or _smallest(config, mechanism, budget, history, cap))


def largest_records(batch_size: int) -> int:
    """Return how many records may push one coordinate of a site's sum all the way; beyond it is cut."""
    return math.ceil(batch_size + 8 * math.sqrt(batch_size))


def _drawn_at_once(config: RunConfig) -> int:
    """Return how many records a step of the last stage expects, those of the reservoir among them."""
    stream = config.task.stream
    earlier = (compatibility.stages(config) - 1) * stream.replay * stream.replay_rate
    return math.ceil(config.federation.lifecycle.batch_size * (1 + earlier))


def _levels(config: RunConfig) -> int:
    """Return the most integer levels that the bound on one unit is cut into."""
    return (1 << (config.protection.value_bits - 1)) - 1


def _levels_that_fit(config: RunConfig, demand_of: Callable[[int], Demand]) -> int:
    """Return the levels of a run's grid: the run file's, or the most that its field has room for."""
    if not config.compression.field_bits:
        return _levels(config)
    return finest_levels(
        demand_of,
        most=_levels(config),
        clients=group_size(config),
        field_bits=config.compression.field_bits,
    )


def _smallest(
    config: RunConfig,
    mechanism: Callable[[float], Mechanism],
    epsilon: float,
    history: Sequence[Event],
    cap: int,
) -> float:
    def replayed(noise: float) -> Event:
        replay = replay_of(mechanism(noise))
        assert replay is not None, "asked for where there is a reservoir alone"
        return replay.event("calibration")

    replays = compatibility.replay_rounds(config)
    return smallest_multiplier(
        lambda noise: mechanism(noise).event("calibration"),
        epsilon=epsilon,
        delta=config.privacy.delta,
        count=cap,
        history=history,
        beside=replayed if replays else None,
        beside_count=replays,
    )
