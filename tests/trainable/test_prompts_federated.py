"""Every kind of prompt in a whole round: record-level noise, secure aggregation, a finished checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ffm_secure.config.compatibility import PROMPTS
from tests.federation.helpers import RECORD, SECAGG, make, train

SLOW = ("prompt", "prefix", "deep_prompt", "p_tuning")
KINDS = [pytest.param(kind, marks=pytest.mark.slow) if kind in SLOW else kind for kind in PROMPTS]


@pytest.mark.parametrize("kind", KINDS)
def test_a_round_under_noise_and_masks(kind: str, tmp_path: Path) -> None:
    made = make(
        task={
            "kind": "text_classification",
            "data": "builtin:clinic_notes",
            "clients": 3,
            "evaluation_examples": 20,
            "max_length": 24,
        },
        model={"name": "builtin:tiny-bert", "trainable": {"kind": kind, "length": 3}},
        federation={
            "rounds": 1,
            "cohort": 3,
            "lifecycle": {"kind": "finetune", "local_steps": 1, "batch_size": 4, "learning_rate": 0.1},
        },
        privacy=RECORD,
        protection=SECAGG,
    )
    built, trained = train(made, tmp_path)
    assert trained.status == "complete"
    record = trained.records[0]
    assert record.survivors == (0, 1, 2)
    assert 0 < built.epsilon() <= made.privacy.epsilon
    assert torch.isfinite(trained.state.vector).all()
    assert not torch.equal(trained.state.vector, built.trainable.flatten() * 0)
