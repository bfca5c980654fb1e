"""What the tests of encrypted sums share: parties, simple pairwise masks, one round through any backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

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


def public(identity: Ed25519PrivateKey) -> bytes:
    return identity.public_key().public_bytes_raw()


IDENTITIES = sorted(
    (Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in range(1, 255)), key=public
)
PARTIES = [public(identity) for identity in IDENTITIES]
"""In ascending order, so that the first few are a cohort."""


def agreement(
    run: bytes, *, parties: int, bound: int, length: int, number: int = 0, fewest: int = 1, attempt: int = 0
) -> Agreement:
    return Agreement(
        run=run,
        round=number,
        attempt=attempt,
        length=length,
        value_bound=bound,
        cohort=tuple(PARTIES[:parties]),
        fewest=fewest,
    )


def client_of(key: KeyHolder, terms: Agreement, place: int) -> EncryptedClient:
    return EncryptedClient(key, terms, IDENTITIES[place], roster=PARTIES)


def server_of(key: KeyHolder, terms: Agreement) -> Accumulator:
    return Accumulator(key.public_bundle(), terms, roster=PARTIES)


def holder(parameters: Parameters, seed: int = 0) -> KeyHolder:
    return KeyHolder.generate(parameters, random=RandomSource.seeded(seed))


def pairwise_masks(
    me: int, count: int, length: int, seed: int
) -> Callable[[npt.NDArray[np.uint64]], npt.NDArray[np.uint64]]:
    """Add the stream of every pair, with the sign of its order:
    they cancel in the sum over all `count` parties.
    """

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
    for party, client, vector in zip(PARTIES, clients, vectors):
        server.add(client.encrypt(vector), sender=party)
    return clients[0].decrypt_sum(server.sum_chunks(), server.parties)


def masked_sum(terms: Agreement, vectors: Integers, seed: int = 0) -> Integers:
    server = Words(terms, "masking")
    clients = [
        MaskingClient(terms, party, mask=pairwise_masks(index, len(vectors), terms.length, seed),
                      open_sum=lambda words, parties: words)
        for index, (party, _) in enumerate(zip(PARTIES, vectors))
    ]  # fmt: skip
    for party, client, vector in zip(PARTIES, clients, vectors):
        server.add(client.encrypt(vector), sender=party)
    return clients[0].decrypt_sum(server.sum_chunks(), server.parties)


def encrypted_sum(key: KeyHolder, terms: Agreement, vectors: Integers) -> Integers:
    server = server_of(key, terms)
    clients = [client_of(key, terms, place) for place in range(len(vectors))]
    for party, client, vector in zip(PARTIES, clients, vectors):
        server.add(client.encrypt(vector), sender=party)
    return clients[0].decrypt_sum(server.sum_chunks(), server.parties)


def upload(key: KeyHolder, terms: Agreement, index: int, vector: Integers) -> list[bytes]:
    return list(client_of(key, terms, index).encrypt(vector))


def added(key: KeyHolder, terms: Agreement, uploads: Sequence[Sequence[bytes]]) -> list[bytes]:
    """Add the uploads of the first parties, in order."""
    server = server_of(key, terms)
    for party, chunks in zip(PARTIES, uploads):
        server.add(chunks, sender=party)
    return list(server.sum_chunks())
