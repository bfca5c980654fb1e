"""Integer noise for the secure-aggregation ring: discrete Gaussian and Skellam, from cryptographic bits.

Small scales are drawn from a table whose probabilities are computed in 60-digit decimals. A table cell is
chosen with 64 random bits (Walker's alias method in exact integers); what 64 bits cannot represent, rounding
remainders and far tails alike, is one more outcome of the table and leads to a second draw with 192 bits.
Large scales are sums of small ones:

    X = k X1 + X2,  X1 ~ DG(s1), X2 ~ DG(s2)   is   DG(sqrt(k^2 s1^2 + s2^2))

up to a factor 1 +- 4 exp(-2 pi^2 t^2) on every probability, t = s1 s2 / sqrt(k^2 s1^2 + s2^2); k keeps t >=
3, so the factor is 1 +- 1e-76. Skellam beyond the table is the discrete Gaussian of equal variance, corrected
by rejection with the uniform asymptotic expansion of the Bessel function; almost every proposal is accepted.

Source: Canonne, Kamath, Steinke, arXiv 2004.00010 (discrete Gaussian); Agarwal, Kairouz, Liu, arXiv
2110.04995 (Skellam); Micciancio, Walter, Crypto 2017, section 3 (sums of discrete Gaussians); DLMF 10.41.3
(Bessel).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import lru_cache
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from defenses.errors import ParameterError
from defenses.random_source import RandomSource

Integers = npt.NDArray[np.int64]

# The statistical distance of one sample from the exact law, as documented in `discrete_gaussian` and
# `skellam`.
TABLE_DISTANCE = 2.0**-100
REJECTION_DISTANCE = 2.0**-44

_DIGITS = 60
_LARGEST_TABLE = 256.0
_CHUNK = 1 << 14
_TAIL = 14.0
_FINE_BITS = 192


@dataclass(frozen=True, slots=True)
class _Table:
    """Hold an alias table over the integers `first, first + 1, ...`; the last cell in use means "draw
    finely".
    """

    first: int
    shift: np.uint64
    threshold: npt.NDArray[np.uint64]
    alias: Integers
    escape: int
    fine_first: int
    fine_sums: list[int]

    def fill(self, out: Integers, source: RandomSource) -> None:
        """Overwrite `out` with independent samples."""
        for start in range(0, len(out), _CHUNK):
            self._fill_chunk(out[start : start + _CHUNK], source)

    def _fill_chunk(self, out: Integers, source: RandomSource) -> None:
        words = source.words(len(out))
        cell = (words >> self.shift).astype(np.int64)
        words &= np.uint64((1 << int(self.shift)) - 1)
        keep = words < self.threshold.take(cell)
        self.alias.take(cell, out=out)
        cell += self.first
        np.copyto(out, cell, where=keep)
        for position in np.flatnonzero(out == self.escape):
            out[position] = self.fine(source)

    def fine(self, source: RandomSource) -> int:
        """Draw from what the table's 64 bits left over."""
        return self.fine_first + bisect_right(self.fine_sums, source.below(self.fine_sums[-1]))


def discrete_gaussian(count: int, *, sigma: float, source: RandomSource) -> Integers:
    """Return `count` samples of the discrete Gaussian: probability of x proportional to exp(-x^2 / (2
    sigma^2)).

    Guarantee: statistical distance from the exact law at most 2^-100 a sample up to sigma = 256, and a
    further 1e-15 beyond (rounding of the component scales).
    """
    _check("sigma", sigma, least=0.05, most=2.0**50)
    out = np.empty(count, dtype=np.int64)
    _fill_gaussian(out, sigma, source)
    return out


def skellam(count: int, *, variance: float, source: RandomSource) -> Integers:
    """Return `count` samples of the symmetric Skellam law: the difference of two Poisson(variance / 2)
    variables.

    The sum of independent Skellam samples is Skellam with the sum of their variances, exactly.

    Guarantee: statistical distance from the exact law at most 2^-100 a sample up to variance 2^16, 2^-44
    beyond.
    """
    _check("variance", variance, least=0.01, most=2.0**100)
    out = np.empty(count, dtype=np.int64)
    if variance <= _LARGEST_TABLE**2:
        _skellam_table(variance).fill(out, source)
    else:
        for start in range(0, count, _CHUNK):
            _fill_by_rejection(out[start : start + _CHUNK], variance, source)
    return out


def _fill_gaussian(out: Integers, sigma: float, source: RandomSource) -> None:
    if sigma <= _LARGEST_TABLE:
        _gaussian_table(sigma).fill(out, source)
        return
    fine = _LARGEST_TABLE
    rest = math.sqrt((sigma - fine) * (sigma + fine))
    factor = max(1, math.floor(fine * rest / sigma / 3.0))
    small = np.empty(min(len(out), _CHUNK), dtype=np.int64)
    for start in range(0, len(out), _CHUNK):
        part = out[start : start + _CHUNK]
        _fill_gaussian(part, rest / factor, source)
        part *= factor
        _gaussian_table(fine).fill(small[: len(part)], source)
        part += small[: len(part)]


