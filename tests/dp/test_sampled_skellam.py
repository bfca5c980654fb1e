"""Sampled Skellam noise: the charged epsilon is never below what exact distributions say,
in both directions.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.fft import next_fast_len
from scipy.special import gammaln, ive

from defenses.dp import Accountant, GaussianEvent, SampledSkellamEvent, SkellamEvent, from_json
from defenses.dp.orders import ORDERS
from defenses.dp.rdp import event_log_moments, renyi_epsilon
from defenses.dp.skellam_gap import _log_ratio_range
from defenses.errors import ParameterError

Floats = npt.NDArray[np.float64]
GRID = 2e-3  # losses are rounded down to it, so the exact delta is at least what comes out
WINDOW = 40.0  # losses beyond count as this on top, and as nothing below


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One random setting: `records` of a person, each moving the sum by the same integer shift."""

    shift: tuple[int, ...]
    variance: float
    rate: float
    steps: int
    records: int

    def event(self) -> SampledSkellamEvent:
        """Return the event that states the shift's own norms."""
        shift = np.array(self.shift, dtype=np.float64)
        return SampledSkellamEvent(
            unit="record" if self.records == 1 else "person",
            records_per_person=self.records,
            adjacency="add_remove",
            sampling_rate=self.rate,
            l1_sensitivity=float(np.abs(shift).sum()),
            l2_sensitivity=math.sqrt(float(shift @ shift)),
            variance=self.variance,
            dimension=len(self.shift),
            scale=1.0,
            steps=self.steps,
            release="test",
        )


def random_setting(random: np.random.Generator, *, wide: bool = False) -> Setting:
    """Draw a setting whose exact distribution fits a table; `wide` noise is accounted by loss
    distributions.
    """
    if wide:
        deviation = float(np.exp(random.uniform(math.log(3e3), math.log(6e3))))
        return Setting(
            shift=(int(deviation * np.exp(random.uniform(math.log(0.05), math.log(3.0)))),),
            variance=deviation**2,
            rate=1.0 if random.random() < 0.2 else float(np.exp(random.uniform(math.log(1e-3), 0.0))),
            steps=int(random.choice([1, 2, 3, 10])),
            records=int(random.choice([1, 1, 2, 3])),
        )
    dimension = int(random.integers(1, 3))
    deviation = float(np.exp(random.uniform(math.log(0.6), math.log(12.0 if dimension == 1 else 5.0))))
    most = max(1, round(3 * deviation))
    shift = tuple(int(part) for part in random.integers(-most, most + 1, size=dimension))
    return Setting(
        shift=shift if any(shift) else (1,) * dimension,
        variance=deviation**2,
        rate=1.0 if random.random() < 0.2 else float(np.exp(random.uniform(math.log(1e-3), 0.0))),
        steps=int(random.choice([1, 1, 2, 3, 10])),
        records=int(random.choice([1, 1, 1, 2, 3])),
    )


def skellam_masses(outputs: npt.NDArray[np.int64], variance: float) -> Floats:
    """Return the exact probabilities of the difference of two Poisson(variance / 2) variables."""
    distances = np.abs(outputs)
    table = ive(np.arange(int(distances.max()) + 1), variance)
    return np.asarray(table[distances], dtype=np.float64)


def exact_pair(setting: Setting) -> tuple[Floats, Floats]:
    """Return the probabilities of every output of one step, with the person and without."""
    deviation = math.sqrt(setting.variance)
    axes = []
    for part in setting.shift:
        reach = math.ceil(14 * deviation + 12) + setting.records * abs(part)
        axes.append(np.arange(-reach, reach + 1))
    present = np.zeros([len(axis) for axis in axes])
    for number in range(setting.records + 1):
        weight = math.comb(setting.records, number)
        weight *= setting.rate**number * (1 - setting.rate) ** (setting.records - number)
        moved = [axis - number * part for axis, part in zip(axes, setting.shift, strict=True)]
        present += weight * joint(moved, setting.variance)
    return present.ravel(), joint(axes, setting.variance).ravel()


def joint(outputs: list[npt.NDArray[np.int64]], variance: float) -> Floats:
    """Return the product law over all coordinates."""
    masses = [skellam_masses(axis, variance) for axis in outputs]
    return masses[0] if len(masses) == 1 else np.multiply.outer(masses[0], masses[1])


