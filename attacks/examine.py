"""Examine one observation with every attack: each beside its rehearsal and beside itself on noise, judged
together.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from scipy.stats import hypergeom
from torch import nn

from attacks import nulls
from attacks.contract import Attack, Budget, Prior
from attacks.inversion.tokens import vocabulary_of
from attacks.judge import (
    CONFIDENCE,
    FILTERS,
    LEVEL,
    UNCRAFTED,
    Judgement,
    Question,
    Result,
    against_noise,
    confidences,
    decide,
    dominated,
    filtered,
    noise_scores,
    null_runs,
    tried,
)
from attacks.observation import Observation
from attacks.rehearsal import Rehearsals, cannot_rehearse, unlike
from attacks.scoring import read_tokens
from attacks.truth import Truth

CLOSED = frozenset({"presence", "labels", "linear", "least squares", "span", "membership"})  # no search
REHEARSALS = 3  # of an attack that is cheap, for its confidence to be calibrated on
WEAK = "baseline weak: no texts that were not used, so guessing goes by the vocabulary alone"
Allowance = Callable[[Attack], Budget | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """Hold what one attack did to an observation and what may be said of it; `refused` where it was not run,
    with the reason.
    """

    attack: str
    seen: Result | None = None
    judgement: Judgement | None = None
    refused: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """Hold what all attacks on one observation share: rehearsals and noise in its shape, made once, and only
    where an attack asks for them.
    """

    observation: Observation
    model: nn.Module | None
    truth: Truth | None
    stages: Rehearsals | None
    noise: nulls.Noise
    null_steps: float
    drawn: dict[int, Observation] = field(default_factory=dict)
    controls: dict[int, tuple[Observation, Truth] | None] = field(default_factory=dict)

    def rehearsals(self, cost: float) -> tuple[tuple[Observation, Truth], ...]:
        """Return rehearsals for an attack that takes `cost` steps.

        Without the truth there are several, for confidences to be calibrated on, unless making them or
        attacking them takes more steps than one attack may spend on noise.
        """
        if self.stages is None:
            return ()
        several = REHEARSALS if self.truth is None else 1
        if max(cost, self.stages.cost(self.observation)) * several > self.null_steps:
            several = 1
        for seed in range(several):
            if seed not in self.controls:
                self.controls[seed] = self.stages.of(self.observation, seed)
        chosen = [self.controls[seed] for seed in range(several)]
        return tuple(one for one in chosen if one is not None)

    def silence(self, number: int) -> Observation:
        """Return one noise: its zeros move where the truth is known, and stay where only confidence is."""
        if number not in self.drawn:
            self.drawn[number] = self.noise.draw(number, "as they are" if self.truth is None else "moved")
        return self.drawn[number]

    @property
    def missing(self) -> str:
        """Say why there is no control."""
        reason = "no control: no undefended step of this model could be rehearsed"
        return cannot_rehearse(self.observation) or reason


def study(
    observation: Observation,
    model: nn.Module | None,
    truth: Truth | None,
    *,
    unused: Truth | None = None,
    stages: Rehearsals | None = None,
    null_steps: float,
) -> Study:
    """Prepare an observation; `unused` holds records of the same kind that nobody trained on.

    `stages` rehearses this and other observations of the same model; a new one is taken where it is None.
    `null_steps` is how many steps one attack may spend on noise.
    """
    if truth is not None and model is not None:
        truth = replace(truth, vocabulary=vocabulary_of(model))
    if truth is not None and unused is not None:
        truth = replace(truth, others=unused.sequences or (), other_labels=unused.labels or ())
    if stages is None and model is not None:
        stages = Rehearsals(model=model, like=unused)
    return Study(
        observation=observation,
        model=model,
        truth=truth,
        stages=stages,
        noise=nulls.study(observation),
        null_steps=null_steps,
    )


def examine(
    scene: Study,
    allowance: Allowance,
    refusal: Callable[[Attack], str],
    attacks: Collection[Attack],
    watch: Callable[[str, int, int], None] = lambda name, place, total: None,
) -> tuple[Examined, ...]:
    """Run attacks on an observation and judge them together, in their order.

    `allowance` says what an attack may spend, None for one that is not run; `refusal` says why. Closed forms
    come first, so that a search for what they have read exactly is skipped. `watch` is told which attack
    comes next, its place and how many there are.
    """
    results: dict[str, Examined] = {}
    questions: dict[str, Question] = {}
    for place, attack in enumerate(sorted(attacks, key=lambda attack: attack.family not in CLOSED)):
        name = attack.name
        watch(name, place, len(attacks))
        budget = allowance(attack)
        needless = _needless(attack, questions)
        if budget is None or needless:
            if budget is None:
                reason = refusal(attack)
            else:
                reason = needless
            results[name] = Examined(attack=name, refused=reason)
            continue
        questions[name] = _question(attack, scene, budget)
    for name, judgement in zip(questions, _judged(questions, scene), strict=True):
        results[name] = Examined(attack=name, seen=questions[name].seen, judgement=judgement)
    return tuple(results[attack.name] for attack in attacks)


def _needless(attack: Attack, questions: Mapping[str, Question]) -> str:
    """Say why an attack need not be run beside those before it, nothing where it has to be."""
    wider = questions.get(FILTERS.get(attack.name, ""))
    if wider is not None and not _worked(wider.control) and not _worked(wider.seen):
        return filtered(FILTERS[attack.name])
    better = _dominator(attack, questions)
    if better:
        return dominated(better)
    return ""


def _worked(result: Result | None) -> bool:
    return result is not None and result[1] is not None and result[1].proven


def _dominator(attack: Attack, questions: Mapping[str, Question]) -> str:
    """Return a closed form that has read all an attack searches for; nothing for a closed form, which costs
    little.
    """
    if attack.family in CLOSED or attack.family == "active":
        return ""
    exact = (
        name
        for name, question in questions.items()
        if question.seen[1] is not None
        and question.seen[1].exact
        and question.seen[1].measure in ("token F1", "PSNR dB")
    )
    return next(exact, "")


def _question(attack: Attack, scene: Study, budget: Budget) -> Question:
    """Run one attack on the observation, on rehearsals and on noise."""
    prior = Prior()
    attempt = tried(attack, scene.observation, scene.model, prior, budget, scene.truth)
    rehearsals: tuple[tuple[Observation, Truth], ...] = ()
    if attempt[0].applicable:
        rehearsals = scene.rehearsals(attempt[0].steps)
    doubt = ""
    if rehearsals:
        doubt = unlike(scene.observation, rehearsals[0][1])
    controls = []
    for other, true in rehearsals:
        controls.append(tried(attack, other, scene.model, prior, budget, true))
    control = None
    if controls:
        control = controls[0]
    weak = scene.truth is not None and bool(scene.truth.sequences) and not scene.truth.others
    never = ""
    if attack.family == "active":
        never = UNCRAFTED
    blank = Question(seen=attempt, control=control, doubt=doubt, missing=scene.missing, never=never)

    def silence(number: int) -> Result:
        return tried(attack, scene.silence(number), scene.model, prior, budget, scene.truth)

    if scene.truth is None:
        return _by_confidence(blank, controls, silence, scene)
    scored = attempt[1]
    if scored is None:
        return blank
    if scored.luck <= LEVEL and scored.value > scored.baseline:
        noise = noise_scores(silence, null_runs(attempt[0].steps, scene.null_steps), scored, scene.truth)
        scored = against_noise(scored, noise)
    notes: tuple[str, ...] = ()
    if weak and scored.measure == "token F1":
        notes = (WEAK,)
    return replace(blank, seen=(attempt[0], scored), notes=notes)


def _by_confidence(
    question: Question, controls: Sequence[Result], silence: Callable[[int], Result], scene: Study
) -> Question:
    """Hold an attack's own confidence against rehearsals and noise, where the truth is not known."""
    reading = question.seen[0]
    if not reading.applicable or not any(result is not None and result.proven for _, result in controls):
        return question
    first, _ = confidences(reading, controls, ())
    noise = noise_scores(silence, max(null_runs(reading.steps, scene.null_steps), 1), first, None)
    own, control = confidences(reading, controls, noise)
    return replace(question, seen=(reading, own), control=(controls[0][0], control))


