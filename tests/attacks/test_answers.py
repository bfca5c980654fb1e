"""Attacks on answers: each finds what was put there, finds nothing where nothing is, and reads no update."""

from __future__ import annotations

import torch

from attacks.answers import ANSWER_ATTACKS
from attacks.contract import Budget, Prior, Reconstruction
from attacks.membership import lira
from attacks.metrics import auc
from attacks.observation import Observation

ROWS, CLASSES = 240, 3


def run(name: str, answers: torch.Tensor, **examples: torch.Tensor) -> Reconstruction:
    observation = Observation(kind="answers", tensors={"answers": answers})
    return ANSWER_ATTACKS[name]().run(observation, None, Prior(examples=examples), Budget.quick(), 0)


def test_the_label_mix_is_read_off_how_often_each_class_is_answered() -> None:
    labels = torch.arange(ROWS) % CLASSES
    mix = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    read = run("answers_label_mix", mix.expand(ROWS, CLASSES).clone(), labels=labels)
    assert torch.allclose(read.items[0].value, mix)
    even = torch.full((ROWS, CLASSES), 1 / CLASSES)
    nothing = run("answers_label_mix", even, labels=labels)
    assert torch.allclose(nothing.items[0].value, torch.full((CLASSES,), 1 / CLASSES, dtype=torch.float64))


def test_members_are_told_from_others_only_where_the_model_is_surer_of_them() -> None:
    draw = torch.Generator().manual_seed(1)
    labels = torch.randint(0, CLASSES, (ROWS,), generator=draw)
    logits = torch.randn(5, ROWS, CLASSES, generator=draw)
    easy = torch.zeros(ROWS, CLASSES)
    easy[torch.arange(ROWS), labels] = 3.0 * torch.rand(ROWS, generator=draw)
    areas = []
    for memorised in (0.0, 2.0):
        target = logits[0] + easy
        half = torch.arange(ROWS // 2)
        target[half, labels[half]] += memorised
        answers, references = target.softmax(dim=1), (logits[1:] + easy).softmax(dim=2)
        scores = run("answers_membership", answers, labels=labels, references=references).items[0].value
        areas.append(auc(scores[: ROWS // 2].numpy(), scores[ROWS // 2 :].numpy()))
    assert abs(areas[0] - 0.5) < 0.12
    assert areas[1] > 0.75


def test_a_copy_answers_as_the_model_does_where_nobody_asked() -> None:
    draw = torch.Generator().manual_seed(2)
    secret = torch.randn(CLASSES, 4, generator=draw)
    features, elsewhere = torch.randn(2, ROWS, 4, generator=draw)
    answers = (features @ secret.T).softmax(dim=1)
    said = run("answers_copy", answers, features=features, elsewhere=elsewhere).items[0].value
    assert float((said == (elsewhere @ secret.T).argmax(dim=1)).double().mean()) > 0.97
    told_nothing = torch.full((ROWS, CLASSES), 1 / CLASSES)
    blind = run("answers_copy", told_nothing, features=features, elsewhere=elsewhere).items[0].value
    assert float((blind == (elsewhere @ secret.T).argmax(dim=1)).double().mean()) < 0.6


def test_answers_are_no_update_and_an_update_is_no_answers() -> None:
    answers = Observation(kind="answers", tensors={"answers": torch.full((4, 2), 0.5)})
    update = Observation(kind="delta", tensors={"answers": torch.full((4, 2), 0.5)})
    assert "reads updates" in lira().run(answers, None, Prior(), Budget.quick(), 0).reason
    for make in ANSWER_ATTACKS.values():
        assert "reads answers" in make().run(update, None, Prior(), Budget.quick(), 0).reason
        assert "prior.examples" in make().run(answers, None, Prior(), Budget.quick(), 0).reason
        lost = make().run(answers, None, Prior(examples={}), Budget.quick(), 0)
        assert not lost.applicable, "what is not known of the rows is missing, not guessed"
