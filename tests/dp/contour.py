"""An independent oracle: delta as a contour integral of the moment-generating function, no grid of losses at
all.

delta(epsilon) = 1 / (2 pi i) * integral over Re s = c of M(s) e^(-s epsilon) / (s (s + 1)) ds, for any c > 0,
where M is the moment-generating function of the summed loss. M of one step is integrated over outputs by
Gauss-Legendre panels, as M - 1 by a complex expm1, so that a million steps lose no digits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(12)


@dataclass(frozen=True)
class Step:
    """(1 - q) N(0, sigma^2) + q N(1, sigma^2) against N(0, sigma^2), `steps` times."""

    rate: float
    sigma: float
    steps: int


def _log_normal(outputs: npt.NDArray[np.float64], centre: float, sigma: float) -> npt.NDArray[np.float64]:
    return -0.5 * ((outputs - centre) / sigma) ** 2 - math.log(sigma * math.sqrt(2 * math.pi))


def _nodes(step: Step, order: float, fineness: float) -> tuple[npt.NDArray[np.float64], ...]:
    width = step.sigma / fineness
    low, high = -order - 1 - 10 * step.sigma, order + 2 + 10 * step.sigma
    edges = np.arange(low, high + width, width)
    outputs = ((edges[:-1] + edges[1:]) / 2)[:, None] + width / 2 * _NODES[None, :]
    weights = np.broadcast_to(width / 2 * _WEIGHTS[None, :], outputs.shape)
    x = outputs.ravel()
    q_log = _log_normal(x, 0.0, step.sigma)
    loss = np.logaddexp(math.log1p(-step.rate), math.log(step.rate) + (2 * x - 1) / (2 * step.sigma**2))
    small = step.rate * np.expm1(np.minimum((2 * x - 1) / (2 * step.sigma**2), 50.0))
    loss = np.where(np.abs(small) < 0.1, np.log1p(small), loss)
    return loss, q_log + loss, q_log, weights.ravel()


def _log_moment(
    step: Step, points: npt.NDArray[np.complex128], *, add: bool, fineness: float
) -> npt.NDArray[np.complex128]:
    loss, p_log, q_log, weights = _nodes(step, float(points[0].real), fineness)
    own, signed = (q_log, -loss) if add else (p_log, loss)
    used = own + points[0].real * np.maximum(signed, 0.0) > -90
    mass, signed = weights[used] * np.exp(own[used]), signed[used]
    result = np.empty(len(points), dtype=np.complex128)
    for index, point in enumerate(points):
        result[index] = np.log1p(np.dot(mass, np.expm1(point * signed)))
    return result * step.steps


def delta_at(
    steps: list[Step],
    epsilon: float,
    order: float,
    *,
    add: bool = False,
    points: int = 600,
    span: float = 0.0,
    fineness: float = 40.0,
) -> float:
    """Integrate along Re s = order; `span` is the largest imaginary part (chosen from the decay when 0)."""
    gap = 2 * math.pi / (60.0 / order + 2 * epsilon)
    imaginary = (np.arange(points) + 0.5) * (span / points if span else gap)
    s = order + 1j * imaginary
    exponent = sum(_log_moment(step, s, add=add, fineness=fineness) for step in steps) - s * epsilon
    values = (np.exp(exponent) / (s * (s + 1))).real
    return float(values.sum() * (imaginary[1] - imaginary[0]) / math.pi)


def epsilon_at(steps: list[Step], delta: float, order: float, guess: float, **options: float | bool) -> float:
    """Solve delta(epsilon) = delta near the guess by secant steps on log delta."""
    low, high = guess, guess * 1.001
    f_low, f_high = (math.log(delta_at(steps, e, order, **options) / delta) for e in (low, high))
    for _ in range(8):
        if abs(f_high) < 1e-11 or f_high == f_low:
            break
        low, f_low, high = high, f_high, high - f_high * (high - low) / (f_high - f_low)
        f_high = math.log(delta_at(steps, high, order, **options) / delta)
    return high
