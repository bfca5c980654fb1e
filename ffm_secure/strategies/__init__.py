"""What clients send, and how the mean of it becomes the next global model: pure functions of vectors.

A strategy of its own is one file with a subclass of `Strategy` and one line in `registry.STRATEGIES`; a whole
one stands in docs/extending.md.
"""

from __future__ import annotations

from ffm_secure.config.run_file import Strategy as StrategyConfig
from ffm_secure.registry import STRATEGIES
from ffm_secure.strategies.base import ServerState, Strategy
from ffm_secure.trainable.base import TrainableModel


def build(config: StrategyConfig, trainable: TrainableModel | None = None, *, seed: int = 0) -> Strategy:
    """Return the strategy a run file names; the rules for LoRA need to know what is trained."""
    strategy: Strategy = STRATEGIES.load(config.kind).build(config, trainable, seed=seed)
    return strategy


def merges_into_base(config: StrategyConfig) -> bool:
    """Tell whether a strategy changes the weights beside the adapters, so that they must be in the global
    vector.
    """
    merges: bool = STRATEGIES.load(config.kind).merges_into_base
    return merges


__all__ = ["STRATEGIES", "ServerState", "Strategy", "build", "merges_into_base"]
