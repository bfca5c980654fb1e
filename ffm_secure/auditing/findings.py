"""Run every attack against every observer's view of a replayed step, each beside its control."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from attacks import nulls
from attacks.contract import Attack, not_applicable
from attacks.judge import (
    FILTERS,
    LEVEL,
    UNCRAFTED,
    Judgement,
    Question,
    Result,
    against_noise,
    decide,
    dominated,
    filtered,
    noise_values,
    null_runs,
    tried,
)
from attacks.luck import FEW_DRAWS
from attacks.registry import ATTACKS
from attacks.scoring import Score, hopeless, pooled, regrouped
from attacks.truth import Truth
from ffm_secure.auditing import replayed as client_replay
from ffm_secure.auditing.budget import (
    CHEAP,
    CLOSED,
    DEAR,
    DRAWS,
    DRAWS_OF_ONE,
    HEAVY,
    LATE,
    NULL_STEPS,
    REGROUPING_STEPS,
    SHOWN_PICTURES,
    AuditBudget,
    not_run,
)
from ffm_secure.auditing.crafted import CRAFTERS, MaliciousServer, Played, honest, play
from ffm_secure.auditing.png import side_by_side
from ffm_secure.auditing.step import REGROUPED, ObservationPoint, ReplayedStep
from ffm_secure.auditing.wording import Decode
from ffm_secure.config.run_file import RunConfig
from ffm_secure.records import (
    AuditFinding,
    Observer,
    Point,
    RecoveredPair,
)

SEARCHED = ("token F1", "PSNR dB")  # what searches look for

Ran = dict[tuple[str, int, str], Result]  # by attack, records, and point or what crossed the wire


def finding_of(
    observer: Observer, point: Point, result: Result, judged: Judgement, decode: Decode
) -> AuditFinding:
    """Write a judgement as a finding of the report."""
    return AuditFinding(
        observer=observer,
        attack=result[0].attack,
        point=point,
        verdict=judged.verdict,
        measure=judged.measure,
        score=judged.score,
        low=judged.low,
        high=judged.high,
        baseline=judged.baseline,
        control=judged.control,
        luck=judged.luck,
        seconds=result[0].seconds,
        knowledge=result[0].knowledge_used,
        reason=judged.reason,
        pairs=tuple(
            RecoveredPair(truth=decode(true), recovered=decode(guess)) for true, guess in judged.pairs
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One question of an audit: an attack at one point of a step's way,
    for the observers who see that point.
    """

    attack: Attack
    point: Point
    observers: tuple[Observer, ...]
    stage: ReplayedStep
    question: Question | None
    refused: str = ""  # why the attack was not run
    judged: Judgement | None = None  # where there is nothing to ask


def run_attacks(
    stages: list[ReplayedStep],
    observers: tuple[Observer, ...],
    config: RunConfig,
    purse: AuditBudget,
    decode: Decode,
    ran: Ran,
    whose: Mapping[Observer, Question],
    server: MaliciousServer | None = None,
) -> tuple[tuple[AuditFinding, ...], int]:
    """Return the findings of all attacks, judged together, and the number of questions luck was corrected
    for.

    `whose` asks, for each observer of sums, whether what they hold can be given to its client. Attacks on
    crafted broadcasts are played by `server`.
    """
    names = []
    for name in ATTACKS:
        if {"all", name} & set(config.audit.attacks):
            names.append(name)
    attacks = []
    for name in names:
        attacks.append(ATTACKS[name]())
    asked: list[Asked] = []
    # Closed forms come first, so that a search for what they have read exactly is skipped.
    ordered = sorted(attacks, key=lambda one: (one.family in HEAVY, one.name in LATE))
    crafted = []
    for attack in ordered:
        if attack.family == "active" and server is not None:
            crafted.append(attack)
    for place, attack in enumerate(ordered):
        purse.watch(attack.name, place, len(ordered))
        if attack in crafted:
            continue
        asked += _ask(attack, stages, observers, config, purse, ran, asked)
    if server is not None and set(observers) & set(CRAFTERS):
        for played in play(server, crafted, stages, purse):
            asked.append(_from_a_malicious(played, observers, config))
    for attack in crafted:
        asked += _uncrafted(attack, stages[0], observers, config)
    put = [one for one in asked if one.question is not None]
    judgements = decide([*(one.question for one in put if one.question is not None), *whose.values()])
    verdicts = dict(zip(map(id, put), judgements[: len(put)], strict=True))
    findings = [
        finding for one in asked for finding in _findings_of(one, verdicts.get(id(one)), purse, decode, ran)
    ]
    for (observer, question), judged in zip(whose.items(), judgements[len(put) :], strict=True):
        findings.append(finding_of(observer, "aggregated", question.seen, judged, decode))
    return tuple(findings), max((one.questions for one in judgements), default=0)


