"""What may be said of an attack that ran beside its control: leaked, not leaked, inconclusive, not applicable, and why."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from attacks.contract import Attack, Budget, Prior, Reconstruction
from attacks.observation import Observation
from attacks.scoring import Score, score
from attacks.truth import Truth

Verdict = Literal["leaked", "not leaked", "inconclusive", "not applicable"]
Result = tuple[Reconstruction, Score | None]

TELLING = (
    0.1  # how much surer an attack must be on an undefended update than on noise for its confidence to tell
)
_FAILED = "failed"  # in the details of an attack that ended in an error


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """A verdict with the numbers it rests on; `score` is None where nothing could be scored."""

    verdict: Verdict
    measure: str = ""
    score: float | None = None
    low: float | None = None
    high: float | None = None
    baseline: float | None = None
    control: float | None = None
    reason: str = ""
    pairs: tuple[tuple[str, str], ...] = ()


def tried(
    attack: Attack,
    seen: Observation,
    model: nn.Module | None,
    prior: Prior,
    budget: Budget,
    truth: Truth | None,
) -> Result:
    """Run an attack and score it; an error ends the attack, not the audit, and proves nothing."""
    try:
        found = attack.run(seen, model, prior, budget, 0)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        told = f"failed with {type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        return Reconstruction(
            attack=attack.name, items=(), confidence=0.0, seconds=0.0, knowledge_used=(), applicable=True, reason=told,
            details={_FAILED: 1},
        ), None  # fmt: skip
    return found, score(found, truth) if found.applicable and truth is not None else None


def judge(seen: Result, control: Result | None) -> Judgement:
    """Judge a scored attack: a leak, no leak although the control succeeded, nothing proven, or not applicable.

    Guarantee: "not leaked" is said only where the control succeeded by more than luck, "leaked" only where the attack did.
    What the truth proves is a leak whatever the control did.
    """
    found, result = seen
    if result is not None and result.proven:
        return _scored("leaked", result, control)
    if not found.applicable and (control is None or not control[0].applicable):
        return Judgement(verdict="not applicable", reason=(control or seen)[0].reason)
    if control is None:
        return Judgement(
            verdict="inconclusive", reason="no control: no undefended step of this model could be rehearsed"
        )
    if not control[0].applicable:
        return Judgement(verdict="not applicable", reason=control[0].reason)
    reference = control[1]
    if reference is None or not reference.proven:
        return _unproven(control)
    if _FAILED in found.details:
        return _beside(reference, "inconclusive", found.reason)
    if result is not None and result.succeeded:
        return replace(_scored("inconclusive", result, control), reason=_lucky(result) + _over(result, "; "))
    if result is not None:
        return replace(_scored("not leaked", result, control), reason="control passed" + _over(result, "; "))
    if found.applicable and not found.items:
        return _beside(
            reference,
            "not leaked",
            f"control passed, here it finds nothing: {found.reason or 'no reason given'}",
        )
    told = found.reason or "nothing to score"
    return _beside(
        reference, "not applicable", f"works on the undefended update, but does not fit this one: {told}"
    )


def _unproven(control: Result) -> Judgement:
    found, reference = control
    told = "the same attack fails even on the undefended update, so its silence proves nothing"
    if _FAILED in found.details:
        told = f"on the undefended update it {found.reason}"
    if reference is None:
        return Judgement(verdict="inconclusive", reason=told)
    if reference.succeeded:
        told = f"on the undefended update {_lucky(reference)}"
    return Judgement(verdict="inconclusive", measure=reference.measure, control=reference.value, reason=told)


def _lucky(result: Score) -> str:
    return f"guessing does as well in {result.luck:.0%} of cases, so its success proves nothing"


def _over(result: Score, start: str = "") -> str:
    return f"{start}mean of {result.draws} draws of records and noise" if result.draws > 1 else ""


def _beside(reference: Score, verdict: Verdict, reason: str) -> Judgement:
    return Judgement(
        verdict=verdict,
        measure=reference.measure,
        control=reference.value,
        baseline=reference.baseline,
        reason=reason,
    )


def _scored(verdict: Verdict, result: Score, control: Result | None) -> Judgement:
    reference = None if control is None else control[1]
    return Judgement(
        verdict=verdict,
        reason=_over(result),
        measure=result.measure,
        score=result.value,
        low=result.low,
        high=result.high,
        baseline=result.baseline,
        control=None if reference is None else reference.value,
        pairs=result.pairs,
    )


def judge_unknown(
    seen: Reconstruction, control: Reconstruction, silence: Reconstruction, *, guessed: bool = False
) -> Judgement:
    """Judge an attack where the truth is not known: is it as sure as on a rehearsal, or no surer than on noise?

    `guessed` says that the rehearsal's size was a guess: it may have been easier than the update, and a passed control
    then proves no silence.
    """
    low = silence.confidence if silence.items else 0.0
    base = Judgement(
        verdict="inconclusive",
        measure="own confidence",
        score=seen.confidence if seen.items else 0.0,
        baseline=low,
        control=control.confidence,
        reason="its confidence does not tell an update from noise; name what the client trained on with --truth",
    )
    if _FAILED in seen.details:
        return replace(base, reason=seen.reason)
    if control.confidence - low < TELLING:
        return base
    if seen.items and seen.confidence > 0.5 * (low + control.confidence):
        return replace(base, verdict="leaked", reason="as sure as on a rehearsal with invented data")
    return unless_guessed(
        replace(base, verdict="not leaked", reason="control passed on a rehearsal"), guessed
    )


def unless_guessed(judgement: Judgement, guessed: bool) -> Judgement:
    """Take "not leaked" back where the rehearsal behind it may have been easier than the update."""
    if judgement.verdict != "not leaked" or not guessed:
        return judgement
    told = "the rehearsal's size is a guess: state batch_size, and lengths or sequence_length of texts, in knowledge"
    return replace(judgement, verdict="inconclusive", reason=told)
