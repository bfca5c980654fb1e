"""Rules against a few wrong points: slow obvious definitions beside them, and what each promises."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from defenses import robust


def points_of(seed: int, count: int, width: int = 5) -> Tensor:
    """Return points [count, width], float64."""
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, width)))


def slow_krum_scores(points: Tensor, wrong: int) -> list[float]:
    """Add up, for every point, the smallest squared distances to others, by loops."""
    scores = []
    for index, point in enumerate(points):
        others = [
            float((point - other).square().sum()) for place, other in enumerate(points) if place != index
        ]
        scores.append(sum(sorted(others)[: len(points) - wrong - 2]))
    return scores


def slow_bulyan(points: Tensor, wrong: int) -> Tensor:
    """Choose one by one, then average each coordinate's values nearest to the median, by loops."""
    left, chosen = list(points), []
    for _ in range(len(points) - 2 * wrong):
        scores = []
        for index, point in enumerate(left):
            others = sorted(
                float((point - other).square().sum()) for k, other in enumerate(left) if k != index
            )
            scores.append(sum(others[: min(max(1, len(left) - wrong - 2), max(1, len(left) - 1))]))
        chosen.append(left.pop(int(np.argmin(scores))))
    averages = []
    for place in range(points.shape[1]):
        values = [float(point[place]) for point in chosen]
        middle = float(np.median(values))
        nearest = sorted(values, key=lambda value, middle=middle: abs(value - middle))
        averages.append(float(np.mean(nearest[: len(points) - 4 * wrong])))
    return torch.tensor(averages, dtype=torch.float64)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_the_coordinate_median_is_numpys(count: int) -> None:
    points = points_of(count, count)
    assert robust.coordinate_median(points).numpy() == pytest.approx(np.median(points.numpy(), axis=0))


@pytest.mark.parametrize(("count", "wrong"), [(3, 1), (7, 2), (8, 3), (5, 0)])
def test_the_trimmed_mean_leaves_out_both_ends(count: int, wrong: int) -> None:
    points = points_of(count, count)
    expected = [float(np.mean(sorted(column)[wrong : count - wrong])) for column in points.numpy().T]
    assert robust.trimmed_mean(points, wrong=wrong).numpy() == pytest.approx(expected)


@pytest.mark.parametrize("count", [1, 2, 3, 8, 15])
def test_no_point_nearby_has_a_smaller_sum_of_distances(count: int) -> None:
    points = points_of(count, count, width=3)
    centre = robust.geometric_median(points)

    def total(place: Tensor) -> float:
        return float((points - place).norm(dim=1).sum())

    here = total(centre)
    for direction in itertools.product((-1.0, 0.0, 1.0), repeat=3):
        for length in (1e-4, 1e-2, 1.0):
            assert here <= total(centre + length * torch.tensor(direction, dtype=torch.float64)) + 1e-9


def test_the_geometric_median_of_a_point_that_holds_the_majority_is_that_point() -> None:
    """Weiszfeld's plain iteration divides by zero here."""
    points = torch.cat([torch.ones(5, 2), points_of(1, 3, 2)]).double()
    assert torch.allclose(robust.geometric_median(points), torch.ones(2).double(), atol=1e-6)


@pytest.mark.parametrize(("count", "wrong"), [(5, 1), (9, 3), (10, 2)])
def test_krum_is_its_definition(count: int, wrong: int) -> None:
    points = points_of(count, count)
    scores = slow_krum_scores(points, wrong)
    assert robust.krum_scores(points, wrong=wrong).tolist() == pytest.approx(scores)
    assert torch.equal(robust.krum(points, wrong=wrong), points[int(np.argmin(scores))])
    best = np.argsort(scores, kind="stable")[: count - wrong]
    assert torch.allclose(robust.multi_krum(points, wrong=wrong), points[best].mean(dim=0))


@pytest.mark.parametrize(("count", "wrong"), [(7, 1), (12, 2), (11, 2)])
def test_bulyan_is_its_definition(count: int, wrong: int) -> None:
    points = points_of(count + 40, count)
    assert torch.allclose(robust.bulyan(points, wrong=wrong), slow_bulyan(points, wrong))


