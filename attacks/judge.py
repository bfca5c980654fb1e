"""The one place that judges: what an audit may say of every attack it ran, all its questions taken together.

A verdict rests on three comparisons. Luck: the attack against itself on noise in the shape of the update,
and against guessing. Number: an audit asks many questions, so luck is corrected for all of them. Control: the
same attack on an undefended rehearsal of the same setting. *Leaked* is clearly above luck after the
correction; *not leaked* is near luck and clearly below a control that passed; everything between proves
nothing and is *inconclusive*.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from attacks import luck
from attacks.contract import Attack, Budget, Prior, Reconstruction
from attacks.observation import Observation
from attacks.scoring import LUCK, Score, score
from attacks.truth import Truth

Verdict = Literal["leaked", "not leaked", "inconclusive", "not applicable"]
Result = tuple[Reconstruction, Score | None]

LEVEL = (
    0.01  # how often an audit of nothing but noise and guesses may hold a leak, all its questions together
)
NEAR = 0.3  # of the way from luck to the control: up to here an attack is near luck
CLEAR_AUC = 0.6  # of membership: below it next to nobody is told apart, however surely
EFFECT = 0.1  # of the way from guessing to perfect: below it nobody learned anything, however surely
TELLING = (
    0.1  # how much surer an attack must be on a rehearsal than on noise for its confidence to tell them apart
)
CONFIDENCE = "own confidence"
NULL_RUNS = (99, 19, 4)  # of an attack on noise, the most its cost allows
_STEP = {"PSNR dB": 0.5, CONFIDENCE: 0.05}  # the least deviation that scores on noise are credited with
_SMALLEST_STEP = 0.02
_GATE = 4  # from as many runs on noise their spread is known
UNCRAFTED = "reads a broadcast that a malicious server crafted; this one was not"
_FAILED = "failed"  # in the details of an attack that ended in an error


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """A verdict with the numbers it rests on; `score` is None where nothing could be scored.

    `luck` is corrected for the `questions` of the audit, None where nothing was asked.
    """

    verdict: Verdict
    measure: str = ""
    score: float | None = None
    low: float | None = None
    high: float | None = None
    baseline: float | None = None
    control: float | None = None
    reason: str = ""
    luck: float | None = None
    questions: int = 0
    pairs: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Hold all that the verdict on one attack at one place rests on.

    `doubt` says why silence would prove nothing although the control passed, `missing` why there is no
    control, `never` why an attack whose control fails does not fit what was observed at all.
    """

    seen: Result
    control: Result | None = None
    doubt: str = ""
    missing: str = "no control: no undefended step of this model could be rehearsed"
    never: str = ""
    notes: tuple[str, ...] = ()

    @property
    def luck(self) -> float | None:
        """Return how likely chance does as well, None where nothing was claimed that chance could do."""
        scored = self.seen[1]
        if scored is None:
            return None
        if scored.value > scored.baseline:
            return scored.luck
        return 1.0


def tried(
    attack: Attack,
    observation: Observation,
    model: nn.Module | None,
    prior: Prior,
    budget: Budget,
    truth: Truth | None,
) -> Result:
    """Run an attack and score it; an error ends the attack, not the audit, and proves nothing."""
    try:
        reading = attack.run(observation, model, prior, budget, 0)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        first = "no message"
        if str(error):
            first = str(error).splitlines()[0]
        return Reconstruction(
            attack=attack.name, items=(), confidence=0.0, seconds=0.0, knowledge_used=(), applicable=True,
            reason=f"failed with {type(error).__name__}: {first}", details={_FAILED: 1},
        ), None  # fmt: skip
    return reading, score(reading, truth) if reading.applicable and truth is not None else None


FILTERS = {
    "span_exact": "span"
}  # attacks that accept nothing which another one does not accept by the same rule


def filtered(wider: str) -> str:
    """Say why an attack is not run that accepts less than one which read nothing undefended."""
    return f"not run: it accepts less than {wider}, which read nothing on the undefended update"


def dominated(better: str) -> str:
    """Say why a search is not run."""
    return f"not run: {better} has read everything exactly at this point"


