"""How likely chance does as well: one definition for every measure, over several draws, and over all
questions of an audit.

A luck is a p-value: of an attack that knows nothing it lies below x with probability at most x, as far as
its null holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta, binom, t

Floats = NDArray[np.float64]

FEW_DRAWS = 5  # below this many no interval keeps what it states: the draws themselves are printed
_EXACT_TOKENS = 2_000  # longer sums are bounded, not computed
_PSEUDO_TRUTHS = 20_000


def rank(value: float, nulls: Sequence[float]) -> float:
    """Return the share of null scores, the value itself among them, that are at least as high as the value.

    Guarantee: for a value exchangeable with the nulls it lies at or below x with probability at most x.
    """
    beaten_by = sum(null >= value for null in nulls)
    return (1 + beaten_by) / (1 + len(nulls))


def beyond(value: float, nulls: Sequence[float], *, step: float) -> float:
    """Return the luck of a value by its rank among null scores; beyond all of them, by how far it lies
    beyond.

    With K nulls a rank never falls below 1 / (K + 1), which no correction for many questions lets pass. A
    value above every null is therefore held against Student's t of its distance, never taken for more likely
    than its rank says. `step` is the least standard deviation the nulls are credited with.

    Assumes: beyond the highest null the scores of chance fall off no slower than Student's t with K - 1
    degrees.
    """
    ordinal = rank(value, nulls)
    if len(nulls) < 2 or ordinal > 1 / (1 + len(nulls)):
        return ordinal
    spread = max(float(np.std(nulls, ddof=1)), step) * math.sqrt(1 + 1 / len(nulls))
    # From the highest null, not from the mean: the nulls may have several modes.
    distance = (value - max(nulls)) / spread
    return min(ordinal, float(t.sf(distance, len(nulls) - 1)) if distance > 0 else ordinal)


def majority(lucks: Sequence[float]) -> float:
    """Return the luck of several independent draws: most of them beat their own null, or all of them do.

    One bad draw cannot outvote many good ones, and one lucky draw carries nothing. The k-th smallest of n
    uniform lucks lies below x as often as k or more of n trials of chance x succeed; k is a majority, or n,
    and both are paid for.

    Raises: ValueError for no draw.
    """
    if not lucks:
        raise ValueError("0 draws, must be at least 1")
    ordered, count = sorted(lucks), len(lucks)
    if count == 1:
        return ordered[0]
    tails = []
    for place in (count // 2 + 1, count):
        tails.append(float(binom.sf(place - 1, count, ordered[place - 1])))
    return min(1.0, 2 * min(tails))


def holm(lucks: Sequence[float]) -> tuple[float, ...]:
    """Return lucks corrected for their number, in their order: below x with probability at most x for any of
    those that are luck.

    Source: Holm, 1979, A simple sequentially rejective multiple test procedure.
    """
    corrected, worst = [0.0] * len(lucks), 0.0
    for place, index in enumerate(np.argsort(np.asarray(lucks), kind="stable")):
        worst = max(worst, min(1.0, (len(lucks) - place) * lucks[index]))
        corrected[index] = worst
    return tuple(corrected)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Hold a mean with the ends of its interval, None below five draws."""

    mean: float
    low: float | None
    high: float | None


def interval(values: Sequence[float], *, confidence: float = 0.99, bounded: bool = True) -> Spread:
    """Return the mean of independent draws with an interval that covers the true mean as often as it states.

    Values in [0, 1] get the exact binomial interval at their sum, which allows for what draws on the ends of
    the range hide; others (`bounded` false) get Student's t. Below five draws there is no interval.

    Source: Clopper and Pearson, 1934: exact for draws that are right or wrong, wider than needed for values
    between.
    """
    mean, count = float(np.mean(values)), len(values)
    if count < FEW_DRAWS:
        return Spread(mean=mean, low=None, high=None)
    tail = (1 - confidence) / 2
    if bounded:
        total = min(float(count), max(0.0, float(np.sum(values))))
        if total <= 0.0:
            low = 0.0
        else:
            low = float(beta.ppf(tail, total, count - total + 1))
        if total >= count:
            high = 1.0
        else:
            high = float(beta.ppf(1 - tail, total + 1, count - total))
        return Spread(mean=mean, low=low, high=high)
    half = float(t.isf(tail, count - 1)) * float(np.std(values, ddof=1)) / math.sqrt(count)
    return Spread(mean=mean, low=mean - half, high=mean + half)


# ------------------------------------------------------------------------------------------- guesses at words


def at_least(hits: int, chances: Floats) -> float:
    """Return the chance that at least `hits` of independent events happen: exact, or Chernoff's bound of very
    many.
    """
    if hits <= 0:
        return 1.0
    if hits > len(chances):
        return 0.0
    if len(chances) > _EXACT_TOKENS:
        return _chernoff(hits, chances)
    short, reached = (
        np.zeros(hits),
        0.0,
    )  # by how many happened so far; a sum of positive terms keeps small tails exact
    short[0] = 1.0
    for chance in chances:
        reached += float(short[-1]) * float(chance)
        short[1:] = short[1:] * (1 - chance) + short[:-1] * chance
        short[0] *= 1 - chance
    return min(1.0, reached)


def _chernoff(hits: int, chances: Floats) -> float:
    if hits <= float(chances.sum()):
        return 1.0
    slopes = np.linspace(0.01, 40.0, 400)
    logarithms = np.log1p(chances[None, :] * np.expm1(np.minimum(slopes, 40.0))[:, None]).sum(axis=1)
    return float(min(1.0, math.exp(min(0.0, float((logarithms - slopes * hits).min())))))


# ------------------------------------------------------------------------------------------ guesses at labels


def labels_luck(counts: Sequence[float], true: Sequence[int], shares: Sequence[float] | None = None) -> float:
    """Return how often label counts that know nothing of the records are as right: the worse of two guesses.

    One guess redraws the true labels from the class `shares` (uniform where None), the other renames the
    classes, which keeps how unevenly a client's labels fall.
    """
    classes, examples, guess = len(true), int(sum(true)), np.asarray(counts, dtype=float)
    wrong = float(np.abs(guess - np.asarray(true)).sum()) + 1e-9
    if shares is None:
        chances = np.full(classes, 1 / classes)
    else:
        chances = np.asarray(shares) / np.sum(shares)
    if examples == 1 and wrong < 0.5:  # one label, and it is right
        return max(1 / classes, float(chances[int(np.argmax(true))]))
    as_right = []
    for others in _pseudo_truths(tuple(true), tuple(chances.tolist())):
        as_right.append(int((np.abs(others - guess).sum(axis=1) <= wrong).sum()))
    return max(1 + count for count in as_right) / (1 + _PSEUDO_TRUTHS)


@lru_cache(maxsize=4)
def _pseudo_truths(true: tuple[int, ...], chances: tuple[float, ...]) -> tuple[Floats, Floats]:
    """Return label counts drawn from class shares, and the true ones under other names:
    (many, classes) each.
    """
    generator = np.random.default_rng(0)
    redrawn = generator.multinomial(sum(true), chances, size=_PSEUDO_TRUTHS)
    renamed = generator.permuted(np.tile(np.asarray(true), (_PSEUDO_TRUTHS, 1)), axis=1)
    return redrawn.astype(float), renamed.astype(float)
