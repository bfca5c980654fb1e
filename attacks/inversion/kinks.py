"""Let the derivative of a gradient see the kinks of rectifiers.

A gradient jumps where a rectified unit switches. Automatic differentiation of that gradient leaves the jumps
out, so that matching on a ReLU network descends on a part of its objective only. Here values and gradients
stay exact and only the derivative of the switch is replaced: by a bump of stated width around zero, as
spiking networks are trained.
Source of the replacement: Neftci, Mostafa, Zenke, "Surrogate Gradient Learning in Spiking Neural Networks",
2019.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from attacks.foreign import AutogradContext


class _Switch(torch.autograd.Function):
    """One where a value is positive, else zero;
    its derivative is a parabola's density of the told deviation.
    """

    @staticmethod
    def forward(context: AutogradContext, values: Tensor, width: float) -> Tensor:
        context.save_for_backward(values)
        context.width = width
        return (values > 0).to(values.dtype)

    @staticmethod
    def backward(context: AutogradContext, *slopes: Tensor) -> tuple[Tensor, None]:
        (values,) = context.saved_tensors
        reach = math.sqrt(5.0) * context.width * max(float(values.norm()) / math.sqrt(values.numel()), 1e-12)
        bump = torch.addcmul(values.new_ones(()), values, values, value=-1.0 / reach**2).clamp_min(0.0)
        return slopes[0] * bump * (0.75 / reach), None


class _Rectify(torch.autograd.Function):
    """The rectifier, with a gradient whose own derivative includes that of the switch."""

    @staticmethod
    def forward(context: AutogradContext, values: Tensor, width: float) -> Tensor:
        context.save_for_backward(values)
        context.width = width
        return values.clamp_min(0.0)

    @staticmethod
    def backward(context: AutogradContext, *slopes: Tensor) -> tuple[Tensor, None]:
        (values,) = context.saved_tensors
        return slopes[0] * _Switch.apply(values, context.width), None  # type: ignore[no-untyped-call]


class SeenRectifier(nn.Module):
    """A rectifier whose switching the second derivative sees, `width` times the root mean square of its
    inputs wide.
    """

    def __init__(self, width: float) -> None:
        super().__init__()
        self.width = width

    def forward(self, values: Tensor) -> Tensor:
        """Return the positive part."""
        rectified: Tensor = _Rectify.apply(values, self.width)  # type: ignore[no-untyped-call]
        return rectified


def see_kinks(model: nn.Module, width: float) -> nn.Module:
    """Replace every ReLU module of a private copy of a model by one whose kink is seen.

    Guarantee: outputs and gradients of the model do not change; only derivatives of gradients do.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.ReLU) and name:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, SeenRectifier(width))
    return model