def lower_delta(own: Floats, other: Floats, steps: int, epsilons: Floats) -> Floats:
    """Return a lower bound of delta of `steps` steps:
    losses are rounded down, lost tails count as nothing.
    """
    used = (own > 1e-250) & (other > 1e-250)
    losses, masses = np.log(own[used] / other[used]), own[used]
    kept = losses > -WINDOW
    cells = np.floor(np.minimum(losses[kept], WINDOW) / GRID).astype(np.int64)
    first = int(cells.min())
    binned = np.bincount(cells - first, weights=masses[kept])
    length = steps * (len(binned) - 1) + 1
    size = next_fast_len(length, real=True)
    total = np.maximum(np.fft.irfft(np.fft.rfft(binned, n=size) ** steps, n=size)[:length], 0.0)
    composed = (np.arange(length) + steps * first) * GRID
    gains = [float(np.sum(total * -np.expm1(np.minimum(epsilon - composed, 0.0)))) for epsilon in epsilons]
    return np.asarray(gains)


@pytest.mark.parametrize("settings", [150, pytest.param(2000, marks=pytest.mark.slow)])
def test_random_settings_are_never_below_the_exact_divergence(settings: int) -> None:
    """Delta of the accountant is at least the exact one, with the record added and with it removed."""
    random = np.random.default_rng(20261130)
    epsilons = np.array([0.01, 0.1, 0.5, 1.0, 2.0, 4.0, 8.0])
    tightest = math.inf
    for _ in range(settings):
        setting = random_setting(random)
        accountant = Accountant()
        accountant.compose(setting.event())
        charged = np.array([accountant.delta(float(epsilon)) for epsilon in epsilons])
        present, absent = exact_pair(setting)
        for own, other in ((present, absent), (absent, present)):
            exact = lower_delta(own, other, setting.steps, epsilons)
            assert (charged >= exact - 1e-12).all(), (setting, charged, exact)
            seen = exact > 1e-9
            if seen.any():
                tightest = min(tightest, float((charged[seen] / exact[seen]).min()))
    # A bound that is many times the truth everywhere would pass the assertion above and say nothing.
    assert tightest < 3.0


@pytest.mark.parametrize("settings", [4, pytest.param(500, marks=pytest.mark.slow)])
def test_wide_noise_accounted_by_its_loss_distribution_is_never_below_the_exact_divergence(
    settings: int,
) -> None:
    """At the epsilon that is charged, the exact delta of either direction is at most the delta asked for."""
    random = np.random.default_rng(15)
    by_losses, tightest = 0, math.inf
    for _ in range(settings):
        setting = random_setting(random, wide=True)
        accountant = Accountant()
        accountant.compose(setting.event())
        present, absent = exact_pair(setting)
        for delta in (1e-5, 1e-2):
            charged = accountant.epsilon(delta)
            by_losses += charged.accountant != "rdp"
            for own, other in ((present, absent), (absent, present)):
                exact = float(lower_delta(own, other, setting.steps, np.array([charged.epsilon]))[0])
                assert exact <= delta + 1e-12, (setting, charged, exact)
                if 0.05 < charged.epsilon < 20 and exact > 0:
                    tightest = min(tightest, delta / exact)
    assert by_losses > settings
    assert tightest < 1.2


def test_skellam_is_as_near_to_the_discrete_gaussian_as_is_charged() -> None:
    """The log-ratio of both laws stays inside the bound over the whole range, and the bound is no
    caricature.
    """
    for variance in (1e4, 1e5, 1e6):
        for reach in (2.0, 6.0, 11.0):
            outputs = np.arange(0, math.floor(reach * math.sqrt(variance)) + 1)
            everywhere = np.arange(
                -math.ceil(30 * math.sqrt(variance)), math.ceil(30 * math.sqrt(variance)) + 1
            )
            gaussian = np.exp(-(everywhere.astype(np.float64) ** 2) / (2 * variance)).sum()
            logs = np.log(ive(outputs, variance)) + outputs.astype(np.float64) ** 2 / (2 * variance)
            furthest = float(np.abs(logs + math.log(gaussian)).max())
            charged = _log_ratio_range(reach, variance)
            assert furthest <= charged
            assert charged < 20 * furthest


