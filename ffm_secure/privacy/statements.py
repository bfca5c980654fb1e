"""Epsilon in words: once for every observer, with the five fields without which it means nothing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from defenses.dp import (
    Accountant,
    EpsilonBound,
    Event,
    GaussianEvent,
    NonPrivateEvent,
    SampledSkellamEvent,
)
from ffm_secure.config import compatibility
from ffm_secure.config.run_file import OBSERVERS, Privacy, RunConfig
from ffm_secure.records import Observer, PrivacyStatement

if TYPE_CHECKING:  # a verifier states epsilon without a model library
    from ffm_secure.privacy.mechanism import Mechanism

SEEDED = "NOT PRIVATE: the privacy noise of this run came from a seed, which is for tests only"
ADJACENCY: Final = {
    "record": "add or remove one record",
    "person": "add or remove one person",
    "client": "zero out one client",
    "none": "none",
}
_ACCOUNTANTS = {
    "pld": "PLD, tilted FFT, rounded up",
    "gaussian": "Gaussian, closed form",
    "rdp": "Renyi, rounded up",
    "none": "none",
}


def statements(
    config: RunConfig, mechanism: Mechanism, events: Sequence[Event] | None = None
) -> tuple[PrivacyStatement, ...]:
    """State epsilon once for every observer, with its five fields.

    `events` is what one owner has spent; without it the statement is the plan's: every round a client may
    take part in.
    """
    bound = _bound(config, mechanism, events)
    if events is None:
        bound = replace(bound, epsilon=config.privacy.epsilon)
    words = _mechanism_words(config, mechanism, events)
    return _for_everybody(config, bound, adjacency=mechanism.adjacency, mechanism=words)


def statements_of(
    config: RunConfig, events: Sequence[tuple[Event, int]], delta: float
) -> tuple[PrivacyStatement, ...]:
    """State epsilon for every observer from a run file and what one owner has paid for, each event as often
    as it says: all that somebody needs who has no model.

    Raises:
      ParameterError: the events cannot be added up, or a count is none.
    """
    bound = EpsilonBound(epsilon=math.inf, delta=delta, accountant="none", slack=0.0)
    if not any(isinstance(event, NonPrivateEvent) for event, _ in events):
        accountant = Accountant()
        for event, count in events:
            accountant.compose(event, count=count)
        bound = accountant.epsilon(delta)
    words = tuple(f"{count} x {event.to_json()}" for event, count in events)
    return _for_everybody(config, bound, adjacency=ADJACENCY[config.privacy.unit], mechanism=words)


def unit_words(privacy: Privacy) -> str:
    """Say whom an epsilon of a run protects."""
    if privacy.unit == "person":
        return f"person with up to {privacy.records_per_person} records"
    return privacy.unit


def _for_everybody(
    config: RunConfig, bound: EpsilonBound, *, adjacency: str, mechanism: tuple[str, ...]
) -> tuple[PrivacyStatement, ...]:
    privacy = config.privacy
    common = PrivacyStatement(
        observer="public",
        epsilon=bound.epsilon,
        delta=privacy.delta,
        unit=unit_words(privacy),
        adjacency=adjacency,
        mechanism=mechanism,
        slack=bound.slack,
        accountant=_ACCOUNTANTS[bound.accountant],
    )
    if privacy.unit == "none":
        common = replace(
            common, epsilon=math.inf, delta=0.0, accountant="none", note=f"no privacy unit: {privacy.reason}"
        )
    elif privacy.noise == "seeded":
        common = replace(common, epsilon=math.inf, note=SEEDED)
    return tuple(_for_observer(common, config, observer) for observer in OBSERVERS)


def _bound(config: RunConfig, mechanism: Mechanism, events: Sequence[Event] | None) -> EpsilonBound:
    accountant = Accountant()
    if mechanism.noise_multiplier and events is None:
        rounds = max(1, compatibility.paid_rounds(config))
        accountant.compose(mechanism.event("plan"), count=rounds)
    for event, count in Counter(events or ()).items():
        accountant.compose(event, count=count)
    return accountant.epsilon(config.privacy.delta or 1e-5)


def _mechanism_words(
    config: RunConfig, mechanism: Mechanism, events: Sequence[Event] | None
) -> tuple[str, ...]:
    if events is not None and len(set(events)) > 1:
        return tuple(_event_words(event, count) for event, count in Counter(events).items())
    return (mechanism.words(compatibility.paid_rounds(config)),)


def _event_words(event: Event, count: int) -> str:
    """Say one event of several in a line; one of a rare kind stands as it is charged."""
    if isinstance(event, GaussianEvent):
        sampled = _sampled(event.sampling, event.sampling_rate)
        return (
            f"{event.release}: {count} x {event.steps} {sampled} Gaussian steps, noise multiplier "
            f"{event.noise_multiplier:.4f}, clip {event.clip_norm:g}"
        )
    if isinstance(event, SampledSkellamEvent):
        sampling = "full" if event.sampling_rate == 1.0 else "poisson"
        multiplier = math.sqrt(event.variance) / event.l2_sensitivity
        return (
            f"{event.release}: {count} x {event.steps} {_sampled(sampling, event.sampling_rate)} sum of "
            f"{event.dimension:,} numbers with Skellam noise in shares, noise multiplier {multiplier:.4f}"
        )
    return f"{count} x {event.to_json()}"


def _sampled(sampling: str, rate: float) -> str:
    if sampling == "full":
        return "unsampled"
    return f"Poisson({rate:.6g}) sampled" if sampling == "poisson" else f"fixed-size({rate:.6g}) sampled"


def _for_observer(common: PrivacyStatement, config: RunConfig, observer: Observer) -> PrivacyStatement:
    common = replace(common, observer=observer)
    if not common.finite:
        return common
    if config.privacy.noise_shares == "sum":
        common = replace(common, note=_rests_on(config))
    elif config.privacy.unit != "client":
        return common
    elif config.privacy.correlation == "banded":
        common = replace(common, note=_rests_on_everybody(config))
    if observer != "colluding_server":
        return common
    if config.protection.kind == "bfv":
        return replace(
            common,
            epsilon=math.inf,
            note="a server that holds one client's key reads every upload, and one client's share of the "
            "noise protects nobody",
        )
    known = f"noise of up to {config.protection.colluding} colluding clients is not counted"
    if config.privacy.correlation == "banded":
        known = f"{common.note}; {known}"
    if config.privacy.noise_shares != "sum":
        return replace(common, note=known)
    return replace(
        common,
        note=f"{known}; with more of them epsilon is infinite, for a site's share alone protects nobody",
    )


def _rests_on_everybody(config: RunConfig) -> str:
    """Say what an epsilon of noise with a memory rests on."""
    hidden = "masks" if config.protection.kind == "secagg" else "encryption"
    honest = compatibility.honest_survivors(config)
    return (
        f"rests on the {hidden} and on the noise of {honest} honest clients in every round (no sum that "
        "lacks a client is opened); what a client adds in a round takes back a part of what it added before"
    )


def _rests_on(config: RunConfig) -> str:
    """Say what an epsilon of noise in shares rests on."""
    hidden = "masks" if config.protection.kind == "secagg" else "encryption"
    least, honest = compatibility.minimum_survivors(config), compatibility.honest_survivors(config)
    return (
        f"rests on the {hidden} and on at least {honest} honest sites in every opened sum (no sum of "
        f"fewer than {least} is "
        "opened); an upload read alone holds a share of the noise only"
    )
