"""A parameter every sample sees as its own copy, so that one backward pass yields one gradient per sample."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ExpandedParameter(nn.Module):
    """Hold one parameter of shape `[*shape]` and hand it out as `[batch, *shape]`.

    The expanded view costs no memory. Its gradient is the stack of per-sample gradients, which is what soft
    prompts, prefixes, scaling vectors and the learned constants of prompt generators need and what a prompt
    fed as a batch of one can never give.

    Guarantee: row b of the output depends on the parameter alone; `PerSampleEngine` reads the gradient row by
    row.
    """

    value: nn.Parameter

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value)

    def forward(self, batch_size: int) -> Tensor:
        """Return the parameter as `[batch_size, *shape]` without copying it."""
        return self.value.unsqueeze(0).expand(batch_size, *self.value.shape)

    def extra_repr(self) -> str:
        """Name the shape in the printed model."""
        return f"shape={tuple(self.value.shape)}"


def expanded_normal(*shape: int, std: float, generator: torch.Generator | None = None) -> ExpandedParameter:
    """Open an `ExpandedParameter` filled with N(0, std^2)."""
    return ExpandedParameter(torch.randn(shape, generator=generator) * std)
