"""Adam on the server for sums with noise of known size: the noise is taken out of the second moment."""

from __future__ import annotations

import torch
from torch import Tensor

from ffm_secure.aggregation.base import Aggregate
from ffm_secure.config.run_file import Strategy as StrategyConfig
from ffm_secure.strategies.base import ServerState, Strategy


class DebiasedAdam(Strategy):
    """Step by the mean change over the root of its second moment *less the variance of the noise*.

    Noise of variance V makes every second moment V larger, and plain Adam then divides small gradients by the
    noise: all coordinates move alike. Where a round's noise is known (`Aggregate.noise_variance`), its
    running
    mean is kept beside the second moment and subtracted, above a floor of tau^2. With no noise this is Adam
    with bias correction.

    Guarantee: post-processing of opened sums and public constants; nothing is charged for it.
    Source: Tang, Shpilevskiy, Lécuyer, arXiv 2312.14334, Algorithm 1 (DP-AdamBC).
    """

    def __init__(self, config: StrategyConfig) -> None:
        self.config = config

    def start(self, vector: Tensor) -> ServerState:
        """Return the state before the first round."""
        empty = torch.zeros_like(vector, dtype=torch.float64)
        slots = {"mean": empty, "square": empty.clone(), "noise": torch.zeros((), dtype=torch.float64)}
        return ServerState(round=0, vector=vector.detach().clone(), optimizer_state=slots)

    def step(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """Return the state after a round."""
        return self._step(state, aggregate.mean, aggregate.noise_variance)

    def step_by_mean(self, state: ServerState, mean_message: Tensor) -> ServerState:
        """Return the state after a round whose noise nobody knows: none is taken out."""
        return self._step(state, mean_message, 0.0)

    def _step(self, state: ServerState, change: Tensor, noise_variance: float) -> ServerState:
        config, slots, number = self.config, state.optimizer_state, state.round + 1
        mean = config.momentum * slots["mean"] + (1 - config.momentum) * change
        square = config.beta2 * slots["square"] + (1 - config.beta2) * change.square()
        noise = config.beta2 * slots["noise"] + (1 - config.beta2) * noise_variance
        forgotten = 1 - config.beta2**number  # how much of the moments the zeros of the start do not hold
        signal = ((square - noise) / forgotten).clamp_min(config.tau**2)
        direction = mean / (1 - config.momentum**number) / signal.sqrt()
        vector = (state.vector.double() + config.learning_rate * direction).to(torch.float32)
        slots = {"mean": mean, "square": square, "noise": noise}
        return ServerState(round=number, vector=vector, optimizer_state=slots)