def failed(reading: Reconstruction) -> bool:
    """Say whether an attack ended in an error."""
    return _FAILED in reading.details


# ------------------------------------------------------------------------------------------------------- luck


def against_noise(scored: Score, noise: Sequence[float]) -> Score:
    """Return a score that also has to beat the same attack on noise: its luck is the worse of guessing's and
    noise's.
    """
    if not noise:
        return scored
    mean = sum(noise) / len(noise)
    if len(noise) < _GATE:  # too few for a spread: all of them have to lie in the lower half
        clear = max(noise) < scored.baseline + 0.5 * (scored.value - scored.baseline)
        return replace(scored, noise=mean, luck=scored.luck if clear else 1.0)
    step = _STEP.get(scored.measure, _SMALLEST_STEP)
    return replace(scored, noise=mean, luck=max(scored.luck, luck.beyond(scored.value, noise, step=step)))


def noise_scores(
    run: Callable[[int], Result], count: int, scored: Score, truth: Truth | None, *, enough: int = 3
) -> tuple[float, ...]:
    """Return what an attack scores on noise, `count` times or until `enough` runs have done as well as on the
    update.

    `run` takes the number of a noise. Without a truth the score is the attack's confidence.
    """
    scores: list[float] = []
    for number in range(count):
        reading, result = run(number)
        floor = 0.0
        if truth is not None:
            floor = min(scored.baseline, scored.value)
        if truth is None:
            scores.append(reading.confidence if reading.items else floor)
        else:
            scores.append(result.value if result is not None and result.measure == scored.measure else floor)
        if sum(one >= scored.value for one in scores) >= enough:
            break
    return tuple(scores)


def null_runs(cost: float, allowed: float) -> int:
    """Return how often an attack that takes `cost` steps is run on noise, where all may take `allowed`."""
    return next((count for count in NULL_RUNS if count * max(cost, 0.1) <= allowed), 0)


def noise_values(readings: Sequence[Reconstruction], scored: Score, truth: Truth) -> tuple[float, ...]:
    """Return what readings of noise score against a truth, by the measure of a score; one that finds nothing
    scores guessing.
    """
    others = []
    for reading in readings:
        others.append(score(reading, truth, with_luck=False))
    floor = min(scored.baseline, scored.value)
    return tuple(
        other.value if other is not None and other.measure == scored.measure else floor for other in others
    )


