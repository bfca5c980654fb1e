"""Rounds give words to their clients where cohorts change, and give nothing away where they do not."""

from __future__ import annotations

import numpy as np
import pytest

from attacks.cohort import OpenedSum, attribute, attribution_score, counts_by_client, participation
from attacks.judge import LEVEL

CLIENTS, COHORT = 8, 5


def rounds(count: int, seed: int, *, fixed: bool = False) -> tuple[list[OpenedSum], dict[int, int]]:
    """Return sums of clients that share common words and have 30 of their own,
    of which each brings about half.
    """
    rng = np.random.default_rng(seed)
    own = {client: [100 * (client + 1) + word for word in range(30)] for client in range(CLIENTS)}
    sums = []
    for _ in range(count):
        cohort = range(COHORT) if fixed else rng.choice(CLIENTS, COHORT, replace=False).tolist()
        words = {int(word) for word in rng.choice(50, 20)}
        for client in cohort:
            words |= {word for word in own[client] if rng.random() < 0.5}
        sums.append(OpenedSum(tokens=frozenset(words), cohort=tuple(cohort)))
    return sums, {word: client for client, words in own.items() for word in words}


def test_attribution_rises_with_rounds_up_to_nearly_all() -> None:
    values = []
    for count in (5, 10, 20, 40):
        scored = attribution_score(*rounds(count, seed=1), CLIENTS)
        assert scored is not None
        values.append(scored.value)
    assert values == sorted(values)
    assert values[0] > 0.25
    assert values[-1] > 0.95
    assert scored is not None
    assert scored.luck < LEVEL / 100


def test_a_fixed_cohort_leaves_it_at_chance() -> None:
    sums, owners = rounds(40, seed=2, fixed=True)
    scored = attribution_score(sums, owners, CLIENTS)
    assert scored is not None
    assert scored.value <= 1 / COHORT
    assert scored.luck > 0.5


def test_one_round_is_at_chance_and_no_round_is_refused() -> None:
    scored = attribution_score(*rounds(1, seed=3), CLIENTS)
    assert scored is not None
    assert scored.luck > LEVEL
    with pytest.raises(ValueError, match="0 opened sums"):
        attribute([], CLIENTS)


def test_words_of_nobody_alone_are_not_scored() -> None:
    sums, _ = rounds(5, seed=4)
    assert attribution_score(sums, {9_999: 0}, CLIENTS) is None


def test_counts_of_sums_are_solved_for_each_client() -> None:
    sums, _ = rounds(12, seed=5)
    took_part = participation(sums, CLIENTS)
    held = np.random.default_rng(6).integers(0, 9, size=(CLIENTS, 3))
    assert counts_by_client(took_part @ held, took_part) == pytest.approx(held, abs=1e-8)
