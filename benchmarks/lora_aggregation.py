"""Hold what each rule for averaging LoRA makes of a round against the dense mean of the clients' products.

    python -m benchmarks.lora_aggregation [--quick] [--json]

The runs of `experiments/lora-aggregation.toml` with one seed, their clients trained for real. After every
round the adapted weights of the new model are compared with the mean of what the clients' own weights were:
the distance, divided by how far that mean moved. Exact rules miss it by rounding; plain averaging of A and of
B misses it by its bias. Left out are FedSA, whose clients each have a model of their own, none of which is
meant to be the mean, and LoRA-XS, whose core is one matrix that enters the weight linearly. The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from ffm_secure.api import place
from ffm_secure.config.run_file import Strategy
from ffm_secure.engines import simulation
from ffm_secure.experiments import grid as experiments
from ffm_secure.server.rounds import plan_round
from ffm_secure.site.trainer import SiteTrainer
from ffm_secure.strategies.lora_rules import LoraRule
from ffm_secure.trainable import replicate

GRID = Path(__file__).resolve().parents[1] / "experiments" / "lora-aggregation.toml"


class Factors(LoraRule):
    """See the adapters of any run; a LoraRule for its names and products alone."""


def weights(factors: LoraRule, vector: Tensor) -> Tensor:
    """Return every adapted weight: what was folded into it, plus the product."""
    parts = [
        ((factors.view(vector, item.weight) if item.weight else 0.0) + factors.product(vector, item)).reshape(
            -1
        )
        for item in factors.adapters
    ]
    return torch.cat(parts).double()


def misses(config: Any, *, base: Path, rounds: int) -> Iterator[tuple[float, float]]:
    """Yield for each round the distance to the dense mean, in units of how far that mean moved, and the
    largest entry of it.
    """
    with tempfile.TemporaryDirectory() as folder:
        built = simulation.build(place(config, base=base, runs=Path(folder)).prepared(), Path(folder))
        trainer = SiteTrainer(
            spec=built.spec, trainable=replicate(built.trainable), task=built.task, states=built.states
        )
        strategy, factors = built.prepared.strategy, Factors(Strategy(), built.trainable)
        state = strategy.start(built.trainable.flatten().cpu())
        for number in range(1, rounds + 1):
            plan = plan_round(built.server, number, state)
            messages, own = [], []
            for client in plan.cohort:
                site = built.sites[client]
                learned = trainer.learn(site.data, plan, state.vector, site.source(plan))
                messages.append(learned.vector.double())
                own.append(weights(factors, trainer.trainable.flatten().cpu()))
            before, wanted = weights(factors, state.vector), torch.stack(own).mean(0)
            state = strategy.step_by_mean(state, torch.stack(messages).mean(0))
            missed = weights(factors, state.vector) - wanted
            yield float(missed.norm() / (wanted - before).norm()), float(missed.abs().max())


def rows(*, quick: bool) -> Iterator[dict[str, Any]]:
    """Measure every cell of the grid with its first seed."""
    _, cells = experiments.load(GRID, quick=quick)
    for cell in cells:
        config = cell.config
        factored = config.model.trainable.kind == "lora" and config.federation.strategy.kind != "fedsa"
        if cell.seed != cells[0].seed or not factored:
            continue
        rounds = min(config.federation.rounds, 2)
        differences = list(misses(config, base=GRID.parent, rounds=rounds))
        yield {
            **dict(cell.labels),
            "rounds": rounds,
            "relative": max(relative for relative, _ in differences),
            "largest": max(largest for _, largest in differences),
        }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the quick form of the grid, for smoke use")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    print(
        "| privacy | split | rule | missed, share of the mean change | "
        "largest entry missed |\n|---|---|---|---|---|"
    )
    table = []
    for row in rows(quick=options.quick):
        table.append(row)
        words = (row["privacy"], row["split"], row["rule"], f"{row['relative']:.1e}", f"{row['largest']:.1e}")
        print(f"| {' | '.join(words)} |", flush=True)
    if options.json:
        print(json.dumps({"rows": table, "torch": torch.__version__, "machine": platform.machine()}))


if __name__ == "__main__":
    main()
