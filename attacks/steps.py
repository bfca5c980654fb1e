"""Count what a computation costs by what it does, not by how long it took.

 A clock, even one of CPU time, runs faster on a busy core: an audit that asks it tries other attacks there. A
step is counted from the calls an attack makes and the shapes of what they return, so the same attack on the
same update costs the same number of steps on every machine; a thousand of them take about a second of a quiet
core.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor
from torch.overrides import TorchFunctionMode

from attacks.foreign import Unknown

CALL = 0.012  # steps of a call, whatever its size
_ELEMENT = 2e-6  # of an element that is computed
_PRODUCT = 6e-9  # of a multiplication and addition in a product of matrices, for each byte of a number
_SPECTRUM = 5e-7  # of an entry of a matrix times its smaller side, where its singular values are computed
_FACTOR = 1e-7  # the same, where it is factored or solved
_BACKWARD = 2.0  # how much dearer going back is than the way there

_PRODUCTS = frozenset({
    "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "linear", "einsum", "cdist",
    "scaled_dot_product_attention", "tensordot",
})  # fmt: skip
_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d", "conv_transpose2d"})
_SPECTRA = ("svd", "eig", "pinv", "matrix_rank")
_FACTORS = ("qr", "lstsq", "solve", "inv", "cholesky", "slogdet", "det")
_BACKWARDS = frozenset({"grad", "backward"})
_FREE = frozenset({"__get__", "__set__", "size", "stride", "detach"})  # what computes nothing


class _Meter(TorchFunctionMode):
    """Count the steps of every call made while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0
        self.ahead = 0.0  # of what a way back will pass, since the last one

    def __torch_function__(
        self,
        func: Callable[..., Unknown],
        types: Sequence[type],
        args: Sequence[Unknown] = (),
        kwargs: Mapping[str, Unknown] | None = None,
    ) -> Unknown:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in _FREE or (not isinstance(result, (Tensor, tuple, list)) and name not in _BACKWARDS):
            return result
        if name in _BACKWARDS:
            self.total += CALL + _BACKWARD * self.ahead
            self.ahead = 0.0
            return result
        cost = CALL + _work(name, args, result)
        self.total += cost
        if isinstance(result, Tensor) and result.requires_grad:
            self.ahead += cost
        return result


def _work(name: str, args: Sequence[Unknown], result: Unknown) -> float:
    """Return the steps of one call beyond those of any call."""
    size = _size(result)
    if not args or not isinstance(args[0], Tensor):
        return _ELEMENT * size
    first = args[0]
    product = _PRODUCT * first.element_size()
    if name in _PRODUCTS and first.ndim:
        return product * size * first.shape[-1]
    if name in _CONVOLUTIONS and len(args) > 1 and isinstance(args[1], Tensor):
        return product * size * args[1].numel() / max(1, args[1].shape[0])
    bare = name.removeprefix("linalg_")
    if first.ndim > 1 and bare.startswith(_SPECTRA + _FACTORS):
        entries = first.numel() * min(first.shape[-2:])
        if bare.startswith(_SPECTRA):
            return _SPECTRUM * entries
        return _FACTOR * entries
    return _ELEMENT * max(size, first.numel())


def _size(result: Unknown) -> int:
    """Count the elements that a call returned."""
    if isinstance(result, Tensor):
        return result.numel()
    total = 0
    if isinstance(result, (tuple, list)):
        for part in result:
            total += _size(part)
    return total


_METER: contextvars.ContextVar[_Meter | None] = contextvars.ContextVar("steps", default=None)


@contextmanager
def counted() -> Iterator[None]:
    """Count steps inside; a count within a count is one count."""
    if _METER.get() is not None:
        yield
        return
    meter = _Meter()
    token = _METER.set(meter)
    try:
        with meter:
            yield
    finally:
        _METER.reset(token)


def so_far() -> float:
    """Return the steps counted since the outermost `counted` began; 0 outside of one."""
    meter = _METER.get()
    if meter is None:
        return 0.0
    return meter.total
