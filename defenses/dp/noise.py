"""Gaussian noise from cryptographic bits, released so that no floating-point residue betrays what it hides.

Why not a plain float Gaussian: the sum x + z of floats can only take values that x and the sampler's own set
of values allow, and its low bits tell neighbouring x apart (Mironov 2012; Jin et al., arXiv 2112.05307;
Holohan and Braghin, arXiv 2107.10138, whose remedy is to add several samples). Here the ideal mechanism is "x
+ Gaussian, rounded to a public grid", which is post-processing of the Gaussian mechanism and loses nothing in
the accounting. It is computed in float64 from 128 random bits a pair, and the grid is so coarse (2^-14 of the
noise) against float64 that every grid cell holds billions of the sampler's values: the probability of each
output differs from the ideal one by a relative 2^-34, and the reachable outputs are the same grid whatever x
was. One rounding replaces four samplers.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from defenses.errors import ParameterError
from defenses.random_source import RandomSource

GRID_BITS = 14
# Covers the float32 rounding of norms and clip factors: the noise is this much wider than the event states.
WIDENING = 1.0 + 2.0**-16
_PAIRS = 1 << 13


class _Sampler:
    """Fill float64 blocks with standard normals by Box and Muller's transform,
    in buffers that stay in cache.
    """

    def __init__(self, source: RandomSource) -> None:
        self._source = source
        self._words = np.empty(2 * _PAIRS, dtype=np.int64)
        self._integers = torch.from_numpy(self._words)
        self._values = torch.empty(2 * _PAIRS, dtype=torch.float64)
        self._radius = torch.empty(_PAIRS, dtype=torch.float64)
        self._angle = torch.empty(_PAIRS, dtype=torch.float64)

    def block(self, std: float = 1.0) -> Tensor:
        """Return 2 * _PAIRS samples of N(0, std^2); the buffer is overwritten by the next call.

        The radius uses |w + 1/2| / 2^63 with w a uniform signed 64-bit integer, so it is never zero and the
        tail reaches 9.4 standard deviations (mass beyond: 5e-21 a sample).
        """
        self._source.fill(self._words)
        values, radius, angle = self._values, self._radius, self._angle
        values.copy_(self._integers)
        torch.add(values[:_PAIRS], 0.5, out=radius)
        radius.abs_().mul_(2.0**-63).log_().mul_(-2.0).clamp_min_(0.0).sqrt_().mul_(std)
        torch.mul(values[_PAIRS:], math.pi * 2.0**-63, out=angle)
        torch.cos(angle, out=values[:_PAIRS])
        torch.sin(angle, out=values[_PAIRS:])
        values[:_PAIRS].mul_(radius)
        values[_PAIRS:].mul_(radius)
        return values


def gaussian(count: int, *, std: float, source: RandomSource) -> npt.NDArray[np.float64]:
    """Return `count` samples of N(0, std^2) in float64, not rounded to any grid.

    Assumes: the caller rounds the noisy value before it is released. `add_gaussian` does both.
    """
    _check(std)
    out = torch.empty(count, dtype=torch.float64)
    sampler = _Sampler(source)
    for start in range(0, count, 2 * _PAIRS):
        part = out[start : start + 2 * _PAIRS]
        part.copy_(sampler.block(std)[: len(part)])
    result: npt.NDArray[np.float64] = out.numpy()
    return result


def add_gaussian(values: Tensor, *, std: float, source: RandomSource, divisor: float = 1.0) -> Tensor:
    """Return values + N(0, std^2) rounded to a public power-of-two grid, in float32, over a divisor.

    Guarantee: before it is divided the output is a multiple of `grid_of(std)` (or a float32 rounding of one);
    the noise is independent in every coordinate and uses the source alone; std 0 adds none.
    Assumes: `std` and `divisor` are public constants.
    """
    _check(std)
    if std == 0:
        return values.detach().to(torch.float32).clone().div_(divisor)
    precision = torch.float64 if values.dtype == torch.float64 else torch.float32
    flat = values.detach().to("cpu", precision).reshape(-1)
    out = torch.empty(len(flat), dtype=torch.float32)
    sampler, grid = _Sampler(source), grid_of(std)
    for start in range(0, len(flat), 2 * _PAIRS):
        part = flat[start : start + 2 * _PAIRS]
        # in units of the grid, a power of two, so scaling rounds nothing
        noisy = sampler.block(std / grid)[: len(part)]
        noisy.add_(part, alpha=1.0 / grid).round_().mul_(grid)
        out[start : start + len(part)].copy_(noisy).div_(divisor)  # while it is in the cache
    return out.reshape(values.shape).to(values.device)


def grid_of(std: float) -> float:
    """Return the spacing of released values: the power of two at or below std * 2^-14."""
    return math.ldexp(1.0, math.floor(math.log2(std)) - GRID_BITS)


def _check(std: float) -> None:
    if not (std >= 0 and math.isfinite(std)):
        raise ParameterError(f"std = {std}: must be finite and not negative")
