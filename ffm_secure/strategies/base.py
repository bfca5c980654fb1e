"""What a strategy is, and the state every strategy steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ffm_secure.aggregation.base import Aggregate, View
from ffm_secure.config.run_file import Strategy as StrategyConfig
from ffm_secure.trainable.base import TrainableModel


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerState:
    """Hold the global model after `round` rounds:
    the trained vector and the server optimizer's own tensors.
    """

    round: int
    vector: Tensor  # float32 [d]
    optimizer_state: Mapping[str, Tensor] = field(default_factory=dict)


class Strategy:
    """Say what clients train and send, and turn the mean of what they sent into the next state.

    Here everything is trained and the change itself is sent. `linear` rules need only the sum, so what is
    sent may be masked or encrypted.
    Guarantee: `message` is a function of one client's vectors, `step` of the mean message: neither looks at a
    single client from outside.
    """

    needs: ClassVar[View] = "sum"  # the view of the updates that `step` gets
    linear: ClassVar[bool] = True
    merges_into_base: ClassVar[bool] = (
        False  # needs the weights beside the adapters as part of the global vector
    )
    home: Sequence[slice] = ()  # places of the numbers that stay with each client between rounds
    note: str = ""  # one line for the plan

    def __init__(self, config: StrategyConfig) -> None:
        self.config = config

    @classmethod
    def build(cls, config: StrategyConfig, trainable: TrainableModel | None, *, seed: int) -> Strategy:
        """Make the strategy of a run; most need neither what is trained nor the seed."""
        return cls(config)

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

    def step(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """Return the state after a round; a rule that wants groups overrides this, and says so in `needs`."""
        return self.step_by_mean(state, aggregate.mean)

    def step_by_mean(self, state: ServerState, mean_message: Tensor) -> ServerState:
        """Return the state after a round; `mean_message` is float64 [d]."""
        raise NotImplementedError

    def after_public(self, vector: Tensor, phase: int) -> Tensor:
        """Return the vector to broadcast after the server learned by itself in round `phase`; the model is
        the same one.
        """
        return vector

    def moved(self, before: Tensor, after: Tensor) -> Tensor:
        """Return what to remember of a change of the global vector, so that `cosine` can compare it with
        another.
        """
        return after - before

    def cosine(self, first: Tensor, second: Tensor) -> float | None:
        """Return the cosine between two changes that `moved` returned; None where they cannot be compared."""
        return float(torch.nn.functional.cosine_similarity(first.double(), second.double(), dim=0))
