"""The privacy-loss distribution of one step on a grid, without losing privacy.

Why the grid is safe. Each interval of losses keeps its mass under P and under Q exactly; both are given to
the two end points of the interval. The hockey-stick curve of the result is the piecewise linear interpolation
(in e^epsilon) of a convex curve, hence above it everywhere, and domination is kept under composition. The
excess is of second order.

Source: Doroshenko et al., arXiv 2207.04380 (connecting the dots).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, ndtri

from defenses.dp.pairs import Floats, Integers, MixturePair

# Beyond this loss e^-loss leaves the range of doubles; the accountant then falls back to Renyi accounting.
LARGEST_LOSS = 680.0


class LossTooLarge(ArithmeticError):
    """A single step loses more than double precision can carry."""


@dataclass(frozen=True, slots=True)
class LossGrid:
    """A discrete privacy-loss distribution on multiples of `spacing`, valid for both directions.

    `forward[t]` is the mass under P of loss `indices[t] * spacing`, `backward[t]` the mass under Q of the
    same point, which in the other direction has the loss `-indices[t] * spacing`. The infinities are losses
    given up on. `coarse_*` describe the intervals before their mass was moved: masses and log-ratios, a lower
    bound for moments.
    """

    spacing: float
    indices: Integers
    forward: Floats
    backward: Floats
    forward_infinity: float
    backward_infinity: float
    coarse_forward: Floats
    coarse_backward: Floats


def bulk(pair: MixturePair) -> float:
    """Return the loss scale within which most of one step's outputs lie."""
    edge = pair.sigma * 2 + (1.0 if pair.up[0] == 0.0 else 0.0)
    low, high = pair.loss(np.array([-edge, edge]))
    return float(max(abs(low), abs(high)))


def discretise(pair: MixturePair, *, spacing: float, growth: float, tail: float) -> LossGrid:
    """Put the loss of one step on multiples of `spacing`, pessimistically in both directions.

    Intervals have the width `spacing` in the bulk and widen by the fraction `growth` outside. At most about
    `tail` of the probability is moved to an infinite loss.

    Guarantee: the result dominates the pair for both directions, up to roundings of a few ulp of each mass.
    Raises: LossTooLarge when losses do not fit double precision.
    """
    first, last = _output_range(pair, tail)
    low, high = (float(value) for value in pair.loss(np.array([first, last])))
    if max(-low, high) > LARGEST_LOSS:
        raise LossTooLarge
    indices = _dots(math.floor(low / spacing), math.ceil(high / spacing), bulk(pair) / spacing, growth)
    losses = indices * spacing
    outputs = pair.output_of_loss(losses)
    cells = []
    for index in range(-len(pair.down) + 1, len(pair.up)):
        cells.append(_cell_masses(outputs, index * 1.0, pair.sigma))
    offset = len(pair.down) - 1
    mass_p = sum(
        (weight * cells[offset + index] for index, weight in enumerate(pair.up)), np.zeros(len(losses) + 1)
    )
    mass_q = sum(
        (weight * cells[offset - index] for index, weight in enumerate(pair.down)), np.zeros(len(losses) + 1)
    )
    # P - e^loss Q over each cell, with the common central component taken out of both before it can cancel.
    centre = cells[offset]
    rest_p = sum((w * cells[offset + i] for i, w in enumerate(pair.up) if i), np.zeros(len(losses) + 1))
    rest_q = sum((w * cells[offset - i] for i, w in enumerate(pair.down) if i), np.zeros(len(losses) + 1))
    left = losses[:-1]
    near, far = pair.gap - pair.down[0] * np.expm1(left), pair.up[0] - pair.down[0] * np.exp(left)
    above = (
        np.where(np.abs(left) < 0.5, near, far) * centre[1:-1] + rest_p[1:-1] - np.exp(left) * rest_q[1:-1]
    )
    result = _connect(spacing, indices, losses, mass_p, mass_q, above)
    return _symmetrise(result) if pair.symmetric else result