RULES = {
    "coordinate_median": lambda points, wrong: robust.coordinate_median(points),
    "geometric_median": lambda points, wrong: robust.geometric_median(points),
    "trimmed_mean": lambda points, wrong: robust.trimmed_mean(points, wrong=wrong),
    "krum": lambda points, wrong: robust.krum(points, wrong=wrong),
    "multi_krum": lambda points, wrong: robust.multi_krum(points, wrong=wrong),
    "bulyan": lambda points, wrong: robust.bulyan(points, wrong=wrong),
}


@pytest.mark.parametrize("name", sorted(RULES))
@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), far=st.sampled_from([1e2, 1e6, 1e12]))
def test_two_points_far_away_move_a_rule_by_no_more_than_the_others_spread(
    name: str, seed: int, far: float
) -> None:
    """The mean would move by far / 6; the plain mean does, in the next test."""
    right = points_of(seed, 10)
    wrong = far * points_of(seed + 1, 2)
    both = torch.cat([wrong, right])
    moved = float((RULES[name](both, 2) - right.mean(dim=0)).norm())
    assert moved <= 2.0 * float((right - right.mean(dim=0)).norm(dim=1).max()) * 5**0.5


def test_two_points_far_away_move_the_mean() -> None:
    right = points_of(3, 10)
    both = torch.cat([1e6 * torch.ones(2, 5, dtype=torch.float64), right])
    assert float((both.mean(dim=0) - right.mean(dim=0)).norm()) > 1e5


@pytest.mark.parametrize("name", sorted(set(RULES) - {"bulyan"}))  # two equal scores go by order there
def test_order_does_not_matter(name: str) -> None:
    points = points_of(5, 11)
    order = torch.from_numpy(np.random.default_rng(2).permutation(11))
    assert torch.allclose(RULES[name](points, 2), RULES[name](points[order], 2), atol=1e-8)


def test_trust_is_by_direction_and_length_counts_nothing() -> None:
    reference = torch.tensor([2.0, 0.0], dtype=torch.float64)
    points = torch.tensor([[10.0, 0.0], [-300.0, 1.0], [0.1, 0.1]], dtype=torch.float64)
    mean = robust.trusted_mean(points, reference, torch.full((3,), 2.0))
    half = 1 / 2**0.5
    expected = (1.0 * torch.tensor([2.0, 0.0]) + half * torch.tensor([2 * half, 2 * half])) / (1.0 + half)
    assert torch.allclose(mean, expected.double())
    assert float(mean.norm()) <= 2.0


def test_where_nobody_agrees_nothing_is_trusted() -> None:
    reference = torch.tensor([1.0, 0.0], dtype=torch.float64)
    against = torch.tensor([[-1.0, 0.0], [-2.0, 5.0], [0.0, 0.0]], dtype=torch.float64)
    assert float(robust.trusted_mean(against, reference, torch.ones(3)).norm()) == 0.0
    assert float(robust.trusted_mean(-against, 0 * reference, torch.ones(3)).norm()) == 0.0


@pytest.mark.parametrize(
    ("rule", "count"), [("trimmed_mean", 4), ("krum", 6), ("multi_krum", 6), ("bulyan", 10)]
)
def test_too_few_points_are_refused(rule: str, count: int) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        RULES[rule](points_of(1, count), 2)


def test_an_independent_library_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    """byzfl counts one neighbour more in Krum than the paper, so it is asked with one attacker more."""
    found = importlib.util.find_spec("byzfl")
    if found is None:
        pytest.skip("byzfl is not installed")
    package = types.ModuleType("byzfl")  # its rules alone: the package as a whole asks for a picture library
    package.__path__ = list(found.submodule_search_locations or ())
    monkeypatch.setitem(sys.modules, "byzfl", package)
    aggregators = importlib.import_module("byzfl.aggregators.aggregators")
    points = points_of(9, 11).float()
    for ours, theirs in (
        (robust.coordinate_median(points), aggregators.Median()),
        (robust.trimmed_mean(points, wrong=2), aggregators.TrMean(f=2)),
        (robust.krum(points, wrong=2), aggregators.Krum(f=3)),
        (robust.geometric_median(points), aggregators.GeometricMedian(nu=1e-9, T=500)),
    ):
        assert torch.allclose(ours, theirs(points), atol=1e-4), theirs.__class__.__name__
