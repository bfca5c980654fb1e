"""Every reconstruction that reads an undefended update is at its baseline at noise multiplier 1, and falls on the way."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import nn

from attacks import Budget, Knowledge, Observation, Prior
from attacks.inversion import active
from attacks.registry import build
from attacks.scoring import score
from attacks.truth import Truth
from tests.attacks import models

BUDGET = Budget(seconds=30.0, iterations=30, restarts=1)
Case = tuple[Observation, nn.Module, Truth]


def text() -> Case:
    model, ids = models.gpt2(vocabulary=120, width=64, length=16, tied=False), models.sentences(2, 5, 120)
    batch = {"input_ids": ids, "labels": torch.tensor([0, 1])}
    knowledge = Knowledge(batch_size=2, labels=(0, 1), sequence_length=5)
    return models.observe(model, batch, models.text_loss, knowledge=knowledge), model, _words(ids)


def _words(ids: torch.Tensor) -> Truth:
    return Truth(sequences=tuple(tuple(row) for row in ids.tolist()))


def vision() -> Case:
    model = models.vit(size=16, patch=8, width=64, layers=2)
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    seen = models.observe(
        model, {"images": images, "labels": torch.tensor([3])}, models.image_loss,
        knowledge=Knowledge(batch_size=1, labels=(3,), image_shape=(3, 16, 16)),
    )  # fmt: skip
    return seen, model, Truth(images=images)


def picture(make: Callable[[], nn.Module], count: int = 1) -> Callable[[], Case]:
    def case() -> Case:
        model, (images, labels) = make(), models.digits()
        batch = {"images": images[:count], "labels": labels[:count]}
        granted = Knowledge(batch_size=count, labels=tuple(labels[:count].tolist()), image_shape=(1, 8, 8))
        seen = models.observe(model, batch, models.image_loss, knowledge=granted)
        return seen, model, Truth(images=images[:count])

    return case


def crafted() -> nn.Module:
    return active.craft_imprint(models.mlp(), models.digits()[0][600:1000], bins=64)


CLOSED = {
    "token_presence": text,
    "position_text": text,
    "span": text,
    "span_exact": text,
    "position_vision": vision,
    "linear_readout": picture(models.mlp),
    "cocktail_party": picture(models.mlp),
    "imprint": picture(crafted, 2),
    "trap_weights": picture(models.mlp),
}
SEARCHED = {
    "inverting_gradients": picture(models.cnn),
    "modern_inversion": picture(models.cnn),
    "dlg": picture(models.cnn),
    "text_matching": text,
    "tag": text,
}


def reads(name: str, case: Case, noise: float) -> bool:
    seen, model, truth = case
    seen = models.noised(seen, noise) if noise else seen
    found = build(name).run(seen, model, Prior(), BUDGET, 0)
    result = score(found, truth) if found.applicable else None
    return result is not None and result.succeeded


@pytest.mark.parametrize("name", CLOSED)
def test_closed_forms_read_the_bare_update_and_nothing_at_noise_one(name: str) -> None:
    case = CLOSED[name]()
    assert reads(name, case, 0.0)
    assert not reads(name, case, 1.0)


@pytest.mark.parametrize("name", SEARCHED)
def test_searches_read_nothing_at_noise_one(name: str) -> None:
    assert not reads(name, SEARCHED[name](), 1.0)


def test_the_share_of_words_read_falls_with_noise() -> None:
    seen, model, truth = text()
    shares = []
    for noise in (1e-7, 1e-3, 1e-1, 1.0):
        found = build("token_presence").run(models.noised(seen, noise), model, Prior(), BUDGET, 0)
        result = score(found, truth)
        shares.append(0.0 if result is None else result.value)
    assert shares[0] > 0.9
    assert shares[-1] < 0.3
    assert all(later <= earlier + 0.1 for earlier, later in pairwise(shares))
