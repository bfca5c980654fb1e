"""Time Flower's published SecAgg+ functions; run by `benchmarks.secagg --peer` inside an environment that has them.

Calls the functions a client of that framework calls for the same work: quantise, expand one private and one pairwise
mask for each neighbour with key agreement, add, reduce and serialise; deal two secrets; combine one. Arguments:
length, neighbours, shares, threshold. Prints one JSON object.
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
from flwr.common.secure_aggregation.crypto.symmetric_encryption import encrypt, generate_shared_key
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


def main() -> None:
    length, neighbours, dealers, threshold = (int(argument) for argument in sys.argv[1:])
    values = np.random.default_rng(0).uniform(-1, 1, length).astype(np.float32)
    own, _ = generate_key_pairs()
    peers = [generate_key_pairs()[1] for _ in range(neighbours)]
    seed, secret_key = os.urandom(32), private_key_to_bytes(own)

    start = time.process_time()
    vectors = factor_combine(1, quantize(parameters_multiply([values], 1.0), 1.0, LEVELS))
    quantising = time.process_time() - start
    shapes = [vector.shape for vector in vectors]
    vectors = parameters_addition(vectors, pseudo_rand_gen(seed, MODULUS, shapes))
    for peer in peers:
        vectors = parameters_addition(vectors, pseudo_rand_gen(generate_shared_key(own, peer), MODULUS, shapes))
    vectors = parameters_mod(vectors, MODULUS)
    masks = time.process_time() - start - quantising
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
        "client_upload": masking,
        "of_which_quantising": quantising,
        "of_which_masks": masks,
        "share_dealing": dealing,
        "recovery_of_one_secret": recovery,
        "bytes_per_parameter": sum(map(len, upload)) / length,
        "share_message_bytes": len(sealed),
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
