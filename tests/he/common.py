"""What the tests of encrypted sums share: parties, simple pairwise masks, one round through any backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from defenses.he import (
    Accumulator,
    Agreement,
    EncryptedClient,
    KeyHolder,
    MaskingClient,
    Parameters,
    PlainClient,
)
from defenses.he import WordAccumulator as Words
from defenses.random_source import RandomSource

Integers = npt.NDArray[np.int64]
PARTIES = [bytes([number]) * 32 for number in range(1, 255)]


def agreement(
    run: bytes, *, parties: int, bound: int, length: int, number: int = 0, fewest: int = 1
) -> Agreement:
    return Agreement(run=run, round=number, length=length, value_bound=bound, parties=parties, fewest=fewest)


def holder(parameters: Parameters, seed: int = 0) -> KeyHolder:
    return KeyHolder.generate(parameters, random=RandomSource.seeded(seed))


def pairwise_masks(
    me: int, count: int, length: int, seed: int
) -> Callable[[npt.NDArray[np.uint64]], npt.NDArray[np.uint64]]:
    """Add the stream of every pair, with the sign of its order: they cancel in the sum over all `count` parties."""

    def mask(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        total = words.copy()
        for other in range(count):
            if other == me:
                continue
            stream = RandomSource.seeded(seed).derive(min(me, other), max(me, other)).words(length)
            total = total + stream if me < other else total - stream
        return total

    return mask


def plain_sum(terms: Agreement, vectors: Integers) -> Integers:
    server = Words(terms, "plain")
    clients = [PlainClient(terms, party) for party, _ in zip(PARTIES, vectors)]
    for client, vector in zip(clients, vectors):
        server.add(client.encrypt(vector))
    return clients[0].decrypt_sum(server.sum_chunks(), server.parties)


def masked_sum(terms: Agreement, vectors: Integers, seed: int = 0) -> Integers:
    server = Words(terms, "masking")
    clients = [
        MaskingClient(terms, party, mask=pairwise_masks(index, len(vectors), terms.length, seed),
                      open_sum=lambda words, parties: words)
        for index, (party, _) in enumerate(zip(PARTIES, vectors))
    ]  # fmt: skip
    for client, vector in zip(clients, vectors):
        server.add(client.encrypt(vector))
    return clients[0].decrypt_sum(server.sum_chunks(), server.parties)


def encrypted_sum(key: KeyHolder, terms: Agreement, vectors: Integers) -> Integers:
    server = Accumulator(key.public_bundle(), terms)
    clients = [EncryptedClient(key, terms, party) for party, _ in zip(PARTIES, vectors)]
    for client, vector in zip(clients, vectors):
        server.add(client.encrypt(vector))
    return clients[0].decrypt_sum(server.sum_chunks(), server.parties)


def upload(key: KeyHolder, terms: Agreement, index: int, vector: Integers) -> list[bytes]:
    return list(EncryptedClient(key, terms, PARTIES[index]).encrypt(vector))


def added(key: KeyHolder, terms: Agreement, uploads: Sequence[Sequence[bytes]]) -> list[bytes]:
    server = Accumulator(key.public_bundle(), terms)
    for chunks in uploads:
        server.add(chunks)
    return list(server.sum_chunks())
