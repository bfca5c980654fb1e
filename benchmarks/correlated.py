"""Measure what noise with a memory gains over independent noise of the same price.

    python -m benchmarks.correlated [--quick] [--json]

Clients learn by turns, each in one round of `separation`; both noises keep the whole run at epsilon 8, delta
1e-5 for one client. What a model is made of are prefix sums of the rounds: their noise is drawn from the
streams that sites use, and its deviation set against that of independent noise. "at once" is every client
in every round with independent noise, in the same sum of updates. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import platform

import numpy as np

from defenses.dp import BandedShares, GaussianEvent, NoiseStream, smallest_multiplier
from defenses.random_source import RandomSource

EPSILON, DELTA, LEVELS, COORDINATES = 8.0, 1e-5, 2.0**19, 2_000
SETTINGS = ((16, 2), (32, 4), (64, 8), (128, 16), (128, 32))


def banded(multiplier: float, separation: int, coordinates: int = 1) -> BandedShares:
    """Return the noise of one honest site that holds all of it."""
    return BandedShares(
        noise_multiplier=multiplier,
        l2_sensitivity=LEVELS,
        honest_survivors=1,
        separation=separation,
        dimension=coordinates,
    )


def independent(multiplier: float) -> GaussianEvent:
    """Return the price of one turn under noise without a memory."""
    return GaussianEvent(
        unit="client",
        adjacency="zero_out",
        sampling="full",
        sampling_rate=1.0,
        noise_multiplier=multiplier,
        steps=1,
        clip_norm=1.0,
        release="turn",
    )


def prefix_deviations(shares: BandedShares, rounds: int) -> np.ndarray:
    """Return the deviation of every prefix sum, [rounds], over the bound on one client."""
    stream, total, deviations = NoiseStream(shares, RandomSource.system()), 0.0, []
    for number in range(1, rounds + 1):
        total = total + np.rint(stream.row(number))
        deviations.append(float(np.std(total)) / LEVELS)
    return np.array(deviations)


def compare(rounds: int, separation: int, coordinates: int) -> dict[str, float]:
    """Return root-mean-square and last deviations of both noises."""
    turns = math.ceil(rounds / separation)
    with_memory = smallest_multiplier(
        lambda noise: banded(noise, separation).event("turn", clip_norm=1.0),
        epsilon=EPSILON,
        delta=DELTA,
        count=turns,
    )
    without = smallest_multiplier(independent, epsilon=EPSILON, delta=DELTA, count=turns)
    at_once = smallest_multiplier(independent, epsilon=EPSILON, delta=DELTA, count=rounds)
    deviations = prefix_deviations(banded(with_memory, separation, coordinates), rounds)
    steps = np.sqrt(np.arange(1, rounds + 1))
    return {
        "rounds": rounds,
        "separation": separation,
        "banded": float(np.sqrt(np.mean(deviations**2))),
        "independent": float(without * np.sqrt(np.mean(steps**2))),
        "banded_last": float(deviations[-1]),
        "independent_last": float(without * steps[-1]),
        "all_at_once_last": float(at_once * steps[-1] / separation),
    }


def main() -> None:
    """Print the table, then one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer coordinates, the two smallest settings")
    parser.add_argument("--json", action="store_true", help="kept for symmetry: JSON is always the last line")
    options = parser.parse_args()
    rows = []
    print(
        "| rounds | separation | independent | with a memory | gain | last: independent | memory | at once |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for rounds, separation in SETTINGS[: 2 if options.quick else None]:
        row = compare(rounds, separation, 200 if options.quick else COORDINATES)
        rows.append(row)
        print(
            f"| {rounds} | {separation} | {row['independent']:.3f} | {row['banded']:.3f} | "
            f"{row['independent'] / row['banded']:.2f} | {row['independent_last']:.3f} | "
            f"{row['banded_last']:.3f} | {row['all_at_once_last']:.3f} |",
            flush=True,
        )
    print(json.dumps({"benchmark": "correlated", "machine": platform.machine(), "rows": rows}))


if __name__ == "__main__":
    main()
