"""Scores hold a reconstruction against the truth:
right ones succeed, guesses do not, and nothing is judged that cannot be.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from attacks.contract import Item, ItemKind, Reconstruction
from attacks.metrics import psnr
from attacks.scoring import Score, auc_deviation, hopeless, pooled, regrouped, score
from attacks.truth import Truth

TEXT = Truth(sequences=((1, 10, 11, 2), (1, 12, 13, 2)), labels=(0, 3), classes=4)


def found(kind: ItemKind, *values: object) -> Reconstruction:
    items = tuple(Item(kind=kind, value=torch.as_tensor(value)) for value in values)
    return Reconstruction(
        attack="test", items=items, confidence=1.0, seconds=0.0, knowledge_used=(), applicable=True
    )


def test_tokens_that_stand_in_every_text_count_for_nothing() -> None:
    perfect, special = (
        score(found("token_set", [10, 11, 12, 13]), TEXT),
        score(found("token_set", [1, 2]), TEXT),
    )
    assert perfect is not None
    assert special is not None
    assert perfect.value == 1.0
    assert perfect.succeeded
    assert special.value == 0.0
    assert not special.succeeded


def test_half_of_the_tokens_is_half_recall() -> None:
    result = score(found("sequence", [10, -1], [12, -1]), TEXT)
    assert result is not None
    assert result.value == pytest.approx(2 * 1.0 * 0.5 / 1.5)


@pytest.mark.parametrize(
    ("counts", "succeeded"), [([1, 0, 0, 1], True), ([1, 1, 0, 0], False), ([0.5, 0.5, 0.5, 0.5], False)]
)
def test_label_counts_must_beat_the_uniform_guess(counts: list[float], succeeded: bool) -> None:
    result = score(found("label_counts", counts), TEXT)
    assert result is not None
    assert result.baseline == pytest.approx(0.5)
    assert result.succeeded == succeeded


def test_membership_needs_more_than_luck() -> None:
    truth = Truth(members=(True,) * 32 + (False,) * 32)
    clear = score(found("scores", [1.0] * 32 + [0.0] * 32), truth)
    chance = score(found("scores", np.random.default_rng(0).normal(size=64)), truth)
    assert clear is not None
    assert chance is not None
    assert clear.value == 1.0
    assert clear.succeeded
    assert not chance.succeeded
    assert chance.low is not None
    assert chance.low < 0.5


def test_the_deviation_of_an_area_matches_simulation() -> None:
    rng = np.random.default_rng(1)
    areas = [
        float((rng.normal(0.5, 1, 32)[:, None] > rng.normal(0, 1, 32)[None]).mean()) for _ in range(2000)
    ]
    assert auc_deviation(float(np.mean(areas)), 32, 32) == pytest.approx(float(np.std(areas)), rel=0.15)


def test_an_image_must_beat_the_mean_image() -> None:
    images = torch.rand((3, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    truth = Truth(images=images)
    exact, grey = score(found("image", images[1]), truth), score(found("image", images.mean(0)), truth)
    assert exact is not None
    assert grey is not None
    assert exact.succeeded
    assert not grey.succeeded


def test_a_single_image_must_beat_its_one_colour() -> None:
    image = torch.rand((1, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    grey = image[0].mean(dim=(1, 2), keepdim=True).expand(3, 8, 8)
    exact, guess = (score(found("image", value), Truth(images=image)) for value in (image[0], grey))
    assert exact is not None
    assert guess is not None
    assert exact.succeeded
    assert not guess.succeeded


def test_what_the_truth_cannot_judge_stays_unjudged() -> None:
    assert score(found("embedding", [[1.0, 2.0]]), TEXT) is None
    assert score(found("scores", [1.0, 2.0]), TEXT) is None


def test_the_mean_of_draws_is_judged_and_not_its_luckiest() -> None:
    def drawn(values: list[float], baseline: float = 0.1, measure: str = "label count accuracy") -> Score:
        return pooled([Score(measure=measure, value=v, baseline=baseline, succeeded=v > 0.4) for v in values])

    lucky = drawn([1.0, 0.0, 0.0, 0.0, 0.0])
    assert not lucky.succeeded
    assert lucky.value == pytest.approx(0.2)
    often = drawn([1.0, 1.0, 0.0, 1.0, 1.0])
    assert often.succeeded
    assert often.low is not None
    assert often.low > 0.1
    assert not drawn(
        [0.5, 0.05, 0.05, 0.9], baseline=0.05
    ).succeeded  # far apart: the interval reaches down to guessing
    assert drawn([30.0, 32.0], baseline=12.0, measure="PSNR dB").succeeded
    assert not drawn([17.0, 16.0], baseline=12.0, measure="PSNR dB").succeeded


@pytest.mark.parametrize("most", [1, 2, 5, 6])
def test_draws_are_given_up_exactly_when_no_draw_to_come_can_mend_them(most: int) -> None:
    for marks in itertools.product((0.0, 0.9), repeat=most):
        draws = [
            Score(measure="token F1", value=v, baseline=0.1, succeeded=v > 0.4, luck=1e-6) for v in marks
        ]
        for seen in range(1, most):
            best = replace(draws[0], value=0.9, succeeded=True)
            mended = pooled([*draws[:seen], *[best] * (most - seen)]).succeeded
            assert hopeless(draws[:seen], most) != mended
            if hopeless(draws[:seen], most):
                assert not pooled(draws[:seen]).succeeded


def test_one_draw_stays_as_it_is_and_measures_are_not_mixed() -> None:
    one = Score(measure="token F1", value=0.9, baseline=0.0, succeeded=True, pairs=(("1 2", "1 2"),))
    assert pooled([one]) is one
    with pytest.raises(ValueError, match="2 measures"):
        pooled([one, Score(measure="PSNR dB", value=9.0, baseline=1.0, succeeded=True)])
    with pytest.raises(ValueError, match="0 scores"):
        pooled([])


def test_one_label_of_two_is_a_coin_and_many_coins_are_not() -> None:
    truth = Truth(labels=(1,), classes=2)
    coin = score(found("labels", [1]), truth)
    assert coin is not None
    assert (coin.succeeded, coin.luck, coin.proven) == (True, 0.5, False)
    assert pooled([coin] * 8).proven
    assert not pooled([coin] * 4).proven
    wrong = replace(coin, value=0.0, succeeded=False)
    assert not pooled([coin] * 5 + [wrong] * 3).proven


def test_a_clear_order_of_few_candidates_may_be_luck() -> None:
    def judged(members: int) -> Score | None:
        scores = [1.0 + i for i in range(members)] + [0.0] * members
        return score(found("scores", scores), Truth(members=(True,) * members + (False,) * members))

    assert judged(1).succeeded
    assert not judged(1).proven
    assert judged(8).proven


def test_guessing_tokens_goes_by_the_vocabulary_and_by_texts_that_were_not_used() -> None:
    sequences = (tuple(range(3, 33)), tuple(range(33, 63)))
    everything = score(found("token_set", range(120)), Truth(sequences=sequences, vocabulary=120))
    assert everything is not None
    assert everything.value == pytest.approx(everything.baseline)
    assert not everything.succeeded
    usual = Truth(
        sequences=((5, 6, 7), (6, 7, 8)), vocabulary=30_000, others=((5, 6, 9), (5, 7, 8), (5, 6, 7))
    )
    guess = score(found("token_set", [5, 6, 7]), usual)
    assert guess is not None
    assert guess.baseline >= guess.value - 0.2
    assert not guess.succeeded
    assert score(found("token_set", range(3, 63)), Truth(sequences=sequences, vocabulary=120)).succeeded


def test_a_picture_that_is_no_number_is_no_success() -> None:
    truth = Truth(images=torch.rand(1, 1, 8, 8))
    broken = score(found("image", torch.full((1, 8, 8), float("nan"))), truth)
    assert broken is not None
    assert not broken.succeeded
    assert psnr(torch.full((1, 8, 8), float("nan")), truth.images[0]) == -200.0


def _memberships(count: int, separation: float, seed: int) -> list[Score]:
    """Return membership scores of 16 candidates, half of them members each time."""
    rng, scores = np.random.default_rng(seed), []
    template = score(found("scores", [1.0, 0.0]), Truth(members=(True, False)))
    assert template is not None
    for _ in range(count):
        inside, outside = rng.normal(size=8) + separation, rng.normal(size=8)
        area = float((inside[:, None] > outside[None, :]).mean())
        low = area - 2.576 * auc_deviation(area, 8, 8)
        scores.append(replace(template, value=area, succeeded=low > 0.5 and area >= 0.65))
    return scores


def test_the_luck_of_many_memberships_is_as_often_small_as_it_says() -> None:
    lucks = [regrouped(_memberships(32, 0.0, seed), 8, 8).luck for seed in range(400)]
    for level in (0.01, 0.05, 0.2):
        share = float(np.mean([value <= level for value in lucks]))
        assert abs(share - level) <= 4 * (level * (1 - level) / 400) ** 0.5


def test_many_memberships_say_surely_what_one_cannot() -> None:
    weak = [regrouped(_memberships(32, 0.6, seed), 8, 8) for seed in range(30)]
    assert all(one.proven for one in weak)
    alone = [_memberships(1, 1.2, seed)[0] for seed in range(30)]
    assert 0 < sum(one.succeeded for one in alone) < 25
    nothing = [regrouped(_memberships(32, 0.0, seed), 8, 8) for seed in range(30)]
    assert not any(one.proven for one in nothing)
    assert all(one.low is not None and one.low <= one.value <= one.high for one in weak)
    with pytest.raises(ValueError, match="membership"):
        regrouped([], 8, 8)
