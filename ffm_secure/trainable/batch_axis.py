"""Give layers that see batch and places as one axis their batch axis back, so that each sample keeps its own
gradient.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ffm_secure.foreign import Configuration
from ffm_secure.models.dual_encoder import by_picture

_FLAT = {
    "opt": ("OPTDecoderLayer", ("final_layer_norm", "fc1", "fc2"))
}  # families that merge the axes, and where


def restore_batch_axis(model: nn.Module) -> None:
    """Hook the layers of a family that merges [batch, places, width] to [batch * places, width] before some
    modules.

    The hooks keep nothing but a number on each module, so that copies of the model work on their own.
    """
    by_picture(model)
    config: Configuration = getattr(model, "config", None)
    kind, names = _FLAT.get(str(getattr(config, "model_type", "")), ("", ()))
    for layer in model.modules():
        if type(layer).__name__ != kind:
            continue
        layer.register_forward_pre_hook(_note_places, with_kwargs=True)
        for name in names:
            inner = layer.get_submodule(name)
            inner.register_forward_pre_hook(_apart)
            inner.register_forward_hook(_together)


def _note_places(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if args:
        hidden: Tensor = args[0]
    else:
        hidden = kwargs["hidden_states"]
    for name in _FLAT["opt"][1]:
        layer.get_submodule(name).__dict__["places_of_a_sample"] = hidden.shape[1]


def _apart(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    hidden, *rest = args
    module.__dict__["was_merged"] = hidden.ndim == 2
    if hidden.ndim != 2:
        return args
    places, width = module.__dict__["places_of_a_sample"], hidden.shape[-1]
    return (hidden.reshape(-1, places, width), *rest)


def _together(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    if module.__dict__["was_merged"]:
        return output.flatten(0, 1)
    return output
