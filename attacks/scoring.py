"""Hold a reconstruction against the truth: one measure, its prior baseline, an interval, and whether it beat guessing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from scipy.stats import binom, mannwhitneyu
from torch import Tensor

from attacks import metrics
from attacks.contract import Reconstruction
from attacks.truth import Truth

SHOWN = 4  # texts or images kept beside the truth
ADVANTAGE = 0.3  # share of the way from guessing to perfect that counts as a success
LUCK = 0.05  # how likely guessing may do as well, for a success to be a leak
_Z99 = 2.576
# What counts as clearly better than guessing, by measure.
_ENOUGH: dict[str, Callable[[float, float], bool]] = {
    "membership AUC": lambda value, guessing: value >= 0.65,
    "token F1": lambda value, guessing: metrics.advantage(value, guessing) >= ADVANTAGE,
    "label count accuracy": lambda value, guessing: metrics.advantage(value, guessing) >= ADVANTAGE,
    "PSNR dB": lambda value, guessing: value >= guessing + 6.0,
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pictured:
    """Hold a true image beside the recovered one matched to it, both (channels, height, width) as the model takes them."""

    truth: Tensor
    recovered: Tensor
    psnr: float
    ssim: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """State how well an attack did by its own kind of measure; `succeeded` means clearly better than guessing.

    `luck` is the chance that guessing does as well: one label of two is guessed half the time, however good the score.
    `draws` is how many draws of records and noise the mean is over.
    """

    measure: str
    value: float
    baseline: float
    low: float | None = None
    high: float | None = None
    succeeded: bool
    luck: float = 0.0
    draws: int = 1
    pairs: tuple[tuple[str, str], ...] = ()
    pictures: tuple[Pictured, ...] = ()

    @property
    def proven(self) -> bool:
        """Say whether the success is more than luck."""
        return self.succeeded and self.luck <= LUCK


def score(found: Reconstruction, truth: Truth) -> Score | None:
    """Score what was found by the first kind of item the truth can judge; None when it can judge none.

    Guarantee: the attack never sees the truth; this function never changes the reconstruction.
    """
    for judge in (_members, _tokens, _labels, _images):
        result = judge(found, truth)
        if result is not None:
            return result
    return None


def pooled(scores: Sequence[Score]) -> Score:
    """Return the mean of an attack's scores on several draws of records and noise, with its 99 % interval.

    Guarantee: it succeeds only where the mean would pass as a single score and the whole interval lies above guessing, so
    that one lucky draw is no leak. One score stays as it is.
    Raises: ValueError for no score, or scores of different measures.
    """
    measures = {one.measure for one in scores}
    if len(measures) != 1:
        raise ValueError(f"{len(scores)} scores of {len(measures)} measures, must be some of one")
    if len(scores) == 1:
        return scores[0]
    interval = metrics.bootstrap_interval([one.value for one in scores], confidence=0.99)
    baseline = sum(one.baseline for one in scores) / len(scores)
    enough = _ENOUGH[scores[0].measure](interval.value, baseline)
    return replace(
        scores[0],
        value=interval.value,
        baseline=baseline,
        low=interval.low,
        high=interval.high,
        draws=len(scores),
        succeeded=enough and interval.low > baseline,
        luck=float(
            binom.sf(sum(one.succeeded for one in scores) - 1, len(scores), max(one.luck for one in scores))
        ),
    )


def _members(found: Reconstruction, truth: Truth) -> Score | None:
    values = found.of("scores")
    if not values or truth.members is None or len(values[0]) != len(truth.members):
        return None
    scores, inside = values[0].double().numpy(), np.asarray(truth.members)
    area = metrics.auc(scores[inside], scores[~inside])
    spread = _Z99 * auc_deviation(area, int(inside.sum()), int((~inside).sum()))
    low, high = max(0.0, area - spread), min(1.0, area + spread)
    test = mannwhitneyu(scores[inside], scores[~inside], alternative="greater")
    return Score(
        measure="membership AUC", luck=float(test.pvalue), value=area, baseline=0.5, low=low, high=high,
        succeeded=low > 0.5 and _ENOUGH["membership AUC"](area, 0.5),
    )  # fmt: skip


def auc_deviation(area: float, members: int, others: int) -> float:
    """Return the standard deviation of an AUC.

    Source: Hanley, McNeil 1982, Radiology 143, equation 1.
    """
    one, two = area / (2 - area), 2 * area * area / (1 + area)
    variance = area * (1 - area) + (members - 1) * (one - area * area) + (others - 1) * (two - area * area)
    return math.sqrt(max(variance, 0.0) / (members * others))


def _tokens(found: Reconstruction, truth: Truth) -> Score | None:
    if not truth.sequences:
        return None
    everywhere = (
        set.intersection(*(set(sequence) for sequence in truth.sequences))
        if len(truth.sequences) > 1
        else set()
    )
    true = set().union(*truth.sequences) - everywhere
    guessed: set[int] = set()
    seen = False
    readers: dict[str, Callable[[Tensor], Sequence[int]]] = {
        "token_set": lambda value: value.tolist(),
        "sequence": lambda value: [token for token in value.tolist() if token >= 0],
        "token_counts": lambda value: (value > 0.5).nonzero().flatten().tolist(),
        "placed_tokens": lambda value: value.reshape(-1, value.shape[-1])[:, -1].tolist(),
    }
    for item in found.items:
        if item.kind in readers:
            seen = True
            guessed |= set(readers[item.kind](item.value))
    if not seen or not true:
        return None
    guessed -= everywhere
    result = metrics.token_set_score(guessed, true)
    pairs = _beside(truth.sequences[:SHOWN], found, guessed)
    baseline = _guessed_tokens(true, truth, everywhere)
    enough = _ENOUGH["token F1"](result.f1, baseline)
    return Score(measure="token F1", value=result.f1, baseline=baseline, succeeded=enough, pairs=pairs)


def _guessed_tokens(true: set[int], truth: Truth, everywhere: set[int]) -> float:
    """Return the best F1 of guessing: all ids, or the most frequent ones of texts that were not used, as many as pay best."""
    found = (
        0.0 if truth.vocabulary is None else 2 * len(true) / (max(truth.vocabulary, len(true)) + len(true))
    )
    hits = 0
    frequent = Counter(token for text in truth.others for token in set(text) - everywhere).most_common()
    for number, (token, _) in enumerate(frequent, start=1):
        hits += token in true
        found = max(found, 2 * hits / (number + len(true)))
    return found


def _beside(
    sequences: Sequence[Sequence[int]], found: Reconstruction, guessed: set[int]
) -> tuple[tuple[str, str], ...]:
    """Put each true text beside the recovered text most like it, or beside those of its tokens that were found."""
    texts = [[token for token in value.tolist() if token >= 0] for value in found.of("sequence")]
    pairs = []
    for true in sequences:
        best = max(
            texts, key=lambda text: len(set(text) & set(true)), default=[t for t in true if t in guessed]
        )
        pairs.append((" ".join(map(str, true)), " ".join(map(str, best))))
    return tuple(pairs)


def _labels(found: Reconstruction, truth: Truth) -> Score | None:
    counts = found.of("label_counts") or tuple(_counts(value) for value in found.of("labels"))
    if not counts or truth.labels is None:
        return None
    classes = truth.classes or max(len(counts[0]), max(truth.labels) + 1)
    true = [float(Counter(truth.labels)[label]) for label in range(classes)]
    guessed = [float(value) for value in counts[0].tolist()] + [0.0] * (classes - len(counts[0]))
    uniform = [len(truth.labels) / classes] * classes
    value, baseline = metrics.count_accuracy(guessed[:classes], true), metrics.count_accuracy(uniform, true)
    return Score(
        measure="label count accuracy",
        luck=1.0 / classes if len(truth.labels) == 1 else 0.0,
        value=value,
        baseline=baseline,
        succeeded=_ENOUGH["label count accuracy"](value, baseline),
    )


def _counts(labels: Tensor) -> Tensor:
    return labels.long().bincount()


def _images(found: Reconstruction, truth: Truth) -> Score | None:
    images = found.of("image")
    if not images or truth.images is None:
        return None
    true = truth.images.float()
    usable = [image.float() for image in images if image.shape == true[0].shape]
    if not usable:
        return None
    peak = max(float(true.max() - true.min()), 1e-9)
    table = metrics.similarity_matrix(usable, list(true), partial(metrics.psnr, peak=peak))
    best = float(table.max())
    # The mean image is the guess; of a single image it would be the truth itself, so there the guess is one colour.
    mean = true.mean(dim=0) if len(true) > 1 else true[0].mean(dim=(1, 2), keepdim=True).expand_as(true[0])
    baseline = max(metrics.psnr(mean, target, peak=peak) for target in true)
    matched = sorted(metrics.match_one_to_one(table), key=lambda place: -table[place])[:SHOWN]
    return Score(
        measure="PSNR dB",
        value=best,
        baseline=baseline,
        succeeded=_ENOUGH["PSNR dB"](best, baseline),
        pictures=tuple(
            Pictured(
                truth=true[j],
                recovered=usable[i],
                psnr=float(table[i, j]),
                ssim=metrics.ssim(usable[i], true[j], peak=peak),
            )
            for i, j in matched
        ),
    )
