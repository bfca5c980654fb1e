"""How a sum becomes the next global model: pure functions of (state, mean change)."""

from __future__ import annotations

from ffm_secure.config import Strategy as StrategyConfig
from ffm_secure.strategies.adaptive import ServerOptimizer
from ffm_secure.strategies.average import Average, ServerState, Strategy

STRATEGIES = {
    "average": Average,
    "avgm": ServerOptimizer,
    "adam": ServerOptimizer,
    "yogi": ServerOptimizer,
    "adagrad": ServerOptimizer,
}


def build(config: StrategyConfig) -> Strategy:
    """Return the strategy a run file names."""
    return STRATEGIES[config.kind](config)


__all__ = ["STRATEGIES", "Average", "ServerOptimizer", "ServerState", "Strategy", "build"]
