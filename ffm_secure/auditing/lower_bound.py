"""The lower bound on epsilon that canaries prove, round by round."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from attacks import canary
from defenses.random_source import RandomSource
from ffm_secure.auditing.budget import CANARIES
from ffm_secure.auditing.canary_rounds import (
    Stays,
    answer_canaries,
    client_canaries,
    record_canaries,
    sum_canaries,
)
from ffm_secure.config import compatibility
from ffm_secure.engines import simulation
from ffm_secure.privacy.mechanism import Mechanism, replay_events, replay_of
from ffm_secure.privacy.query_noise import ClientAnswers, RecordAnswers
from ffm_secure.quantities import small
from ffm_secure.records import (
    LeakCurve,
    RunSummary,
)

Bounds = tuple[canary.LowerBound, ...]  # of one audit, the one of least assumptions first


def mechanism_lower_bound(prepared: simulation.Prepared, *, seed: int = 1) -> canary.LowerBound | None:
    """Audit the run's own mechanism over all rounds a client may take part in, with canaries of the largest
    allowed norm.

    The canaries go through the very sampler, bound, noise and divisor that the run used; the result is a
    lower bound on epsilon, wrong with probability at most its significance, to be held against the ledger's
    upper bound.
    """
    rounds = bounds_over_rounds(prepared, seed=seed)
    if rounds:
        return strongest(rounds[max(rounds)])
    return None


def _totals(
    mechanism: Mechanism, coins: canary.Canaries, source: RandomSource, *, new_rounds: int
) -> Iterator[Tensor]:
    """Run the mechanism on canaries; yield the sum of all updates after each round.

    In a stream with a reservoir they are rows of the first stage that stay: the dearest there are.
    """
    replay = replay_of(mechanism)
    stays = None
    if replay is not None:
        stays = Stays(after=new_rounds, sampling_rate=replay.sampling_rate)
    if mechanism.record_level is not None:
        return record_canaries(mechanism.record_level, coins, source, stays)
    if mechanism.sum_level is not None:
        return sum_canaries(mechanism.sum_level, coins, source, stays)
    if isinstance(mechanism, RecordAnswers):
        return answer_canaries(mechanism, coins, source)
    if isinstance(mechanism, ClientAnswers):
        return client_canaries(mechanism.inner, coins, source)
    assert mechanism.client_level is not None
    return client_canaries(mechanism.client_level, coins, source)


def strongest(bounds: Bounds) -> canary.LowerBound:
    """Return the largest of the bounds that are valid here."""
    return max(bounds, key=lambda bound: bound.epsilon)


def bounds_over_rounds(
    prepared: simulation.Prepared, *, seed: int = 1, source: RandomSource | None = None
) -> dict[int, Bounds]:
    """Return the lower bounds that 1, 2, 4, ... rounds of one canary run prove, and all rounds; nothing
    without a mechanism.
    """
    mechanism, config = prepared.mechanism, prepared.config
    if mechanism.noise_multiplier == 0.0:
        return {}
    new_rounds = max(1, compatibility.paid_rounds(config))
    rounds = new_rounds + len(replay_events(mechanism, config))
    dimension = max(2 * CANARIES, min(prepared.trainable.size, 20_000))
    coins = canary.Canaries(
        count=CANARIES, dimension=dimension, norm=mechanism.clip_norm, seed=seed, kind="dirac"
    )
    drawn_from = source or RandomSource.system()
    totals, bounds = _totals(mechanism, coins, drawn_from, new_rounds=new_rounds), {}
    for number in range(1, rounds + 1):
        total = next(totals)
        if number == rounds or number & (number - 1) == 0:
            scores, included = coins.scores(total).double().numpy(), coins.included.numpy()
            # A record that is sampled gives scores of two variances; a client's is there in every round it is
            # counted for.
            gaussian = not mechanism.clips_records
            bounds[number] = canary.bounds(
                scores[included], scores[~included], config.privacy.delta, gaussian=gaussian
            )
    return bounds


def curve_over_rounds(bounds: Mapping[int, Bounds]) -> Iterator[LeakCurve]:
    """Show how the proven lower bound on epsilon grows over the rounds one client takes part in."""
    epsilons = tuple(strongest(one).epsilon for one in bounds.values())
    reason = "no noise hides what one round tells, so more rounds add nothing to it"
    if bounds:
        reason = ""
    here = None
    if bounds:
        here = float(max(bounds))
    x = tuple(map(float, bounds))
    yield LeakCurve(
        attack="canaries",
        axis="rounds",
        measure="epsilon, at least",
        x=x,
        y=epsilons,
        here=here,
        reason=reason,
    )


def measured_how(bounds: Bounds, summary: RunSummary) -> str:
    """Say in the five fields of every epsilon what a measured lower bound is a bound on, and what each bound
    assumes.
    """
    promise = next(statement for statement in summary.statements if statement.observer == "server")
    each = "; ".join(
        (
            f"{bound.method} {bound.epsilon:.3g}, confidence "
            f"{100 * (1 - bound.significance):.4g} %, {bound.assumes}"
        )
        for bound in bounds
    )
    return (
        f"{bounds[0].canaries} canaries in one run of the mechanism: {each}; "
        f"unit {promise.unit}, adjacency {promise.adjacency}, observer server, delta {small(promise.delta)}"
    )
