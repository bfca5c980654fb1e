"""Choose rate and replay of `benchmarks.continual` by the head alone, on rows its LoRA runs do not use.

    python -m benchmarks.continual_choice ../shared --cache FOLDER --out docs/results/continual-steps.md

Gradients of a head on fixed features are cut to the bound, added up and noised as a round of the product does
it, but in one place and with normal noise; nothing here is released. The noise of each row of the table is
that of the product's own plan.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.continual import ADAM, CLASSES, CLIENTS, DOMAINS, SETTINGS_LORA, domains_of, lora_config
from benchmarks.heads import Part
from ffm_secure.lifecycle.stream_measures import measures
from ffm_secure.privacy.calibration import calibrate
from ffm_secure.records import StreamMeasures

RATES, REPLAYS, DRAWS = (0.005, 0.01, 0.02, 0.03, 0.1), (0.0, 0.2), 3
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


@dataclass(slots=True)
class Adam:
    """The server's Adam with the noise taken out, on one head [classes, width + 1]."""

    weight: Tensor
    mean: Tensor
    square: Tensor
    noise: float = 0.0
    rounds: int = 0

    def step(self, change: Tensor, variance: float, rate: float) -> None:
        """Take one step along a mean gradient whose numbers have noise of a known variance."""
        momentum, beta2 = ADAM["momentum"], ADAM["beta2"]
        self.rounds += 1
        self.mean = momentum * self.mean + (1 - momentum) * change
        self.square = beta2 * self.square + (1 - beta2) * change.square()
        self.noise = beta2 * self.noise + (1 - beta2) * variance
        signal = (self.square - self.noise) / (1 - beta2**self.rounds)
        direction = self.mean / (1 - momentum**self.rounds) / signal.clamp_min(ADAM["tau"] ** 2).sqrt()
        self.weight = self.weight - rate * direction


def bounded_sum(weight: Tensor, part: Part, rate: float) -> Tensor:
    """Return the sum of gradients of a sample of rows, each cut to length 1."""
    count = round(rate * len(part.labels))
    chosen = np.random.default_rng().permutation(len(part.labels))[:count]
    features = torch.cat([part.features[chosen].float(), torch.ones(count, 1)], dim=1)
    errors = torch.softmax(features @ weight.T, dim=1)
    errors[torch.arange(count), torch.from_numpy(part.labels[chosen])] -= 1.0
    lengths = errors.norm(dim=1) * features.norm(dim=1)
    return (errors / lengths.clamp(min=1.0)[:, None]).T @ features


def play(parts: Sequence[tuple[Part, Part]], rate: float, replay: float, noise: float) -> StreamMeasures:
    """Play a stream and return what is measured, the domain of a row unknown."""
    batch, rounds = CLIENTS * int(SETTINGS_LORA["batch"]), int(SETTINGS_LORA["rounds"])
    empty = torch.zeros(CLASSES, parts[0][0].features.shape[1] + 1)
    server = Adam(weight=empty, mean=empty, square=empty)
    rows = [[0.0] * len(parts)]
    for stage, (learned, _) in enumerate(parts):
        for _ in range(rounds):
            total = noise * torch.randn_like(empty)
            total += bounded_sum(server.weight, learned, min(1.0, batch / len(learned.labels)))
            for earlier, _ in parts[:stage]:
                total += bounded_sum(server.weight, earlier, replay * min(1.0, batch / len(earlier.labels)))
            server.step(total / batch, (noise / batch) ** 2, rate)
        rows.append([accuracy(server.weight, tested) for _, tested in parts])
    return measures(rows)


def accuracy(weight: Tensor, part: Part) -> float:
    """Return the share right among all classes."""
    features = torch.cat([part.features.float(), torch.ones(len(part.labels), 1)], dim=1)
    return float((features @ weight.T).argmax(dim=1).eq(torch.from_numpy(part.labels)).float().mean())


HEAD = """# Steps over five domains, by the head alone

The stream of [continual learning](continual.md), learned by a linear head on fixed features: {rounds}
rounds a domain, one step of {batch} rows of each of ten clients, gradients cut to 1 a record, Adam with the
noise taken out on the server, and the noise that the product's plan asks for at a lifetime epsilon of 8:
naive, and with a fifth of every domain's rows replayed at the rate of new ones, where a row of the first
domain that stays pays in all five. A simulation in one place with normal noise: nothing is released. Rows are
training rows outside those a LoRA run of the stream learns from, a quarter of them to look at. The domain of
a row is unknown, 108 classes; every draw.

Made by `python -m benchmarks.continual_choice ../shared --cache FOLDER --out docs/results/continual-steps.md`

| learning rate | | noise x clip | average accuracy | forgetting | backward transfer |
|---|---|---|---|---|---|
"""
MEASURES = ("average", "forgetting", "backward")


def main() -> None:
    """Try every setting, some draws each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    domains = domains_of(asked.shared, asked.cache)
    parts = [outside(one.train, case.rows, 1) for one, case in zip(domains, DOMAINS, strict=True)]
    lines = []
    for replay in REPLAYS:
        mechanism = calibrate(lora_config(replay), size=53_868, public_client_size=NOMINAL)
        noise, name = mechanism.noise_multiplier, "replay" if replay else "naive"
        for rate in RATES:
            draws = [play(parts, rate, replay, noise) for _ in range(DRAWS)]
            figures = (
                [getattr(one, what) for one in draws] for what in ("average", "forgetting", "backward")
            )
            cells = " | ".join(", ".join(f"{value:.3f}" for value in values) for values in figures)
            lines.append(f"| {rate:g} | {name} | {noise:.3f} | {cells} |")
            print(lines[-1], flush=True)
    asked.out.write_text(HEAD.format(**SETTINGS_LORA) + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
