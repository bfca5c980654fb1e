"""One gradient per example from one pass over many: what the inputs and slopes of linear layers add up to.

For z = W x + b over the places t of an example, dW = sum_t delta_t x_t^T and db = sum_t delta_t, so the pass
that gives the gradient of all examples gives that of each.
Source: Goodfellow, "Efficient Per-Example Gradient Computations", 2015.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

_SAME = 1e-4  # of the gradient of all examples: how far the sum of those of each may lie from it


@dataclass(frozen=True, slots=True, kw_only=True)
class _Calls:
    """Hold what a linear layer was fed and what it answered, call by call."""

    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


def gradients_of_each(
    model: nn.Module, names: tuple[str, ...], losses: Callable[[], Tensor], count: int
) -> Tensor | None:
    """Return the gradient of each of `count` losses by the named parameters: shape (count, numbers).

    `losses` runs the model on all examples at once. None where parameters lie in other layers than linear
    ones, or are used past them. Guarantee: what is returned adds up to the gradient of all losses. Assumes:
    no example enters the loss of another, as in evaluation mode.
    """
    parameters = dict(model.named_parameters())
    layers = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
    if not all(isinstance(layer, nn.Linear) for layer in layers.values()):
        return None
    wanted = [parameters[name].requires_grad_(True) for name in names]
    with torch.enable_grad(), _recorded(set(layers.values())) as calls:
        total = losses().sum()
        answers = [output for one in calls.values() for output in one.outputs]
        if any(len(output) != count or output.ndim < 2 for output in answers):
            return None
        slopes = torch.autograd.grad(total, [*wanted, *answers], allow_unused=True)
    by_answer = {}
    for answer, slope in zip(answers, slopes[len(wanted) :], strict=True):
        by_answer[id(answer)] = slope
    parts = []
    for name, parameter, whole in zip(names, wanted, slopes, strict=False):
        zeros = parameter.new_zeros(count, *parameter.shape)
        each = _of_one_parameter(name, calls[layers[name]], by_answer, zeros)
        whole = torch.zeros_like(parameter) if whole is None else whole
        if float((each.sum(0) - whole).norm()) > _SAME * float(whole.norm()):
            return None
        parts.append(each.flatten(1))
    return torch.cat(parts, dim=1)


def _of_one_parameter(name: str, calls: _Calls, slopes: Mapping[int, Tensor | None], total: Tensor) -> Tensor:
    """Add up what every call of a layer says of one parameter, onto zeros (count, *shape)."""
    for fed, answer in zip(calls.inputs, calls.outputs, strict=True):
        slope = slopes[id(answer)]
        if slope is None:
            continue
        slope = slope.reshape(len(slope), -1, slope.shape[-1])
        if name.endswith(".bias"):
            total = total + slope.sum(1)
        else:
            total = total + slope.transpose(1, 2) @ fed.detach().reshape(len(fed), -1, fed.shape[-1])
    return total


@contextmanager
def _recorded(layers: set[nn.Module]) -> Iterator[dict[nn.Module, _Calls]]:
    """Record what layers are fed and answer."""
    calls = {layer: _Calls() for layer in layers}

    def keep(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls[layer].inputs.append(inputs[0])
        calls[layer].outputs.append(output)

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
