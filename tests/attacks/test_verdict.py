"""Verdicts say no more than a control, luck and the truth allow."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attacks import Budget, Knowledge, Observation, Prior
from attacks.contract import Finding, Item, PlainAttack, Reconstruction
from attacks.judge import (
    CONFIDENCE,
    LEVEL,
    Judgement,
    Question,
    Result,
    against_noise,
    calibrated,
    confidences,
    decide,
    judge,
    tried,
)
from attacks.rehearsal import unlike
from attacks.scoring import Score
from attacks.truth import Truth

RIGHT = Score(measure="token F1", value=0.9, baseline=0.1, succeeded=True)
WRONG = replace(RIGHT, value=0.1, succeeded=False)
LUCKY = replace(RIGHT, luck=0.5)


def ran(
    *, applicable: bool = True, reason: str = "", items: bool = True, confidence: float = 0.9
) -> Reconstruction:
    kept = (Item(kind="token_set", value=torch.tensor([1])),) if items and applicable else ()
    return Reconstruction(
        attack="test", items=kept, confidence=confidence if kept else 0.0, seconds=0.0, knowledge_used=(),
        applicable=applicable, reason=reason,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("seen", "control", "verdict", "word"),
    [
        ((ran(), RIGHT), (ran(), RIGHT), "leaked", ""),
        ((ran(), WRONG), (ran(), RIGHT), "not leaked", "control passed"),
        ((ran(items=False), None), (ran(), RIGHT), "not leaked", "finds nothing"),
        (
            (ran(applicable=False, reason="no rows"), None),
            (ran(), RIGHT),
            "not applicable",
            "works on the undefended",
        ),
        ((ran(), WRONG), (ran(), WRONG), "inconclusive", "fails even on the undefended"),
        ((ran(), WRONG), (ran(), LUCKY), "inconclusive", "does as well in 50%"),
        ((ran(), LUCKY), (ran(), RIGHT), "inconclusive", "does as well in 50%"),
        ((ran(), WRONG), None, "inconclusive", "no control"),
        ((ran(), RIGHT), None, "leaked", ""),
        ((ran(applicable=False, reason="no model"), None), None, "not applicable", "no model"),
        (
            (ran(), WRONG),
            (ran(applicable=False, reason="not this model"), None),
            "not applicable",
            "not this model",
        ),
    ],
)
def test_a_verdict_follows_from_the_attack_and_its_control(seen, control, verdict: str, word: str) -> None:
    found = judge(Question(seen=seen, control=control))
    assert found.verdict == verdict
    assert word in found.reason
    assert found.reason or verdict == "leaked"


def alone(seen: Result, control: Result | None) -> Judgement:
    return judge(Question(seen=seen, control=control))


def unknown(seen: Reconstruction, *, noise: tuple[float, ...] = (0.0,) * 99, doubt: str = "") -> Judgement:
    own, control = confidences(seen, [(ran(), RIGHT)] * 3, noise)
    return judge(Question(seen=(seen, own), control=(ran(), control), doubt=doubt))


def test_an_error_proves_nothing_on_either_side() -> None:
    def broken(*_: object) -> Finding:
        raise RuntimeError("the decomposition did not converge")

    attack = PlainAttack(name="broken", family="labels", attempt=broken)
    seen = Observation(kind="gradient", tensors={"w": torch.ones(3)})
    failed = tried(attack, seen, None, Prior(), Budget.quick(), Truth(labels=(1,)))
    for found in (alone(failed, (ran(), RIGHT)), alone((ran(), WRONG), failed), alone(failed, failed)):
        assert found.verdict == "inconclusive"
        assert "failed with RuntimeError" in found.reason
    assert unknown(failed[0]).verdict == "inconclusive"


def test_silence_after_a_guessed_rehearsal_is_inconclusive() -> None:
    quiet, doubt = ran(items=False), "the rehearsal's size is a guess"
    assert unknown(quiet).verdict == "not leaked"
    assert unknown(quiet, doubt=doubt).verdict == "inconclusive"
    assert unknown(ran(), doubt=doubt).verdict == "leaked"
    assert judge(Question(seen=(ran(), RIGHT), control=(ran(), RIGHT), doubt=doubt)).verdict == "leaked"
    text, picture = Truth(sequences=((1, 2),)), Truth(images=torch.zeros(1, 1, 2, 2))
    bare = Observation(kind="gradient", tensors={"w": torch.ones(3)})
    counted = replace(bare, knowledge=Knowledge(batch_size=4))
    assert unlike(bare, picture)
    assert not unlike(counted, picture)
    assert unlike(counted, text)
    assert not unlike(replace(bare, knowledge=Knowledge(batch_size=4, sequence_length=9)), text)
    delta = replace(counted, kind="delta")
    assert "optimiser" in unlike(delta, picture)
    assert not unlike(replace(delta, metadata={"optimiser": "SGD with momentum"}), picture)


def test_confidence_tells_nothing_where_noise_makes_an_attack_as_sure() -> None:
    assert unknown(ran(confidence=0.9), noise=(0.9,) * 99).verdict == "inconclusive"
    assert unknown(ran(confidence=0.9), noise=(0.0,) * 98 + (0.95,)).verdict == "inconclusive"
    # Far from sure, but surer than on any noise: neither a leak nor none.
    between = unknown(ran(confidence=0.4))
    assert between.verdict == "inconclusive"
    assert between.measure == CONFIDENCE


def test_nine_tenths_of_the_control_is_no_silence() -> None:
    half = replace(RIGHT, value=0.45, baseline=0.0, succeeded=True, luck=0.02)
    control = replace(RIGHT, value=0.5, baseline=0.0)
    assert alone((ran(), half), (ran(), control)).verdict == "inconclusive"
    near = replace(half, value=0.05, succeeded=False, luck=0.4)
    assert alone((ran(), near), (ran(), control)).verdict == "not leaked"


def test_a_score_has_to_beat_the_attack_on_noise() -> None:
    assert against_noise(RIGHT, (0.1,) * 99).luck <= 1e-6
    assert against_noise(RIGHT, (0.1,) * 97 + (0.9, 0.95)).luck == pytest.approx(0.03)
    assert against_noise(RIGHT, (0.2, 0.8)).luck == 1.0  # two runs have no spread, and one is near
    assert against_noise(RIGHT, ()) is RIGHT


def test_luck_is_corrected_for_every_question_of_the_audit() -> None:
    lucky = replace(RIGHT, luck=0.5 * LEVEL)
    question = Question(seen=(ran(), lucky), control=(ran(), RIGHT))
    (one,) = decide([question])
    assert (one.verdict, one.questions) == ("leaked", 1)
    many = decide([question] * 10)
    assert {found.verdict for found in many} == {"inconclusive"}
    assert many[0].questions == 10
    assert many[0].luck == pytest.approx(5 * LEVEL)
    # What was not asked is not counted.
    silent = Question(seen=(ran(applicable=False, reason="no model"), None))
    assert decide([question, *[silent] * 9])[0].verdict == "leaked"


def test_a_confidence_is_as_good_as_it_was_right() -> None:
    pairs = [(0.9, 1.0), (0.8, 0.0), (0.7, 1.0), (0.1, 0.0)]
    assert calibrated(0.95, pairs) == 1.0
    assert calibrated(0.75, pairs) == calibrated(0.8, pairs) == 0.5
    assert calibrated(0.05, pairs) == 0.0
    assert calibrated(0.99, [(0.99, 0.0)]) == 0.0  # as sure as ever, and never right
    assert calibrated(0.5, []) == 0.0


def test_what_needs_a_crafted_broadcast_is_not_applicable() -> None:
    question = Question(seen=(ran(), WRONG), control=(ran(), WRONG), never="not crafted")
    assert judge(question).verdict == "not applicable"
    assert judge(replace(question, control=(ran(), RIGHT))).verdict == "not leaked"


@pytest.mark.parametrize(
    ("value", "high", "draws", "verdict"),
    [
        (0.651, 0.684, 32, "leaked"),
        (0.605, 0.650, 32, "leaked"),
        (0.594, 0.642, 32, "inconclusive"),
        (0.544, 0.575, 32, "not leaked"),
        (0.544, 0.700, 1, "not leaked"),
    ],
)
def test_what_may_be_a_leak_is_never_told_not_to_be_one(
    value: float, high: float, draws: int, verdict: str
) -> None:
    """Seeds of one run lie on both sides of the edge: no two of them may contradict each other."""
    control = Score(measure="membership AUC", value=0.99, baseline=0.5, succeeded=True)
    seen = replace(control, value=value, low=2 * value - high, high=high, draws=draws, luck=1e-7)
    judgement = judge(Question(seen=(ran(), seen), control=(ran(), control)))
    assert judgement.verdict == verdict
    assert ("more draws would tell" in judgement.reason) == (verdict == "inconclusive")
