"""Measure encrypted sums: bytes, time and error of our BFV and CKKS beside high-level and reference parameter
sets.

    python -m benchmarks.he [--quick] [--json]

The first table runs on the same integers, interleaved, CPU seconds of this process per million parameters
(best of the repeats), three parties' ciphertexts added. In our rows `enc+save` and `decrypt` include packing,
tags, checks and chunk headers; the reference row is TenSEAL alone, which checks nothing. A second part runs
all four backends on random cases and counts the sums that differ. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from defenses.he import (
    Accumulator,
    Agreement,
    EncryptedClient,
    KeyHolder,
    MaskingClient,
    Parameters,
    PlainClient,
    WordAccumulator,
    available,
    choose,
    error_bound,
    noise_margin_bits,
)
from defenses.he.engines import Engine
from defenses.he.packing import Integers, pack
from defenses.he.wire import HEADER_BYTES
from defenses.random_source import RandomSource

PARTIES = 10
ADDED = 3
BOUND = 2**15 - 1
REFERENCE = "CKKS, N=8192 [60,40,40] 2^40, symmetric (reference)"
PEOPLE = sorted(
    (Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in range(1, PARTIES + 1)),
    key=lambda person: person.public_key().public_bytes_raw(),
)
NAMES = [person.public_key().public_bytes_raw() for person in PEOPLE]


def sets() -> dict[str, Parameters]:
    """Name the parameter sets of the table."""
    return {
        "BFV, packed, seeded (ours)": choose("bfv", parties=PARTIES, value_bound=BOUND),
        "BFV, packed, high level (fallback)": choose("bfv", parties=PARTIES, value_bound=BOUND, seeded=False),
        "CKKS, packed, seeded (ours)": choose("ckks", parties=PARTIES, value_bound=BOUND),
        "CKKS, packed, high level (fallback)": choose(
            "ckks", parties=PARTIES, value_bound=BOUND, seeded=False
        ),
    }


class Measurement:
    """Run one parameter set repeatedly and keep the best CPU time of each step."""

    def __init__(self, parameters: Parameters, vectors: Integers) -> None:
        self.parameters, self.vectors = parameters, vectors
        self.seconds: dict[str, float] = {}
        self.wall_seconds = float("inf")
        self.up = self.down = 0
        self.exact = True

    def step(self: Any, name: str, started: float) -> float:
        """Note the CPU time since `started` and return the clock."""
        now = time.process_time()
        self.seconds[name] = min(self.seconds.get(name, float("inf")), now - started)
        return now

    def run(self) -> None:
        """Encrypt, load, add, save, open once, with a fresh key."""
        key = KeyHolder.generate(self.parameters, random=RandomSource.system())
        terms = Agreement(
            run=key.run,
            round=0,
            length=self.vectors.shape[1],
            value_bound=BOUND,
            cohort=tuple(NAMES[:PARTIES]),
            fewest=2,
        )
        clients = [EncryptedClient(key, terms, person, roster=NAMES) for person in PEOPLE[:ADDED]]
        server = Accumulator(key.public_bundle(), terms, roster=NAMES)
        for name, client, vector in zip(NAMES, clients, self.vectors):
            wall, clock = time.perf_counter(), time.process_time()
            chunks = list(client.encrypt(vector))
            clock = self.step("encrypt_save", clock)
            self.wall_seconds = min(self.wall_seconds, time.perf_counter() - wall)
            server.add(chunks, sender=name)
            if client is clients[0]:  # the first upload has nothing to be added to
                self.step("load", clock)
            self.up = sum(map(len, chunks))
        clock = time.process_time()
        total = list(server.sum_chunks())
        clock = self.step("save sum", clock)
        opened = clients[0].decrypt_sum(total, server.parties)
        self.step("decrypt", clock)
        self.down = sum(map(len, total))
        engine = key.engine()
        pairs = [(engine.load(chunk[HEADER_BYTES:]), engine.load(chunk[HEADER_BYTES:])) for chunk in chunks]
        clock = time.process_time()
        for one, other in pairs:
            engine.add(one, other)
        self.step("add", clock)
        self.exact = self.exact and bool((opened == self.vectors.sum(0)).all())

    def row(self) -> dict[str, Any]:
        """Return the figures, for one million parameters."""
        scale = 1e6 / self.vectors.shape[1]
        parameters = self.parameters
        return {
            "bytes_per_parameter_up": self.up / self.vectors.shape[1],
            "bytes_per_parameter_down": self.down / self.vectors.shape[1],
            **{
                f"cpu_s_{name.replace(' ', '_')}": round(value * scale, 4)
                for name, value in self.seconds.items()
            },
            "wall_s_encrypt_save": round(self.wall_seconds * scale, 4),
            "max_error_before_rounding": slot_error(parameters),
            "error_bound": error_bound(parameters, PARTIES),
            "noise_margin_bits": noise_margin_bits(parameters, PARTIES)
            if parameters.scheme == "bfv"
            else None,
            "exact": self.exact,
            "poly_modulus_degree": parameters.poly_modulus_degree,
            "coefficient_bits": list(parameters.coefficient_bits),
            "lanes": parameters.lanes,
            "scale_bits": parameters.scale_bits,
        }


class Reference:
    """Run the reference CKKS set as TenSEAL's own vectors: one value a slot, TenSEAL's serialisation, no
    checks.
    """

    def __init__(self, vectors: Integers) -> None:
        import tenseal

        self.tenseal, self.vectors = tenseal, vectors.astype(np.float64)
        symmetric = tenseal.ENCRYPTION_TYPE.SYMMETRIC
        self.context = tenseal.context(
            tenseal.SCHEME_TYPE.CKKS,
            8192,
            coeff_mod_bit_sizes=[60, 40, 40],
            encryption_type=symmetric,
            n_threads=1,
        )
        self.seconds: dict[str, float] = {}
        self.up = self.down = 0
        self.worst = 0.0

    step = Measurement.step

    def run(self) -> None:
        """Encrypt, load, add, save, open once."""
        uploads = []
        for vector in self.vectors:
            clock = time.process_time()
            parts = [vector[start : start + 4096].tolist() for start in range(0, len(vector), 4096)]
            encrypted = [self.tenseal.ckks_vector(self.context, part, scale=2.0**40) for part in parts]
            uploads.append([each.serialize() for each in encrypted])
            self.step("encrypt_save", clock)
        loaded = []
        for upload in uploads:
            clock = time.process_time()
            loaded.append([self.tenseal.ckks_vector_from(self.context, each) for each in upload])
            self.step("load", clock)
        total = loaded[0]
        for other in loaded[1:]:
            clock = time.process_time()
            for one, two in zip(total, other):
                one.add_(two)
            self.step("add", clock)
        clock = time.process_time()
        saved = [each.serialize() for each in total]
        clock = self.step("save sum", clock)
        opened = np.concatenate(
            [np.array(self.tenseal.ckks_vector_from(self.context, each).decrypt()) for each in saved]
        )
        self.step("decrypt", clock)
        self.up, self.down = sum(map(len, uploads[0])), sum(map(len, saved))
        self.worst = max(self.worst, float(np.abs(opened - self.vectors.sum(0)).max()))

    def row(self) -> dict[str, Any]:
        """Return the figures, for one million parameters."""
        length = self.vectors.shape[1]
        return {
            "bytes_per_parameter_up": self.up / length,
            "bytes_per_parameter_down": self.down / length,
            **{
                f"cpu_s_{name.replace(' ', '_')}": round(value * 1e6 / length, 4)
                for name, value in self.seconds.items()
            },
            "max_error_before_rounding": self.worst,
            "error_bound": None,
        }


def slot_error(parameters: Parameters, chunks: int = 20) -> float:
    """Return the largest error of a decoded slot of a sum of ten, before rounding; 0 for BFV when exact."""
    engine = KeyHolder.generate(parameters, random=RandomSource.system()).engine()
    generator, worst = np.random.default_rng(1), 0.0
    for _ in range(chunks):
        slots = [pack(generator.integers(-BOUND, BOUND + 1, parameters.values_per_chunk), parameters)
                 for _ in range(PARTIES)]  # fmt: skip
        total = engine.load(engine.encrypt(slots[0]))
        for each in slots[1:]:
            engine.add(total, engine.load(engine.encrypt(each)))
        worst = max(worst, float(np.abs(decoded(engine, parameters, total) - sum(slots)).max()))
    return worst


def decoded(engine: Engine, parameters: Parameters, ciphertext: Any) -> Any:
    """Decode without rounding: a benchmark's look inside, which no client has."""
    if parameters.scheme == "bfv":
        return engine.decrypt(ciphertext)
    if not parameters.seeded:
        return np.array(ciphertext.decrypt())
    from tenseal import sealapi

    inside: Any = engine
    plain = sealapi.Plaintext()
    inside._decryptor.decrypt(ciphertext, plain)
    return np.array(inside._encoder.decode_double(plain))


