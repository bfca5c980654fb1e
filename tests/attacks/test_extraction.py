"""A planted secret is found in a model that memorised it, and in no other."""

from __future__ import annotations

import numpy as np
import pytest

from attacks.extraction import RIVALS, Secret, continued, draw_secret, extract, greedy, text_scores
from attacks.released import taught
from attacks.truth import Truth
from tests.attacks.test_released import decoder, privately_taught, texts

SPACE = [range(10, 30)] * 4


def secrets(*repeats: int, first: int = 0) -> list[Secret]:
    planned = []
    for number, count in enumerate(repeats):
        planned.append(draw_secret((5, 6, 7 + number), SPACE, seed=first + number, repeats=count))
    return planned


def planted(chosen: list[Secret]) -> Truth:
    rows = list(texts(3, 30).sequences or ())
    for one in chosen:
        rows += [(*one.prefix, *one.drawn, 3, 3, 3)] * one.repeats
    return Truth(sequences=tuple(rows))


def test_a_secret_shows_the_more_the_more_often_it_was_repeated() -> None:
    chosen = secrets(0, 1, 16)
    exposures = extract(taught(decoder(), planted(chosen), passes=5, rate=3e-3), chosen)
    never, once, often = exposures
    assert never.exposure < once.exposure < often.exposure
    assert often.exposure > 10
    assert often.leaked
    assert often.read
    assert not never.leaked
    assert not never.read


def test_a_private_model_and_one_that_never_saw_them_give_no_secret_away() -> None:
    chosen = secrets(1, 4)
    private = privately_taught(decoder(), planted(chosen), passes=3, noise=2.0)
    for model in (decoder(), private):
        assert not any(one.leaked or one.read for one in extract(model, chosen))


def test_the_rank_of_a_secret_nobody_saw_is_even() -> None:
    model, lucks = decoder(), []
    for seed in range(60):
        one = draw_secret((5, 6, 7), SPACE, seed=100 + seed)
        scores = text_scores(model, one.prefix, (one.drawn, *one.rivals[:99])).tolist()
        lucks.append((1 + sum(score >= scores[0] for score in scores[1:])) / 100)
    assert abs(float(np.mean(lucks)) - 0.5) < 0.15
    assert len({one.drawn for one in secrets(1, 1, 1, 1)}) == 4
    assert len(draw_secret((5,), SPACE, seed=0).rivals) == RIVALS


def test_endings_are_scored_as_each_alone_whatever_their_lengths() -> None:
    model, endings = decoder(), [(10, 11), (12, 13, 14), (10, 11)]
    together = text_scores(model, (5, 6), endings).tolist()
    alone = [float(text_scores(model, (5, 6), [ending])[0]) for ending in endings]
    assert together == pytest.approx(alone, abs=1e-5)
    assert together[0] == pytest.approx(together[2], abs=1e-5)


def test_a_curious_site_reads_on_in_texts_that_were_memorised_only() -> None:
    start, records = decoder(), texts(1, 12)
    model = taught(start, records, passes=40, rate=3e-3)
    continuation = continued(model, start, records.sequences or (), known=4, length=4)
    assert continuation.leaked
    assert continuation.read > continuation.texts / 2
    others = continued(model, start, texts(2, 12).sequences or (), known=4, length=4)
    assert not others.leaked
    assert others.texts == 12
    assert greedy(start, (5, 6), 3) == greedy(start, (5, 6), 4)[:3]


def test_a_secret_without_rivals_is_refused() -> None:
    with pytest.raises(ValueError, match="other draws"):
        Secret(prefix=(1,), drawn=(2,), rivals=())
