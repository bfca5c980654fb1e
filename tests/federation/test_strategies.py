"""Server strategies against their slow, obvious definitions and against torch.optim."""

from __future__ import annotations

import pytest
import torch

from ffm_secure.aggregation import Aggregate, GroupMean
from ffm_secure.config.run_file import Strategy
from ffm_secure.strategies import STRATEGIES, build

CHANGES = [
    torch.tensor([0.5, -1.0, 0.0], dtype=torch.float64),
    torch.tensor([0.25, 2.0, -1.0], dtype=torch.float64),
]
START = torch.tensor([1.0, 2.0, 3.0])


def run(config: Strategy) -> torch.Tensor:
    strategy = build(config)
    state = strategy.start(START)
    for change in CHANGES:
        state = strategy.step_by_mean(state, change)
    assert state.round == 2
    return state.vector.double()


def test_average_adds_the_mean_change() -> None:
    assert torch.allclose(
        run(Strategy(kind="average", learning_rate=0.5)), START.double() + 0.5 * (CHANGES[0] + CHANGES[1])
    )


def test_momentum_is_the_textbook_recursion() -> None:
    velocity, weight = torch.zeros(3).double(), START.double()
    for change in CHANGES:
        velocity = 0.9 * velocity + change
        weight = (weight + velocity).float().double()
    assert torch.allclose(run(Strategy(kind="avgm", learning_rate=1.0, momentum=0.9)), weight)


@pytest.mark.parametrize("kind", ["adam", "yogi", "adagrad"])
def test_adaptive_strategies_follow_algorithm_2(kind: str) -> None:
    rate, tau, beta1, beta2 = 0.1, 1e-2, 0.9, 0.99
    mean, square, weight = [0.0] * 3, [tau**2] * 3, [float(value) for value in START]
    for change in CHANGES:
        for i, delta in enumerate(change.tolist()):
            mean[i] = beta1 * mean[i] + (1 - beta1) * delta
            if kind == "adagrad":
                square[i] += delta**2
            elif kind == "adam":
                square[i] = beta2 * square[i] + (1 - beta2) * delta**2
            else:
                sign = (square[i] > delta**2) - (square[i] < delta**2)
                square[i] -= (1 - beta2) * delta**2 * sign
            numerator = delta if kind == "adagrad" else mean[i]
            weight[i] += rate * numerator / (square[i] ** 0.5 + tau)
    found = run(Strategy(kind=kind, learning_rate=rate, tau=tau, momentum=beta1, beta2=beta2))
    assert torch.allclose(found, torch.tensor(weight, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in STRATEGIES if not STRATEGIES.has(kind, "lora")])
def test_every_strategy_is_pure_and_moves_with_the_change(kind: str) -> None:
    strategy = build(Strategy(kind=kind))
    state = strategy.start(START)
    aggregate = Aggregate.of_mean(CHANGES[0])
    if strategy.needs == "groups":  # seven groups, one of which says the opposite
        groups = [GroupMean(survivors=(site,), mean=CHANGES[0]) for site in range(6)]
        groups.append(GroupMean(survivors=(6,), mean=-100 * CHANGES[0]))
        aggregate = Aggregate(groups=tuple(groups), reference=CHANGES[0])
    first, second = strategy.step(state, aggregate), strategy.step(state, aggregate)
    assert torch.equal(first.vector, second.vector)
    assert torch.equal(state.vector, START)
    assert (first.vector - START)[0] > 0 > (first.vector - START)[1]
    assert (first.vector - START)[2] == 0