def test_ratios_of_bessel_functions_lie_between_the_bounds_the_proof_uses() -> None:
    """Amos 1974, inequality 16, from order 0 to far beyond the argument."""
    for argument in (0.5, 10.0, 1e3, 1e5):
        orders = np.unique(np.geomspace(1, 6 * math.sqrt(argument) + 20, 60).astype(np.int64)) - 1
        below, above = ive(orders, argument), ive(orders + 1, argument)
        used = above > 1e-290
        ratios, middle = above[used] / below[used], orders[used] + 0.5
        assert (ratios <= argument / (middle + np.sqrt(argument**2 + middle**2)) * (1 + 1e-9)).all()
        assert (ratios >= argument / (middle + np.sqrt(argument**2 + (middle + 1) ** 2)) * (1 - 1e-9)).all()


def test_a_wide_release_costs_about_what_its_gaussian_costs_and_less_than_by_renyi_moments() -> None:
    """Twenty releases of 38,000 numbers at 19 bits below the bound: within half a percent of the Gaussian."""
    event = SampledSkellamEvent(
        unit="record",
        adjacency="add_remove",
        sampling_rate=0.01,
        l1_sensitivity=5e5 * 195,
        l2_sensitivity=5e5,
        variance=(0.5 * 5e5) ** 2,
        dimension=38_000,
        scale=1.0,
        steps=20,
        release="test",
    )
    gaussian = GaussianEvent(
        unit="record",
        adjacency="add_remove",
        sampling="poisson",
        sampling_rate=0.01,
        noise_multiplier=0.5,
        steps=20,
        clip_norm=1.0,
        release="test",
    )
    integer, real = Accountant(), Accountant()
    integer.compose(event)
    real.compose(gaussian)
    exact, charged = real.epsilon(1e-5).epsilon, integer.epsilon(1e-5).epsilon
    assert exact <= charged <= 1.005 * exact
    assert charged < 0.75 * renyi_epsilon(event_log_moments(event)[0], 1e-5)[0]
    assert integer.delta(charged) <= 1e-5
    together = Accountant()
    together.compose(gaussian)
    first = together.epsilon_with(event, 1e-5).epsilon
    together.compose(event)
    assert together.epsilon(1e-5).epsilon == pytest.approx(first, rel=1e-3)
    assert together.copy().epsilon(1e-5).epsilon == together.epsilon(1e-5).epsilon
    assert first > charged


def test_narrow_noise_is_accounted_by_renyi_moments_alone() -> None:
    """A count with little noise is far from a Gaussian: nothing is claimed from nearness."""
    event = Setting(shift=(1,), variance=4.0, rate=1.0, steps=1, records=1).event()
    accountant = Accountant()
    accountant.compose(event)
    assert accountant.epsilon(1e-5).accountant == "rdp"


def test_a_bound_with_half_the_shift_is_caught_by_the_same_comparison() -> None:
    """The comparison above can fail: charged at half the sensitivity, hundreds of settings are refuted."""
    random = np.random.default_rng(7)
    refuted = 0
    for _ in range(100):
        setting = random_setting(random)
        event = setting.event()
        cheap = replace(
            event, l1_sensitivity=event.l1_sensitivity / 2, l2_sensitivity=event.l2_sensitivity / 2
        )
        accountant = Accountant()
        accountant.compose(cheap)
        present, absent = exact_pair(setting)
        exact = lower_delta(present, absent, setting.steps, np.array([0.5, 2.0]))
        charged = np.array([accountant.delta(0.5), accountant.delta(2.0)])
        refuted += bool((charged < exact - 1e-12).any())
    assert refuted > 20