def _connect(
    spacing: float, indices: Integers, losses: Floats, mass_p: Floats, mass_q: Floats, above: Floats
) -> LossGrid:
    """Give each cell's two masses to its end points; the outer cells go to the first point, the last, and
    infinity.
    """
    inner_p, inner_q, widths = mass_p[1:-1], mass_q[1:-1], np.diff(losses)
    right = np.clip(above / -np.expm1(-widths), 0.0, inner_p)
    forward, backward = np.zeros(len(losses)), np.zeros(len(losses))
    forward[1:] += right
    forward[:-1] += inner_p - right
    forward[0] += mass_p[0]
    finite_mass = min(float(mass_q[-1] * np.exp(losses[-1])), float(mass_p[-1]))
    forward[-1] += finite_mass
    backward[:] = forward * np.exp(-losses)
    return LossGrid(
        spacing=spacing,
        indices=indices,
        forward=forward,
        backward=backward,
        forward_infinity=max(0.0, float(mass_p[-1]) - finite_mass),
        backward_infinity=max(0.0, float(mass_q[0]) - float(mass_p[0] * np.exp(-losses[0]))),
        coarse_forward=np.concatenate([mass_p[:1], inner_p, [finite_mass]]),
        coarse_backward=np.concatenate(
            [mass_p[:1] * np.exp(-losses[0]), inner_q, [finite_mass * np.exp(-losses[-1])]]
        ),
    )


def _symmetrise(grid: LossGrid) -> LossGrid:
    """Mirror the part above zero; what is left of the probability sits at zero."""
    keep = grid.indices > 0
    indices, forward, backward = grid.indices[keep], grid.forward[keep], grid.backward[keep]
    middle = max(0.0, 1.0 - float(forward.sum()) - float(backward.sum()) - grid.forward_infinity)
    whole = np.concatenate([backward[::-1], [middle], forward])
    cells = len(indices) + 1
    coarse_p, coarse_q = grid.coarse_forward[-cells:], grid.coarse_backward[-cells:]
    coarse_middle = max(0.0, 1.0 - float(coarse_p.sum()) - float(coarse_q.sum()))
    return LossGrid(
        spacing=grid.spacing,
        indices=np.concatenate([-indices[::-1], [0], indices]).astype(np.int64),
        forward=whole,
        backward=whole[::-1].copy(),
        forward_infinity=grid.forward_infinity,
        backward_infinity=grid.forward_infinity,
        coarse_forward=np.concatenate([coarse_q[::-1], [coarse_middle], coarse_p]),
        coarse_backward=np.concatenate([coarse_p[::-1], [coarse_middle], coarse_q]),
    )


def _output_range(pair: MixturePair, tail: float) -> tuple[float, float]:
    """Return outputs below which Q, and above which P, has at most `tail` mass."""
    low = min(
        -i - pair.sigma * _quantile(tail / (len(pair.down) * w)) for i, w in enumerate(pair.down) if w > 0
    )
    high = max(i + pair.sigma * _quantile(tail / (len(pair.up) * w)) for i, w in enumerate(pair.up) if w > 0)
    return low, high


def _quantile(mass: float) -> float:
    return float(-ndtri(mass)) if mass < 0.5 else 0.0


def _dots(first: int, last: int, core: float, growth: float) -> Integers:
    """Return increasing indices from `first` to `last`: every one within the core, sparser outside."""
    reach, edge = max(-first, last), max(1, math.ceil(core))
    steps = 0
    if reach > edge:
        steps = math.ceil(math.log1p(growth * max(0, reach - edge)) / growth) + 1
    outside = edge + np.rint(np.expm1(growth * np.arange(1, steps + 1)) / growth)
    side = np.concatenate([np.arange(1, min(edge, reach) + 1), outside]).astype(np.int64)
    whole = np.concatenate([-side[::-1], [0], side])
    inner = whole[(whole > first) & (whole < last)]
    return np.concatenate([[first], inner, [last]]).astype(np.int64)


def _cell_masses(outputs: Floats, centre: float, sigma: float) -> Floats:
    """Return the mass of N(centre, sigma^2) in the cells the outputs cut the line into, each from its own
    tail.
    """
    edges = (np.concatenate([[-np.inf], outputs, [np.inf]]) - centre) / sigma
    positive = edges[:-1] > 0
    near = np.where(positive, -edges[1:], edges[:-1])
    far = np.where(positive, -edges[:-1], edges[1:])
    return np.asarray(np.maximum(ndtr(far) - ndtr(near), 0.0), dtype=np.float64)
