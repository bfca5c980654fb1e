"""The mean of the models of the last rounds: post-processing of what was released, and less noise for
free.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ffm_secure.strategies.base import ServerState

SUM, COUNT = "tail.sum", "tail.count"


def average_tail(
    before: ServerState, after: ServerState, *, last: int, round: int, rounds: int
) -> ServerState:
    """Return the state after a round; after the last one its vector is the mean over the last `last` rounds.

    The rounds before the last are learned from as they are: the sum is kept beside the server's state. A
    round that was given up adds nothing.
    """
    if last < 2 or round <= rounds - last:
        return after
    total = before.optimizer_state.get(SUM, torch.zeros_like(after.vector, dtype=torch.float64))
    count = before.optimizer_state.get(COUNT, torch.zeros((), dtype=torch.float64))
    if after is not before:
        total, count = total + after.vector.double(), count + 1
    slots = {name: value for name, value in after.optimizer_state.items() if name not in (SUM, COUNT)}
    if round < rounds:
        return replace(after, optimizer_state={**slots, SUM: total, COUNT: count})
    if not float(count):
        return after
    return replace(after, vector=(total / count).to(after.vector.dtype), optimizer_state=slots)