def confidences(
    reconstruction: Reconstruction, rehearsals: Sequence[Result], noise: Sequence[float]
) -> tuple[Score, Score | None]:
    """Return the confidence of an attack as a score, and that of its control: what there is to judge without
    a truth.

    The control passes where rehearsals prove the attack right and their confidence lies clearly above that on
    noise.
    What is reported is calibrated: how right the attack was when it was as sure on rehearsals and on noise.
    """
    confidence = 0.0
    if reconstruction.items:
        confidence = reconstruction.confidence
    ceiling, mean = max(noise, default=0.0), sum(noise) / max(1, len(noise))
    right = []
    for reading, result in rehearsals:
        if result is not None and result.proven:
            right.append(reading.confidence)
    usual = 0.0
    if right:
        usual = sorted(right)[len(right) // 2]
    pairs = []
    for reading, result in rehearsals:
        pairs.append((reading.confidence, _rightness(result)))
    for one in noise:
        pairs.append((one, 0.0))
    telling = bool(right) and usual - ceiling >= TELLING
    own = Score(
        measure=CONFIDENCE,
        value=confidence,
        baseline=mean,
        succeeded=telling and confidence > 0.5 * (ceiling + usual),
        luck=0.0 if telling and confidence > 0.5 * (ceiling + usual) else 1.0,
        calibrated=calibrated(confidence, pairs),
    )
    if noise:
        own = against_noise(own, noise)
    if not rehearsals:
        return own, None
    control = Score(
        measure=CONFIDENCE, value=usual, baseline=mean, succeeded=telling, luck=0.0 if telling else 1.0
    )
    return own, control


def _rightness(result: Score | None) -> float:
    """Return how right a rehearsed attack was, from 0 for guessing to 1."""
    if result is None or not result.succeeded:
        return 0.0
    if result.measure == "PSNR dB":
        return 1.0
    return max(0.0, min(1.0, result.value))


def calibrated(confidence: float, pairs: Sequence[tuple[float, float]]) -> float:
    """Return how right an attack was, on average, when it was as sure: the best non-decreasing fit to
    (confidence, rightness).

    Source: Ayer et al., 1955, pooled adjacent violators.
    """
    blocks: list[list[float]] = []  # sum of rightness, number, highest confidence
    for sure, right in sorted(pairs):
        blocks.append([right, 1.0, sure])
        while len(blocks) > 1 and blocks[-2][0] * blocks[-1][1] >= blocks[-1][0] * blocks[-2][1]:
            total, number, highest = blocks.pop()
            blocks[-1] = [blocks[-1][0] + total, blocks[-1][1] + number, highest]
    level = 0.0
    for total, number, highest in blocks:
        level = total / number
        if confidence <= highest:
            return level
    return level


# --------------------------------------------------------------------------------------------------- verdicts


def decide(questions: Sequence[Question]) -> tuple[Judgement, ...]:
    """Judge all questions of an audit together.

    Guarantee: of an audit in which every success is luck, at most a share of `LEVEL` holds a *leaked*, as far
    as the lucks are right. *Not leaked* is said only beside a control of the same setting that passed.
    """
    asked = []
    for place, question in enumerate(questions):
        if question.luck is not None:
            asked.append(place)
    corrected = luck.holm([questions[place].luck or 0.0 for place in asked])
    levels = dict(zip(asked, corrected, strict=True))
    return tuple(
        judge(question, corrected=levels.get(place), questions=len(asked))
        for place, question in enumerate(questions)
    )


def judge(question: Question, *, corrected: float | None = None, questions: int = 1) -> Judgement:
    """Judge one question, given its luck corrected for all the questions of the audit; alone it is corrected
    for none.
    """
    scored, control = question.seen[1], question.control
    if corrected is None:
        chance = question.luck
    else:
        chance = corrected
    judgement = _judged(question, chance)
    words = [judgement.reason, *_over(scored), *question.notes]
    if judgement.verdict == "leaked" and control is None:
        words.append(question.missing)
    return replace(
        judgement,
        luck=chance,
        questions=questions if chance is not None else 0,
        reason="; ".join(filter(None, words)),
    )


def _judged(question: Question, chance: float | None) -> Judgement:
    reading, scored = question.seen
    control = question.control
    if scored is not None and chance is not None and chance <= LEVEL and _matters(scored):
        return _scored("leaked", scored, control, "")
    if not reading.applicable and (control is None or not control[0].applicable):
        return Judgement(verdict="not applicable", reason=(control or question.seen)[0].reason)
    if control is None:
        return _beside(scored, None, "inconclusive", question.missing)
    if not control[0].applicable:
        return Judgement(verdict="not applicable", reason=control[0].reason)
    if control[1] is None or not control[1].proven:
        if question.never:
            return Judgement(verdict="not applicable", reason=question.never)
        return _unproven(control)
    if failed(reading):
        return _beside(scored, control[1], "inconclusive", reading.reason)
    if scored is not None:
        return _silent(question, scored, control[1], 1.0 if chance is None else chance)
    if not reading.applicable or reading.items:
        reason = (
            "works on the undefended update, but does not fit this one: "
            f"{reading.reason or 'nothing to score'}"
        )
        return _beside(None, control[1], "not applicable", reason)
    reason = f"control passed, here it finds nothing: {reading.reason or 'no reason given'}"
    return _doubted(_beside(None, control[1], "not leaked", reason), question.doubt)


def _matters(scored: Score) -> bool:
    """Say whether a score lies far enough above guessing for anybody to have learned something."""
    if scored.measure in ("PSNR dB", CONFIDENCE):
        return scored.succeeded
    if scored.measure == "membership AUC":
        return scored.value >= CLEAR_AUC
    return scored.value - scored.baseline >= EFFECT * (1.0 - scored.baseline)


def _silent(question: Question, scored: Score, control: Score, chance: float) -> Judgement:
    """Judge an attack that did not beat luck although its control passed."""
    if scored.noise is None:
        bottom = scored.baseline
    else:
        bottom = max(scored.baseline, scored.noise)
    share = (scored.value - bottom) / max(control.value - bottom, 1e-12)
    if scored.luck > LUCK and scored.value > scored.baseline and share > NEAR:
        return _scored("inconclusive", scored, question.control, _lucky(scored))
    if _may_be_a_leak(scored):
        reason = (
            f"the 99 % interval reaches {CLEAR_AUC}, from which membership is a leak: more draws would tell"
        )
        return _scored("inconclusive", scored, question.control, reason)
    if share > NEAR or control.value <= bottom:
        reason = "as good as on the undefended update"
        if share < 1 - NEAR:
            reason = "between luck and the control"
        number = f", but among all questions of this audit luck does as well in {chance:.1%} of cases"
        return _scored("inconclusive", scored, question.control, reason + number)
    return _doubted(_scored("not leaked", scored, question.control, "control passed"), question.doubt)


def _may_be_a_leak(scored: Score) -> bool:
    """Say whether many memberships leave open on which side of a leak their mean lies.

    What lies at the edge is a leak at one seed and none at another; it must never be told not to be one.
    """
    several = scored.measure == "membership AUC" and scored.draws >= luck.FEW_DRAWS
    return several and scored.high is not None and scored.high >= CLEAR_AUC


def _doubted(judgement: Judgement, doubt: str) -> Judgement:
    """Take "not leaked" back where the rehearsal behind it may have been easier than the update."""
    if doubt:
        return replace(judgement, verdict="inconclusive", reason=doubt)
    return judgement


def _unproven(control: Result) -> Judgement:
    reading, reference = control
    reason = "the same attack fails even on the undefended update, so its silence proves nothing"
    if failed(reading):
        reason = f"on the undefended update it {reading.reason}"
    if reference is None:
        return Judgement(verdict="inconclusive", reason=reason)
    if reference.measure == CONFIDENCE:
        reason = (
            "its confidence does not tell an update from noise; name what the client trained on with --truth"
        )
    elif reference.succeeded:
        reason = f"on the undefended update {_lucky(reference)}"
    return Judgement(
        verdict="inconclusive", measure=reference.measure, control=reference.value, reason=reason
    )


def _lucky(result: Score) -> str:
    return f"guessing or noise does as well in {result.luck:.0%} of cases, so its success proves nothing"


def _over(scored: Score | None) -> tuple[str, ...]:
    """Say over what a score is the mean; fewer than five draws are shown, for no interval of theirs would be
    true.
    """
    if scored is None or scored.draws <= 1:
        return ()
    words = f"mean of {scored.draws} draws of records and noise"
    shown = ", ".join(f"{value:.2f}" for value in scored.values)
    return (f"{words}: {shown}" if scored.values and scored.low is None else words,)


def _beside(scored: Score | None, reference: Score | None, verdict: Verdict, reason: str) -> Judgement:
    if scored is not None:
        control = None
        if reference is not None:
            control = reference.value
        return replace(_numbers(verdict, scored, control), reason=reason)
    if reference is None:
        return Judgement(verdict=verdict, reason=reason)
    return Judgement(
        verdict=verdict,
        measure=reference.measure,
        control=reference.value,
        baseline=reference.baseline,
        reason=reason,
    )


def _scored(verdict: Verdict, scored: Score, control: Result | None, reason: str) -> Judgement:
    if control is None or control[1] is None:
        reference = None
    else:
        reference = control[1].value
    if verdict == "leaked" and scored.measure == CONFIDENCE:
        reason = "as sure as on a rehearsal with invented data"
    return replace(_numbers(verdict, scored, reference), reason=reason)


def _numbers(verdict: Verdict, scored: Score, control: float | None) -> Judgement:
    return Judgement(
        verdict=verdict,
        measure=scored.measure,
        score=scored.value if scored.calibrated is None else scored.calibrated,
        low=scored.low,
        high=scored.high,
        baseline=scored.baseline,
        control=control,
        pairs=scored.pairs,
    )
