"""Hold a reconstruction against the truth: one measure, its prior baseline, an interval, and whether it beat
guessing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu, norm
from torch import Tensor

from attacks import luck, metrics
from attacks.contract import Reconstruction
from attacks.truth import Truth

SHOWN = 4  # texts or images kept beside the truth
ADVANTAGE = 0.3  # share of the way from guessing to perfect that counts as a success
# how likely guessing may do as well, for a success to be more than luck when it is the only question
LUCK = 0.05
EXACT_PICTURE = 60.0  # PSNR in dB from which a picture is read exactly
LEAST_AUC = 0.55  # of the mean over many memberships, which is far surer than one
_BATCHES = 99  # of texts that were not used, for guessing to be held against
_Z99 = 2.576
Floats = NDArray[np.float64]
# What counts as clearly better than guessing, by measure.
_ENOUGH: dict[str, Callable[[float, float], bool]] = {
    "membership AUC": lambda value, guessing: value >= 0.65,
    "token F1": lambda value, guessing: metrics.advantage(value, guessing) >= ADVANTAGE,
    "label count accuracy": lambda value, guessing: metrics.advantage(value, guessing) >= ADVANTAGE,
    "PSNR dB": lambda value, guessing: value >= guessing + 6.0,
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pictured:
    """Hold a true image beside the recovered one matched to it, both (channels, height, width) as the model
    takes them.
    """

    truth: Tensor
    recovered: Tensor
    psnr: float
    ssim: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """State how well an attack did by its own kind of measure; `succeeded` means clearly better than
    guessing.

    `luck` is the chance that guessing does as well: one label of two is guessed half the time, however good
    the score. `draws` is how many draws of records and noise the mean is over, `values` what they scored;
    below five there is no interval. `noise` is the mean of the same attack on noise in the shape of the
    update, None where it was not run on any. `calibrated` is how right an attack that is this sure usually
    is, where the value is its own confidence. `exact` says that everything there is to read by this measure
    was read, in every draw.
    """

    measure: str
    value: float
    baseline: float
    low: float | None = None
    high: float | None = None
    succeeded: bool
    luck: float = 0.0
    draws: int = 1
    values: tuple[float, ...] = ()
    noise: float | None = None
    calibrated: float | None = None
    exact: bool = False
    pairs: tuple[tuple[str, str], ...] = ()
    pictures: tuple[Pictured, ...] = ()

    @property
    def proven(self) -> bool:
        """Say whether the success is more than luck."""
        return self.succeeded and self.luck <= LUCK


def score(reconstruction: Reconstruction, truth: Truth, *, with_luck: bool = True) -> Score | None:
    """Score what was found by the first kind of item the truth can judge; None when it can judge none.

    Without `with_luck` the luck is left at 0, where only the value is asked for.

    Guarantee: the attack never sees the truth; this function never changes the reconstruction.
    """
    for judge in (_members, _tokens, _labels, _images):
        result = judge(reconstruction, truth, with_luck)
        if result is not None:
            return result
    return None


def pooled(scores: Sequence[Score]) -> Score:
    """Return the mean of an attack's scores on several draws of records and noise, with its 99 % interval.

    Guarantee: it succeeds where a majority of the draws does, so that one lucky draw is no leak and one bad
    draw outvotes no exact ones; its luck is that of a majority of draws or of all of them. One score stays as
    it is.
    Raises: ValueError for no score, or scores of different measures.
    """
    measures = {one.measure for one in scores}
    if len(measures) != 1:
        raise ValueError(f"{len(scores)} scores of {len(measures)} measures, must be some of one")
    if len(scores) == 1:
        return scores[0]
    values, bounded = tuple(one.value for one in scores), scores[0].measure != "PSNR dB"
    enough = [one.succeeded and _ENOUGH[one.measure](one.value, one.baseline) for one in scores]
    spread = luck.interval(values, bounded=bounded)
    chances = []
    for one, clear in zip(scores, enough, strict=True):
        chances.append(one.luck if clear else 1.0)
    return replace(
        max(scores, key=lambda one: one.value),
        value=spread.mean,
        baseline=sum(one.baseline for one in scores) / len(scores),
        low=spread.low,
        high=spread.high,
        draws=len(scores),
        values=values,
        succeeded=2 * sum(enough) > len(scores),
        luck=luck.majority(chances),
        exact=all(one.exact for one in scores),
    )


def hopeless(scores: Sequence[Score], most: int) -> bool:
    """Say whether `pooled` can no longer succeed, whatever the draws still to come score, `most` in all."""
    failed = sum(not (one.succeeded and _ENOUGH[one.measure](one.value, one.baseline)) for one in scores)
    return 2 * failed >= most


def regrouped(scores: Sequence[Score], members: int, others: int) -> Score:
    """Return the mean of membership AUCs of the same candidates, of whom others were members each time.

    Members are drawn anew for every score, so an observation that knows nothing of them gives AUCs that are
    independent of each other and of known variance, whatever candidates they are: luck is that of their mean.
    The interval is over memberships and noise, not over other candidates.

    Raises: ValueError for no score, or one of another measure.
    Source: Mann and Whitney, 1947, the variance of U under equal distributions.
    """
    if {one.measure for one in scores} != {"membership AUC"}:
        raise ValueError(f"{len(scores)} scores, must be some of membership")
    if len(scores) == 1:
        return scores[0]
    values = tuple(one.value for one in scores)
    spread = luck.interval(values, bounded=False)
    deviation = math.sqrt((members + others + 1) / (12 * members * others * len(values)))
    low, high = spread.low, spread.high
    return Score(
        measure="membership AUC",
        value=spread.mean,
        baseline=0.5,
        low=None if low is None else max(0.0, low),
        high=None if high is None else min(1.0, high),
        succeeded=low is not None and low > 0.5 and spread.mean >= LEAST_AUC,
        luck=float(norm.sf((spread.mean - 0.5) / deviation)),
        draws=len(values),
        values=values,
    )


def _members(reconstruction: Reconstruction, truth: Truth, with_luck: bool) -> Score | None:
    values = reconstruction.of("scores")
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


def _tokens(reconstruction: Reconstruction, truth: Truth, with_luck: bool) -> Score | None:
    if not truth.sequences:
        return None
    everywhere = _everywhere(truth)
    true = set().union(*truth.sequences) - everywhere
    read = read_tokens(reconstruction)
    if read is None or not true:
        return None
    guessed = read - everywhere
    result = metrics.token_set_score(guessed, true)
    baseline = _guessed_tokens(true, truth, everywhere)
    return Score(
        measure="token F1",
        value=result.f1,
        baseline=baseline,
        succeeded=_ENOUGH["token F1"](result.f1, baseline),
        luck=_luck_of_tokens(guessed, true, truth, everywhere) if with_luck else 0.0,
        exact=_sentences_read(reconstruction, truth.sequences),
        pairs=_beside(truth.sequences[:SHOWN], reconstruction, guessed),
    )


def _everywhere(truth: Truth) -> set[int]:
    """Return the tokens that stand in every text there is, such as marks of its start and end: naming them
    reads nothing.
    """
    texts = []
    for text in (*(truth.sequences or ()), *truth.others):
        texts.append(set(text))
    if len(texts) > 1:
        return set.intersection(*texts)
    return set()


def read_tokens(reconstruction: Reconstruction) -> set[int] | None:
    """Return every token that a reconstruction names in whatever form, None where it names none in any."""
    readers: dict[str, Callable[[Tensor], Sequence[int]]] = {
        "token_set": lambda value: value.tolist(),
        "sequence": lambda value: [token for token in value.tolist() if token >= 0],
        "token_counts": lambda value: (value > 0.5).nonzero().flatten().tolist(),
        "placed_tokens": lambda value: value.reshape(-1, value.shape[-1])[:, -1].tolist(),
    }
    named = []
    for item in reconstruction.items:
        if item.kind in readers:
            named.append(set(readers[item.kind](item.value)))
    if named:
        return set().union(*named)
    return None


def _sentences_read(reconstruction: Reconstruction, sequences: Sequence[Sequence[int]]) -> bool:
    texts = set()
    for value in reconstruction.of("sequence"):
        texts.add(tuple(value.tolist()))
    return all(tuple(sequence) in texts for sequence in sequences)


def _luck_of_tokens(guessed: set[int], true: set[int], truth: Truth, everywhere: set[int]) -> float:
    """Return how often other texts of the same kind would hold as many of the named tokens as the true ones
    do.

    Tokens fall into texts independently, as often as into `others`; where too many whole batches of `others`
    do as well, the words of a text hang together too much for that, and the luck is the rank among the
    batches.
    """
    if not guessed:
        return 1.0
    chances = _chances(sorted(guessed), truth, everywhere)
    alone = luck.at_least(len(guessed & true), chances)
    count = len(truth.sequences or ())
    others = []
    for other in truth.others:
        others.append(set(other) - everywhere)
    if len(others) <= count:
        return alone
    order = np.random.default_rng(0)
    batches = []
    for _ in range(_BATCHES):
        batches.append(order.permutation(len(others))[:count])
    nulls = []
    for batch in batches:
        words: set[int] = set().union(*(others[int(place)] for place in batch))
        nulls.append(metrics.token_set_score(guessed, words).f1)
    ordinal = luck.rank(metrics.token_set_score(guessed, true).f1, nulls)
    if ordinal > LUCK:
        return max(alone, ordinal)
    return alone


def _chances(named: Sequence[int], truth: Truth, everywhere: set[int]) -> Floats:
    """Return for each named token the chance that a batch as large as the true one holds it.

    Tokens that no other text holds share what new texts bring that is new. Source: Good, 1953, the
    singletons' share.
    """
    texts = truth.sequences or ()
    largest = max(max(map(max, filter(None, texts)), default=0), *named, 0) + 1
    vocabulary = max(truth.vocabulary or 0, largest)
    distinct = sum(len(set(text) - everywhere) for text in texts) / len(texts)
    if not truth.others:
        share = min(1.0, distinct / max(1, vocabulary - len(everywhere)))
        return np.full(len(named), 1 - (1 - share) ** len(texts))
    held = Counter(token for text in truth.others for token in set(text) - everywhere)
    total = len(truth.others)
    once = max(1, sum(count == 1 for count in held.values()))
    fresh = min(0.5 / (total + 1), once / (total * max(1, vocabulary - len(held))))
    shares = np.array([(held[token] + 0.5) / (total + 1) if token in held else fresh for token in named])
    return 1 - (1 - shares) ** len(texts)


def _guessed_tokens(true: set[int], truth: Truth, everywhere: set[int]) -> float:
    """Return the best F1 of guessing: all ids, or the most frequent ones of texts that were not used, as many
    as pay best.
    """
    reconstruction = 0.0
    if truth.vocabulary is not None:
        reconstruction = 2 * len(true) / (max(truth.vocabulary, len(true)) + len(true))
    hits = 0
    frequent = Counter(token for text in truth.others for token in set(text) - everywhere).most_common()
    for number, (token, _) in enumerate(frequent, start=1):
        hits += token in true
        reconstruction = max(reconstruction, 2 * hits / (number + len(true)))
    return reconstruction


def _beside(
    sequences: Sequence[Sequence[int]], reconstruction: Reconstruction, guessed: set[int]
) -> tuple[tuple[str, str], ...]:
    """Put each true text beside the recovered text most like it, or beside those of its tokens that were
    found.
    """
    texts = []
    for value in reconstruction.of("sequence"):
        texts.append([token for token in value.tolist() if token >= 0])
    pairs = []
    for true in sequences:
        best = max(
            texts, key=lambda text: len(set(text) & set(true)), default=[t for t in true if t in guessed]
        )
        pairs.append((" ".join(map(str, true)), " ".join(map(str, best))))
    return tuple(pairs)


def _labels(reconstruction: Reconstruction, truth: Truth, with_luck: bool) -> Score | None:
    counts = reconstruction.of("label_counts") or tuple(
        _counts(value) for value in reconstruction.of("labels")
    )
    if not counts or truth.labels is None:
        return None
    classes = truth.classes or max(len(counts[0]), max(truth.labels) + 1)
    true = []
    for label in range(classes):
        true.append(Counter(truth.labels)[label])
    guessed = ([float(value) for value in counts[0].tolist()] + [0.0] * classes)[:classes]
    total = sum(guessed)
    if total > 0:  # counts of another total say how the labels are shared out, not how many there are
        guessed = [value * len(truth.labels) / total for value in guessed]
    shares = _shares(truth, classes)
    usual = []
    for share in shares:
        usual.append(len(truth.labels) * share)
    value, baseline = metrics.count_accuracy(guessed, true), metrics.count_accuracy(usual, true)
    return Score(
        measure="label count accuracy",
        luck=luck.labels_luck(guessed, true, shares) if with_luck else 0.0,
        value=value,
        baseline=baseline,
        succeeded=_ENOUGH["label count accuracy"](value, baseline),
        exact=value >= 1 - 1e-9,
    )


def _shares(truth: Truth, classes: int) -> list[float]:
    """Return how often each class is guessed: as often as among records that were not used, else evenly."""
    if not truth.other_labels:
        return [1 / classes] * classes
    others = Counter(truth.other_labels)
    shares: list[float] = []
    for label in range(classes):
        shares.append((others[label] + 1 / classes) / (len(truth.other_labels) + 1))
    return shares


def _counts(labels: Tensor) -> Tensor:
    return labels.long().bincount()


def _images(reconstruction: Reconstruction, truth: Truth, with_luck: bool) -> Score | None:
    images = reconstruction.of("image")
    if not images or truth.images is None:
        return None
    true = truth.images.float()
    usable = []
    for image in images:
        if image.shape == true[0].shape:
            usable.append(image.float())
    if not usable:
        return None
    peak = max(float(true.max() - true.min()), 1e-9)
    table = metrics.similarity_matrix(usable, list(true), partial(metrics.psnr, peak=peak))
    best = float(table.max())
    # The mean image is the guess; of a single image it would be the truth itself, so there the guess is one
    # colour.
    if len(true) > 1:
        mean = true.mean(dim=0)
    else:
        mean = true[0].mean(dim=(1, 2), keepdim=True).expand_as(true[0])
    baseline = max(metrics.psnr(mean, target, peak=peak) for target in true)
    matched = sorted(metrics.match_one_to_one(table), key=lambda place: -table[place])[:SHOWN]
    succeeded = _ENOUGH["PSNR dB"](best, baseline)
    return Score(
        measure="PSNR dB",
        value=best,
        baseline=baseline,
        succeeded=succeeded,
        luck=0.0 if succeeded else 1.0,
        exact=bool((table.max(axis=0) >= EXACT_PICTURE).all()),
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
