"""Measure what each attack reads from each kind of update, by batch size, beside guessing and under noise.

    python -m benchmarks.attacks [--quick] [--assets ../shared] [--peer PYTHON] [--json]

A cell is one attack on one update type at one batch size: the mean score over seeds with its bootstrap interval, the
score of guessing, how many runs beat guessing clearly, and CPU seconds. Models are built in code; with --assets also the
small trained models and data kept beside the repository. With --peer, the interpreter of an environment that holds
breaching 0.1.2, inverting gradients run side by side on the same gradients, interleaved. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from attacks import Budget, Knowledge, Observation, Prior
from attacks.command import load_model
from attacks.inversion import active
from attacks.metrics import bootstrap_interval
from attacks.registry import build
from attacks.scoring import score
from attacks.truth import Truth
from benchmarks import attacks_peer
from tests.attacks import models

UPDATES = ("gradient", "delta, SGD, 2 steps", "delta, AdamW, 1 step", "sum of 4 clients", "noised, z = 1")
RATE, CLIENTS = 0.01, 4


@dataclass(frozen=True, kw_only=True)
class Data:
    """A model and examples (token_ids or images, labels) it may be trained on; `names` are those the model takes."""

    model: Callable[[], nn.Module]
    inputs: Tensor
    labels: Tensor
    classes: int
    image: bool
    prior: Prior = Prior()
    generative: bool = False

    def batch(self, count: int, seed: int) -> dict[str, Tensor]:
        """Draw `count` examples."""
        chosen = torch.randperm(len(self.inputs), generator=torch.Generator().manual_seed(seed))[:count]
        if self.image:
            return {"images": self.inputs[chosen], "labels": self.labels[chosen]}
        return {"input_ids": self.inputs[chosen], "labels": (self.inputs if self.generative else self.labels)[chosen]}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Return the client's loss."""
        return (models.image_loss if self.image else models.text_loss)(model, batch)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One line of the table."""

    attack: str
    model: str
    update: str
    batch: int
    measure: str
    score: float | None
    low: float | None
    high: float | None
    guessing: float | None
    succeeded: str
    seconds: float
    reason: str = ""


def observed(data: Data, model: nn.Module, update: str, count: int, seed: int) -> tuple[Observation, Truth]:
    """Return what crosses the wire for one update type, and what it was made of."""
    draws = [data.batch(count, seed)]
    if update.startswith("sum"):
        draws = [data.batch(count, 1_000 * seed + client) for client in range(CLIENTS)]
        seen = models.observe_sum(model, draws, data.loss, batch_size=count)
    elif update.startswith("delta"):
        sgd = "SGD" in update
        draws = [data.batch(count, 1_000 * seed + step) for step in range(2 if sgd else 1)]
        facts = {"learning_rate": RATE, "optimiser": "sgd" if sgd else "adamw", "weight_decay": 0.0 if sgd else 0.01}
        seen = models.observe_delta(model, draws, data.loss, **facts)
        seen = seen.replace_tensors(seen.tensors, batch_size=count)
    else:
        seen = models.observe(model, draws[0], data.loss, batch_size=count)
        seen = models.noised(seen, 1.0, seed=seed) if update.startswith("noised") else seen
    inputs = torch.cat([draw["images" if data.image else "input_ids"] for draw in draws])
    labels = torch.cat([draw["labels"] for draw in draws])
    granted = Knowledge(
        labels=None if data.generative else tuple(labels.tolist()),
        image_shape=tuple(inputs.shape[1:]) if data.image else None,
        sequence_length=None if data.image else inputs.shape[1],
        local_epochs=1,
    )
    seen = Observation(
        kind=seen.kind,
        tensors=seen.tensors,
        contributors=seen.contributors,
        metadata=seen.metadata,
        broadcast=seen.broadcast,
        knowledge=granted,
    )
    sequences = None if data.image else tuple(tuple(row) for row in inputs.tolist())
    flat = None if data.generative else tuple(labels.tolist())
    return seen, Truth(sequences=sequences, images=inputs if data.image else None, labels=flat, classes=data.classes)


def cell(attack: str, name: str, data: Data, update: str, count: int, seeds: int, budget: Budget) -> Cell:
    """Run one attack on `seeds` updates and score it."""
    runs, reason = [], ""
    for seed in range(seeds):
        model = data.model()
        seen, truth = observed(data, model, update, count, seed)
        found = build(attack).run(seen, model, data.prior, budget, seed)
        result = score(found, truth) if found.applicable else None
        reason = reason or found.reason
        runs.append((found, result))
    scored = [result for _, result in runs if result is not None]
    interval = bootstrap_interval([result.value for result in scored]) if scored else None
    return Cell(
        attack=attack,
        model=name,
        update=update,
        batch=count,
        measure=scored[0].measure if scored else "",
        score=None if interval is None else interval.value,
        low=None if interval is None else interval.low,
        high=None if interval is None else interval.high,
        guessing=sum(result.baseline for result in scored) / len(scored) if scored else None,
        succeeded=f"{sum(result.succeeded for result in scored)}/{seeds}",
        seconds=sum(found.seconds for found, _ in runs) / seeds,
        reason=reason,
    )


def small(*, quick: bool) -> dict[str, tuple[Data, tuple[str, ...]]]:
    """Return the models built in code, each with the attacks that fit it."""
    images, labels = models.digits()
    pictures = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    words = models.sentences(60, 8, 500)
    halves = torch.arange(60) % 2
    digits = {"inputs": images, "labels": labels, "classes": 10, "image": True}
    text = {"inputs": words, "labels": halves, "classes": 2, "image": False}
    tall = {"inputs": pictures, "labels": torch.arange(64) % 10, "classes": 10, "image": True}

    def crafted() -> nn.Module:
        return active.craft_imprint(models.mlp(), images[600:1000], bins=64)

    def adapted() -> nn.Module:
        return models.add_lora(models.bert(vocabulary=500), 8, ("query", "value"), zero_b=False)

    found = {
        "GPT-2, 2 layers": (
            Data(model=lambda: models.gpt2(vocabulary=500, width=64, tied=False), **text),
            ("token_presence", "position_text", "span", "label_identity"),
        ),
        "network of two layers": (
            Data(model=models.mlp, **digits),
            ("linear_readout", "spear", "llg", "cocktail_party"),
        ),
        "the same behind an imprint block": (Data(model=crafted, **digits), ("imprint",)),
        "ViT, 2 layers": (Data(model=lambda: models.vit(width=64), **tall), ("position_vision",)),
    }
    if quick:
        return found
    return found | {
        "BERT, 2 layers": (
            Data(model=lambda: models.bert(vocabulary=500), **text),
            ("token_presence", "position_text", "tag", "text_matching", "lamp"),
        ),
        "BERT with LoRA of rank 8": (Data(model=adapted, **text), ("span", "text_matching")),
        "convolutions": (
            Data(model=models.cnn, **digits),
            ("dlg", "idlg", "inverting_gradients", "modern_inversion", "fedavg_unrolled", "fedavg_surrogate"),
        ),
    }


def assets(folder: Path) -> dict[str, tuple[Data, tuple[str, ...]]]:
    """Return the small trained models beside the repository, on data they were made for."""
    import pyarrow.parquet as pq

    stories, vision = folder / "models" / "llama_stories260k", folder / "models" / "vit_cifar10_546k"
    if not (stories.is_dir() and vision.is_dir()):
        return {}
    ids = torch.randint(10, 500, (60, 8), generator=torch.Generator().manual_seed(0))
    language = Data(model=lambda: load_model(stories), inputs=ids, labels=ids, classes=0, image=False, generative=True)
    rows = pq.read_table(folder / "data" / "cifar10" / "validation.parquet").slice(0, 64).to_pylist()
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.247, 0.2435, 0.2616])
    raw = torch.stack([_picture(row["image"]) for row in rows])
    pictures = (raw - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    labels = torch.tensor([int(row["label"]) for row in rows])
    return {
        "LLaMA-stories, trained": (language, ("token_presence", "span")),
        "ViT, trained on CIFAR-10": (
            Data(
                model=lambda: load_model(vision),
                inputs=pictures,
                labels=labels,
                classes=10,
                image=True,
                prior=Prior(image_mean=mean, image_std=std),
            ),
            ("position_vision", "label_identity"),
        ),
    }


def _picture(stored: Any) -> Tensor:
    """Return a stored picture as (3, height, width) in [0, 1]."""
    content = stored["bytes"] if isinstance(stored, dict) else stored
    pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """Run the whole table, printing as it goes."""
    budget = Budget(seconds=20.0 if options.quick else 60.0, iterations=60 if options.quick else 300, restarts=1)
    sizes, seeds = ((1, 4), 2) if options.quick else ((1, 2, 4, 8), 5)
    groups = small(quick=options.quick) | ({} if options.assets is None else assets(options.assets))
    print(
        f"{'attack':22} {'model':32} {'update':21} {'batch':>5} {'score':>8} {'95 %':>17} {'guess':>7} {'won':>5} {'s':>7}"
    )
    for name, (data, attacks) in groups.items():
        for attack in attacks:
            for update in UPDATES:
                for count in sizes:
                    line = cell(attack, name, data, update, count, seeds, budget)
                    _print(line)
                    yield line


def _print(line: Cell) -> None:
    start = f"{line.attack:22} {line.model:32} {line.update:21} {line.batch:5}"
    if line.score is None:
        print(f"{start} {line.reason}", flush=True)
        return
    between = f"{line.low:8.3f}-{line.high:8.3f}"
    print(
        f"{start} {line.score:8.3f} {between} {line.guessing:7.3f} {line.succeeded:>5} {line.seconds:7.2f}", flush=True
    )


def main() -> None:
    """Print the table, then one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="closed forms only, two seeds, batches of 1 and 4")
    parser.add_argument("--assets", type=Path, help="folder with the trained models and data")
    parser.add_argument("--peer", type=Path, help="Python of an environment with breaching 0.1.2")
    parser.add_argument("--only-peer", action="store_true", help="leave the table out")
    parser.add_argument("--json", action="store_true", help="kept for symmetry: JSON is always the last line")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = [] if options.only_peer else [asdict(line) for line in cells(options)]
    beside = None if options.peer is None else attacks_peer.side_by_side(options.peer, quick=options.quick)
    software = {"python": sys.version.split()[0], "torch": torch.__version__, "machine": platform.machine()}
    print(json.dumps({"benchmark": "attacks", **software, "cells": table, "side_by_side": beside}))


if __name__ == "__main__":
    main()
