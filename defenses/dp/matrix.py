"""Correlated noise by banded matrix factorisation: client-level runs that cannot claim amplification by
sampling.

The server releases prefix sums A x of the per-round sums x. With A = B C the noise B z equals noise C^-1 z
on every round, where z is fresh. A client that takes part at most `participations` times, at least
`min_separation` rounds apart, touches columns of C whose supports do not meet when C has at most
`min_separation` bands, so the sensitivity is the root of a sum of squared column norms and the whole run is
one Gaussian release.

Source: Choquette-Choo et al., arXiv 2306.08153, section 3; square-root coefficients: Fichtenberger,
Henzinger, Upadhyay, arXiv 2202.11205.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from defenses.dp.events import Adjacency, MatrixFactorizationEvent, Unit
from defenses.errors import ParameterError

Coefficients = npt.NDArray[np.float64]
_REACH = 50  # times the bands: what an inverse reaches back; the rest is below any rounding


def square_root_coefficients(bands: int) -> Coefficients:
    """Return the first `bands` Taylor coefficients of (1 - x)^(-1/2): the square root of the prefix-sum
    matrix.
    """
    if bands < 1:
        raise ParameterError(f"bands = {bands}: must be at least 1")
    index = np.arange(1, bands)
    return np.concatenate([[1.0], np.cumprod((2 * index - 1) / (2 * index))])


def participation_cap(*, steps: int, min_separation: int) -> int:
    """Return how often a client can take part in `steps` rounds, at least `min_separation` rounds apart."""
    if steps < 1 or min_separation < 1:
        raise ParameterError(f"steps = {steps}, min_separation = {min_separation}: both must be at least 1")
    return math.ceil(steps / min_separation)


def sensitivity(
    coefficients: Sequence[float] | Coefficients, *, participations: int, min_separation: int
) -> float:
    """Return the largest change of C x, in clip bounds, by one client, rounded up.

    Raises: ParameterError when the bands are more than the separation, for then columns overlap.
    """
    column = np.asarray(coefficients, dtype=np.float64)
    if len(column) > min_separation:
        raise ParameterError(
            f"bands = {len(column)}: at most min_separation = {min_separation}, or the columns overlap"
        )
    if participations < 1:
        raise ParameterError(f"participations = {participations}: must be at least 1")
    return math.sqrt(participations * float(column @ column)) * (1 + 1e-12)


def root_mean_square_error(
    coefficients: Sequence[float] | Coefficients, *, steps: int, participations: int
) -> float:
    """Return the error of a prefix sum, root mean square over the run, for noise multiplier one and clip
    bound one.
    """
    column = np.asarray(coefficients, dtype=np.float64)
    rows = np.cumsum(_inverse(column, steps))
    # Entry (t, s) of A C^-1 depends on t - s alone; its square appears steps - (t - s) times.
    total = float(((steps - np.arange(steps)) * rows**2).sum())
    return math.sqrt(total / steps * participations * float(column @ column))


def deviation_over_fresh(coefficients: Sequence[float] | Coefficients) -> float:
    """Return the deviation of one round's noise over that of its fresh part, once the memory is full.

    Coefficients that fall keep the zeros of their polynomial outside the unit circle, so the inverse dies
    out and the value is finite.
    """
    column = np.asarray(coefficients, dtype=np.float64)
    return float(np.linalg.norm(_inverse(column, _REACH * len(column))))


def best_bands(*, steps: int, min_separation: int) -> int:
    """Return the number of bands, at most the separation, with the least error for prefix sums."""
    cap = participation_cap(steps=steps, min_separation=min_separation)
    most = min(min_separation, steps)
    candidates = sorted({round(value) for value in np.geomspace(1, most, 24)} | {most})
    errors = {
        bands: root_mean_square_error(square_root_coefficients(bands), steps=steps, participations=cap)
        for bands in candidates
    }
    return min(errors, key=lambda bands: (errors[bands], bands))


def correlate(
    coefficients: Sequence[float] | Coefficients,
    fresh: npt.NDArray[np.float64],
    previous: Sequence[npt.NDArray[np.float64]],
) -> npt.NDArray[np.float64]:
    """Return this round's noise, a row of C^-1 z, from fresh noise and the noise of earlier rounds, newest
    first.

    Keep the last `bands - 1` results; the first round passes none.
    """
    column = np.asarray(coefficients, dtype=np.float64)
    noise = np.array(fresh, dtype=np.float64)
    for weight, earlier in zip(column[1:], previous):
        noise -= weight * earlier
    return np.asarray(noise / column[0], dtype=np.float64)


def event(
    *,
    coefficients: Sequence[float] | Coefficients,
    noise_multiplier: float,
    steps: int,
    min_separation: int,
    clip_norm: float,
    release: str,
    unit: Unit = "client",
    adjacency: Adjacency = "zero_out",
    participations: int | None = None,
) -> MatrixFactorizationEvent:
    """Return the event of a whole run; `participations` defaults to all the separation allows."""
    cap = participation_cap(steps=steps, min_separation=min_separation)
    times = cap if participations is None else min(participations, cap)
    return MatrixFactorizationEvent(
        unit=unit,
        adjacency=adjacency,
        noise_multiplier=noise_multiplier,
        sensitivity=sensitivity(coefficients, participations=times, min_separation=min_separation),
        bands=len(coefficients),
        min_separation=min_separation,
        participations=times,
        steps=steps,
        clip_norm=clip_norm,
        release=release,
    )


def _inverse(column: Coefficients, steps: int) -> Coefficients:
    """Return the first column of the inverse of the banded lower-triangular Toeplitz matrix."""
    result = np.zeros(steps)
    result[0] = 1 / column[0]
    for row in range(1, steps):
        used = min(row, len(column) - 1)
        result[row] = -float(column[1 : used + 1] @ result[row - used : row][::-1]) / column[0]
    return result
