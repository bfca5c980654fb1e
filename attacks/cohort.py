"""Whose it is: give what several opened sums hold to the clients that took part in them.

One sum says what a cohort holds and not who brought it. The server knows who took part in each round, and a
word that is there whenever one client is, and gone when it is not, is that client's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from attacks import luck
from attacks.scoring import Score

Floats = NDArray[np.float64]

MEASURE = "attribution"
_STRAY = 1e-3  # how often a word is read that nobody brought
_SHUFFLES = 99


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedSum:
    """Hold the tokens read off one opened sum, and the clients behind it."""

    tokens: frozenset[int]
    cohort: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribution:
    """Give each token to a client: `best`; `evidence` (tokens, clients) is the log-likelihood that it is that
    client's alone.
    """

    tokens: tuple[int, ...]
    evidence: Floats
    best: tuple[int, ...]


def attribute(sums: Sequence[OpenedSum], clients: int) -> Attribution:
    """Give every token read in some round to the client that best explains where it was there and where not.

    A noisy group test: a client that alone has a token brings it at some rate in its rounds and never in
    others, but for strays. The rate that fits each client best is found from its own rounds.

    Raises: ValueError for no sum.
    """
    if not sums:
        raise ValueError("0 opened sums, must be at least 1")
    tokens = tuple(sorted(set().union(*(one.tokens for one in sums))))
    present = np.array([[token in one.tokens for one in sums] for token in tokens], dtype=float)
    evidence = _alone(present, participation(sums, clients))
    if tokens:
        best = tuple(int(place) for place in evidence.argmax(axis=1))
    else:
        best = ()
    return Attribution(tokens=tokens, evidence=evidence, best=best)


def participation(sums: Sequence[OpenedSum], clients: int) -> Floats:
    """Return who took part: (rounds, clients) of zeros and ones."""
    table = np.zeros((len(sums), clients))
    for place, one in enumerate(sums):
        table[place, list(one.cohort)] = 1.0
    return table


def _alone(present: Floats, took_part: Floats) -> Floats:
    """Return the log-likelihood of every client having a token alone, at the rate that fits it best: (tokens,
    clients).
    """
    rounds = took_part.sum(axis=0)
    with_it = present @ took_part
    without = present.sum(axis=1, keepdims=True) - with_it
    rate = np.clip(with_it / np.maximum(rounds, 1.0), _STRAY, 1 - _STRAY)
    absent = rounds[None, :] - with_it
    quiet = len(took_part) - rounds[None, :] - without
    evidence: Floats = (
        with_it * np.log(rate)
        + absent * np.log1p(-rate)
        + without * np.log(_STRAY)
        + quiet * np.log1p(-_STRAY)
    )
    return evidence


def counts_by_client(counts: Floats, took_part: Floats) -> Floats:
    """Return how many of each label every client holds, from the counts of sums: (rounds, classes) to
    (clients, classes).

    Least squares over the rounds, no count below zero; exact where each client's batch is the same in every
    round and the cohorts tell the clients apart.
    """
    return np.stack([nnls(took_part, column)[0] for column in np.asarray(counts, dtype=float).T], axis=1)


def attribution_score(sums: Sequence[OpenedSum], owners: Mapping[int, int], clients: int) -> Score | None:
    """Score attribution by the tokens that one client alone has: the share that goes to that client; None
    where there is none.

    Luck is the rank among the same reading under rounds dealt out anew: who took part then says nothing.
    """
    known = attribute(sums, clients)
    placed = []
    for place, token in enumerate(known.tokens):
        if token in owners:
            placed.append((place, owners[token]))
    if not placed:
        return None

    def value(best: Sequence[int]) -> float:
        return sum(best[place] == owner for place, owner in placed) / len(placed)

    took_part = participation(sums, clients)
    present = np.array([[token in one.tokens for one in sums] for token in known.tokens], dtype=float)
    generator, nulls = np.random.default_rng(0), []
    for _ in range(_SHUFFLES):
        dealt = took_part[generator.permutation(len(took_part))]
        nulls.append(value(_alone(present, dealt).argmax(axis=1).tolist()))
    share, chance = value(known.best), 1 / clients
    mean = sum(nulls) / len(nulls)
    return Score(
        measure=MEASURE,
        value=share,
        baseline=max(chance, mean),
        noise=mean,
        succeeded=share >= 2 * chance,
        luck=luck.beyond(share, nulls, step=0.02),
    )
