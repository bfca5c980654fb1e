"""How a classifier answers, class by class: F1, recall, who is taken for whom, and how sure it may be."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ffm_secure.records import ClassMeasures

BINS = 15  # of confidence, as in the source
MOST_CLASSES = 50  # above which a matrix of who is taken for whom is left out


def class_measures(
    chances: NDArray[np.float64], wanted: NDArray[np.int64], names: Sequence[str]
) -> ClassMeasures | None:
    """Measure answers by the probabilities [n, classes] a model gave; None where these are no numbers.

    Macro F1 is the mean over the classes that occur or were answered, balanced accuracy the mean recall of
    those that occur, both unweighted. The calibration error is the mean distance between confidence and share
    right over bins of equal width, weighted by their rows.
    Source: Guo et al. 2017, arXiv:1706.04599, equation 3, for the calibration error.
    """
    if not len(wanted) or not bool(np.isfinite(chances).all()):
        return None
    answered = chances.argmax(axis=1)
    counts = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(counts, (wanted, answered), 1)
    right, of_class, of_answer = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
    occurs, asked = of_class > 0, (of_class + of_answer) > 0
    f1 = 2 * right[asked] / (of_class + of_answer)[asked]
    recall = right[occurs] / of_class[occurs]
    return ClassMeasures(
        names=tuple(names),
        rows=len(wanted),
        macro_f1=float(f1.mean()),
        balanced_accuracy=float(recall.mean()),
        calibration_error=_calibration_error(chances.max(axis=1), answered == wanted),
        confusion=tuple(map(tuple, counts.tolist())) if len(names) <= MOST_CLASSES else (),
    )


def _calibration_error(confidence: NDArray[np.float64], right: NDArray[np.bool_]) -> float:
    places = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    distance = 0.0
    for place in range(BINS):
        inside = places == place
        if inside.any():
            gap = abs(float(confidence[inside].mean()) - float(right[inside].mean()))
            distance += float(inside.mean()) * gap
    return distance
