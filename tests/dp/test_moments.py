"""Second moments kept as vectors are bounded and added up as the rows they stand for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from defenses.dp import MomentRows, SumMechanism
from defenses.errors import ParameterError

WIDTH, CLASSES = 3, 2
NUMBERS = st.one_of(
    st.floats(-3, 3), st.sampled_from([0.0, 1e-200, 1e150, 1e308, -1e308, np.inf, -np.inf, np.nan])
)


def mechanism(bound: float, *, whole: bool = False) -> SumMechanism:
    dimension = WIDTH * (WIDTH + 1) // 2 + CLASSES * WIDTH
    return SumMechanism(
        noise_multiplier=1.0, bound=bound, scale=64.0, dimension=dimension, honest_survivors=1,
        whole_numbers=whole,
    )  # fmt: skip


def rows_of(features: np.ndarray) -> MomentRows:
    labels = np.arange(len(features)) % CLASSES
    return MomentRows(features=features, labels=labels.astype(np.int64), classes=CLASSES)


@given(
    features=st.integers(0, 6).flatmap(lambda count: arrays(np.float64, (count, WIDTH), elements=NUMBERS)),
    bound=st.floats(0.01, 50),
)
def test_the_bounded_sum_is_that_of_the_rows_written_out(features: np.ndarray, bound: float) -> None:
    rows, inner = rows_of(features), mechanism(bound)
    with np.errstate(all="ignore"):
        written_out = inner.bounded(rows.dense()).sum(axis=0)
    np.testing.assert_allclose(inner.bounded_sum(rows), written_out, rtol=1e-9, atol=1e-9 * bound)


@given(features=arrays(np.float64, (1, WIDTH), elements=NUMBERS), bound=st.floats(0.01, 50))
def test_no_row_moves_the_sum_by_more_than_the_bound(features: np.ndarray, bound: float) -> None:
    moved = mechanism(bound).bounded_sum(rows_of(features))
    assert np.isfinite(moved).all()
    assert np.linalg.norm(moved) <= bound * (1 + 1e-9)


def test_a_sum_is_read_as_the_matrices_it_stands_for() -> None:
    features = np.random.default_rng(0).normal(size=(5, WIDTH))
    rows = rows_of(features)
    moments, by_class = MomentRows.read(rows.weighted_sum(np.ones(5)), width=WIDTH, classes=CLASSES)
    np.testing.assert_allclose(moments, features.T @ features, atol=1e-12)
    for label in range(CLASSES):
        np.testing.assert_allclose(by_class[label], features[rows.labels == label].sum(axis=0), atol=1e-12)


def test_what_the_rows_cannot_be_is_refused() -> None:
    features = np.ones((2, WIDTH))
    with pytest.raises(ParameterError, match=r"\[n, width\]"):
        MomentRows(features=features, labels=np.zeros(3, dtype=np.int64), classes=CLASSES)
    for label in (-1, CLASSES):
        with pytest.raises(ParameterError, match=r"\[0, 2\)"):
            MomentRows(features=features, labels=np.array([0, label]), classes=CLASSES)
    with pytest.raises(ParameterError, match="whole numbers"):
        mechanism(2.0, whole=True).bounded_sum(rows_of(features))
    wide = MomentRows(features=np.ones((2, WIDTH + 1)), labels=np.zeros(2, dtype=np.int64), classes=CLASSES)
    with pytest.raises(ParameterError, match="must be 12"):
        mechanism(2.0).bounded_sum(wide)
