"""Measure the ten-line private loop beside the plain loop and beside a federated run with one site.

    python -m benchmarks.alone [--rounds N] [--repeats N] [--json]

Clinic notes, MiniLM with rank-2 LoRA and a head, batches of 64 notes of 32 tokens, SGD. The three start from
the same numbers and take as many steps with the same rate, bound and noise (epsilon 8 at delta 1e-5); the two
private ones from several seeds. Accuracy is of the same public rows. Seconds are of one thread of the
processor. The plain loop and the private one take turns step by step in one process; the ratio is of their
sums, and its span that of blocks of ten steps. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from defenses.dp import PerSampleEngine, RecordMechanism, epsilon
from defenses.random_source import RandomSource
from ffm_secure.api import Run
from ffm_secure.config import run_file
from ffm_secure.engines import simulation
from ffm_secure.tasks.base import Task
from ffm_secure.tasks.encoded import Encoded

LOCAL_STEPS, BATCH, RATE, BLOCK = 5, 64, 0.5, 10
TARGET = 1.1


def table(rounds: int, seed: int) -> dict[str, Any]:
    """Return the federated run with one site."""
    steps = {"local_steps": LOCAL_STEPS, "batch_size": BATCH, "learning_rate": RATE}
    return {
        "format": 1,
        "name": "one-site",
        "seed": seed,
        "task": {
            "kind": "text_classification",
            "data": "builtin:clinic_notes?size=8000&validation=300",
            "clients": 1,
            "max_length": 32,
            "evaluation_examples": 300,
        },
        "model": {"name": "builtin:minilm", "trainable": {"kind": "lora", "rank": 2}},
        "federation": {
            "rounds": rounds,
            "cohort": 1,
            "evaluate_every": rounds,
            "lifecycle": {"kind": "finetune", **steps},
        },
        "privacy": {"ledger": "run", "unit": "record", "epsilon": 8.0, "delta": 1e-5, "clip_norm": 0.5},
        "protection": {"kind": "none"},
        "speed": {"threads": 1},
    }


def plain_steps(model: nn.Module, task: Task, rows: Encoded) -> Iterator[None]:
    """Take steps of an ordinary loop: shuffled batches, mean loss, SGD."""
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=RATE)
    draw = np.random.default_rng(0)
    while True:
        batch = task.batch(rows, draw.choice(len(rows), BATCH, replace=False), device="cpu")
        optimizer.zero_grad()
        task.losses(model, batch).mean().backward()
        optimizer.step()
        yield


def private_steps(model: nn.Module, task: Task, rows: Encoded, mechanism: RecordMechanism) -> Iterator[None]:
    """Take the steps of the page on DP-SGD alone."""
    engine, run, source = PerSampleEngine(model), mechanism.start(), RandomSource.system()
    optimizer = torch.optim.SGD(engine.parameters.values(), lr=RATE)
    for _ in range(mechanism.steps):
        places = run.sample(len(rows), source)
        total = engine.empty(run.bound)
        if len(places):
            batch = task.batch(rows, places, device="cpu")
            total = engine.clipped_sum(partial(task.losses, model, batch), clip=run.bound)
        for name, gradient in run.privatise(total, source).items():
            engine.parameters[name].grad = gradient.to(engine.parameters[name].dtype)
        optimizer.step()
        yield


def seconds_of(step: Callable[[], object]) -> float:
    """Return the processor's seconds of one step."""
    began = time.process_time()
    step()
    return time.process_time() - began


def federated(rounds: int, seed: int) -> tuple[float, float, float]:
    """Return accuracy, epsilon and the processor's seconds of the federated run with one site."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        result = Run(run_file.from_table(table(rounds, seed)), runs=Path(folder)).start()
        return result.metric, result.epsilon, time.process_time() - began


def loops(rounds: int, seed: int, *, beside_plain: bool) -> dict[str, Any]:
    """Run the private loop, step by step in turns with the plain one where asked."""
    with tempfile.TemporaryDirectory() as folder:
        config = run_file.from_table(table(rounds, seed))
        ready = simulation.build(simulation.prepare(config, Path.cwd()), Path(folder) / "run")
        task, model = ready.prepared.task, ready.trainable.model
        rows, evaluation = task.encode(ready.prepared.dataset.train), ready.server.evaluation
        level = ready.spec.mechanism.record_level
    assert level is not None
    mechanism = replace(level, steps=rounds * LOCAL_STEPS)
    models = {"private": model.train()}
    steps = {"private": partial(next, private_steps(model, task, rows, mechanism))}
    if beside_plain:
        models["plain"] = copy.deepcopy(model)
        steps["plain"] = partial(next, plain_steps(models["plain"], task, rows))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for place in range(mechanism.steps):
        for name in sorted(steps, reverse=bool(place % 2)):
            seconds[name].append(seconds_of(steps[name]))
    accuracy = {name: task.evaluate(one, evaluation).metric for name, one in models.items()}
    return {"seconds": seconds, "accuracy": accuracy, "mechanism": mechanism}


def measure(rounds: int, repeats: int) -> dict[str, Any]:
    """Run all three and return every figure."""
    torch.set_num_threads(1)
    alone, together = [], []
    first = loops(rounds, 7, beside_plain=True)
    for seed in range(7, 7 + repeats):
        loop = first if seed == 7 else loops(rounds, seed, beside_plain=False)
        alone.append(loop["accuracy"]["private"])
        together.append(federated(rounds, seed))
    seconds, mechanism = first["seconds"], first["mechanism"]
    blocks = []
    for start in range(0, mechanism.steps - BLOCK + 1, BLOCK):
        part = slice(start, start + BLOCK)
        blocks.append(sum(seconds["private"][part]) / sum(seconds["plain"][part]))
    return {
        "steps": mechanism.steps,
        "noise_multiplier": mechanism.noise_multiplier,
        "epsilon_loop": epsilon([mechanism.event("a loop")], 1e-5).epsilon,
        "epsilon_federated": together[0][1],
        "accuracy_plain": first["accuracy"]["plain"],
        "accuracy_loop": alone,
        "accuracy_federated": [accuracy for accuracy, _, _ in together],
        "seconds_plain": sum(seconds["plain"]) / mechanism.steps,
        "seconds_private": sum(seconds["private"]) / mechanism.steps,
        "ratio": sum(seconds["private"]) / sum(seconds["plain"]),
        "ratio_blocks": [min(blocks), max(blocks)],
        "seconds_federated": together[0][2],
        "target": TARGET,
    }


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    figures = measure(chosen.rounds, chosen.repeats)
    if not chosen.json:
        for name, value in figures.items():
            print(f"{name:<24} {value}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
