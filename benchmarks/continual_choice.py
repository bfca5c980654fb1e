"""Choose rate and replay of `benchmarks.continual` by the head alone, on rows no figure is taken from.

    python -m benchmarks.continual_choice ../shared --cache FOLDER

Gradients of a head on fixed features are cut to the bound, added up and noised as a round of the product does
it, but in one place and with normal noise; nothing here is released. The noise of each row of the table is
that of the product's own plan.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.continual import CLASSES, CLIENTS, DOMAINS, SETTINGS_LORA, domains_of, lora_config
from benchmarks.heads import Part
from ffm_secure.lifecycle.stream_measures import measures
from ffm_secure.privacy.mechanism import calibrate

RATES, REPLAYS = (2.0, 8.0, 30.0), ((0.0, 1.0), (0.2, 1.0), (0.2, 0.5), (0.5, 0.5))
NOMINAL = 1320


def outside(part: Part, rows: int, seed: int) -> tuple[Part, Part]:
    """Return rows to learn from and rows to look at, none of them among the rows of the page's runs."""
    order = np.random.default_rng(7).permutation(len(part.labels))[rows:]
    order = np.random.default_rng(seed).permutation(order)
    tested = order[: len(order) // 4]
    learned = order[len(order) // 4 :]
    return (
        Part(features=part.features[learned], labels=part.labels[learned]),
        Part(features=part.features[tested], labels=part.labels[tested]),
    )


def step(weight: Tensor, parts: Sequence[tuple[Part, int]], noise: float, rate: float, batch: int) -> Tensor:
    """Return a head after one round: bounded gradients of a sample of each part, added up and noised."""
    total = noise * torch.randn_like(weight)
    for part, count in parts:
        chosen = np.random.default_rng().permutation(len(part.labels))[:count]
        ones = torch.ones(len(chosen), 1)
        features = torch.cat([part.features[chosen].float(), ones], dim=1)
        errors = torch.softmax(features @ weight.T, dim=1)
        errors[torch.arange(len(chosen)), torch.from_numpy(part.labels[chosen])] -= 1.0
        lengths = errors.norm(dim=1) * features.norm(dim=1)
        total += (errors / lengths.clamp(min=1.0)[:, None]).T @ features
    return weight - rate * total / batch


def play(parts: Sequence[tuple[Part, Part]], rate: float, replay: float, ratio: float, noise: float) -> None:
    """Play a stream and print what is measured."""
    batch, rounds = CLIENTS * int(SETTINGS_LORA["batch"]), int(SETTINGS_LORA["rounds"])
    weight = torch.zeros(CLASSES, parts[0][0].features.shape[1] + 1)
    rows = [[0.0] * len(parts)]
    for stage, (learned, _) in enumerate(parts):
        again = [(earlier, round(batch * replay * ratio)) for earlier, _ in parts[:stage]] if replay else []
        for _ in range(rounds):
            weight = step(weight, [(learned, batch), *again], noise, rate, batch)
        rows.append([accuracy(weight, tested) for _, tested in parts])
    measured = measures(rows)
    print(
        f"{rate:5g} {replay:4g} {ratio:4g} {noise:.3f}", measured, [round(x, 2) for x in rows[-1]], flush=True
    )


def accuracy(weight: Tensor, part: Part) -> float:
    """Return the share right among all classes."""
    features = torch.cat([part.features.float(), torch.ones(len(part.labels), 1)], dim=1)
    return float((features @ weight.T).argmax(dim=1).eq(torch.from_numpy(part.labels)).float().mean())


def main() -> None:
    """Try every setting once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--cache", type=Path, required=True)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    domains = domains_of(asked.shared, asked.cache)
    parts = [outside(one.train, case.rows, 1) for one, case in zip(domains, DOMAINS, strict=True)]
    for replay, ratio in REPLAYS:
        config = lora_config(replay)
        stream = replace(config.task.stream, replay_rate=ratio)
        config = replace(config, task=replace(config.task, stream=stream))
        mechanism = calibrate(config, size=80_000, public_client_size=NOMINAL)
        for rate in RATES:
            play(parts, rate, replay, ratio, mechanism.noise_multiplier)


if __name__ == "__main__":
    main()