def one_sum(server: Any, clients: list[Any], vectors: Integers) -> Integers:
    """Carry one round through one backend."""
    for name, client, vector in zip(NAMES, clients, vectors):
        server.add(client.encrypt(vector), sender=name)
    result: Integers = clients[0].decrypt_sum(server.sum_chunks(), server.parties)
    return result


def pairwise(me: int, count: int, seed: int) -> Any:
    """Return a mask that cancels over all `count` parties."""

    def mask(words: Any) -> Any:
        for other in range(count):
            if other != me:
                stream = RandomSource.seeded(seed).derive(min(me, other), max(me, other)).words(len(words))
                words = words + stream if me < other else words - stream
        return words

    return mask


def agreement_of_backends(cases: int) -> dict[str, Any]:
    """Run random cases and extremes through the four backends and count sums that differ in any bit."""
    generator, differing = np.random.default_rng(0), 0
    settings = [
        (2, 1),
        (3, 127),
        (3, 2**15 - 1),
        (5, 2**15),
        (6, 2**19 - 1),
        (4, 2**31 - 1),
        (3, 2**40),
        (2, 2**59 - 1),
    ]
    keys = {
        each: [
            KeyHolder.generate(
                choose(scheme, parties=each[0], value_bound=each[1]), random=RandomSource.system()
            )
            for scheme in ("bfv", "ckks")
        ]
        for each in settings
    }
    for case in range(cases):
        most, bound = settings[case % len(settings)]
        count, length = int(generator.integers(1, most + 1)), int(generator.integers(1, 400))
        extremes = case // len(settings) % 2 == 1
        vectors = generator.integers(-bound, bound + 1, (count, length))
        if extremes:
            vectors = generator.choice(np.array([-bound, bound]), (count, length))
        expected = vectors.sum(0)
        results = []
        for key in keys[most, bound]:
            terms = Agreement(
                run=key.run,
                round=case,
                length=length,
                value_bound=bound,
                cohort=tuple(NAMES[:most]),
                fewest=1,
            )
            clients = [EncryptedClient(key, terms, person, roster=NAMES) for person in PEOPLE[:count]]
            results.append(one_sum(Accumulator(key.public_bundle(), terms, roster=NAMES), clients, vectors))
        results.append(
            one_sum(
                WordAccumulator(terms, "plain"), [PlainClient(terms, each) for each in NAMES[:count]], vectors
            )
        )
        masking = [
            MaskingClient(
                terms, name, mask=pairwise(index, count, case), open_sum=lambda words, parties: words
            )
            for index, name in enumerate(NAMES[:count])
        ]
        results.append(one_sum(WordAccumulator(terms, "masking"), masking, vectors))
        differing += not all(result.dtype == np.int64 and (result == expected).all() for result in results)
    return {"cases": cases, "differing": differing, "seed": 0}