def _fill_by_rejection(out: Integers, variance: float, source: RandomSource) -> None:
    highest = float(_log_ratio(np.array([_TAIL * math.sqrt(variance)]), variance)[0])
    surely = math.exp(-highest - 1.0 / variance)
    wanting = np.arange(len(out))
    while len(wanting):
        proposal = np.empty(len(wanting), dtype=np.int64)
        _fill_gaussian(proposal, math.sqrt(variance), source)
        uniform = source.uniform(len(wanting))
        unsure = np.flatnonzero(uniform >= surely)
        # beyond 14 standard deviations (mass 1e-44) the ratio is capped instead of followed
        ratio = np.exp(np.minimum(_log_ratio(proposal[unsure].astype(np.float64), variance) - highest, 0.0))
        refused = unsure[uniform[unsure] >= ratio]
        out[wanting] = proposal
        wanting = wanting[refused]


def _log_ratio(k: npt.NDArray[np.float64], variance: float) -> npt.NDArray[np.float64]:
    """Return log P_skellam(k) / P_gaussian(k), less its value at 0, for variance above 2^16."""
    slope = k / variance
    root = np.sqrt(1.0 + slope**2)
    exponent = variance * (slope**2 / (1.0 + root) - slope * np.arcsinh(slope) + slope**2 / 2)
    share, radius = (slope / root) ** 2, variance * root
    series = (3 - 5 * share) / (24 * radius) + (81 - 462 * share + 385 * share**2) / (1152 * radius**2)
    at_zero = 3 / (24 * variance) + 81 / (1152 * variance**2)
    result: npt.NDArray[np.float64] = exponent - 0.5 * np.log(root) + np.log1p(series) - math.log1p(at_zero)
    return result


@lru_cache(maxsize=64)
def _gaussian_table(sigma: float) -> _Table:
    with localcontext() as context:
        context.prec = _DIGITS
        scale = 2 * Decimal(sigma) ** 2
        step, square = (-1 / scale).exp(), (-2 / scale).exp()
        weights, value, limit = [Decimal(1)], Decimal(1), Decimal(2) ** -_FINE_BITS
        while value > limit:
            value *= step
            step *= square
            weights.append(value)
        return _build(weights)


@lru_cache(maxsize=64)
def _skellam_table(variance: float) -> _Table:
    """Run Miller's backward recurrence I_{k-1} = I_{k+1} + (2k / variance) I_k, then normalise."""
    with localcontext() as context:
        context.prec = _DIGITS
        top = math.ceil(20 * math.sqrt(variance) + 120)
        values = [Decimal(0)] * (top + 2)
        values[top] = Decimal(1)
        double = 2 / Decimal(variance)
        for k in range(top, 0, -1):
            values[k - 1] = values[k + 1] + double * k * values[k]
        limit = values[0] * Decimal(2) ** -_FINE_BITS
        return _build([value for value in values if value > limit])


def _build(half: list[Decimal]) -> _Table:
    """Build the table of a symmetric law from its unnormalised probabilities at 0, 1, 2, ..."""
    total = half[0] + 2 * sum(half[1:])
    exact = [value * Decimal(2) ** 64 / total for value in (*half[:0:-1], *half)]
    coarse = [int(value) for value in exact]
    remainders = []
    for value, whole in zip(exact, coarse):
        remainders.append(int((value - whole) * Decimal(2) ** (_FINE_BITS - 64)))
    reach = len(half) - 1
    used = [index for index, weight in enumerate(coarse) if weight]
    first, last = used[0], used[-1]
    weights = [*coarse[first : last + 1], (1 << 64) - sum(coarse)]
    bits = max(1, (len(weights) - 1).bit_length())
    threshold, alias = _alias(weights, bits)
    low = first - reach
    return _Table(
        first=low,
        shift=np.uint64(64 - bits),
        threshold=np.array(threshold, dtype=np.uint64),
        alias=np.array(alias, dtype=np.int64) + low,
        escape=low + len(weights) - 1,
        fine_first=-reach,
        fine_sums=list(accumulate(remainders)),
    )


def _alias(weights: list[int], bits: int) -> tuple[list[int], list[int]]:
    """Split integer weights that sum to 2^64 over 2^bits equal cells of two outcomes each, exactly."""
    capacity = 1 << (64 - bits)
    left = weights + [0] * ((1 << bits) - len(weights))
    threshold, alias = [capacity] * len(left), list(range(len(left)))
    small = [i for i, weight in enumerate(left) if weight < capacity]
    large = [i for i, weight in enumerate(left) if weight > capacity]
    while small:
        i, j = small.pop(), large[-1]
        threshold[i], alias[i] = left[i], j
        left[j] -= capacity - left[i]
        if left[j] <= capacity:
            large.pop()
            if left[j] < capacity:
                small.append(j)
    return threshold, alias


def _check(name: str, value: float, *, least: float, most: float) -> None:
    if not least <= value <= most:
        raise ParameterError(f"{name} = {value}: must lie in [{least:g}, {most:g}]")
