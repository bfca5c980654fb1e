"""How much was recovered.

Text, images, membership, matching and intervals. Pure functions of what was recovered and what was true.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.stats import norm, rankdata
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class SetScore:
    """Precision, recall and their harmonic mean;
    an empty recovery has precision 0, an empty truth recall 0.
    """

    precision: float
    recall: float
    f1: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A point estimate with the ends of its confidence interval."""

    value: float
    low: float
    high: float
    confidence: float


# ------------------------------------------------------------------------------------------------------- text


def set_score(hits: float, recovered: float, true: float) -> SetScore:
    """Return precision, recall and F1 from counts."""
    precision = 0.0
    if recovered:
        precision = hits / recovered
    recall = 0.0
    if true:
        recall = hits / true
    f1 = 0.0
    if hits:
        f1 = 2 * precision * recall / (precision + recall)
    return SetScore(precision=precision, recall=recall, f1=f1)


def token_set_score(recovered: Iterable[int], true: Iterable[int]) -> SetScore:
    """Compare two sets of token ids."""
    recovered_set, wanted = set(recovered), set(true)
    return set_score(len(recovered_set & wanted), len(recovered_set), len(wanted))


def token_bag_score(recovered: Iterable[int], true: Iterable[int]) -> SetScore:
    """Compare two bags of token ids: every occurrence counts once."""
    return _bag_score(recovered, true)


def _bag_score(recovered: Iterable[Hashable], true: Iterable[Hashable]) -> SetScore:
    recovered_counts, true_counts = Counter(recovered), Counter(true)
    common = recovered_counts & true_counts
    return set_score(common.total(), recovered_counts.total(), true_counts.total())


def positional_accuracy(recovered: Sequence[int], true: Sequence[int]) -> float:
    """Return the share of true positions that hold the right token.

    Missing positions count as wrong, extra ones are ignored.
    """
    if true:
        return sum(a == b for a, b in zip(recovered, true, strict=False)) / len(true)
    return 0.0


def rouge_n(recovered: Sequence[int], true: Sequence[int], n: int) -> SetScore:
    """Compare the bags of n-grams of two sequences.

    Source: Lin, "ROUGE", 2004, section 2 (with precision and F1 as commonly reported).
    """
    return _bag_score(_grams(recovered, n), _grams(true, n))


def rouge_l(recovered: Sequence[int], true: Sequence[int]) -> SetScore:
    """Compare two sequences by their longest common subsequence. Source: Lin, "ROUGE", 2004, section 3."""
    return set_score(_longest_common(recovered, true), len(recovered), len(true))


def exact_sequence_rate(recovered: Sequence[Sequence[int]], true: Sequence[Sequence[int]]) -> float:
    """Return the share of true sequences recovered entirely, each recovered sequence serving once."""
    recovered_counts, wanted = Counter(map(tuple, recovered)), Counter(map(tuple, true))
    if true:
        return (recovered_counts & wanted).total() / len(true)
    return 0.0


def fact_recall(recovered: Sequence[Sequence[int]], facts: Sequence[Sequence[int]]) -> float:
    """Return the share of personal facts (token spans) that stand, whole and in order, in some recovered
    sequence.
    """
    if facts:
        return sum(any(_contains(text, fact) for text in recovered) for fact in facts) / len(facts)
    return 0.0


def count_accuracy(recovered: Sequence[float], true: Sequence[float]) -> float:
    """Return 1 minus the total variation distance of two count vectors, relative to the true total."""
    total = float(np.sum(true))
    if total:
        return 1.0 - float(np.abs(np.subtract(recovered, true)).sum()) / (2 * total)
    return 0.0


def _grams(sequence: Sequence[int], n: int) -> list[tuple[int, ...]]:
    grams: list[tuple[int, ...]] = []
    for start in range(len(sequence) - n + 1):
        grams.append(tuple(sequence[start : start + n]))
    return grams


def _longest_common(first: Sequence[int], second: Sequence[int]) -> int:
    row = [0] * (len(second) + 1)
    for token in first:
        diagonal = 0
        for column, other in enumerate(second, start=1):
            above = row[column]
            row[column] = diagonal + 1 if token == other else max(above, row[column - 1])
            diagonal = above
    return row[-1]


