"""Federated averaging, and the state every strategy steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ffm_secure.config.run_file import Strategy as StrategyConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerState:
    """Hold the global model after `round` rounds: the trained vector and the server optimizer's own tensors."""

    round: int
    vector: Tensor  # float32 [d]
    optimizer_state: Mapping[str, Tensor] = field(default_factory=dict)


class Strategy:
    """Say what clients train and send, and turn the mean of what they sent into the next state.

    Here everything is trained and the change itself is sent. `linear` rules need only the sum, so what is sent may be masked
    or encrypted.
    Guarantee: `message` is a function of one client's vectors, `step` of the mean message: neither looks at a single client
    from outside.
    """

    linear: ClassVar[bool] = True
    folds: ClassVar[bool] = False  # needs the weights beside the adapters as part of the global vector
    home: Sequence[slice] = ()  # places of the numbers that stay with each client between rounds
    note: ClassVar[str] = ""  # one line for the plan

    def trains(self, step: int) -> tuple[str, ...] | None:
        """Name the tensors that get gradients in this step; None for all."""
        return None

    def sends(self, step: int) -> tuple[str, ...] | None:
        """Name the tensors whose change is sent, as it is or as a product; None for all."""
        return self.trains(step)

    def size(self, trained: int) -> int:
        """Return how many numbers a client sends, of `trained` numbers of the global vector."""
        return trained

    def mask(self, client: int) -> Tensor | None:
        """Return [d] with 0 where a client's numbers stay at zero; None where all are used."""
        return None

    def message(self, old: Tensor, change: Tensor, step: int) -> Tensor:
        """Return what a client sends of its change [d] from the broadcast vector [d]."""
        return change

    def start(self, vector: Tensor) -> ServerState:
        """Return the state before the first round."""
        return ServerState(round=0, vector=vector.detach().clone())

    def step(self, state: ServerState, mean_message: Tensor) -> ServerState:
        """Return the state after a round; `mean_message` is float64."""
        raise NotImplementedError

    def after_public(self, vector: Tensor, phase: int) -> Tensor:
        """Return the vector to broadcast after the server learned by itself in round `phase`; the model is the same one."""
        return vector

    def moved(self, before: Tensor, after: Tensor) -> Tensor:
        """Return what to remember of a change of the global vector, so that `cosine` can compare it with another."""
        return after - before

    def cosine(self, first: Tensor, second: Tensor) -> float | None:
        """Return the cosine between two changes that `moved` returned; None where they cannot be compared."""
        return float(torch.nn.functional.cosine_similarity(first.double(), second.double(), dim=0))


class Average(Strategy):
    """Add the mean change of the clients, scaled by the server's learning rate.

    Source: McMahan et al. 2017, arXiv:1602.05629, Algorithm 1 (learning rate 1).
    """

    def __init__(self, config: StrategyConfig) -> None:
        self.learning_rate = config.learning_rate

    def step(self, state: ServerState, mean_message: Tensor) -> ServerState:
        """Return the state after a round."""
        vector = (state.vector.double() + self.learning_rate * mean_message).to(torch.float32)
        return ServerState(round=state.round + 1, vector=vector)