# ------------------------------------------------------------------------------------------- attacks together


def _judged(questions: Mapping[str, Question], scene: Study) -> tuple[Judgement, ...]:
    """Judge all questions; without a truth, an attack that noise of the same zeros makes as sure may be borne
    out by another.
    """
    first = decide(list(questions.values()))
    if scene.truth is not None or scene.model is None:
        return first
    vocabulary = vocabulary_of(scene.model) or 0
    proven = set()
    for name, one in zip(questions, first, strict=True):
        if one.verdict == "leaked":
            proven.add(name)
    amended = []
    for name, question in questions.items():
        amended.append(
            _borne_out(question, [questions[other] for other in sorted(proven - {name})], vocabulary)
        )
    return decide(amended)


def _borne_out(question: Question, witnesses: Sequence[Question], vocabulary: int) -> Question:
    """Take the luck of an attack that names the words another one, proven by itself, read elsewhere in the
    update.
    """
    reading, own = question.seen
    words = read_tokens(reading)
    if own is None or own.measure != CONFIDENCE or not words or own.proven or not vocabulary:
        return question
    for witness in witnesses:
        theirs = read_tokens(witness.seen[0])
        if not theirs or witness.seen[0].attack == reading.attack:
            continue
        shared = len(words & theirs)
        chance = float(hypergeom.sf(shared - 1, vocabulary, len(words), len(theirs)))
        if chance <= own.luck and 2 * shared > max(len(words), len(theirs)):
            scored = replace(
                own,
                luck=chance,
                succeeded=True,
                baseline=0.0,
                calibrated=witness.seen[1].calibrated if witness.seen[1] else None,
            )
            return replace(
                question,
                seen=(reading, scored),
                notes=(f"names the words that {witness.seen[0].attack} read",),
            )
    return question


def leaks(results: Sequence[Examined]) -> Iterator[Examined]:
    """Yield what leaked."""
    return (one for one in results if one.judgement is not None and one.judgement.verdict == "leaked")
