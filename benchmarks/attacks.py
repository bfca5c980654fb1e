"""Measure what each attack reads from each kind of update, by batch size, beside guessing and under noise.

    python -m benchmarks.attacks [--quick] [--assets ../shared] [--peer PYTHON] [--span-peer FOLDER] [--parts
    ...] [--json]

Four parts. `table`: a cell is one attack on one update type at one batch size, the mean score over seeds
with its bootstrap interval, the score of guessing, how many runs beat guessing clearly, and CPU seconds.
`conformance`: figures known for an attack, held against a repetition. `span`: the published span check beside
ours. `peer`, with the interpreter of an environment that holds breaching 0.1.2: inverting gradients beside
ours on the same gradients. Models are built in code; with --assets also trained models and real data. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attacks import Budget, Knowledge, Observation, Prior
from attacks.inversion.tokens import vocabulary_of
from attacks.metrics import bootstrap_interval
from attacks.registry import build
from attacks.scoring import score
from attacks.truth import Truth
from benchmarks import attacks_conformance, attacks_models, attacks_peer, attacks_span, attacks_special
from benchmarks.attacks_models import Data, Group
from tests.attacks import models
from tests.attacks.cases import Case

PARTS = ("table", "conformance", "span", "peer")
RATE, CLIENTS = 0.01, 4


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


def observed(
    data: Data, model: nn.Module, update: str, count: int, seed: int
) -> tuple[Observation, Truth, Prior]:
    """Return what crosses the wire for one update type, what it was made of,
    and what the attacker is given.
    """
    steps = 2 if "SGD" in update else 1
    seeds = [seed] if not update.startswith(("sum", "delta")) else [
        1_000 * seed + part for part in range(CLIENTS if update.startswith("sum") else steps)
    ]  # fmt: skip
    chosen = [data.chosen(count, draw) for draw in seeds]
    draws = [data.rows(places) for places in chosen]
    if data.dropout is not None:
        torch.manual_seed(seed)
        model.train()
    if update.startswith("sum"):
        observation = models.observe_sum(model, draws, data.loss, batch_size=count)
    elif update.startswith("delta"):
        sgd = "SGD" in update
        facts = {
            "learning_rate": RATE,
            "optimiser": "sgd" if sgd else "adamw",
            "weight_decay": 0.0 if sgd else 0.01,
        }
        observation = models.observe_delta(model, draws, data.loss, **facts)
        observation = observation.replace_tensors(observation.tensors, batch_size=count)
    else:
        observation = models.observe(model, draws[0], data.loss, batch_size=count)
        observation = (
            models.noised(observation, 1.0, seed=seed) if update.startswith("noised") else observation
        )
    model.eval()
    inputs = torch.cat([draw["images" if data.image else "input_ids"] for draw in draws])
    labels = torch.cat([draw["labels"] for draw in draws])
    granted = Knowledge(
        labels=None if data.generative else tuple(labels.tolist()),
        image_shape=tuple(inputs.shape[1:]) if data.image else None,
        sequence_length=None if data.image else inputs.shape[1],
        local_epochs=1,
        dropout=data.dropout,
    )
    observation = Observation(
        kind=observation.kind,
        tensors=observation.tensors,
        contributors=observation.contributors,
        metadata=observation.metadata,
        broadcast=observation.broadcast,
        knowledge=granted,
    )
    prior, members = data.tested(torch.cat(chosen))
    truth = Truth(
        sequences=None if data.image else tuple(tuple(row) for row in inputs.tolist()),
        images=inputs if data.image else None,
        labels=None if data.generative else tuple(labels.tolist()),
        classes=data.classes,
        members=members,
        vocabulary=vocabulary_of(model),
        others=() if data.image else data.unused(torch.cat(chosen)),
    )
    return observation, truth, prior


def cell(group: Group, attack: str, update: str, count: int, *, seeds: int, budget: Budget) -> Cell:
    """Run one attack on `seeds` updates and score it."""

    def setting(seed: int) -> Case:
        model = group.data.model()
        observation, truth, prior = observed(group.data, model, update, count, seed)
        return Case(seen=observation, model=model, truth=truth, prior=prior)

    kind = f"{group.part}, {update}" if group.part else update
    return measured_cell(setting, attack, group.name, kind, count, seeds=seeds, budget=budget)


def measured_cell(
    setting: Callable[[int], Case],
    attack: str,
    model: str,
    update: str,
    count: int,
    *,
    seeds: int,
    budget: Budget,
) -> Cell:
    """Run one attack on a setting a seed and sum the scores up."""
    runs, reason = [], ""
    for seed in range(seeds):
        case = setting(seed)
        reconstruction = build(attack).run(case.seen, case.model, case.prior, budget, seed)
        reason = reason or reconstruction.reason
        pictures = bool(reconstruction.of("image"))
        judged = (
            replace(case.truth, labels=None) if pictures else case.truth
        )  # labels were granted, pictures were not
        runs.append((reconstruction, score(reconstruction, judged) if reconstruction.applicable else None))
    scored = [result for _, result in runs if result is not None]
    interval = bootstrap_interval([result.value for result in scored]) if scored else None
    return Cell(
        attack=attack,
        model=model,
        update=update,
        batch=count,
        measure=scored[0].measure if scored else "",
        score=None if interval is None else interval.value,
        low=None if interval is None else interval.low,
        high=None if interval is None else interval.high,
        guessing=sum(result.baseline for result in scored) / len(scored) if scored else None,
        succeeded=f"{sum(result.succeeded for result in scored)}/{seeds}",
        seconds=sum(reconstruction.seconds for reconstruction, _ in runs) / seeds,
        reason=reason,
    )


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """Run the whole table, printing as it goes."""
    groups = attacks_models.built(quick=options.quick)
    groups += (
        [] if options.assets is None else attacks_models.from_assets(options.assets, quick=options.quick)
    )
    special = () if options.quick else attacks_special.LINES
    first, shares = map(int, options.share.split("/"))
    groups, special = groups[first - 1 :: shares], special[first - 1 :: shares]
    print(
        f"{'attack':20} {'model':31} {'update':30} {'batch':>5} {'score':>8} {'95 %':>17} "
        f"{'guess':>7} {'won':>5} {'s':>7}"
    )
    for group in groups:
        sizes = tuple(size for size in group.sizes if size in (1, 4)) if options.quick else group.sizes
        seeds = min(2, group.seeds) if options.quick else group.seeds
        budget = Budget(steps=30_000, iterations=group.iterations, restarts=1)
        for attack in group.attacks:
            for update in group.updates:
                for count in sizes:
                    line = cell(group, attack, update, count, seeds=seeds, budget=budget)
                    _print(line)
                    yield line
    for entry in special:
        budget = Budget(steps=60_000, iterations=entry.iterations, restarts=1)
        line = measured_cell(
            entry.setting,
            entry.attack,
            entry.model,
            entry.update,
            entry.batch,
            seeds=entry.seeds,
            budget=budget,
        )
        _print(line)
        yield line


def _print(line: Cell) -> None:
    start = f"{line.attack:20} {line.model:31} {line.update:30} {line.batch:5}"
    if line.score is None:
        print(f"{start} {line.reason}", flush=True)
        return
    between = f"{line.low:8.3f}-{line.high:8.3f}"
    print(
        f"{start} {line.score:8.3f} {between} {line.guessing:7.3f} {line.succeeded:>5} {line.seconds:7.2f}",
        flush=True,
    )


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Run the chosen parts one after another; each states its CPU seconds."""
    measured_cells: dict[str, Any] = {}
    for part in options.parts:
        began = time.process_time()
        print(f"\n{part}", flush=True)
        if part == "table":
            measured_cells["cells"] = [asdict(line) for line in cells(options)]
        elif part == "conformance":
            lines = list(attacks_conformance.lines(quick=options.quick))
            measured_cells["conformance"] = [asdict(line) | {"within": line.within} for line in lines]
        elif part == "span":
            measured_cells["span"] = attacks_span.side_by_side(options.span_peer, quick=options.quick)
        elif options.peer is not None:
            measured_cells["side_by_side"] = attacks_peer.side_by_side(options.peer, quick=options.quick)
        measured_cells[f"{part}_seconds"] = round(time.process_time() - began, 1)
    return measured_cells


def main() -> None:
    """Print the tables, then one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="closed forms only, one or two seeds, two batch sizes"
    )
    parser.add_argument("--assets", type=Path, help="folder with the trained models and data")
    parser.add_argument("--peer", type=Path, help="Python of an environment with breaching 0.1.2")
    parser.add_argument("--span-peer", type=Path, help="folder that holds the published span functions")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to run, in this order")
    parser.add_argument(
        "--only-peer", action="store_const", dest="parts", const=("peer",), help="same as --parts peer"
    )
    parser.add_argument(
        "--share",
        default="1/1",
        metavar="K/N",
        help="every N-th model of the table from the K-th, for several cores",
    )
    parser.add_argument("--json", action="store_true", help="kept for symmetry: JSON is always the last line")
    options = parser.parse_args()
    torch.set_num_threads(1)
    software = {"python": sys.version.split()[0], "torch": torch.__version__, "machine": platform.machine()}
    print(json.dumps({"benchmark": "attacks", **software, **measured(options)}))


if __name__ == "__main__":
    main()
