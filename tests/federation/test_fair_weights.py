"""`weighting = "q_fair"`: two sums say what the weighted mean is, and neither says one client's loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from defenses.random_source import RandomSource
from defenses.secagg import ring
from ffm_secure.aggregation import aggregate_of
from ffm_secure.errors import PlanRefused
from ffm_secure.lifecycle import ModelUpdate
from ffm_secure.protection.codec import FAIR_LEVELS, fair_weight
from tests.federation.helpers import RECORD, SECAGG, make, prepared, train


def test_weights_grow_with_the_loss_as_the_power_says() -> None:
    assert fair_weight(2.0, power=1.0) == pytest.approx(2 * fair_weight(1.0, power=1.0), rel=1e-3)
    assert fair_weight(2.0, power=2.0) == pytest.approx(4 * fair_weight(1.0, power=2.0), rel=2e-3)
    assert fair_weight(0.1, power=0.0) == fair_weight(3.0, power=0.0) == FAIR_LEVELS
    assert fair_weight(1e9, power=1.0) == FAIR_LEVELS
    assert fair_weight(0.0, power=3.0) == 1


def test_the_opened_mean_is_the_weighted_one() -> None:
    ready = prepared(make(federation={"weighting": "q_fair", "fairness": 2.0}))
    losses, size = (0.4, 0.9, 2.2), ready.spec.codec.size
    changes = torch.randn(3, size, generator=torch.Generator().manual_seed(1)) * 0.1
    codec, sent = ready.spec.codec, []
    for loss, change in zip(losses, changes, strict=True):
        weight = fair_weight(loss, power=2.0)
        source = RandomSource.seeded(1)
        protected = ready.mechanism.protect(change, loss=loss, weight=weight, source=source)
        sent.append(codec.quantise(protected, source=source))
    for other in sent[1:]:
        ring.add_into(sent[0], other)
    opened = codec.open(ring.reduce(sent[0], codec.modulus_bits), round=1, survivors=(0, 1, 2))
    weights = np.array([fair_weight(loss, power=2.0) for loss in losses], dtype=float)
    assert opened.weight_sum == weights.sum()
    wanted = (torch.from_numpy(weights)[:, None] * changes.double()).sum(dim=0) / weights.sum()
    mean = aggregate_of(ready.config, [opened]).mean
    assert torch.allclose(mean, wanted, atol=1e-5)
    assert not torch.allclose(mean, changes.double().mean(dim=0), atol=1e-3)


def test_a_run_under_masks_weighs_by_loss(tmp_path: Path) -> None:
    federation = {"rounds": 1, "cohort": 4, "weighting": "q_fair", "fairness": 1.0}
    ready, trained = train(make(federation=federation, protection=SECAGG), tmp_path)
    assert trained.records[0].aborted == ""
    site = ready.sites[0]
    with site._borrow_trainer() as trainer:
        update = ModelUpdate(vector=torch.zeros(trainer.trainable.size), loss=1.5, steps=1)
        protected = trainer.protect(update, site.data, RandomSource.seeded(1))
    assert protected.weight == fair_weight(1.5, power=1.0)


def test_a_private_loss_weighs_nothing() -> None:
    with pytest.raises(PlanRefused, match="no event charges for it"):
        prepared(make(federation={"weighting": "q_fair"}, privacy=RECORD))
