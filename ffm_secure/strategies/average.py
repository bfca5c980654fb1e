"""Federated averaging, and the state every strategy steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ffm_secure.config import Strategy as StrategyConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerState:
    """Hold the global model after `round` rounds: the trained vector and the server optimizer's own tensors."""

    round: int
    vector: Tensor  # float32 [d]
    slots: Mapping[str, Tensor] = field(default_factory=dict)


class Strategy(Protocol):
    """Turn the mean change of a round into the next state; never looks at a single client."""

    def start(self, vector: Tensor) -> ServerState:
        """Return the state before the first round."""

    def step(self, state: ServerState, mean_change: Tensor) -> ServerState:
        """Return the state after a round; `mean_change` is float64 [d], new minus old."""


class Average:
    """Add the mean change of the clients, scaled by the server's learning rate.

    Source: McMahan et al. 2017, arXiv:1602.05629, Algorithm 1 (learning rate 1).
    """

    def __init__(self, config: StrategyConfig) -> None:
        self.learning_rate = config.learning_rate

    def start(self, vector: Tensor) -> ServerState:
        """Return the state before the first round."""
        return ServerState(round=0, vector=vector.detach().clone())

    def step(self, state: ServerState, mean_change: Tensor) -> ServerState:
        """Return the state after a round."""
        vector = (state.vector.double() + self.learning_rate * mean_change).to(torch.float32)
        return ServerState(round=state.round + 1, vector=vector)
