"""Measure how fast cryptographic noise is drawn, beside the usual non-cryptographic samplers.

    python -m benchmarks.noise [--quick] [--json]

Millions of samples per CPU second of one thread, best of the repeats. "released" adds the noise to a vector
and rounds to the public grid. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable

import numpy as np
import torch

from defenses.dp.discrete import discrete_gaussian, skellam
from defenses.dp.noise import add_gaussian, gaussian
from defenses.dp.sampling import poisson_sample
from defenses.random_source import RandomSource

Draw = Callable[[int], object]


def rows() -> dict[str, Draw]:
    """Name what is measured; each takes the number of samples."""
    source = RandomSource.system()
    usual = np.random.default_rng(0)
    buffer = np.empty(1 << 14, dtype=np.int64)

    def words(count: int) -> None:
        for _ in range(count // len(buffer)):
            source.fill(buffer)

    return {
        "Gaussian": lambda n: gaussian(n, std=1.0, source=source),
        "Gaussian, released (added and rounded)": lambda n: add_gaussian(
            torch.zeros(n), std=1.0, source=source
        ),
        "Skellam, variance 1e2": lambda n: skellam(n, variance=1e2, source=source),
        "Skellam, variance 1e8": lambda n: skellam(n, variance=1e8, source=source),
        "Skellam, variance 1e12": lambda n: skellam(n, variance=1e12, source=source),
        "discrete Gaussian, sigma 10": lambda n: discrete_gaussian(n, sigma=10.0, source=source),
        "discrete Gaussian, sigma 1e6": lambda n: discrete_gaussian(n, sigma=1e6, source=source),
        "Poisson sampling, rate 0.01 (records)": lambda n: poisson_sample(n, rate=0.01, source=source),
        "raw AES-256-CTR words": words,
        "not cryptographic: torch.randn": lambda n: torch.randn(n),
        "not cryptographic: numpy standard_normal": lambda n: usual.standard_normal(n),
        "not cryptographic: numpy Skellam, variance 1e8": lambda n: (
            usual.poisson(5e7, n) - usual.poisson(5e7, n)
        ),
    }


def speed(draw: Draw, count: int, repeats: int) -> float:
    """Return millions of samples per CPU second."""
    draw(1 << 14)
    best = 0.0
    for _ in range(repeats):
        start = time.process_time()
        draw(count)
        best = max(best, count / (time.process_time() - start) / 1e6)
    return best


def main() -> None:
    """Print the table, then one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer samples")
    parser.add_argument("--json", action="store_true", help="kept for symmetry: JSON is always the last line")
    options = parser.parse_args()
    torch.set_num_threads(1)
    count, repeats = (1 << 20, 2) if options.quick else (1 << 23, 5)
    result = {}
    print(f"{'sampler':48} {'million/s':>10}")
    for name, draw in rows().items():
        result[name] = speed(draw, count, repeats)
        print(f"{name:48} {result[name]:10.1f}", flush=True)
    print(json.dumps({"benchmark": "noise", "machine": platform.machine(), "million_per_second": result}))


if __name__ == "__main__":
    main()
