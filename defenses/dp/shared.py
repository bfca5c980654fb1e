"""Noise in shares for a sum that is bounded per record:
every site adds a part, the opened sum holds the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from defenses.dp.accountant import Accountant
from defenses.dp.discrete import Integers, skellam
from defenses.dp.events import Adjacency, Event, NonPrivateEvent, SampledSkellamEvent, Unit
from defenses.dp.mechanism_digest import digest_of
from defenses.dp.moments import MomentRows
from defenses.errors import BudgetExceeded, ParameterError
from defenses.random_source import RandomSource

Reals = npt.NDArray[np.float64]

# Sums of float32 gradients depend on their order; up to some hundred records a site that stays far below
# this.
FLOAT_ROOM = 1e-3
_FINE_BITS = 16  # rows are summed exactly, on a grid finer than the released one by this many bits
_LARGEST_EXACT = 2.0**62
_PRECISION = 1e-4
_MOST_NOISE = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class SumMechanism:
    """Describe one release of a sum over the records of all sites, each record's row bounded in L2.

    `noise_multiplier` is the noise of the whole opened sum over the integer bound on one record. Every site
    adds Skellam noise of variance (noise_multiplier * l2)^2 / honest_survivors, so the sum holds enough as
    soon as `honest_survivors` sites whose shares no colluder knows are in it.

    `scale` is the number of integer levels in 1.0 and `dimension` the length of a row. Every site rounds its
    sum at random, with one uniform number a coordinate that no row decides; so one record moves the rounded
    sum by less than one level a coordinate more than the row itself: sqrt(dimension) in L2. Rows that are
    whole numbers (`whole_numbers`: counts, votes) are not rounded and pay nothing for it. A coordinate of a
    site's sum beyond `largest` levels is cut, which moves no two neighbours apart.

    Guarantee: with at least `honest_survivors` honest sites in every opened sum, `event` is what one release
    costs one record (or one person with `records_per_person` records). No site's share alone protects it.
    Assumes: a sum given to `share` comes from rows of at most `bound`, and was added up in float64, or in
    float32 over at most some hundred rows (`FLOAT_ROOM`). `share_of_rows` bounds and adds exactly by itself.
    Source: docs/shared_noise.md.
    """

    noise_multiplier: float
    bound: float
    scale: float
    dimension: int
    honest_survivors: int
    sampling_rate: float = 1.0
    unit: Unit = "record"
    records_per_person: int = 1
    adjacency: Adjacency = "add_remove"
    whole_numbers: bool = False
    largest: int = 2**40

    def __post_init__(self) -> None:
        problems = [
            f"{name} = {value}: must be a positive finite number"
            for name, value in (("bound", self.bound), ("scale", self.scale))
            if not (value > 0 and math.isfinite(value))
        ]
        if not self.noise_multiplier >= 0:
            problems.append(f"noise_multiplier = {self.noise_multiplier}: must not be negative")
        if self.honest_survivors < 1 or self.dimension < 1 or self.largest < 1:
            problems.append(
                f"honest_survivors = {self.honest_survivors}, dimension = {self.dimension}, "
                f"largest = {self.largest}: at least 1 each"
            )
        if not 0 < self.sampling_rate <= 1:
            problems.append(f"sampling_rate = {self.sampling_rate}: must lie in (0, 1]")
        if self.whole_numbers and (self.bound < 1 or self.scale != int(self.scale)):
            problems.append(
                f"bound = {self.bound}, scale = {self.scale}: whole numbers need a bound "
                "of at least 1 and a whole scale"
            )
        if problems:
            raise ParameterError("; ".join(problems))
        if self.noise_multiplier > 0:
            self.event("check")

    @property
    def l2_sensitivity(self) -> float:
        """Return the L2 bound on what one record changes, in levels, rounding included."""
        if self.whole_numbers:
            return self.bound * self.scale
        rounding = math.sqrt(self.dimension) * (1 + 2.0**-_FINE_BITS)
        return self.bound * self.scale * (1 + FLOAT_ROOM) + rounding

    @property
    def l1_sensitivity(self) -> float:
        """Return the L1 bound on what one record changes, in levels: an integer is at most its own square."""
        change, step = self.l2_sensitivity, self.scale if self.whole_numbers else 1.0
        return max(change, min(math.sqrt(self.dimension) * change, change**2 / step))

    @property
    def variance(self) -> float:
        """Return the variance that is charged, of every coordinate of the opened sum, in squared levels."""
        return (self.noise_multiplier * self.l2_sensitivity) ** 2

    @property
    def share_variance(self) -> float:
        """Return the variance one site adds, in squared levels."""
        return self.variance / self.honest_survivors * (1 + 1e-12)

    @property
    def noise_bound(self) -> int:
        """Return what one site's noise on one coordinate exceeds with probability below 1e-30."""
        # Bernstein: Skellam tails are those of a normal law, with a linear term where the variance is small.
        return 48 + math.ceil(12 * math.sqrt(self.share_variance))

    def event(self, release: str, *, steps: int = 1) -> Event:
        """Return what `steps` releases cost: what a ledger reserves before data are touched."""
        if self.noise_multiplier == 0:
            return NonPrivateEvent(reason=f"{release}: noise_multiplier is 0")
        return SampledSkellamEvent(
            unit=self.unit,
            records_per_person=self.records_per_person,
            adjacency=self.adjacency,
            sampling_rate=self.sampling_rate,
            l1_sensitivity=self.l1_sensitivity,
            l2_sensitivity=self.l2_sensitivity,
            variance=self.variance,
            dimension=self.dimension,
            scale=self.scale,
            steps=steps,
            release=release,
        )

    def share(self, total: Reals, source: RandomSource) -> Integers:
        """Return one site's sum [d] of bounded rows on the grid,
        with this site's share of the noise, int64.
        """
        values = np.asarray(total, dtype=np.float64).reshape(-1)
        if len(values) != self.dimension:
            raise ParameterError(f"total: has {len(values)} numbers, the mechanism states {self.dimension}")
        levels = np.clip(np.nan_to_num(values * self.scale), -self.largest, self.largest)
        return self._noised(self._rounded(levels, source), source)

    def share_of_rows(self, rows: Reals, source: RandomSource) -> Integers:
        """Bound every row of [n, d], add them up exactly, round once, add this site's share; int64 [d].

        Guarantee: whatever the rows hold, one of them moves the result by at most the stated sensitivity; a
        row that is not finite counts as zeros.
        """
        bounded = self.bounded(rows)
        if self.whole_numbers:
            levels = np.rint(bounded * self.scale).astype(np.int64).sum(axis=0)
            return self._noised(np.clip(levels, -self.largest, self.largest), source)
        fine = self.scale * 2.0**_FINE_BITS
        if len(bounded) * self.bound * fine > _LARGEST_EXACT:
            raise ParameterError(
                f"{len(bounded)} rows at scale {self.scale:g} do not fit 64 bits; lower value_bits"
            )
        exact = np.rint(bounded * fine).astype(np.int64).sum(axis=0)
        dither = np.floor(source.uniform(self.dimension) * 2.0**_FINE_BITS).astype(np.int64)
        rounded = (exact + dither) >> _FINE_BITS
        return self._noised(np.clip(rounded, -self.largest, self.largest), source)

    def bounded_sum(self, rows: Reals | MomentRows) -> Reals:
        """Return the sum [d] of the rows [n, d] within the bound, as `bounded` has them, in two passes."""
        if isinstance(rows, MomentRows):
            return self._bounded_moments(rows)
        if self.whole_numbers:
            return np.asarray(self.bounded(rows).sum(axis=0), dtype=np.float64)
        values = self._checked(rows)
        with np.errstate(over="ignore", invalid="ignore"):
            norms = np.sqrt(np.einsum("nd,nd->n", values, values))
        finite = np.isfinite(norms)
        if not finite.all():
            values, norms = values[finite], norms[finite]
        factors = np.where(norms > self.bound, self.bound / np.maximum(norms, 1e-300), 1.0)
        return np.asarray(factors @ values, dtype=np.float64)

    def _bounded_moments(self, rows: MomentRows) -> Reals:
        if self.whole_numbers:
            raise ParameterError("second moments are no whole numbers")
        if rows.dimension != self.dimension:
            raise ParameterError(f"rows: {rows.dimension} numbers long, must be {self.dimension}")
        norms = rows.norms()
        finite = np.isfinite(norms)
        factors = np.minimum(1.0, self.bound / np.maximum(np.where(finite, norms, 1.0), 1e-300))
        return rows.weighted_sum(np.where(finite, factors, 0.0))

    def _checked(self, rows: Reals) -> Reals:
        values = np.asarray(rows, dtype=np.float64)
        if values.ndim != 2 or values.shape[1] != self.dimension:
            raise ParameterError(f"rows: shape {values.shape}, must be [n, {self.dimension}]")
        return values

    def bounded(self, rows: Reals) -> Reals:
        """Return the rows [n, d] within the bound:
        scaled down, or left out where whole numbers are beyond it.
        """
        values = self._checked(rows)
        with np.errstate(over="ignore", invalid="ignore"):
            norms = np.sqrt(np.square(values).sum(axis=1))
        finite = np.isfinite(norms)
        values = np.where(finite[:, None], values, 0.0)
        if self.whole_numbers:
            whole = (values == np.rint(values)).all(axis=1) & finite & (norms <= self.bound * (1 + 1e-12))
            return np.where(whole[:, None], values, 0.0)
        factors = np.where(norms > self.bound, self.bound / np.maximum(norms, 1e-300), 1.0)
        return np.asarray(values * np.where(finite, factors, 0.0)[:, None], dtype=np.float64)

    def _rounded(self, levels: Reals, source: RandomSource) -> Integers:
        """Round at random to a neighbouring integer: up where the uniform number is below the fraction."""
        grid = np.floor(levels)
        up = source.uniform(len(grid)) < levels - grid
        return np.asarray(grid.astype(np.int64) + up, dtype=np.int64)

    def _noised(self, levels: Integers, source: RandomSource) -> Integers:
        if self.noise_multiplier == 0:
            return levels
        return levels + skellam(self.dimension, variance=self.share_variance, source=source)

    def digest(self) -> str:
        """Return a hash of everything that decides epsilon."""
        return digest_of("sum", asdict(self))


def smallest_multiplier(
    event_of: Callable[[float], Event],
    *,
    epsilon: float,
    delta: float,
    count: int = 1,
    history: Sequence[Event] = (),
    beside: Callable[[float], Event] | None = None,
    beside_count: int = 0,
) -> float:
    """Return the smallest noise multiplier, rounded up, with which `count` events keep epsilon on top of a
    history.

    `beside` is another event of the same noise that one unit goes through, `beside_count` times.

    Raises:
      BudgetExceeded: the history leaves nothing.
    """
    past = Accountant()
    for event in history:
        past.compose(event)

    def spent(multiplier: float) -> float:
        accountant = past.copy()
        accountant.compose(event_of(multiplier), count=count)
        if beside is not None and beside_count:
            accountant.compose(beside(multiplier), count=beside_count)
        return accountant.epsilon(delta).epsilon

    low, high = 1e-3, 1.0
    while spent(high) > epsilon:
        if high > _MOST_NOISE:
            raise BudgetExceeded(f"what was spent before leaves nothing of epsilon {epsilon:g}")
        low, high = high, 2 * high
    while high - low > _PRECISION * high:
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > epsilon else (low, middle)
    return high
