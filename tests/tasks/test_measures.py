"""Macro F1, balanced accuracy, calibration and the confusion of classes: the definitions, row by row."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from ffm_secure.tasks.measures import BINS, MOST_CLASSES, class_measures


def drawn(seed: int, rows: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    source = np.random.default_rng(seed)
    return source.dirichlet([0.5] * classes, rows), source.integers(0, classes, rows)


@given(st.integers(0, 10_000), st.integers(1, 60), st.integers(2, 7))
@settings(max_examples=40, deadline=None)
def test_measures_are_those_of_their_definitions(seed: int, rows: int, classes: int) -> None:
    chances, wanted = drawn(seed, rows, classes)
    measured = class_measures(chances, wanted, list(map(str, range(classes))))
    assert measured is not None
    answered = chances.argmax(axis=1)
    assert measured.macro_f1 == pytest.approx(metrics.f1_score(wanted, answered, average="macro"))
    recalls = [float((answered[wanted == k] == k).mean()) for k in set(wanted.tolist())]
    assert measured.balanced_accuracy == pytest.approx(sum(recalls) / len(recalls))
    assert measured.confusion == tuple(
        tuple(sum((wanted == i) & (answered == j)) for j in range(classes)) for i in range(classes)
    )
    gap = 0.0
    for number in range(BINS):
        inside = [row for row in range(rows) if number / BINS < chances[row].max() <= (number + 1) / BINS]
        if inside:
            sure = sum(chances[row].max() for row in inside) / len(inside)
            right = sum(answered[row] == wanted[row] for row in inside) / len(inside)
            gap += len(inside) / rows * abs(sure - right)
    assert measured.calibration_error == pytest.approx(gap)


def test_a_model_that_always_gives_one_class_is_no_better_than_chance_by_class() -> None:
    chances = np.tile([0.9, 0.1], (10, 1))
    wanted = np.array([0] * 9 + [1])
    measured = class_measures(chances, wanted, ["common", "rare"])
    assert measured is not None
    assert measured.balanced_accuracy == 0.5
    assert measured.calibration_error == pytest.approx(0.0)
    assert measured.macro_f1 == pytest.approx((18 / 19 + 0.0) / 2)


def test_what_cannot_be_measured_is_not() -> None:
    assert class_measures(np.zeros((0, 2)), np.zeros(0, np.int64), ["a", "b"]) is None
    assert class_measures(np.full((1, 2), np.nan), np.zeros(1, np.int64), ["a", "b"]) is None
    chances, wanted = drawn(1, 5, MOST_CLASSES + 1)
    measured = class_measures(chances, wanted, list(map(str, range(MOST_CLASSES + 1))))
    assert measured is not None
    assert measured.confusion == ()