def _contains(text: Sequence[int], span: Sequence[int]) -> bool:
    return bool(span) and tuple(span) in set(_grams(text, len(span)))


# ----------------------------------------------------------------------------------------------------- images


def mean_squared_error(recovered: Tensor, true: Tensor) -> float:
    """Return the mean squared error of two images of one shape."""
    return float((recovered.double() - true.double()).square().mean())


def psnr(recovered: Tensor, true: Tensor, *, peak: float = 1.0, cap: float = 200.0) -> float:
    """Return the peak signal-to-noise ratio in dB, at most `cap` (an exact copy would be infinite).

    An image with a value that is no number is as bad as can be: -`cap`.
    """
    error = mean_squared_error(recovered, true)
    if not math.isfinite(error):
        return -cap
    if error == 0.0:
        return cap
    return min(cap, 10.0 * math.log10(peak**2 / error))


def ssim(recovered: Tensor, true: Tensor, *, peak: float = 1.0) -> float:
    """Return the structural similarity of two images (channels, height, width), averaged over channels and
    windows.

    Gaussian window of 11 pixels and sigma 1.5, without padding; smaller images use the largest odd window
    that fits.
    Source: Wang et al., "Image quality assessment", 2004, equation 13.
    """
    similarity, _ = _ssim_terms(recovered, true, peak)
    return similarity


def ms_ssim(recovered: Tensor, true: Tensor, *, peak: float = 1.0) -> float:
    """Return the multi-scale structural similarity of two images (channels, height, width).

    Five scales; images too small for the window at a scale use fewer, with the weights renormalised. Negative
    terms count as 0. Source: Wang, Simoncelli, Bovik, "Multi-scale structural similarity", 2003, equation 7.
    """
    weights = [0.0448, 0.2856, 0.3001, 0.2363, 0.1333]
    side = min(true.shape[-2:])
    scales = max(1, min(len(weights), int(math.log2(max(side, 1) / 11)) + 1 if side >= 11 else 1))
    share = np.array(weights[:scales]) / sum(weights[:scales])
    first, second, product = recovered.double(), true.double(), 1.0
    for scale in range(scales):
        similarity, contrast = _ssim_terms(first, second, peak)
        if scale == scales - 1:
            term = similarity
        else:
            term = contrast
        product *= max(term, 0.0) ** float(share[scale])
        first, second = avg_pool2d(first, 2), avg_pool2d(second, 2)
    return product


def identification_rate(recovered: Tensor, true: Tensor, distractors: Tensor) -> float:
    """Return the share of recovered images whose nearest image, among true ones and distractors, is their own
    source.

    `recovered` and `true` are matched row by row: match them one to one first. Distance is Euclidean over
    pixels.
    """
    pool = torch.cat([true.flatten(1), distractors.flatten(1)]).double()
    nearest = torch.cdist(recovered.flatten(1).double(), pool).argmin(dim=1)
    return float((nearest == torch.arange(len(recovered))).double().mean())


def _ssim_terms(recovered: Tensor, true: Tensor, peak: float) -> tuple[float, float]:
    first, second = recovered.double().unsqueeze(1), true.double().unsqueeze(1)
    window = _gaussian_window(min(11, *(side - (side + 1) % 2 for side in true.shape[-2:])))
    luminance_floor, contrast_floor = (0.01 * peak) ** 2, (0.03 * peak) ** 2

    def smooth(image: Tensor) -> Tensor:
        return conv2d(image, window)

    mean_first, mean_second = smooth(first), smooth(second)
    variance_first = smooth(first * first) - mean_first**2
    variance_second = smooth(second * second) - mean_second**2
    covariance = smooth(first * second) - mean_first * mean_second
    contrast = (2 * covariance + contrast_floor) / (variance_first + variance_second + contrast_floor)
    luminance = (2 * mean_first * mean_second + luminance_floor) / (
        mean_first**2 + mean_second**2 + luminance_floor
    )
    return float((luminance * contrast).mean()), float(contrast.mean())


