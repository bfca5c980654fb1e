"""Copy a model without its numbers: most attacks find within milliseconds that they do not fit, and copying
the weights of a real model takes longer than that.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Collection

import torch
from torch import nn

# What nobody can change.
_CONSTANT = (type(None), bool, int, float, str, bytes, type, torch.dtype, torch.device)
_EMPTY = (dict, list, set, OrderedDict)
_WAYS = ("__deepcopy__", "__copy__", "__getstate__", "__reduce__", "__reduce_ex__", "__setstate__")


def sharing_copy(model: nn.Module, *, own: Collection[str] = ()) -> nn.Module:
    """Return a copy of a model whose parameters share their numbers with it, but for those named in `own`.

    Buffers, hooks and all other state are the copy's own. Assumes: whoever gets the copy replaces shared
    numbers, and never writes into them.
    """
    twins: dict[int, object] = {}
    for name, value in model.named_parameters():
        if name not in own and type(value) is nn.Parameter:
            twins[id(value)] = nn.Parameter(value.detach(), requires_grad=value.requires_grad)
    modules = list(model.modules())
    if not all(map(_plain, set(map(type, modules)))):
        return copy.deepcopy(model, twins)
    for module in modules:
        twins[id(module)] = type(module).__new__(type(module))
    for module in modules:
        state = vars(twins[id(module)])
        for name, value in vars(module).items():
            state[name] = _twin(value, twins)
    twin = twins[id(model)]
    assert isinstance(twin, nn.Module)
    return twin


def _plain(kind: type[nn.Module]) -> bool:
    """Say whether a module is its attributes and nothing else, so that copying them copies it."""
    return all(getattr(kind, way, None) is getattr(nn.Module, way, None) for way in _WAYS)


def _twin(value: object, twins: dict[int, object]) -> object:
    """Copy one attribute; whatever it holds of the model becomes what the copy holds."""
    if isinstance(value, _CONSTANT):
        return value
    if id(value) in twins:
        return twins[id(value)]
    if type(value) in _EMPTY and not value:  # most of a module are hooks that it does not have
        twins[id(value)] = type(value)()
    elif type(value) is dict:
        twins[id(value)] = {name: _twin(part, twins) for name, part in value.items()}
    else:
        return copy.deepcopy(value, twins)
    return twins[id(value)]
