"""Six ways to share noise wrongly: each is refuted by canaries that only know the specification."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pytest
import torch

from attacks import canary
from defenses.dp import Accountant, SumMechanism, poisson_sample
from defenses.random_source import RandomSource

Floats = npt.NDArray[np.float64]
CANARIES, DIMENSION, ROUNDS, DELTA = 1500, 3000, 6, 1e-5


def honest(**changes: object) -> SumMechanism:
    """Return the mechanism that is charged: a full release, two honest survivors counted on."""
    base = SumMechanism(
        noise_multiplier=2.0, bound=1.0, scale=2.0**15, dimension=DIMENSION, honest_survivors=2
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def charged(mechanism: SumMechanism) -> float:
    """Return what the ledger says of all rounds."""
    accountant = Accountant()
    accountant.compose(mechanism.event("round"), ROUNDS)
    return accountant.epsilon(DELTA).epsilon


@dataclass(frozen=True, kw_only=True)
class Game:
    """One site holds canaries, included by their own coins; a second honest site adds its share."""

    coins: canary.Canaries
    rows: Floats  # [included canaries, dimension]

    @classmethod
    def start(cls, norm: float = 1.0) -> Game:
        """Toss the coins."""
        coins = canary.Canaries(count=CANARIES, dimension=DIMENSION, norm=norm, seed=4, kind="dirac")
        included = coins.included.nonzero().flatten()
        rows = np.stack([coins.direction(int(index)).numpy() for index in included])
        return cls(coins=coins, rows=rows.astype(np.float64))

    def lower_bound(self, total: Floats, *, gaussian: bool = True) -> float:
        """Return the largest valid lower bound on epsilon that a server proves from what it opened."""
        scores = self.coins.scores(torch.from_numpy(total)).double().numpy()
        included = self.coins.included.numpy()
        found = canary.bounds(scores[included], scores[~included], DELTA, gaussian=gaussian)
        return max(bound.epsilon for bound in found)


def opened(rows: Floats, mechanism: SumMechanism, source: RandomSource, *, sites: int = 2) -> Floats:
    """Return one opened sum in real units: one site with rows, the others with nothing."""
    total = mechanism.share(rows.sum(axis=0), source)
    for _ in range(sites - 1):
        total = total + mechanism.share(np.zeros(mechanism.dimension), source)
    return np.asarray(total / mechanism.scale, dtype=np.float64)


def all_rounds(round_of: Callable[[RandomSource], Floats]) -> Floats:
    """Return the sum of all opened sums: for a constant query that is all a server learns."""
    source = RandomSource.system()
    return np.asarray(sum(round_of(source) for _ in range(ROUNDS)), dtype=np.float64)


def test_the_canaries_stay_below_the_ledger_where_nothing_is_broken() -> None:
    """And not far below: an audit that finds nothing proves nothing."""
    game, mechanism = Game.start(), honest()
    found = game.lower_bound(all_rounds(lambda source: opened(game.rows, mechanism, source)))
    assert 0.5 * charged(mechanism) < found <= charged(mechanism)


def broken() -> Iterator[tuple[str, Callable[[Game, RandomSource], Floats]]]:
    """Yield the variants that leave too little noise or too large a row in one opened sum."""
    yield (
        "share of too many survivors",
        lambda game, source: opened(game.rows, honest(honest_survivors=6), source),
    )
    yield "noise missing at one site", lambda game, source: opened(game.rows, honest(), source, sites=1)
    yield "two local steps", lambda game, source: opened(2 * game.rows, honest(), source)
    yield "no bound per record", lambda game, source: opened(5 * game.rows, honest(), source)


@pytest.mark.parametrize(("name", "round_of"), list(broken()), ids=lambda value: str(value).split(" at ")[0])
def test_a_broken_variant_is_refuted(name: str, round_of: Callable[[Game, RandomSource], Floats]) -> None:
    """The lower bound lies above what is charged for the mechanism as specified."""
    game = Game.start()
    found = game.lower_bound(all_rounds(lambda source: round_of(game, source)))
    assert found > charged(honest()), name


def test_a_second_local_step_moves_a_sites_sum_by_more_than_the_bound() -> None:
    """Why two steps are refused: the record is counted twice, and turns the others' gradients besides."""
    points = np.array([1.0, 1.01, 0.99, 1.02])

    def two_steps(values: Floats) -> float:
        first = float(np.clip(values, -1, 1).sum())
        second = np.clip(values - 0.9 * first, -1, 1)  # gradients at the moved model
        return first + float(second.sum())

    change = abs(two_steps(points) - two_steps(points[:-1]))
    assert change <= 2.0
    moved = abs(two_steps(np.append(np.zeros(50) + 0.9, 1.0)) - two_steps(np.zeros(50) + 0.9))
    several = [
        abs(two_steps(np.append(np.full(50, level), 1.0)) - two_steps(np.full(50, level)))
        for level in np.linspace(-0.05, 0.05, 41)
    ]
    assert max(moved, *several) > 2.0


def test_rounding_outside_the_bound_is_refuted() -> None:
    """Rounding every coordinate up is no row's own length: a short dense row moves the sum by sqrt(d)
    levels.
    """
    mechanism = honest(scale=20.0, noise_multiplier=6.0)
    unpaid = (mechanism.noise_multiplier * mechanism.bound * mechanism.scale) ** 2  # rounding left out
    row = np.full(DIMENSION, 1.0 / math.sqrt(DIMENSION))
    change = np.ceil(row * mechanism.scale) - np.ceil(np.zeros(DIMENSION))
    assert float(np.linalg.norm(change)) > 2 * mechanism.bound * mechanism.scale
    assert float(np.linalg.norm(change)) <= mechanism.l2_sensitivity
    # The distance over the deviation is what a two-point test sees: its exact epsilon, against what was
    # claimed.
    separation = float(np.linalg.norm(change)) / math.sqrt(unpaid) * math.sqrt(ROUNDS)
    claimed = canary.gaussian_epsilon(math.sqrt(ROUNDS) / mechanism.noise_multiplier, DELTA)
    assert canary.gaussian_epsilon(separation, DELTA) > claimed
    paid = charged(mechanism)
    assert canary.gaussian_epsilon(separation * math.sqrt(unpaid / mechanism.variance), DELTA) <= paid


def test_a_replayed_share_is_refuted() -> None:
    """The same noise on two sums: their difference has none, and shows who was sampled in one and not
    the other.
    """
    game = Game.start()
    mechanism = honest(sampling_rate=0.5, noise_multiplier=8.0)
    source = RandomSource.system()
    frozen = RandomSource.seeded(9)

    def one(noise: RandomSource) -> Floats:
        sampled = poisson_sample(len(game.rows), rate=0.5, source=source)
        return opened(game.rows[sampled], mechanism, noise)

    replayed = np.abs(one(frozen.derive("share")) - one(frozen.derive("share")))
    assert game.lower_bound(replayed, gaussian=False) > charged(mechanism)
    fresh = np.abs(one(source) - one(source))
    assert game.lower_bound(fresh, gaussian=False) <= charged(mechanism)