def _ask(
    attack: Attack,
    stages: list[ReplayedStep],
    observers: tuple[Observer, ...],
    config: RunConfig,
    purse: AuditBudget,
    ran: Ran,
    before: Sequence[Asked],
) -> Iterator[Asked]:
    """Run an attack at every point an observer sees, all of them together,
    so that its control is run once.
    """
    if attack.family in HEAVY:
        several = stages[1:]
    else:
        several = stages[:1]
    places: dict[Point, list[Observer]] = {}
    for observer in observers:
        places.setdefault(client_replay.seen_by(observer, config, several[0].points), []).append(observer)
    needless = {}
    for point in places:
        needless[point] = _needless(attack, point, before)
    if all(needless.values()):
        for point, who in places.items():
            if purse.budget(attack) is None:
                reason = purse.refusal(attack)
            else:
                reason = needless[point]
            yield Asked(
                attack=attack,
                point=point,
                observers=tuple(who),
                stage=several[0],
                question=None,
                refused=reason,
            )
        return
    stage = _stage_for(attack, stages, purse, ran)
    control = repeated(attack, stage, "raw", purse, ran)
    for point, who in places.items():
        proven = control is not None and control[1] is not None and control[1].proven
        # Where the control failed nothing would be proven, so the attack is not run a second time.
        if proven:
            observed = repeated(attack, stage, point, purse, ran, like=control, noise=True)
        else:
            observed = control
        question = None
        if observed is not None and control is not None:
            never = ""
            if attack.family == "active":
                never = UNCRAFTED
            question = Question(seen=observed, control=control, never=never)
        yield Asked(
            attack=attack,
            point=point,
            observers=tuple(who),
            stage=stage,
            question=question,
            refused="" if question is not None else purse.refusal(attack),
        )


def _needless(attack: Attack, point: Point, before: Sequence[Asked]) -> str:
    """Say why an attack need not be run beside those before it, nothing where it has to be."""
    for one in before:
        if one.attack.name == FILTERS.get(attack.name) and one.question is not None:
            control = one.question.control
            if control is None or control[1] is None or not control[1].proven:
                return filtered(one.attack.name)
    better = _dominator(attack, point, before)
    if better:
        return dominated(better)
    return ""


def _dominator(attack: Attack, point: Point, before: Sequence[Asked]) -> str:
    """Return an attack that has read exactly, at the same point, all that a search would look for."""
    if attack.family not in HEAVY:
        return ""
    for one in before:
        scored = None
        if one.question is not None:
            scored = one.question.seen[1]
        if one.point == point and scored is not None and scored.exact and scored.measure in SEARCHED:
            return one.attack.name
    return ""


def _findings_of(
    asked: Asked, judged: Judgement | None, purse: AuditBudget, decode: Decode, ran: Ran
) -> Iterator[AuditFinding]:
    for observer in asked.observers:
        if asked.judged is not None:
            silent = not_applicable(asked.judged.reason, attack=asked.attack.name), None
            yield finding_of(observer, asked.point, silent, asked.judged, decode)
            continue
        if asked.question is None or judged is None:
            yield not_run(observer, asked.attack.name, asked.point, asked.refused)
            continue
        scored = asked.question.seen[1]
        if scored is not None and judged.verdict in ("leaked", "not leaked"):
            shown = scored.pictures
        else:
            shown = ()
        prior = asked.stage.prior
        pictures = side_by_side(shown[:SHOWN_PICTURES], prior.image_mean, prior.image_std)
        finding = finding_of(observer, asked.point, asked.question.seen, judged, decode)
        finding = replace(finding, granted=_granted_words(asked.stage), pictures=pictures)
        yield (
            finding
            if asked.attack.family == "active"
            else _beside_the_wire(finding, asked.attack, asked.stage, purse, ran)
        )


def _from_a_malicious(played: Played, observers: Sequence[Observer], config: RunConfig) -> Asked:
    """Put what a malicious server learned beside the other questions."""
    who = tuple(observer for observer in observers if observer in CRAFTERS)
    refused = ""
    if played.question is None:
        refused = "not tried: the steps of this audit were used up"
    return Asked(
        attack=played.attack,
        point=client_replay.seen_by("server", config, played.stage.points),
        observers=who,
        stage=played.stage,
        question=played.question,
        refused=refused,
        judged=played.judgement,
    )


def _uncrafted(
    attack: Attack, stage: ReplayedStep, observers: Sequence[Observer], config: RunConfig
) -> Iterator[Asked]:
    """Say for those who craft no broadcast that nothing of the kind can be theirs."""
    for observer in observers:
        if observer not in CRAFTERS:
            point = client_replay.seen_by(observer, config, stage.points)
            yield Asked(
                attack=attack,
                point=point,
                observers=(observer,),
                stage=stage,
                question=None,
                judged=honest(attack),
            )