def wrapping() -> dict[str, float]:
    """Measure the cost of giving the key to one more client."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from defenses.he import KeyRequest

    random = RandomSource.system()
    parameters = choose("bfv", parties=PARTIES, value_bound=BOUND)
    started = time.process_time()
    key = KeyHolder.generate(parameters, random=random)
    generated = time.process_time()
    sender, recipient = (Ed25519PrivateKey.generate() for _ in range(2))
    roster = [each.public_key().public_bytes_raw() for each in (sender, recipient)]
    asked = KeyRequest(recipient, run=key.run, random=random)
    wrapped = key.wrap_for(asked.offer, identity=sender, roster=roster, random=random)
    asked.unwrap(wrapped, holder=roster[0], parameters=parameters)
    return {
        "generate_cpu_ms": round((generated - started) * 1e3, 2),
        "offer_wrap_unwrap_cpu_ms": round((time.process_time() - generated) * 1e3, 2),
        "wrapped_bytes": len(wrapped),
        "public_bundle_bytes": len(key.public_bundle()),
    }


def main() -> None:
    """Print the tables, then the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run: fewer parameters, repeats and cases"
    )
    parser.add_argument(
        "--json", action="store_true", help="kept for uniformity; the JSON object is always printed"
    )
    quick = parser.parse_args().quick
    usable, reason = available()
    if not usable:
        print(reason)
        print(json.dumps({"benchmark": "he", "skipped": reason}))
        return
    length, repeats = (100_000, 1) if quick else (1_000_000, 3)
    vectors = np.random.default_rng(0).integers(-BOUND, BOUND + 1, (ADDED, length))
    vectors[:, 0], vectors[:, 1] = BOUND, -BOUND
    measurements: dict[str, Measurement | Reference] = {
        name: Measurement(parameters, vectors) for name, parameters in sets().items()
    }
    measurements[REFERENCE] = Reference(vectors)
    for _ in range(repeats):
        for measurement in measurements.values():
            measurement.run()
    rows = {name: measurement.row() for name, measurement in measurements.items()}
    print(
        f"{PARTIES} parties agreed, {ADDED} added, |x| <= {BOUND}; CPU seconds per 1 M parameters, one thread"
    )
    print(
        f"{'parameter set':<52} {'B/par up':>8} {'down':>6} {'enc+save':>8} {'load':>6} {'add':>6} "
        f"{'decrypt':>7} {'max error':>9} {'bound':>8}"
    )
    for name, row in rows.items():
        print(
            f"{name:<52} {row['bytes_per_parameter_up']:8.2f} {row['bytes_per_parameter_down']:6.2f} "
            f"{row['cpu_s_encrypt_save']:8.3f} {row['cpu_s_load']:6.3f} {row['cpu_s_add']:6.3f} "
            f"{row['cpu_s_decrypt']:7.3f} {row['max_error_before_rounding']:9.2g} "
            f"{row['error_bound'] or 0:8.2g}"
        )
    agreement = agreement_of_backends(100 if quick else 1000)
    keys = wrapping()
    print(f"four backends on {agreement['cases']} random cases: {agreement['differing']} sums differ")
    print(f"key: {keys}")
    ours = rows["BFV, packed, seeded (ours)"]
    reference = rows[REFERENCE]
    result = {
        "benchmark": "he",
        "format": 1,
        "quick": quick,
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "tenseal": reason,
            "python": platform.python_version(),
        },
        "parameters": length,
        "rows": rows,
        "backends": agreement,
        "key": keys,
        "ratios": {
            "reference_bytes_over_ours": reference["bytes_per_parameter_up"] / ours["bytes_per_parameter_up"],
            "reference_encrypt_over_ours": reference["cpu_s_encrypt_save"] / ours["cpu_s_encrypt_save"],
        },
        "targets": {
            "bfv_bytes_per_parameter <= 4.0": ours["bytes_per_parameter_up"] <= 4.0,
            "bfv_encrypt_save_cpu_s <= 0.25": ours["cpu_s_encrypt_save"] <= 0.25,
            "all sums exact": all(row.get("exact", True) for row in rows.values())
            and agreement["differing"] == 0,
        },
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
