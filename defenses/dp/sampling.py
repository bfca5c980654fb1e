"""Who takes part in a step: every choice that amplification relies on,
drawn from cryptographic randomness.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from defenses.errors import ParameterError
from defenses.random_source import RandomSource

Indices = npt.NDArray[np.int64]
_CHUNK = 1 << 16


def poisson_sample(population: int, *, rate: float, source: RandomSource) -> Indices:
    """Return the sorted indices of those who take part, each independently with probability `rate`.

    Guarantee: the probability of each index is floor(rate * 2^64) / 2^64, so never above `rate`, and exactly
    1 for rate 1; the result may be empty, and an empty step is still a step with noise.
    """
    if population < 0:
        raise ParameterError(f"population = {population}: must not be negative")
    if not 0 <= rate <= 1:
        raise ParameterError(f"rate = {rate}: must lie in [0, 1]")
    if rate == 1:
        return np.arange(population, dtype=np.int64)
    threshold = np.uint64(math.floor(math.ldexp(rate, 64)))
    members = []
    for start in range(0, population, _CHUNK):
        members.append(start + np.flatnonzero(source.words(min(_CHUNK, population - start)) < threshold))
    return np.concatenate(members).astype(np.int64) if members else np.empty(0, dtype=np.int64)


def fixed_size_sample(population: int, *, size: int, source: RandomSource) -> Indices:
    """Return a sorted uniform subset of exactly `size` indices, without replacement.

    The members are those with the smallest random keys; a tie among keys, which would favour an order, is
    redrawn.
    """
    if not 0 <= size <= population:
        raise ParameterError(f"size = {size}: must lie in [0, population = {population}]")
    if size == 0:
        return np.empty(0, dtype=np.int64)
    while True:
        keys = source.words(population)
        chosen = np.argpartition(keys, size - 1)[:size]
        limit = keys[chosen].max()
        if np.count_nonzero(keys <= limit) == size:
            return np.sort(chosen).astype(np.int64)


def participation_cap(clients: int, *, rounds: int, cohort: int) -> int:
    """Return the most rounds any client can take part in under `balanced_schedule`: ceil(rounds * cohort /
    clients).
    """
    _check_schedule(clients, rounds, cohort)
    return -(-rounds * cohort // clients)


def balanced_schedule(clients: int, *, rounds: int, cohort: int, source: RandomSource) -> list[Indices]:
    """Return one cohort of distinct clients for each round, in which everybody's turns are capped.

    Clients are dealt from shuffled decks, each deck holding every client once; a deck that begins in the
    middle of a round deals first those who are not yet in that round.

    Guarantee: every cohort has exactly `cohort` distinct clients, and no client is in more than
    `participation_cap`.
    Assumes: no amplification is claimed for this schedule; each realised participation is charged in full.
    """
    _check_schedule(clients, rounds, cohort)
    schedule: list[Indices] = []
    deck = np.empty(0, dtype=np.int64)
    for _ in range(rounds):
        members, deck = deck[:cohort], deck[cohort:]
        if len(members) < cohort:
            fresh = source.permutation(clients)
            free = fresh[~np.isin(fresh, members)][: cohort - len(members)]
            deck = fresh[~np.isin(fresh, free)]
            members = np.concatenate([members, free])
        schedule.append(np.sort(members))
    return schedule


def _check_schedule(clients: int, rounds: int, cohort: int) -> None:
    if clients < 1 or rounds < 0:
        raise ParameterError(
            f"clients = {clients}, rounds = {rounds}: there must be a client, and no negative rounds"
        )
    if not 1 <= cohort <= clients:
        raise ParameterError(f"cohort = {cohort}: must lie in [1, clients = {clients}]")