def _stage_for(attack: Attack, stages: Sequence[ReplayedStep], purse: AuditBudget, ran: Ran) -> ReplayedStep:
    """Return the first stage on which the control passes; a step on one record is the second chance of a
    cheap attack.
    """
    if attack.family in HEAVY:
        several = stages[1:]
    else:
        if attack.family in CLOSED:
            several = stages
        else:
            several = stages[:1]
    for stage in several:
        control = run_once(attack, stage, stage.control, purse, ran)
        if control is None or control[0].steps > DEAR or (control[1] is not None and control[1].succeeded):
            if control is not None and control[1] is not None:
                return stage
            return several[0]
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
    noise: bool = False,
) -> Result | None:
    """Run an attack on every draw of a stage where that is cheap; its score is then their mean.

    A draw on which nothing is found counts as guessing, as far as the score `like` this one says what that
    is. With `noise` a score better than guessing also has to beat the same attack on noise in the shape of
    the update.
    """
    if attack.family == "membership":
        several = _memberships(attack, stage, point, purse, ran)
        if several is not None:
            return several
    first = run_once(attack, stage, stage.at(point), purse, ran)
    if first is not None and first[1] is not None:
        known = first[1]
    else:
        known = None
        if like is not None:
            known = like[1]
    if first is None or known is None or not first[0].applicable:  # what does not fit, fits no draw
        return first
    guess = replace(
        known, value=known.baseline, succeeded=False, luck=1.0, exact=False, pairs=(), pictures=()
    )
    draws = [(first[1] or guess, stage.at(point).truth)]
    if first[0].steps > CHEAP:
        most = 1
    else:
        most = DRAWS_OF_ONE if stage.records == 1 else DRAWS
    for number in range(1, most):
        if like is None and hopeless([scored for scored, _ in draws], most):
            break  # a control that failed says nothing further, whatever the next draws do
        other = purse.draw(stage, number, point)
        place = f"{point}, draw {number}"
        attempt = None
        if other is not None:
            attempt = run_once(attack, other, other.at(point), purse, ran, key=place)
        if other is None or attempt is None:
            break
        draws.append((attempt[1] or guess, other.at(point).truth))
    scores = []
    for scored, _ in draws:
        scores.append(scored)
    if all(one is guess for one in scores):
        return first
    if noise and pooled(scores).luck <= LEVEL:
        scores = _against_noise(attack, stage, point, purse, draws, first[0].steps)
    return first[0], pooled(scores)


def _memberships(
    attack: Attack, stage: ReplayedStep, point: Point, purse: AuditBudget, ran: Ran
) -> Result | None:
    """Ask who was in the step, many times over the same candidates; None where it can be asked only once.

    What one membership of 32 candidates says varies so much that its verdict would be a coin flip; the passes
    of the model, which are what it costs, serve for all of them.
    """
    first: Result | None = None
    scores: list[Score] = []
    spent = 0.0
    for number in range(REGROUPED):
        scene = stage.regroup(point, number)
        if scene is None or spent > REGROUPING_STEPS[purse.name]:
            break
        attempt = run_once(attack, stage, scene, purse, ran, key=f"{point}, members {number}")
        if attempt is None:
            break
        if first is not None:
            spent += attempt[0].steps  # the passes of the model were made for the first one
        elif attempt[1] is None:  # nothing to score, and it would be so again
            return attempt
        first = first or attempt
        scores.append(attempt[1] or replace(scores[0], value=0.5, succeeded=False, luck=1.0))
    if first is None or len(scores) < FEW_DRAWS:
        return None
    # Luck needs no runs on noise: who was a member was drawn anew for every score, so of noise it is exact.
    return first[0], regrouped(scores, stage.records, stage.records)


def _against_noise(
    attack: Attack,
    stage: ReplayedStep,
    point: Point,
    purse: AuditBudget,
    draws: Sequence[tuple[Score, Truth]],
    cost: float,
) -> list[Score]:
    """Hold each draw's score against what the same attack makes of noise, whose readings all draws share."""
    shape = nulls.study(stage.at(point).observation)
    readings = []
    for number in range(null_runs(cost, NULL_STEPS[purse.name])):
        budget = purse.budget(attack)
        if budget is None:
            break
        silent = shape.draw(number, "moved")
        readings.append(tried(attack, silent, stage.model, stage.prior, budget, None)[0])
    return [against_noise(scored, noise_values(readings, scored, truth)) for scored, truth in draws]


def _granted_words(stage: ReplayedStep) -> tuple[str, ...]:
    """Name everything an attacker of this stage may know beyond the wire."""
    priors = (
        f"prior.{name}" for name in ("candidates", "image_mean") if getattr(stage.prior, name) is not None
    )
    return (*stage.control.observation.knowledge.granted(), "one step", *priors)


def _beside_the_wire(
    finding: AuditFinding, attack: Attack, stage: ReplayedStep, purse: AuditBudget, ran: Ran
) -> AuditFinding:
    """Put beside a leak how the attack fares on what the protocol really sends; where nothing leaked at
    worst, that is less.
    """
    if finding.verdict != "leaked":
        return finding
    clients = stage.at(finding.point).observation.contributors
    if purse.budget(attack) is None:
        return replace(finding, observed_reason=purse.refusal(attack))
    try:
        attempt = run_once(attack, stage, stage.wire(clients), purse, ran, key=f"wire of {clients}")
    except ValueError as error:
        return replace(finding, observed_reason=str(error))
    result, scored = cast(Result, attempt)
    note = f"{clients} client{'s' if clients > 1 else ''} in one whole round, nothing granted"
    value = None
    if scored is not None:
        value = scored.value
    return replace(
        finding, observed=value, observed_reason=note if value is not None else f"{note}: {result.reason}"
    )
