"""The models of the last rounds, averaged into the last one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ffm_secure.config import compatibility
from ffm_secure.errors import PlanRefused
from ffm_secure.strategies.base import ServerState
from ffm_secure.strategies.tail import average_tail
from tests.federation.helpers import make, train


def state(value: float, number: int) -> ServerState:
    """Return a state whose vector is one number."""
    return ServerState(round=number, vector=torch.full((2,), value))


def test_the_last_model_is_the_mean_of_the_last_rounds_and_earlier_ones_are_as_they_were() -> None:
    """Five rounds, the last three averaged; a round that was given up adds nothing."""
    before, vectors = state(0.0, 0), []
    for number, value in enumerate((1.0, 2.0, 3.0, None, 7.0), start=1):
        if value is None:
            after = before
        else:
            after = replace(before, vector=torch.full((2,), value), round=before.round + 1)
        before = average_tail(before, after, last=3, round=number, rounds=5)
        vectors.append(float(before.vector[0]))
    assert vectors == [1.0, 2.0, 3.0, 3.0, 5.0]
    assert not before.optimizer_state


def test_noise_that_rounds_do_not_share_falls_with_the_rounds_averaged() -> None:
    """Sixteen models around one point: their mean is four times as near."""
    torch.manual_seed(2)
    before = ServerState(round=0, vector=torch.zeros(4000))
    for number in range(1, 17):
        after = replace(before, vector=torch.randn(4000), round=number)
        before = average_tail(before, after, last=16, round=number, rounds=16)
    assert float(before.vector.std()) == pytest.approx(0.25, rel=0.05)


def test_a_run_ends_on_the_mean_and_learns_from_the_models_themselves(tmp_path: Path) -> None:
    """With and without averaging the rounds before the last are the same, the last is not."""
    plain = make(federation={"rounds": 3})
    averaged = make(federation={"rounds": 3, "strategy": {"kind": "average", "average_last": 2}})
    _, first = train(plain, tmp_path / "plain")
    _, second = train(averaged, tmp_path / "averaged")
    assert first.records[1].loss == pytest.approx(second.records[1].loss, abs=1e-6)
    assert not torch.equal(first.state.vector, second.state.vector)
    assert "tail.sum" not in second.state.optimizer_state


def test_a_question_asked_first_counts_as_no_round_of_learning(tmp_path: Path) -> None:
    """The mean is over the last rounds of learning, whatever was asked before them."""

    def final(rounds: int, last: int) -> torch.Tensor:
        lifecycle = {
            "kind": "finetune",
            "local_steps": 2,
            "batch_size": 8,
            "learning_rate": 0.1,
            "start": "class_sums",
        }
        strategy = {"kind": "average", "average_last": last}
        config = make(federation={"rounds": rounds, "lifecycle": lifecycle, "strategy": strategy})
        _, result = train(config, tmp_path / f"{rounds}-{last}")
        assert [record.query for record in result.records] == ["class_sums"] + ["learn"] * rounds
        return result.state.vector

    mean = (final(2, 0).double() + final(3, 0).double()) / 2
    torch.testing.assert_close(final(3, 2).double(), mean, atol=1e-6, rtol=0)


def test_rules_that_turn_factors_are_refused() -> None:
    """Their numbers mean something else in every round."""
    made = make(federation={"rounds": 3, "strategy": {"kind": "rolora", "average_last": 2}})
    with pytest.raises(PlanRefused, match="their mean is no model"):
        compatibility.check(made)
