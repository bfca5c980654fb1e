"""Server optimizers: the mean change of a round is treated as a negative gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ffm_secure.config.run_file import Strategy as StrategyConfig
from ffm_secure.strategies.base import ServerState, Strategy


class ServerOptimizer(Strategy):
    """Step the global model with momentum, Adam, Yogi or Adagrad on the server.

    Momentum and Adagrad are torch.optim's own; Adam and Yogi follow the paper, which has no bias correction,
    so torch.optim would be another algorithm.

    Source: Reddi et al. 2021, arXiv:2003.00295, Algorithm 2; Hsu et al. 2019, arXiv:1909.06335 (FedAvgM).
    """

    def __init__(self, config: StrategyConfig) -> None:
        self.config = config

    def start(self, vector: Tensor) -> ServerState:
        """Return the state before the first round."""
        names = {
            "avgm": ("momentum",),
            "adagrad": ("sum",),
            "adam": ("mean", "square"),
            "yogi": ("mean", "square"),
        }
        floor = {"square": self.config.tau**2, "sum": self.config.tau**2}
        optimizer_state = {}
        for name in names[self.config.kind]:
            optimizer_state[name] = torch.full_like(vector, floor.get(name, 0.0), dtype=torch.float64)
        return ServerState(round=0, vector=vector.detach().clone(), optimizer_state=optimizer_state)

    def step_by_mean(self, state: ServerState, mean_message: Tensor) -> ServerState:
        """Return the state after a round."""
        if self.config.kind in ("avgm", "adagrad"):
            vector, optimizer_state = self._torch_step(state, mean_message)
        else:
            vector, optimizer_state = self._moment_step(state, mean_message)
        return ServerState(
            round=state.round + 1, vector=vector.to(torch.float32), optimizer_state=optimizer_state
        )

    def _torch_step(self, state: ServerState, change: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        weight = torch.nn.Parameter(state.vector.double())
        weight.grad = -change
        config = self.config
        optimizer: torch.optim.Optimizer
        if config.kind == "avgm":
            optimizer = torch.optim.SGD([weight], lr=config.learning_rate, momentum=config.momentum)
            slot, key = "momentum", "momentum_buffer"
        else:
            optimizer = torch.optim.Adagrad([weight], lr=config.learning_rate, eps=config.tau)
            slot, key = "sum", "sum"
        optimizer.state[weight][key] = state.optimizer_state[slot].clone()
        optimizer.step()
        return weight.detach(), {slot: optimizer.state[weight][key].detach()}

    def _moment_step(self, state: ServerState, change: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        mean = config.momentum * state.optimizer_state["mean"] + (1 - config.momentum) * change
        old, squared = state.optimizer_state["square"], change.square()
        if config.kind == "adam":
            square = config.beta2 * old + (1 - config.beta2) * squared
        else:
            square = old - (1 - config.beta2) * squared * torch.sign(old - squared)
        vector = state.vector.double() + config.learning_rate * mean / (square.sqrt() + config.tau)
        return vector, {"mean": mean, "square": square}
