"""Time Flower's published SecAgg+ functions; run by `benchmarks.secagg --peer` inside an environment that has
them.

Calls the functions a client of that framework calls for the same work: quantise, expand one private and one
pairwise mask for each neighbour with key agreement, add, reduce and serialise; deal two secrets; combine one;
and the key stages of one round: keys, dealing to the neighbours, encrypting and decrypting shares. Arguments:
length, neighbours, shares, threshold, threshold of the round. Prints one JSON object.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time

import numpy as np
from flwr.common import ndarray_to_bytes
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt, encrypt, generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    factor_combine,
    parameters_addition,
    parameters_mod,
    parameters_multiply,
)
from flwr.common.secure_aggregation.quantization import quantize
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen, share_keys_plaintext_concat
from flwr.supercore.primitives.asymmetric import generate_key_pairs, private_key_to_bytes

LEVELS, MODULUS = 1 << 16, 1 << 32


def key_stages(neighbours: int, threshold: int) -> float:
    """Time everything of one client's round that is not the upload."""
    peers = [generate_key_pairs()[1] for _ in range(neighbours)]
    start = time.process_time()
    own, _ = generate_key_pairs()
    channel, _ = generate_key_pairs()
    seed_shares = create_shares(os.urandom(32), threshold, neighbours + 1)
    key_shares = create_shares(private_key_to_bytes(own), threshold, neighbours + 1)
    for number, peer in enumerate(peers):
        key = generate_shared_key(channel, peer)
        plain = share_keys_plaintext_concat(0, number, seed_shares[number], key_shares[number])
        decrypt(key, encrypt(key, plain))
    return time.process_time() - start


def main() -> None:
    length, neighbours, dealers, threshold, own_threshold = (int(argument) for argument in sys.argv[1:])
    values = np.random.default_rng(0).uniform(-1, 1, length).astype(np.float32)
    own, _ = generate_key_pairs()
    peers = [generate_key_pairs()[1] for _ in range(neighbours)]
    seed, secret_key = os.urandom(32), private_key_to_bytes(own)

    start = time.process_time()
    vectors = factor_combine(1, quantize(parameters_multiply([values], 1.0), 1.0, LEVELS))
    quantising = time.process_time() - start
    shared = [generate_shared_key(own, peer) for peer in peers]
    agreed = time.process_time() - start
    shapes = [vector.shape for vector in vectors]
    for secret in (seed, *shared):
        vectors = parameters_addition(vectors, pseudo_rand_gen(secret, MODULUS, shapes))
    vectors = parameters_mod(vectors, MODULUS)
    masks = time.process_time() - start - agreed
    upload = [ndarray_to_bytes(vector) for vector in vectors]
    masking = time.process_time() - start

    start = time.process_time()
    seed_shares = create_shares(seed, threshold, dealers)
    key_shares = create_shares(secret_key, threshold, dealers)
    dealing = time.process_time() - start

    start = time.process_time()
    combine_shares(seed_shares[:threshold])
    recovery = time.process_time() - start

    plain = share_keys_plaintext_concat(1, 2, seed_shares[0], key_shares[0])
    sealed = encrypt(generate_shared_key(own, peers[0]), plain)
    facts = {
        "peer": f"flwr {importlib.metadata.version('flwr')}",
        "seconds": {
            "client_upload": masking,
            "quantising_alone": quantising,
            "masks_alone": masks,
            "share_dealing": dealing,
            "recovery_of_one_secret": recovery,
            "key_stages": key_stages(neighbours, own_threshold),
        },
        "bytes_per_parameter": sum(map(len, upload)) / length,
        "share_message_bytes": len(sealed),
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
