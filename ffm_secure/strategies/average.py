"""Federated averaging."""

from __future__ import annotations

import torch
from torch import Tensor

from ffm_secure.config.run_file import Strategy as StrategyConfig
from ffm_secure.strategies.base import ServerState, Strategy


class Average(Strategy):
    """Add the mean change of the clients, scaled by the server's learning rate.

    Source: McMahan et al. 2017, arXiv:1602.05629, Algorithm 1 (learning rate 1).
    """

    def __init__(self, config: StrategyConfig) -> None:
        self.learning_rate = config.learning_rate

    def step_by_mean(self, state: ServerState, mean_message: Tensor) -> ServerState:
        """Return the state after a round."""
        vector = (state.vector.double() + self.learning_rate * mean_message).to(torch.float32)
        return ServerState(round=state.round + 1, vector=vector)
