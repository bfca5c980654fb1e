"""Per-sample gradients for layers that model libraries derive from torch's own: scaled and positional
lookups, frozen norms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses.dp.layers import Cover, Recorder, _embedding, _expand_flat, _forward, _is, _linear
from defenses.errors import NotPrivateError
from defenses.foreign import LibraryLayer, LibraryObject


def cover_subclass(module: nn.Module, recorder: Recorder) -> Cover | None:
    """Return the cover of a derived layer, or None when this kind of module is not known."""
    if "forward" in module.__dict__:
        return None  # somebody already replaced this module's forward; what it does is not known
    if isinstance(module, nn.Embedding):
        return _cover_lookup(module, recorder)
    if _is(module, "transformers.models.falcon.modeling_falcon", "FalconLinear"):
        return _cover_falcon(module, recorder)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return _cover_frozen_norm(module, recorder)
    return None


class _Watched(Tensor):
    """A table that may be looked up and asked for its type and place, and nothing else."""

    parameter: nn.Parameter
    recorder: Recorder
    padding: int | None

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> LibraryObject:
        if func is F.embedding:
            indices, table = args[0], args[1]
            return _embedding(table.recorder.spread(indices), table.parameter, table.padding, table.recorder)
        if getattr(func, "__name__", "") == "__get__":
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise NotPrivateError(
            f"a table of shape {tuple(_plain(args))} is used by {getattr(func, '__name__', func)}, not "
            "looked up alone; its gradient per sample is not known"
        )


def _plain(args: Sequence[Any]) -> torch.Size:
    with torch._C.DisableTorchFunctionSubclass():
        return next((value.shape for value in args if isinstance(value, _Watched)), torch.Size(()))


def _cover_lookup(module: nn.Embedding, recorder: Recorder) -> Cover | None:
    """Run the module's own forward (scaling, positions with an offset) and record the one lookup inside it.

    Guarantee: any other use of the table inside the forward is an error.
    """
    own = dict(module.named_parameters(recurse=False))
    if own.keys() != {"weight"} or module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        return None
    original, weight, padding = module.forward, own["weight"], module.padding_idx

    def forward(*args: object, **kwargs: object) -> Tensor:
        watched: _Watched = weight.detach().as_subclass(_Watched)
        watched.parameter, watched.recorder, watched.padding = weight, recorder, padding
        module.__dict__["weight"] = watched
        try:
            return original(*args, **kwargs)  # type: ignore[arg-type]
        finally:
            del module.__dict__["weight"]

    return _forward(module, forward, own.values())


def _cover_falcon(module: LibraryLayer, recorder: Recorder) -> Cover:
    """Falcon writes x W^T + b out by hand."""
    own = module.parameters(recurse=False)
    return _forward(
        module,
        lambda input: _linear(recorder.spread(input), module.weight, module.bias, recorder, False),
        own,
    )


def _cover_frozen_norm(module: LibraryLayer, recorder: Recorder) -> Cover | None:
    """Batch normalisation with frozen statistics scales and shifts every channel of every sample alike."""
    if not module.affine or module.running_mean is None:
        return None

    def forward(input: Tensor) -> Tensor:
        x = recorder.spread(input)
        y = F.batch_norm(x, module.running_mean, module.running_var, None, None, False, 0.0, module.eps)
        shape = (x.shape[0], x.shape[1], *[1] * (x.ndim - 2))
        scaled = y * _expand_flat(module.weight, recorder, shape)
        return (scaled + _expand_flat(module.bias, recorder, shape)).to(y.dtype)

    return _forward(module, forward, module.parameters(recurse=False))
