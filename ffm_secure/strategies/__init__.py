"""What clients send, and how the mean of it becomes the next global model: pure functions of vectors."""

from __future__ import annotations

from typing import Any

from ffm_secure.config.run_file import Strategy as StrategyConfig
from ffm_secure.strategies.adaptive import ServerOptimizer
from ffm_secure.strategies.average import Average, ServerState, Strategy
from ffm_secure.strategies.lora_rules import LORA_RULES

STRATEGIES = {
    "average": Average,
    "avgm": ServerOptimizer,
    "adam": ServerOptimizer,
    "yogi": ServerOptimizer,
    "adagrad": ServerOptimizer,
}


def build(config: StrategyConfig, trainable: Any = None, *, seed: int = 0) -> Strategy:
    """Return the strategy a run file names; the rules for LoRA need to know what is trained."""
    if config.kind in LORA_RULES:
        return LORA_RULES[config.kind](config, trainable, seed=seed)
    return STRATEGIES[config.kind](config)


def folds(config: StrategyConfig) -> bool:
    """Tell whether a strategy changes the weights beside the adapters, so that they must be part of the global vector."""
    return config.kind in LORA_RULES and LORA_RULES[config.kind].folds


__all__ = [
    "LORA_RULES",
    "STRATEGIES",
    "Average",
    "ServerOptimizer",
    "ServerState",
    "Strategy",
    "build",
    "folds",
]
