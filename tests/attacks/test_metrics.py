"""Every metric beside its slow, obvious definition."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks import baselines, metrics

tokens = st.lists(st.integers(0, 5), max_size=9)
scores = st.lists(st.integers(-3, 3), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(tokens, tokens)
def test_set_scores_count_what_they_say(found, true):
    result = metrics.token_set_score(found, true)
    hits = sum(token in true for token in set(found))
    assert result.precision == (hits / len(set(found)) if found else 0.0)
    assert result.recall == (hits / len(set(true)) if true else 0.0)
    expected = 2 * result.precision * result.recall / (result.precision + result.recall) if hits else 0.0
    assert result.f1 == pytest.approx(expected)


@settings(max_examples=60, deadline=None)
@given(tokens, tokens)
def test_rouge_n_counts_common_grams_by_removal(found, true):
    for n in (1, 2):
        pool = [tuple(true[i : i + n]) for i in range(len(true) - n + 1)]
        wanted, hits = len(pool), 0
        for gram in [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]:
            if gram in pool:
                pool.remove(gram)
                hits += 1
        assert metrics.rouge_n(found, true, n).recall == (hits / wanted if wanted else 0.0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=7), st.lists(st.integers(0, 3), max_size=7))
def test_rouge_l_is_the_longest_common_subsequence(found, true):
    def subsequences(text):
        return {pick for size in range(len(text) + 1) for pick in itertools.combinations(text, size)}

    longest = max(map(len, subsequences(found) & subsequences(true)))
    assert metrics.rouge_l(found, true).recall == (longest / len(true) if true else 0.0)


def test_sequences_positions_and_facts():
    assert metrics.positional_accuracy([1, 2, 9], [1, 5, 9, 4]) == 0.5
    assert metrics.exact_sequence_rate([[1, 2], [1, 2]], [[1, 2], [3]]) == 0.5
    assert metrics.fact_recall([[7, 1, 2, 8]], [[1, 2], [2, 1]]) == 0.5
    assert metrics.fact_recall([], []) == 0.0
    assert metrics.count_accuracy([2, 0], [1, 1]) == 0.5


@settings(max_examples=60, deadline=None)
@given(scores, scores)
def test_auc_is_the_chance_of_a_right_order(inside, outside):
    wins = sum((a > b) + 0.5 * (a == b) for a in inside for b in outside)
    assert metrics.auc(inside, outside) == pytest.approx(wins / (len(inside) * len(outside)))


@settings(max_examples=60, deadline=None)
@given(scores, scores, st.sampled_from([0.0, 0.01, 0.1, 0.34, 1.0]))
def test_tpr_at_fpr_is_the_best_of_all_thresholds(inside, outside, rate):
    best = 0.0
    for threshold in [-math.inf, *sorted(set(inside + outside))]:
        if np.mean(np.array(outside) > threshold) <= rate:
            best = max(best, float(np.mean(np.array(inside) > threshold)))
    assert metrics.tpr_at_fpr(inside, outside, rate) == pytest.approx(best)


def test_psnr_of_a_known_error():
    image = torch.zeros(1, 4, 4)
    assert metrics.psnr(image + 0.1, image) == pytest.approx(20.0, abs=1e-4)
    assert metrics.psnr(image, image) == 200.0


def slow_ssim(first: torch.Tensor, second: torch.Tensor) -> float:
    size = min(11, first.shape[-1] - (first.shape[-1] + 1) % 2)
    line = [math.exp(-((i - (size - 1) / 2) ** 2) / (2 * 1.5**2)) for i in range(size)]
    weight = torch.tensor([[a * b for a in line] for b in line], dtype=torch.float64)
    weight /= weight.sum()
    values = []
    for channel, row, column in itertools.product(
        range(first.shape[0]), range(first.shape[1] - size + 1), range(first.shape[2] - size + 1)
    ):
        a = first[channel, row : row + size, column : column + size].double()
        b = second[channel, row : row + size, column : column + size].double()
        mean_a, mean_b = (weight * a).sum(), (weight * b).sum()
        var_a, var_b = (weight * (a - mean_a) ** 2).sum(), (weight * (b - mean_b) ** 2).sum()
        both = (weight * (a - mean_a) * (b - mean_b)).sum()
        top = (2 * mean_a * mean_b + 0.01**2) * (2 * both + 0.03**2)
        values.append(float(top / ((mean_a**2 + mean_b**2 + 0.01**2) * (var_a + var_b + 0.03**2))))
    return float(np.mean(values))


@pytest.mark.parametrize("side", [6, 13])
def test_ssim_equals_its_definition(side):
    generator = torch.Generator().manual_seed(side)
    first, second = torch.rand(2, 2, side, side, generator=generator)
    assert metrics.ssim(first, second) == pytest.approx(slow_ssim(first, second), abs=1e-9)
    assert metrics.ssim(first, first) == pytest.approx(1.0)


def test_ms_ssim_is_one_scale_on_a_small_image_and_falls_with_noise():
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(2, 1, 12, 12, generator=generator)
    assert metrics.ms_ssim(small[0], small[1]) == pytest.approx(max(0.0, metrics.ssim(small[0], small[1])))
    image = torch.nn.functional.interpolate(
        torch.rand(1, 3, 12, 12, generator=generator), size=96, mode="bilinear"
    )[0]
    noisy = [
        metrics.ms_ssim((image + level * torch.randn(image.shape, generator=generator)).clamp(0, 1), image)
        for level in (0.0, 0.1, 0.5)
    ]
    assert noisy[0] == pytest.approx(1.0)
    assert noisy[0] > noisy[1] > noisy[2]


def test_identification_needs_the_own_source_to_be_nearest():
    true, distractors = torch.eye(3).reshape(3, 1, 1, 3), torch.full((1, 1, 1, 3), 0.5)
    assert metrics.identification_rate(true * 0.9, true, distractors) == 1.0
    assert metrics.identification_rate(torch.full_like(true, 0.5), true, distractors) == 0.0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=1, max_size=3))
def test_matching_is_the_best_of_all_permutations(rows):
    table = np.array(rows, dtype=float)
    total = sum(table[a, b] for a, b in metrics.match_one_to_one(table))
    best = max(
        sum(table[row, column] for row, column in enumerate(order))
        for order in itertools.permutations(range(3), len(rows))
    )
    assert total == best


def test_bootstrap_interval_covers_as_often_as_it_says():
    generator = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        interval = metrics.bootstrap_interval(
            generator.normal(size=40), resamples=300, seed=seed, confidence=0.9
        )
        hits += interval.low <= 0.0 <= interval.high
    assert 0.82 <= hits / 200 <= 0.96
    with pytest.raises(ValueError, match="empty"):
        metrics.bootstrap_interval([])


def test_gaussian_predictions_match_simulation():
    generator = np.random.default_rng(0)
    inside, outside = 1 + 2 * generator.normal(size=20_000), 2 * generator.normal(size=20_000)
    assert metrics.auc(inside, outside) == pytest.approx(metrics.gaussian_auc(2.0), abs=0.01)
    assert metrics.tpr_at_fpr(inside, outside, 0.01) == pytest.approx(
        metrics.gaussian_tpr(2.0, 0.01), abs=0.01
    )
    assert metrics.gaussian_auc(0.0) == 1.0


def test_advantage_is_zero_at_the_prior_and_one_at_perfect():
    assert metrics.advantage(0.84, 0.84) == 0.0
    assert metrics.advantage(1.0, 0.84) == 1.0
    assert metrics.advantage(0.5, 0.84) < 0.0
    assert metrics.advantage(0.5, 1.0) == 0.0


def test_baselines():
    assert baselines.unigram_tokens(torch.tensor([1.0, 5.0, 3.0]), 2).tolist() == [1, 2]
    assert baselines.uniform_counts(3, 7).tolist() == [3, 2, 2]
    assert baselines.expected_counts(torch.tensor([1.0, 3.0]), 8).tolist() == [2.0, 6.0]
    assert torch.equal(baselines.random_tokens(9, 4, seed=1), baselines.random_tokens(9, 4, seed=1))
    public = torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)])
    assert torch.equal(baselines.nearest_public(torch.full((1, 2, 2), 0.7), public), public[1])
    assert torch.equal(baselines.mean_image(public), baselines.grey_image((1, 2, 2)))
    chain = torch.full((3, 3), -9.0)
    chain[0, 1] = chain[1, 2] = chain[2, 1] = 0.0
    assert baselines.language_model_text(chain, 3).tolist() == [1, 2, 1]
