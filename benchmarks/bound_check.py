"""What a bound on every client under masks would cost: a check by random projections beside proofs.

    python -m benchmarks.bound_check --out docs/results/bound-under-masks.md

CPU seconds of one process, the least of five. Proofs are priced by their cheapest part, one scalar
multiplication a number (RoFL, arXiv:2107.03311, commits to every number; a range proof comes on top), and by
a tenth of that for proofs with one multi-exponentiation over all numbers (ACORN, USENIX Security 2023).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from defenses.random_source import RandomSource
from defenses.secagg import Mask, add_masks, ring
from ffm_secure.privacy.mechanism import MechanismOutput
from ffm_secure.protection.codec import real_codec

NUMBERS, BUCKETS, GROUP, TRIALS = 1_000_000, 1024, 3, 400
Vector = NDArray[np.float64]


def least_seconds(work: Callable[[], object]) -> float:
    """Return the least CPU time of five calls."""
    times = []
    for _ in range(5):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return min(times)


def sketch(values: Vector, seed: int) -> Vector:
    """Return BUCKETS random signed sums of values [d]: linear, and of about the same length.

    Source: Charikar et al. 2002 (Count-Sketch); its squared length is unbiased, with variance 2 / BUCKETS.
    """
    words = np.random.Generator(np.random.SFC64(seed)).integers(0, 2 * BUCKETS, len(values), dtype=np.uint16)
    signed = np.where(words & 1, values, -values)
    return np.bincount(words >> 1, weights=signed, minlength=BUCKETS)


def costs() -> dict[str, float]:
    """Return seconds for NUMBERS numbers: masks of a group of three, the projections, one commitment each."""
    generator = np.random.default_rng(1)
    words = generator.integers(0, 1 << 24, NUMBERS, dtype=np.uint32)
    values = generator.normal(size=NUMBERS)
    masks = [Mask(bytes([place]) * 32, 1) for place in range(GROUP)]
    key, other = X25519PrivateKey.generate(), X25519PrivateKey.generate().public_key()
    one = least_seconds(lambda: [key.exchange(other) for _ in range(500)]) / 500
    return {
        "masks alone": least_seconds(lambda: add_masks(words, masks)),
        "rounding, masks and packing": least_seconds(lambda: _sealed(values, masks)),
        "random projections": least_seconds(lambda: sketch(values, 7)),
        "one multi-exponentiation": one * NUMBERS / 10,
        "a commitment a number": one * NUMBERS,
    }


def _sealed(values: Vector, masks: list[Mask]) -> bytes:
    """Do all that a client's own update needs before it is sent."""
    codec = real_codec(
        size=NUMBERS, clients=GROUP, value_bits=20, bound=8.0, max_weight=1, carries_loss=False
    )
    update = MechanismOutput(values=values, loss=0.0, weight=1)
    vector = codec.quantise(update, source=RandomSource.seeded(1))
    add_masks(vector, masks)
    return ring.pack(vector, codec.modulus_bits)


def detection(size: int = 20_000) -> dict[str, float]:
    """Return how often groups of three are refused: honest, with a too long update told true, and with a lie.

    Updates with their noise are as long as the bound; a sketch is too long beyond 1.25 times that, and a
    group lies where its sketches do not add up to the sketch of its opened sum.
    """
    generator, bound = np.random.default_rng(2), 2.0**0.5
    counts = {"honest": 0, "told true": 0, "lied about": 0}
    for trial in range(TRIALS):
        honest = generator.normal(size=(GROUP, size)) * (bound / size**0.5)
        seed = 1000 + trial
        true = [sketch(update, seed) for update in honest]
        counts["honest"] += _refused(true, sketch(honest.sum(axis=0), seed), bound)
        large = honest.copy()
        large[0] *= 1.5
        claimed = [sketch(update, seed) for update in large]
        opened = sketch(large.sum(axis=0), seed)
        counts["told true"] += _refused(claimed, opened, bound)
        counts["lied about"] += _refused(true, opened, bound)
    return {name: count / TRIALS for name, count in counts.items()}


def _refused(claimed: list[Vector], opened: Vector, bound: float) -> bool:
    too_long = any(float(np.linalg.norm(one)) > 1.25 * bound for one in claimed)
    return too_long or not np.allclose(np.sum(claimed, axis=0), opened, atol=1e-6)


PAGE = """# A bound on every client, under masks

Under masks the server checks opened sums, so one client has the room of all in its sum. Could every
client's own L2 norm be held, at less than five times the cost of masking? For {numbers:,} numbers in
groups of {group}:

| | CPU seconds of a client | times the masks alone | times all of sealing |
|---|---|---|---|
{rows}

**Proofs** of a bound for sealed vectors cost group operations for every number: more than a thousand
times the masks where one multi-exponentiation serves all numbers, ten times that where each is committed
to (RoFL). Shared proofs between two servers that do not collude (PINE) are cheaper; there is one server
here. They are not built.

**Random projections** would be cheap enough to think of. After the masked uploads are in, the server
draws a seed, and every client sends {buckets:,} signed sums of its own vector ({bytes:,} bytes). They are
linear: those of a group must add up to those of its opened sum, which nobody can aim at before the seed
is known. And they are about as long as the vector: one that is too long shows its sender. In {trials}
groups each:

| | refused |
|---|---|
{shares}

An update with 1.5 times the bound is refused, whether its sender tells the truth (it is named) or lies
(the group is refused). Two attackers can only move between themselves what both were allowed.

**Why it is not built.** Beside the masks alone it is at the limit of five times, beside all that
sealing an update
takes it is not. The projections are about one client. Where every update is private by itself (record or
person unit with noise at every site) they are post-processing and cost nothing; with noise in shares, or
under the client unit, they would need noise and a charge of their own, and without a unit they give away
{buckets:,} numbers of an update that masks were to hide. So the check is sound for the first case alone,
and it needs a stage after the upload in every protection, in which a site still holds what it sent. What
is there is the bound on every opened sum, in small groups (`protection.groups`).

Made by `python -m benchmarks.bound_check --out docs/results/bound-under-masks.md`.
"""


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    seconds = costs()
    masks, sealing = seconds["masks alone"], seconds["rounding, masks and packing"]
    rows = []
    for name, value in seconds.items():
        rows.append(f"| {name} | {value:.3g} | {value / masks:.3g} | {value / sealing:.2g} |")
    shares = [f"| {name} | {share:.1%} |" for name, share in detection().items()]
    page = PAGE.format(
        numbers=NUMBERS,
        group=GROUP,
        buckets=BUCKETS,
        bytes=4 * BUCKETS,
        trials=TRIALS,
        rows="\n".join(rows),
        shares="\n".join(shares),
    )
    asked.out.write_text(page)
    print("\n".join([*rows, *shares]))


if __name__ == "__main__":
    main()
