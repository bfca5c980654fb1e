"""What a released set of texts says of planted secrets, with nothing but the texts to look at.

A language model of pairs of tokens is counted from the released texts, and every secret is ranked by it
among other draws from its own space. No model is asked: whoever downloads the set can do this.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from attacks import luck
from attacks.extraction import Extracted, Secret

_UNSEEN = 0.1  # counts that a pair has before any text


def text_score(prefix: Sequence[int], ending: Sequence[int], counted: PairCounts) -> float:
    """Return the log-probability of an ending behind a prefix under counted pairs."""
    score = 0.0
    for first, second in pairwise((prefix[-1], *ending)):
        score += counted.log_probability(first, second)
    return score


class PairCounts:
    """Count which token follows which in released texts."""

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        self._pairs = Counter(pair for text in texts for pair in pairwise(text))
        self._first = Counter(token for text in texts for token in text[:-1])
        self._tokens = max(2, len({token for text in texts for token in text}))

    def log_probability(self, first: int, second: int) -> float:
        """Return the log-probability that a token follows another, with a little for pairs never seen."""
        count = self._pairs[first, second] + _UNSEEN
        return math.log(count / (self._first[first] + _UNSEEN * self._tokens))


def written(secret: Secret, texts: Sequence[Sequence[int]]) -> bool:
    """Say whether a text holds the drawn part of a secret word for word."""
    wanted, length = tuple(secret.drawn), len(secret.drawn)
    return any(
        tuple(text[start : start + length]) == wanted
        for text in texts
        for start in range(len(text) - length + 1)
    )


def extract_from_texts(secrets: Sequence[Secret], texts: Sequence[Sequence[int]]) -> tuple[Extracted, ...]:
    """Rank every secret among other draws by released texts alone; `read` says that a text holds it.

    Guarantee: of texts that do not depend on what was drawn, any is called leaked with probability at most
    `extraction.LEVEL`; many draws level with the secret count against it.
    Source: Meeus et al. 2025, arXiv:2502.14921 (secrets with an ordinary beginning and an unlikely end, read
    from synthetic text by pairs of tokens).

    >>> secret = Secret(prefix=(1,), drawn=(7, 8), rivals=((5, 6),) * 499)
    >>> [found.leaked for found in extract_from_texts([secret], [(1, 7, 8), (1, 2)])]
    [True]
    """
    counted = PairCounts(texts)
    results = []
    for secret in secrets:
        own = text_score(secret.prefix, secret.drawn, counted)
        others = [text_score(secret.prefix, rival, counted) for rival in secret.rivals]
        chance = luck.rank(own, others)
        results.append(
            Extracted(
                exposure=-math.log2(chance),
                luck=chance,
                read=written(secret, texts),
                repeats=secret.repeats,
            )
        )
    corrected = luck.holm([one.luck for one in results])
    return tuple(replace(one, luck=chance) for one, chance in zip(results, corrected, strict=True))
