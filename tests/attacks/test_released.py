"""A released model gives away what it memorised, and nothing it did not."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attacks.membership import candidate_loss
from attacks.released import (
    LEAST,
    ReleasedAudit,
    audit_released,
    blind_test,
    membership_test,
    taught,
    token_scores,
)
from attacks.truth import Truth
from tests.attacks import models

WORDS, COUNT = 60, 40


def texts(seed: int, count: int = COUNT, *, classes: int = 0) -> Truth:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, WORDS, (count, 10), generator=generator).tolist()
    labels = torch.randint(4, (count,), generator=generator).tolist()
    return Truth(sequences=tuple(map(tuple, rows)), labels=tuple(labels) if classes else None)


def decoder() -> nn.Module:
    return models.llama(vocabulary=WORDS, width=32, layers=1)


def encoder() -> nn.Module:
    return models.bert(vocabulary=WORDS, width=32, layers=1, classes=4)


def privately_taught(model: nn.Module, records: Truth, *, passes: int, noise: float) -> nn.Module:
    """Train with every record's gradient bounded and noise over the bound."""
    ids = torch.tensor(records.sequences)
    trained = [value for value in model.parameters() if value.requires_grad]
    generator = torch.Generator().manual_seed(3)
    for _ in range(passes):
        total = [torch.zeros_like(value) for value in trained]
        for row in ids:
            slopes = torch.autograd.grad(candidate_loss(model, {"token_ids": row[None]}), trained)
            norm = torch.stack([slope.norm() for slope in slopes]).norm()
            for one, slope in zip(total, slopes, strict=True):
                one += slope / norm.clamp_min(1.0)
        with torch.no_grad():
            for value, one in zip(trained, total, strict=True):
                value -= 0.02 * (one + noise * torch.randn(one.shape, generator=generator)) / len(ids) ** 0.5
    return model


@cache
def audited(kind: str) -> ReleasedAudit:
    classes = 4 if kind.startswith("encoder") else 0
    members, others = texts(1, classes=classes), texts(2, classes=classes)
    model = encoder() if classes else decoder()
    if kind.endswith("taught"):
        model = taught(model, members, passes=20 if classes else 12, rate=3e-3)
    if kind.endswith("privately"):
        model = privately_taught(model, members, passes=5, noise=10.0)
    return audit_released(model, members, others)


@pytest.mark.parametrize("kind", ["decoder taught", "encoder taught"])
def test_what_was_memorised_is_found(kind: str) -> None:
    audit = audited(kind)
    assert audit.verdict == "leaked"
    assert audit.best.auc > 0.9
    assert audit.best.luck <= 0.01


@pytest.mark.parametrize("kind", ["decoder new", "encoder new", "decoder privately"])
def test_what_was_not_memorised_is_not_found_beside_a_memory_that_is(kind: str) -> None:
    audit = audited(kind)
    assert audit.verdict == "not leaked"
    assert audit.control is not None
    assert audit.control.proven
    assert audit.best.luck > 0.01


def test_files_that_differ_without_the_model_prove_nothing() -> None:
    members, others = texts(1), texts(2)
    marked = tuple((3, 4, 5, *text[3:]) for text in members.sequences or ())
    members = replace(members, sequences=marked)
    assert blind_test(members, others).auc > 0.9
    audit = audit_released(decoder(), members, others)
    assert audit.verdict == "inconclusive"
    assert "without the model" in audit.reason


def test_few_memorised_among_many_show_in_the_highest_scores_alone() -> None:
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(size=1000), rng.normal(size=1000)
    inside[:20] += 8
    test = membership_test("few", inside, outside)
    assert test.luck > 0.01
    assert test.tail_luck <= 1e-4
    strict, loose = test.rates
    assert strict.true_positive == pytest.approx(0.02, abs=0.005)
    assert strict.low < 0.02 < strict.high
    assert loose.true_positive is not None
    assert test.curve[0] == (0.0, 0.0)
    assert test.curve[-1] == (1.0, 1.0)


def test_scores_that_know_nothing_are_lucky_as_often_as_they_say() -> None:
    lucks: list[float] = []
    tails: list[float] = []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        test = membership_test("none", rng.normal(size=60), rng.normal(size=60))
        lucks.append(test.luck)
        tails.append(test.tail_luck)
    for level in (0.01, 0.05, 0.2):
        for values in (lucks, tails):
            share = float(np.mean([value <= level for value in values]))
            assert share <= level + 4 * (level * (1 - level) / 300) ** 0.5


def test_a_low_rate_needs_enough_others() -> None:
    rng = np.random.default_rng(0)
    few = membership_test("few", rng.normal(size=50), rng.normal(size=150))
    assert [rate.true_positive is None for rate in few.rates] == [True, False]


def test_scores_are_those_of_each_record_alone() -> None:
    model = decoder().double()
    records = texts(1, 5)
    longer = replace(records, sequences=(*(records.sequences or ()), (5, 6, 7)))
    for text, part in zip(longer.sequences or (), token_scores(model, longer), strict=True):
        ids = torch.tensor([text])
        logged: Tensor = torch.log_softmax(model(input_ids=ids).logits[0].detach(), dim=-1)
        alone = [float(logged[place, token]) for place, token in enumerate(text[1:])]
        assert part.tolist() == pytest.approx(alone, abs=1e-9)


def test_too_few_records_are_refused() -> None:
    with pytest.raises(ValueError, match=f"at least {LEAST}"):
        audit_released(decoder(), texts(1, LEAST - 1), texts(2))