@given(
    shift=st.integers(1, 6),
    deviation=st.floats(0.5, 8.0),
    rate=st.floats(1e-3, 0.999),
    order=st.floats(1.0, 12.0),
)
def test_removing_a_record_is_the_worse_direction_for_symmetric_integer_noise(
    shift: int, deviation: float, rate: float, order: float
) -> None:
    """The reflection x -> shift - x swaps both laws, so E_Q (P/Q)^a >= E_P (Q/P)^a at every real order."""
    setting = Setting(shift=(shift,), variance=deviation**2, rate=rate, steps=1, records=1)
    present, absent = exact_pair(setting)
    used = (present > 1e-280) & (absent > 1e-280)
    ratio = present[used] / absent[used]
    removed = float(np.sum(absent[used] * ratio**order))
    added = float(np.sum(present[used] * ratio**-order))
    assert added <= removed * (1 + 1e-9)
    for epsilon in (0.0, 0.3, 1.0, 3.0):
        without = float(np.sum(np.maximum(present - math.exp(epsilon) * absent, 0.0)))
        with_it = float(np.sum(np.maximum(absent - math.exp(epsilon) * present, 0.0)))
        assert with_it <= without + 1e-12


def test_noise_that_is_not_symmetric_has_no_reflection() -> None:
    """The symmetry is used: for one-sided Poisson noise adding a record can be the worse direction."""
    outputs = np.arange(0, 60)
    masses = np.exp(outputs * math.log(6.0) - 6.0 - gammaln(outputs + 1))
    mixed = 0.5 * masses + 0.5 * np.concatenate([masses[1:], [0.0]])  # the record takes one away
    removed = float(np.sum(masses * (mixed / masses) ** 6))
    added = float(np.sum(mixed * (masses / mixed) ** 6))
    other = 0.5 * masses + 0.5 * np.concatenate([[0.0], masses[:-1]])  # the record adds one
    removed_up = float(np.sum(masses * (other / masses) ** 6))
    added_up = float(np.sum(other * (masses / other) ** 6))
    assert added > removed or added_up > removed_up


def test_without_sampling_it_is_the_event_of_a_full_release() -> None:
    """At rate 1 the curve is that of `SkellamEvent` with the same numbers."""
    sampled = Setting(shift=(7, 2), variance=90.0, rate=1.0, steps=3, records=1).event()
    full = SkellamEvent(
        unit="record",
        adjacency="add_remove",
        l1_sensitivity=sampled.l1_sensitivity,
        l2_sensitivity=sampled.l2_sensitivity,
        variance=90.0,
        scale=1.0,
        steps=3,
        release="test",
    )
    np.testing.assert_allclose(event_log_moments(sampled)[0], event_log_moments(full)[0], rtol=1e-9)


def test_the_curve_grows_with_rate_steps_records_and_shift_and_falls_with_noise() -> None:
    """Whatever makes a release tell more is charged more."""
    base = Setting(shift=(5,), variance=50.0, rate=0.1, steps=4, records=2)
    event = base.event()
    curve = event_log_moments(event)[0]
    for worse in (
        replace(event, sampling_rate=0.2),
        replace(event, steps=5),
        replace(event, records_per_person=3),
        replace(event, l2_sensitivity=6.0, l1_sensitivity=6.0),
        replace(event, variance=40.0),
    ):
        assert (event_log_moments(worse)[0] >= curve).all()
        assert event_log_moments(worse)[0][ORDERS > 1][0] > curve[ORDERS > 1][0]


def test_a_person_is_never_cheaper_than_her_records_under_the_group_mixture() -> None:
    """With k records the exact moments of all subsets stay below the weighted average that is charged."""
    for rate, records in itertools.product((0.02, 0.3, 0.8), (2, 4)):
        setting = Setting(shift=(2,), variance=16.0, rate=rate, steps=1, records=records)
        present, absent = exact_pair(setting)
        ratio = present / absent
        for alpha in (2, 3, 6):
            exact = math.log(float(np.sum(absent * ratio**alpha)))
            charged = float(np.interp(alpha - 1, ORDERS, event_log_moments(setting.event())[0]))
            assert charged >= exact - 1e-12


def test_events_of_impossible_releases_are_refused_and_the_text_reads_back() -> None:
    """Client unit, replace-one and several records of one record are not what the derivation covers."""
    event = Setting(shift=(3,), variance=9.0, rate=0.1, steps=1, records=1).event()
    assert from_json(event.to_json()) == event
    for wrong in (
        {"unit": "client"},
        {"adjacency": "replace_one"},
        {"sampling_rate": 0.0},
        {"sampling_rate": 1.5},
        {"records_per_person": 2},
        {"variance": 0.0},
        {"l1_sensitivity": 1.0},
    ):
        with pytest.raises(ParameterError):
            replace(event, **wrong)  # type: ignore[arg-type]
