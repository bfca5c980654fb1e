"""Run every attack against every observer's view of a replayed step, each beside its control."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import cast

from attacks.contract import Attack
from attacks.registry import ATTACKS
from attacks.scoring import pooled
from attacks.verdict import Judgement, Result, judge, tried
from ffm_secure.auditing import replayed as client_replay
from ffm_secure.auditing.budget import (
    CHEAP,
    CLOSED,
    DEAR,
    DRAWS,
    DRAWS_OF_ONE,
    HEAVY,
    LATE,
    SHOWN_PICTURES,
    AuditBudget,
    not_tried,
)
from ffm_secure.auditing.png import side_by_side
from ffm_secure.auditing.step import ObservationPoint, ReplayedStep
from ffm_secure.auditing.wording import Decode
from ffm_secure.config.run_file import RunConfig
from ffm_secure.records import (
    AuditFinding,
    Observer,
    Point,
    RecoveredPair,
)

Ran = dict[tuple[str, int, str], Result]  # by attack, records, and point or what crossed the wire


def finding_of(
    observer: Observer, point: Point, seen: Result, judged: Judgement, decode: Decode
) -> AuditFinding:
    """Write a judgement as a finding of the report."""
    return AuditFinding(
        observer=observer,
        attack=seen[0].attack,
        point=point,
        verdict=judged.verdict,
        measure=judged.measure,
        score=judged.score,
        low=judged.low,
        high=judged.high,
        baseline=judged.baseline,
        control=judged.control,
        seconds=seen[0].seconds,
        knowledge=seen[0].knowledge_used,
        reason=judged.reason,
        pairs=tuple(
            RecoveredPair(truth=decode(true), recovered=decode(guess)) for true, guess in judged.pairs
        ),
    )


def run_attacks(
    stages: list[ReplayedStep],
    observers: tuple[Observer, ...],
    config: RunConfig,
    purse: AuditBudget,
    decode: Decode,
    ran: Ran,
) -> Iterator[AuditFinding]:
    wanted = [name for name in ATTACKS if {"all", name} & set(config.audit.attacks)]
    for name in sorted(wanted, key=lambda name: name in LATE):
        attack = ATTACKS[name]()  # all its observers together, so that its control is run once
        stage = _stage_for(attack, stages, purse, ran)
        control = repeated(attack, stage, "raw", purse, ran)
        for observer in observers:
            point = client_replay.seen_by(observer, config, stage.points)
            proven = control is not None and control[1] is not None and control[1].proven
            # Where the control failed nothing would be proven, so the attack is not run a second time.
            seen = repeated(attack, stage, point, purse, ran, like=control) if proven else control
            if seen is None or control is None:
                yield not_tried(observer, attack, point, purse)
                continue
            judged = judge(seen, control)
            shown = (
                seen[1].pictures if seen[1] is not None and judged.verdict in ("leaked", "not leaked") else ()
            )
            pictures = side_by_side(shown[:SHOWN_PICTURES], stage.prior.image_mean, stage.prior.image_std)
            found = finding_of(observer, point, seen, judged, decode)
            found = replace(found, granted=_granted_words(stage), pictures=pictures)
            yield _beside_the_wire(found, attack, stage, purse, ran)


def _stage_for(attack: Attack, stages: Sequence[ReplayedStep], purse: AuditBudget, ran: Ran) -> ReplayedStep:
    """Return the first stage on which the control passes; a step on one record is the second chance of a cheap attack."""
    several = stages[1:] if attack.family in HEAVY else stages if attack.family in CLOSED else stages[:1]
    for stage in several:
        control = run_once(attack, stage, stage.control, purse, ran)
        if control is None or control[0].seconds > DEAR or (control[1] is not None and control[1].succeeded):
            return stage if control is not None and control[1] is not None else several[0]
    return several[0]


def run_once(
    attack: Attack, stage: ReplayedStep, scene: ObservationPoint, purse: AuditBudget, ran: Ran, key: str = ""
) -> Result | None:
    """Run an attack on a scene, if that has not been done and the purse allows it."""
    place, budget = (attack.name, stage.records, key or scene.point), purse.budget(attack)
    if place not in ran and budget is not None:
        ran[place] = tried(attack, scene.observation, stage.model, stage.prior, budget, scene.truth)
    return ran.get(place)


def repeated(
    attack: Attack,
    stage: ReplayedStep,
    point: Point,
    purse: AuditBudget,
    ran: Ran,
    *,
    like: Result | None = None,
) -> Result | None:
    """Run an attack on every draw of a stage where that is cheap; its score is then their mean.

    A draw on which nothing is found counts as guessing, as far as the score `like` this one says what that is.
    """
    first = run_once(attack, stage, stage.at(point), purse, ran)
    known = first[1] if first is not None and first[1] is not None else None if like is None else like[1]
    if first is None or known is None or first[0].seconds > CHEAP:
        return first
    guess = replace(known, value=known.baseline, succeeded=False, pairs=(), pictures=())
    scores = [first[1] or guess]
    for number in range(1, DRAWS_OF_ONE if stage.records == 1 else DRAWS):
        other = purse.draw(stage, number, point)
        place = f"{point}, draw {number}"
        done = None if other is None else run_once(attack, other, other.at(point), purse, ran, key=place)
        if done is None:
            break
        scores.append(done[1] or guess)
    found = any(one is not guess for one in scores)
    return (first[0], pooled(scores)) if found else first


def _granted_words(stage: ReplayedStep) -> tuple[str, ...]:
    """Name everything an attacker of this stage may know beyond the wire."""
    priors = (
        f"prior.{name}" for name in ("candidates", "image_mean") if getattr(stage.prior, name) is not None
    )
    return (*stage.control.observation.knowledge.granted(), "one step", *priors)


def _beside_the_wire(
    found: AuditFinding, attack: Attack, stage: ReplayedStep, purse: AuditBudget, ran: Ran
) -> AuditFinding:
    """Put beside a leak how the attack fares on what the protocol really sends; where nothing leaked at worst, that is less."""
    if found.verdict != "leaked":
        return found
    clients = stage.at(found.point).observation.contributors
    if purse.budget(attack) is None:
        return replace(found, observed_reason=purse.refusal(attack))
    try:
        done = run_once(attack, stage, stage.wire(clients), purse, ran, key=f"wire of {clients}")
    except ValueError as error:
        return replace(found, observed_reason=str(error))
    result, scored = cast(Result, done)
    told = f"{clients} client{'s' if clients > 1 else ''} in one whole round, nothing granted"
    value = None if scored is None else scored.value
    return replace(
        found, observed=value, observed_reason=told if value is not None else f"{told}: {result.reason}"
    )