def _gaussian_window(size: int, sigma: float = 1.5) -> Tensor:
    offsets = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    line = torch.exp(-(offsets**2) / (2 * sigma**2))
    plane = torch.outer(line, line)
    return (plane / plane.sum())[None, None]


# ------------------------------------------------------------------------------------------------- membership


def auc(scores_in: Sequence[float] | Floats, scores_out: Sequence[float] | Floats) -> float:
    """Return the chance that a member scores above a non-member, ties counting half (Mann-Whitney)."""
    members, others = np.asarray(scores_in, dtype=float), np.asarray(scores_out, dtype=float)
    ranks = rankdata(np.concatenate([members, others]))
    surplus = ranks[: len(members)].sum() - len(members) * (len(members) + 1) / 2
    return float(surplus / (len(members) * len(others)))


def tpr_at_fpr(
    scores_in: Sequence[float] | Floats, scores_out: Sequence[float] | Floats, rate: float
) -> float:
    """Return the largest true-positive rate of any threshold whose false-positive rate is at most `rate`.

    Guarantee: never interpolates; with fewer than 1/rate non-members the threshold lies above all of them.
    """
    members, others = np.asarray(scores_in, dtype=float), np.sort(np.asarray(scores_out, dtype=float))
    allowed = math.floor(rate * len(others) + 1e-9)
    if allowed >= len(others):
        return 1.0
    return float((members > others[len(others) - allowed - 1]).mean())


def gaussian_auc(noise_multiplier: float, sensitivity: float = 1.0) -> float:
    """Return the best AUC against one Gaussian step: Phi(sensitivity / (sqrt(2) z))."""
    if noise_multiplier == 0:
        return 1.0
    return float(norm.cdf(sensitivity / (math.sqrt(2) * noise_multiplier)))


def gaussian_tpr(noise_multiplier: float, rate: float) -> float:
    """Return the best true-positive rate at a false-positive rate against one Gaussian step.

    Phi(Phi^-1(rate) + 1/z).
    """
    if noise_multiplier == 0:
        return 1.0
    return float(norm.cdf(norm.ppf(rate) + 1.0 / noise_multiplier))


# ----------------------------------------------------------------------------------- matching and uncertainty


def match_one_to_one(similarity: Floats) -> list[tuple[int, int]]:
    """Pair recovered (rows) with true items (columns), each at most once,
    for the largest total similarity.
    """
    rows, columns = linear_sum_assignment(np.asarray(similarity, dtype=float), maximize=True)
    return [(int(row), int(column)) for row, column in zip(rows, columns, strict=True)]


def similarity_matrix(
    recovered: Sequence[Any], true: Sequence[Any], metric: Callable[[Any, Any], float]
) -> Floats:
    """Return metric(recovered, true) for every pair: shape (recovered, true)."""
    table = np.zeros((len(recovered), len(true)))
    for row, image in enumerate(recovered):
        for column, wanted in enumerate(true):
            table[row, column] = metric(image, wanted)
    return table


def bootstrap_interval(
    values: Sequence[float] | Floats,
    *,
    statistic: Callable[[Floats], float] | None = None,
    confidence: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
) -> Interval:
    """Return a statistic (default the mean) with its percentile bootstrap interval.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, section 13.3.
    """
    sample = np.asarray(values, dtype=float)
    if sample.size == 0:
        raise ValueError("values is empty: an interval needs at least one value")
    evaluate = statistic or (lambda resampled: float(np.mean(resampled)))
    generator = np.random.default_rng(seed)
    resampled = []
    for _ in range(resamples):
        resampled.append(evaluate(sample[generator.integers(0, len(sample), len(sample))]))
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value=evaluate(sample), low=float(low), high=float(high), confidence=confidence)


def advantage(score: float, baseline: float, *, perfect: float = 1.0) -> float:
    """Return how far a score lies between the prior's baseline (0) and perfect recovery (1).

    Below the baseline it is negative.
    """
    if baseline >= perfect:
        return 0.0
    return (score - baseline) / (perfect - baseline)
