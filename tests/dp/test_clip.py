"""Clipping bounds one sample's share whatever its gradient is."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from defenses.dp.clip import AdaptiveCount, Clipping, ClippingKind, clip_vector
from defenses.errors import ParameterError

KINDS = ["flat", "per_layer", "automatic", "adaptive"]
norms = st.lists(
    st.one_of(st.floats(0, 2.0**60, width=32), st.just(float("nan")), st.just(float("inf"))),
    min_size=1,
    max_size=5,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(kind=st.sampled_from(KINDS), bound=st.floats(1e-3, 1e3), first=norms, second=norms)
def test_no_sample_exceeds_the_bound(
    kind: ClippingKind, bound: float, first: list[float], second: list[float]
) -> None:
    length = min(len(first), len(second))
    squared = {"a.weight": torch.tensor(first[:length]) ** 2, "b.weight": torch.tensor(second[:length]) ** 2}
    factors = Clipping(kind=kind, clip_norm=bound).factors(squared)
    for sample in range(length):
        parts = [float(squared[name][sample]) for name in squared]
        scale = [float(factors[name][sample]) for name in squared]
        if not all(math.isfinite(part) for part in parts) or not math.isfinite(
            float(torch.tensor(parts).sum())
        ):
            assert scale == [0.0, 0.0]
        else:
            total = sum(part * factor**2 for part, factor in zip(parts, scale, strict=True))
            assert math.sqrt(total) <= bound * (1 + 1e-6)
            assert all(factor > 0 for factor in scale)


def test_small_gradients_are_left_alone_by_flat_clipping() -> None:
    factors = Clipping(clip_norm=2.0).factors({"w": torch.tensor([0.0, 1.0, 4.0, 16.0])})
    torch.testing.assert_close(factors["w"], torch.tensor([1.0, 1.0, 1.0, 0.5]))


def test_per_layer_clipping_splits_the_bound_over_modules() -> None:
    clip = Clipping(kind="per_layer", clip_norm=2.0)
    squared = {
        "a.weight": torch.tensor([100.0]),
        "a.bias": torch.tensor([44.0]),
        "b.weight": torch.tensor([1.0]),
    }
    factors = clip.factors(squared)
    assert float(factors["a.weight"]) == float(factors["a.bias"]) == pytest.approx(2 / math.sqrt(2) / 12)
    assert float(factors["b.weight"]) == 1.0


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    values=st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=1, max_size=20),
    bound=st.floats(1e-6, 1e6),
)
def test_a_clipped_vector_is_within_the_bound(values: list[float], bound: float) -> None:
    clipped = clip_vector(torch.tensor(values), clip_norm=bound)
    assert float(torch.linalg.vector_norm(clipped.double())) <= bound * (1 + 1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_vector_with_a_non_finite_coordinate_becomes_zero(bad: float) -> None:
    assert torch.equal(clip_vector(torch.tensor([1.0, bad]), clip_norm=1.0), torch.zeros(2))


def test_an_adaptive_bound_converges_to_the_quantile() -> None:
    lengths = torch.linspace(0.1, 10.0, 1000)
    clip = Clipping(kind="adaptive", clip_norm=0.01, quantile=0.3, learning_rate=0.5)
    for _ in range(100):
        clip = clip.follow(clip.within({"w": lengths**2}) / len(lengths))
    assert clip.clip_norm == pytest.approx(float(lengths.quantile(0.3)), rel=0.05)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(total=st.floats(0.3, 20), excess=st.floats(1.01, 100))
def test_gradient_and_count_together_cost_what_the_event_states(total: float, excess: float) -> None:
    count = AdaptiveCount(total=total, count_noise=total / 2 * excess)
    assert count.gradient > total
    # one joint release with independent noise: squared ratios of sensitivity to noise add up
    assert count.gradient**-2 + (0.5 / count.count_noise) ** 2 == pytest.approx(total**-2)


def test_a_count_that_would_cost_more_than_the_step_is_refused() -> None:
    with pytest.raises(ParameterError, match="count_noise"):
        AdaptiveCount(total=2.0, count_noise=1.0)


@pytest.mark.parametrize("options", [
    {"clip_norm": 0.0}, {"clip_norm": -1.0}, {"clip_norm": float("nan")}, {"clip_norm": float("inf")},
    {"clip_norm": 1.0, "kind": "ghost"}, {"clip_norm": 1.0, "stabiliser": 0.0},
    {"clip_norm": 1.0, "quantile": 1.0},
])  # fmt: skip
def test_impossible_clipping_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ParameterError):
        Clipping(**options)
