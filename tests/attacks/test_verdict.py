"""Verdicts say no more than a control, luck and the truth allow."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attacks import Budget, Knowledge, Observation, Prior
from attacks.contract import Finding, Item, PlainAttack, Reconstruction
from attacks.rehearsal import guessed
from attacks.scoring import Score
from attacks.truth import Truth
from attacks.verdict import judge, judge_unknown, tried, unless_guessed

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
        ((ran(), WRONG), (ran(), LUCKY), "inconclusive", "guessing does as well in 50%"),
        ((ran(), LUCKY), (ran(), RIGHT), "inconclusive", "guessing does as well in 50%"),
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
    found = judge(seen, control)
    assert found.verdict == verdict
    assert word in found.reason
    assert found.reason or verdict == "leaked"


def test_an_error_proves_nothing_on_either_side() -> None:
    def broken(*_: object) -> Finding:
        raise RuntimeError("the decomposition did not converge")

    attack = PlainAttack(name="broken", family="labels", attempt=broken)
    seen = Observation(kind="gradient", tensors={"w": torch.ones(3)})
    failed = tried(attack, seen, None, Prior(), Budget.quick(), Truth(labels=(1,)))
    for found in (judge(failed, (ran(), RIGHT)), judge((ran(), WRONG), failed), judge(failed, failed)):
        assert found.verdict == "inconclusive"
        assert "failed with RuntimeError" in found.reason
    assert judge_unknown(failed[0], ran(), ran(confidence=0.0)).verdict == "inconclusive"


def test_silence_after_a_guessed_rehearsal_is_inconclusive() -> None:
    quiet = ran(items=False)
    assert judge_unknown(quiet, ran(), ran(confidence=0.0)).verdict == "not leaked"
    assert judge_unknown(quiet, ran(), ran(confidence=0.0), guessed=True).verdict == "inconclusive"
    assert judge_unknown(ran(), ran(), ran(confidence=0.0), guessed=True).verdict == "leaked"
    assert unless_guessed(judge((ran(), RIGHT), (ran(), RIGHT)), True).verdict == "leaked"
    text, picture = Truth(sequences=((1, 2),)), Truth(images=torch.zeros(1, 1, 2, 2))
    bare = Observation(kind="gradient", tensors={"w": torch.ones(3)})
    counted = replace(bare, knowledge=Knowledge(batch_size=4))
    assert guessed(bare, picture)
    assert not guessed(counted, picture)
    assert guessed(counted, text)
    assert not guessed(replace(bare, knowledge=Knowledge(batch_size=4, sequence_length=9)), text)
