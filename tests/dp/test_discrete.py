"""Integer noise has exactly the law it claims:
tables against definitions, samples against laws, both ways.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from mpmath import besseli, exp, log, mp, mpf
from scipy import stats

from defenses.dp import discrete
from defenses.dp.discrete import discrete_gaussian, skellam
from defenses.errors import ParameterError
from defenses.random_source import RandomSource

COUNT = 200_000


def probabilities(table: discrete._Table) -> dict[int, Fraction]:
    """Read the exact law back from an alias table and its fine table."""
    capacity = 1 << int(table.shift)
    found: dict[int, int] = {}
    for cell, (threshold, alias) in enumerate(zip(table.threshold, table.alias, strict=True)):
        own = min(int(threshold), capacity)
        found[cell + table.first] = found.get(cell + table.first, 0) + own
        found[int(alias)] = found.get(int(alias), 0) + capacity - own
    assert sum(found.values()) == 1 << 64
    escape = Fraction(found.pop(table.escape), 1 << 64)
    law = {value: Fraction(weight, 1 << 64) for value, weight in found.items() if weight}
    below = 0
    for offset, above in enumerate(table.fine_sums):
        value = table.fine_first + offset
        law[value] = law.get(value, Fraction(0)) + escape * Fraction(above - below, table.fine_sums[-1])
        below = above
    return law


def distance(law: dict[int, Fraction], exact: Callable[[int], mpf], reach: int) -> float:
    total = mpf(0)
    for value in range(-reach, reach + 1):
        share = law.get(value, Fraction(0))
        total += abs(mpf(share.numerator) / share.denominator - exact(value))
    return float(log(total + mpf(2) ** -180, 2)) - 1


@pytest.mark.parametrize("sigma", [0.3, 1.0, 4.7, 20.0])
def test_the_gaussian_table_is_exact_to_two_to_the_minus_hundred(sigma: float) -> None:
    with mp.workdps(70):
        reach = math.ceil(18 * sigma) + 3
        weights = {x: exp(-(mpf(x) ** 2) / (2 * mpf(sigma) ** 2)) for x in range(-reach, reach + 1)}
        total = sum(weights.values())
        law = probabilities(discrete._gaussian_table(sigma))
        assert distance(law, lambda x: weights[x] / total, reach) < -100


@pytest.mark.parametrize("variance", [0.1, 1.0, 9.0, 400.0])
def test_the_skellam_table_is_exact_to_two_to_the_minus_hundred(variance: float) -> None:
    with mp.workdps(70):
        reach = math.ceil(20 * math.sqrt(variance)) + 60
        law = probabilities(discrete._skellam_table(variance))
        mu = mpf(variance)
        assert distance(law, lambda k: exp(-mu) * besseli(abs(k), mu), reach) < -100


def test_the_bessel_correction_agrees_with_a_sixty_digit_recurrence() -> None:
    variance = 70_000.0
    top = 9000
    with mp.workdps(60):
        values = [mpf(0)] * (top + 2)
        values[top] = mpf(10) ** -200
        for k in range(top, 0, -1):
            values[k - 1] = values[k + 1] + 2 * mpf(k) / mpf(variance) * values[k]
        for k in (1, 100, 700, 1500, 2500, 3500):
            exact = float(log(values[k] / values[0]) + mpf(k) ** 2 / (2 * mpf(variance)))
            found = float(discrete._log_ratio(np.array([float(k)]), variance)[0])
            assert found == pytest.approx(exact, abs=1e-13)


def test_a_sum_of_discrete_gaussians_is_a_discrete_gaussian() -> None:
    fine, factor, rest = 6.0, 2, 8.0
    variance = int(fine**2 + factor**2 * rest**2)  # an integer, so that no rounding enters
    with mp.workdps(40):
        reach = 400
        law = dict.fromkeys(range(-reach, reach + 1), mpf(0))
        left = {x: exp(-(mpf(x) ** 2) / (2 * mpf(rest) ** 2)) for x in range(-120, 121)}
        right = {x: exp(-(mpf(x) ** 2) / (2 * mpf(fine) ** 2)) for x in range(-100, 101)}
        for x, a in left.items():
            for y, b in right.items():
                law[factor * x + y] += a * b
        mass = sum(law.values())
        wide = {x: exp(-(mpf(x) ** 2) / (2 * variance)) for x in law}
        total = sum(wide.values())
        assert max(abs(law[x] / mass / (wide[x] / total) - 1) for x in range(-120, 121)) < 1e-30


def chi_square(
    samples: npt.NDArray[np.int64], law: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float64]]
) -> float:
    """Return the p-value that samples come from the law, over cells with at least 20 expected."""
    values = np.arange(samples.min() - 1, samples.max() + 2)
    expected = law(values) * len(samples)
    observed = np.bincount(samples - values[0], minlength=len(values))
    good = expected >= 20
    rest = np.array([observed[~good].sum(), expected[~good].sum()])
    cells = (
        np.append(observed[good], rest[0]),
        np.append(expected[good], rest[1] + len(samples) - expected.sum()),
    )
    return float(
        stats.chi2.sf(((cells[0] - cells[1]) ** 2 / np.maximum(cells[1], 1)).sum(), len(cells[0]) - 1)
    )


def gaussian_law(sigma: float) -> Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float64]]:
    reach = np.arange(-2000, 2001)
    total = np.exp(-(reach**2) / (2 * sigma**2)).sum()
    return lambda values: np.exp(-(values**2) / (2 * sigma**2)) / total


@pytest.mark.parametrize("sigma", [0.8, 3.0, 40.0])
def test_discrete_gaussian_samples_pass_at_their_scale_and_fail_at_another(sigma: float) -> None:
    samples = discrete_gaussian(COUNT, sigma=sigma, source=RandomSource.seeded(11))
    assert chi_square(samples, gaussian_law(sigma)) > 1e-4
    assert chi_square(samples, gaussian_law(1.05 * sigma)) < 1e-9


@pytest.mark.parametrize("variance", [0.7, 9.0, 1600.0])
def test_skellam_samples_pass_at_their_scale_and_fail_at_another(variance: float) -> None:
    samples = skellam(COUNT, variance=variance, source=RandomSource.seeded(12))
    assert chi_square(samples, lambda k: stats.skellam.pmf(k, variance / 2, variance / 2)) > 1e-4
    wide = 1.05**2 * variance
    assert chi_square(samples, lambda k: stats.skellam.pmf(k, wide / 2, wide / 2)) < 1e-9


@pytest.mark.parametrize("kind", ["discrete_gaussian", "skellam"])
@pytest.mark.parametrize("scale", [260.0, 5_000.0, 1e6])
def test_large_scales_pass_at_their_scale_and_fail_at_another(kind: str, scale: float) -> None:
    source = RandomSource.seeded(13)
    if kind == "skellam":
        samples = skellam(COUNT, variance=scale**2, source=source)
    else:
        samples = discrete_gaussian(COUNT, sigma=scale, source=source)
    # half a step of jitter makes integers continuous, which the test needs at the smaller scales
    smooth = (samples + RandomSource.seeded(14).uniform(COUNT) - 0.5) / scale
    assert stats.kstest(smooth, "norm").pvalue > 1e-4
    assert stats.kstest(smooth / 1.05, "norm").pvalue < 1e-9
    assert abs(float(np.mean(samples % 2)) - 0.5) < 5 / math.sqrt(COUNT)


def test_shares_of_skellam_add_up_to_skellam() -> None:
    total = sum(
        skellam(COUNT, variance=4.0 / 5, source=RandomSource.seeded(20 + share)) for share in range(5)
    )
    assert isinstance(total, np.ndarray)
    assert chi_square(total, lambda k: stats.skellam.pmf(k, 2.0, 2.0)) > 1e-4


def test_the_fine_draw_has_the_law_of_the_remainders() -> None:
    table = discrete._gaussian_table(1.0)
    source = RandomSource.seeded(15)
    draws = np.array([table.fine(source) for _ in range(20_000)])
    sums = [0, *table.fine_sums]
    weights = {table.fine_first + i: (b - a) / sums[-1] for i, (a, b) in enumerate(pairwise(sums))}
    law = lambda values: np.array([weights.get(int(value), 0.0) for value in values])
    assert chi_square(draws, law) > 1e-4
    assert draws.min() >= table.fine_first


@pytest.mark.parametrize("call", [
    lambda source: discrete_gaussian(1, sigma=0.0, source=source),
    lambda source: discrete_gaussian(1, sigma=float("nan"), source=source),
    lambda source: skellam(1, variance=-1.0, source=source),
    lambda source: skellam(1, variance=float("inf"), source=source),
])  # fmt: skip
def test_impossible_scales_are_refused(call: Callable[[RandomSource], object]) -> None:
    with pytest.raises(ParameterError, match="must lie in"):
        call(RandomSource.seeded(0))


def test_alias_weights_split_exactly() -> None:
    weights = [1, (1 << 64) - 6, 2, 3]
    threshold, alias = discrete._alias(weights, 2)
    mass = dict.fromkeys(range(4), 0)
    for cell in range(4):
        mass[cell] += threshold[cell]
        mass[alias[cell]] += (1 << 62) - threshold[cell]
    assert list(mass.values()) == weights
    assert Decimal(sum(weights)) == Decimal(2) ** 64
