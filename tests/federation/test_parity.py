"""The loop equals what it claims to be:
plain torch for one client, the same sums under every protection, any number of workers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ffm_secure.records import RoundRecord
from tests.federation.helpers import CLIENT, RECORD, SECAGG, make, prepared, train


@pytest.mark.parametrize(
    ("optimizer", "strategy"),
    [("sgd", "average"), ("adam", "average"), ("adamw", "average"), ("sgd", "fedsa")],
)
def test_one_client_without_noise_equals_plain_torch(optimizer: str, strategy: str, tmp_path: Path) -> None:
    lifecycle = {
        "kind": "finetune",
        "local_steps": 3,
        "batch_size": 16,
        "learning_rate": 0.05,
        "optimizer": optimizer,
    }
    made = make(
        task={"clients": 1},
        federation={"rounds": 2, "cohort": 1, "lifecycle": lifecycle, "strategy": {"kind": strategy}},
        protection={"kind": "none", "value_bits": 32, "coordinate_bound": 2.0},
    )
    built, trained = train(made, tmp_path)

    plain = prepared(made)
    parameters = list(plain.trainable.parameters.values())
    encoded = plain.task.encode(plain.dataset.train.take(plain.parts[0]))
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    for number in (1, 2):  # a client's optimizer is new in every round
        stepper = kinds[optimizer](
            parameters, lr=0.05, **({} if optimizer == "sgd" else {"weight_decay": 0.0})
        )
        order = np.random.default_rng([made.seed, number, 0])
        order.integers(2**62)
        rows = order.permutation(len(encoded))
        for step in range(3):
            stepper.zero_grad()
            batch = plain.task.batch(encoded, rows[16 * step : 16 * step + 16], device="cpu")
            plain.task.losses(plain.trainable.model, batch).mean().backward()
            stepper.step()
    reached = built.own_vector(
        0, trained.state.vector, before=3
    )  # what stayed at home belongs to the client's model
    assert float((reached - plain.trainable.flatten()).abs().max()) <= 1e-6
    assert built.trainable.size == trained.state.vector.numel()


@pytest.mark.parametrize(
    "privacy", [{"unit": "none", "reason": "test data"}, RECORD], ids=["plain", "record"]
)
def test_masked_equals_unmasked_bit_for_bit(privacy: dict[str, object], tmp_path: Path) -> None:
    results = {}
    for name, protection in {"open": {"kind": "none", "threshold": 3}, "masked": SECAGG}.items():
        _, trained = train(make(privacy=privacy, protection=protection), tmp_path / name)
        results[name] = trained.state.vector
    assert torch.equal(results["open"], results["masked"])
    assert float(results["open"].abs().sum()) > 0


@pytest.mark.parametrize("kind", ["bfv", "ckks"])
def test_encrypted_equals_open_bit_for_bit(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("tenseal", reason="the extra 'he' is not installed")
    results = []
    for name in ("none", kind):
        made = make(
            privacy=RECORD,
            protection={"kind": name, "threshold": 3, "value_bits": 12},
            federation={"rounds": 2},
        )
        results.append(train(made, tmp_path / name)[1])
    assert torch.equal(results[0].state.vector, results[1].state.vector)
    assert results[1].records[-1].bytes_up > results[0].records[-1].bytes_up


def test_client_noise_is_the_same_under_masks_and_encryption(tmp_path: Path) -> None:
    pytest.importorskip("tenseal", reason="the extra 'he' is not installed")
    masked = train(make(privacy=CLIENT, protection={**SECAGG, "value_bits": 12}), tmp_path / "masked")[1]
    sealed = train(
        make(privacy=CLIENT, protection={"kind": "bfv", "threshold": 3, "value_bits": 12}),
        tmp_path / "sealed",
    )[1]
    assert torch.equal(masked.state.vector, sealed.state.vector)


@pytest.mark.parametrize(
    "privacy", [{"unit": "none", "reason": "test data"}, RECORD], ids=["plain", "record"]
)
def test_workers_change_nothing_but_speed(privacy: dict[str, object], tmp_path: Path) -> None:
    one = train(make(privacy=privacy, protection=SECAGG), tmp_path / "one")[1]
    three = train(make(privacy=privacy, protection=SECAGG, speed={"workers": 3}), tmp_path / "three")[1]
    assert torch.equal(one.state.vector, three.state.vector)


def test_speed_settings_leave_the_mechanism_alone() -> None:
    base = prepared(make(privacy=RECORD))
    fast = prepared(make(privacy=RECORD, speed={"workers": 2, "microbatch": 3, "threads": 1}))
    other = prepared(make(privacy={**RECORD, "clip_norm": 2.0}))
    assert base.mechanism.digest() == fast.mechanism.digest() != other.mechanism.digest()


def test_survivors_only(tmp_path: Path) -> None:
    """With dropouts the sum is that of the survivors: equal to an open run that lost the same clients."""
    dropout = {"rate": 0.4, "stages": ["advertise", "share", "train", "upload", "unmask"]}
    federation = {
        "rounds": 4,
        "cohort": 6,
        "dropout": dropout,
        "lifecycle": {"kind": "finetune", "local_steps": 1, "batch_size": 8, "learning_rate": 0.1},
    }
    runs: dict[str, tuple[RoundRecord, ...]] = {}
    vectors = {}
    for name, kind in {"open": "none", "masked": "secagg"}.items():
        made = make(
            seed=2, task={"clients": 6}, federation=federation, protection={"kind": kind, "threshold": 4}
        )
        _, trained = train(made, tmp_path / name)
        runs[name], vectors[name] = trained.records, trained.state.vector
    opened = [record for record in runs["masked"] if not record.aborted]
    assert opened, "the seed loses too many clients for this test to show anything"
    assert any(len(record.survivors) < 6 for record in opened)
    same = [record.round for record in opened]
    assert [r.survivors for r in runs["masked"] if r.round in same] == [
        r.survivors for r in runs["open"] if r.round in same
    ]
    if len(opened) == 4:
        assert torch.equal(vectors["open"], vectors["masked"])
