"""Accuracy against bytes: a head on AG News features, twenty uneven sites, every compression, one command.

    python -m benchmarks.bytes ../shared --out docs/results/bytes.md

Compression, bound, noise, code, the check of every opened sum and the rule are the product's own; local
steps of the head are taken in closed form on features that are computed once (`--cache FOLDER` keeps them),
and the Gaussian noise of record-level steps comes from torch at the size the mechanism states. Masks take
nothing off and add nothing (sums agree bit for bit under every protection, which the tests hold), so they are
left out here.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch
from torch import Tensor

from benchmarks.heads import CASES, part_of
from benchmarks.sums import opened_sum
from defenses.random_source import RandomSource
from defenses.secagg import ring
from ffm_secure.agreed.loaded_model import LoadedModel, PublicFacts, load_model
from ffm_secure.aggregation import aggregate_of
from ffm_secure.config import compatibility, run_file
from ffm_secure.data.dataset import Examples
from ffm_secure.data.partition import partition
from ffm_secure.engines.summary import size
from ffm_secure.config.run_file import Split
from ffm_secure.errors import PlanRefused
from ffm_secure.models import backbone
from ffm_secure.privacy.expectations import site_noise_variance
from ffm_secure.records import RoundPlan
from ffm_secure.server.sum_check import why_too_large

SITES, ROWS, CLASSES, ALPHA = 20, 3000, 4, 0.5
ROUNDS, SEEDS = 20, (1, 2, 3)
LOCAL = {"kind": "finetune", "local_steps": 5, "batch_size": 32, "learning_rate": 2.0}
ONE_STEP = {"kind": "finetune", "local_steps": 1, "batch_size": 32, "learning_rate": 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One table: a privacy unit with the settings it learns by."""

    title: str
    privacy: Mapping[str, object]
    lifecycle: Mapping[str, object]
    strategy: Mapping[str, object]
    coordinate_bound: float = 4.0


UNITS = (
    Unit(
        title="No unit",
        privacy={"unit": "none", "reason": "public news"},
        lifecycle=LOCAL,
        strategy={"kind": "average"},
    ),
    Unit(
        title="Record unit, epsilon 8, whole noise at every site",
        privacy={"unit": "record", "epsilon": 8.0, "delta": 1e-5, "clip_norm": 0.5},
        lifecycle=LOCAL,
        strategy={"kind": "average"},
    ),
    Unit(
        title="Record unit, epsilon 1, noise in shares, Adam at the server",
        privacy={
            "unit": "record", "epsilon": 1.0, "delta": 1e-5, "clip_norm": 0.5, "noise_shares": "sum",
        },
        lifecycle=ONE_STEP,
        strategy={"kind": "adam", "learning_rate": 0.3, "tau": 0.01},
    ),
    Unit(
        title="Client unit, epsilon 8",
        privacy={"unit": "client", "epsilon": 8.0, "delta": 1e-5, "clip_norm": 1.0},
        lifecycle=LOCAL,
        strategy={"kind": "average"},
    ),
)  # fmt: skip
COMPRESSIONS: Mapping[str, Mapping[str, object]] = {
    "nothing": {},
    "16 bits": {"kind": "bits", "field_bits": 16},
    "rotation, 16 bits": {"kind": "rotation", "field_bits": 16},
    "support 1/4": {"kind": "support", "share": 0.25},
    "support 1/4, residual": {"kind": "support", "share": 0.25, "residual": True},
    "support 1/4, residual, 16 bits": {
        "kind": "support", "share": 0.25, "residual": True, "field_bits": 16,
    },
    "support 1/10": {"kind": "support", "share": 0.1},
    "support 1/10, residual": {"kind": "support", "share": 0.1, "residual": True},
    "support 1/100, residual": {"kind": "support", "share": 0.01, "residual": True},
    "fixed projection 1/4": {"kind": "projection", "share": 0.25},
    "fixed projection 1/10": {"kind": "projection", "share": 0.1},
    "fixed projection 1/100": {"kind": "projection", "share": 0.01},
    "fresh projection 1/4": {"kind": "projection", "share": 0.25, "basis": "fresh"},
    "fresh projection 1/10": {"kind": "projection", "share": 0.1, "basis": "fresh"},
    "fresh projection 1/10, residual": {
        "kind": "projection", "share": 0.1, "basis": "fresh", "residual": True,
    },
    "fresh projection 1/100": {"kind": "projection", "share": 0.01, "basis": "fresh"},
    "fresh projection 1/100, residual": {
        "kind": "projection", "share": 0.01, "basis": "fresh", "residual": True,
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """All rows as unit features [n, width + 1], the last number a constant for the bias."""

    train: Tensor
    labels: np.ndarray
    evaluation: Tensor
    evaluation_labels: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a table."""

    name: str
    up: int
    accuracies: tuple[float, ...]
    refused: str = ""


def model_of(unit: Unit, compression: Mapping[str, object]) -> LoadedModel:
    """Return the model and spec of a run file.

    Raises:
      PlanRefused: the two do not go together.
    """
    config = run_file.from_table(
        {
            "format": 1,
            "name": "bytes",
            "seed": 1,
            "task": {
                "kind": "text_classification",
                "data": "ag_news_subset",
                "clients": SITES,
                "max_length": 64,
                "nominal_examples": ROWS // SITES,
            },
            "model": {"name": "builtin:minilm", "trainable": {"kind": "head"}},
            "federation": {
                "rounds": ROUNDS,
                "cohort": SITES,
                "strategy": dict(unit.strategy),
                "lifecycle": dict(unit.lifecycle),
            },
            "compression": dict(compression),
            "privacy": {"ledger": "run", **unit.privacy},
            "protection": {"kind": "secagg", "coordinate_bound": unit.coordinate_bound},
        }
    )
    compatibility.check(config)
    facts = PublicFacts(public_client_size=ROWS // SITES, classes=CLASSES)
    return load_model(config, Path.cwd(), facts)


def matrix_of(vector: Tensor) -> Tensor:
    """Return a head's vector as weights [classes, width + 1], the bias last."""
    weights = vector[:-CLASSES].double().view(CLASSES, -1)
    return torch.cat((weights, vector[-CLASSES:].double().unsqueeze(1)), dim=1)


def vector_of(weights: Tensor) -> Tensor:
    """Undo `matrix_of`."""
    return torch.cat((weights[:, :-1].reshape(-1), weights[:, -1]))


def local_update(
    model: LoadedModel, features: Tensor, labels: Tensor, start: Tensor, generator: torch.Generator
) -> Tensor:
    """Return what one site learns, float64 [d]; noise in shares and of the client unit comes later."""
    spec = model.spec
    lifecycle, record = spec.config.federation.lifecycle, spec.mechanism.record_level
    clip = spec.mechanism.clip_norm if spec.mechanism.clips_records else float("inf")
    weights, lengths = start.clone(), features.norm(dim=1)
    for _ in range(lifecycle.local_steps):
        chance = lifecycle.batch_size / (ROWS // SITES if spec.mechanism.clips_records else len(features))
        chosen = torch.rand(len(features), generator=generator) < chance
        errors = torch.softmax(features @ weights.T, dim=1)
        errors[torch.arange(len(labels)), labels] -= 1.0
        norms = errors.norm(dim=1) * lengths
        bounded = errors * (chosen * (clip / norms.clamp_min(1e-12)).clamp(max=1.0)).unsqueeze(1)
        total = bounded.T @ features
        if record is not None:
            noise = torch.randn(total.shape, generator=generator, dtype=torch.float64)
            total = total + record.gradient_noise_multiplier() * clip * noise
        weights = weights - lifecycle.learning_rate * total / lifecycle.batch_size
    return vector_of(weights - start)


def train(model: LoadedModel, world: World, seed: int) -> float:
    """Train to the end and return the accuracy on public rows."""
    spec, generator = model.spec, torch.Generator().manual_seed(seed)
    split = Split(kind="dirichlet", alpha=ALPHA, min_size=10)
    rows_dealt = Examples(columns={"label": world.labels}, label_column="label")
    parts = partition(rows_dealt, split=split, clients=SITES, seed=seed)
    state = spec.strategy.start(model.trainable.flatten())
    left = torch.zeros((SITES, spec.compression.size), dtype=torch.float64)
    source, everybody = RandomSource.system(), tuple(range(SITES))
    for number in range(ROUNDS):
        plan = RoundPlan(run_id=bytes(16), round=number + 1, cohort=everybody, fingerprint="", mechanism="")
        public, vectors = spec.public_state(plan, state.vector), []
        for site, part in enumerate(parts):
            rows = torch.from_numpy(np.asarray(part))
            labels = torch.from_numpy(world.labels[part])
            update = local_update(model, world.train[rows], labels, matrix_of(state.vector), generator)
            if spec.config.compression.residual:
                update = update + left[site]
            sent = spec.compression.compress(update, public)
            left[site] = update - spec.compression.restore(sent.double(), public)
            protected = spec.mechanism.protect(sent, loss=0.0, weight=1, source=source)
            vector = spec.codec.quantise(protected, source=source)
            vectors.append(vector)
        opened = opened_sum(spec.codec, vectors, round=number + 1, survivors=everybody)
        refused = why_too_large(opened, spec, state.vector, turns=number + 1)
        assert not refused, refused
        known = site_noise_variance(spec.mechanism, spec.config.federation.lifecycle)
        sums = [spec.restored(opened, plan, state.vector)]
        aggregate = aggregate_of(spec.config, sums, site_noise_variance=known * spec.compression.noise_share)
        state = spec.strategy.step(state, aggregate)
    answers = (world.evaluation @ matrix_of(state.vector).T).argmax(dim=1).numpy()
    return float((answers == world.evaluation_labels).mean())


def world_of(shared: Path, cache: Path | None) -> World:
    """Return the rows of AG News as features."""
    train_part, public = (part_of(shared, CASES[0], part, cache) for part in ("train", "validation"))
    chosen = np.random.default_rng(0).permutation(len(train_part.labels))[:ROWS]
    shown = np.random.default_rng(0).permutation(len(public.labels))[:1000]
    return World(
        train=_unit(train_part.features[chosen]),
        labels=np.asarray(train_part.labels[chosen]),
        evaluation=_unit(public.features[shown]),
        evaluation_labels=np.asarray(public.labels[shown]),
    )


def _unit(features: Tensor) -> Tensor:
    rows_of_one = torch.nn.functional.normalize(features.double(), dim=1)
    return torch.cat([rows_of_one, torch.ones(len(features), 1, dtype=torch.float64)], dim=1)


def measure(unit: Unit, world: World, seeds: Sequence[int]) -> list[Row]:
    """Return the table of a unit."""
    rows = []
    for name, compression in COMPRESSIONS.items():
        try:
            model = model_of(unit, compression)
        except PlanRefused as refusal:
            reason = str(refusal).splitlines()[-1].strip()
            rows.append(Row(name=name, up=0, accuracies=(), refused=reason))
            continue
        up = ring.packed_bytes(model.codec.length, model.codec.modulus_bits)
        accuracies = tuple(train(model, world, seed) for seed in seeds)
        rows.append(Row(name=name, up=up, accuracies=accuracies))
        print(unit.title, "|", name, "|", up, f"{fmean(accuracies):.3f}", flush=True)
    return rows


HEAD = """# Fewer bytes: accuracy against upload

{sites} sites with {rows} AG News rows between them, dealt by Dirichlet {alpha}, a softmax head on MiniLM
features (1,540 numbers), {rounds} rounds in which all take part; accuracy on 1,000 public rows, mean (and
deviation) over seeds {seeds} (split, batches, noise; the map of a compression is the run file's, seed 1).
Rates and bounds were set for the first line of each table and are the same in all its lines. *Up* is one
site's upload of one round. Differences below 0.01 mean nothing, under the client unit below 0.03.

Made by `python -m benchmarks.bytes ../shared --out docs/results/bytes.md`; how is said there.
"""


def page(tables: Mapping[str, Sequence[Row]], seeds: Sequence[int]) -> str:
    """Return the page."""
    lines = [
        HEAD.format(
            sites=SITES,
            rows=f"{ROWS:,}",
            alpha=ALPHA,
            rounds=ROUNDS,
            seeds=", ".join(map(str, seeds)),
        )
    ]
    for title, rows in tables.items():
        lines += [f"\n## {title}\n", "| sent | up | of the whole | accuracy | against the whole |"]
        lines.append("|---|---|---|---|---|")
        whole = rows[0]
        for row in rows:
            if row.refused:
                lines.append(f"| {row.name} | | | refused | |")
                continue
            mean, spread = fmean(row.accuracies), ""
            if len(row.accuracies) > 1:
                spread = f" ± {stdev(row.accuracies):.3f}"
            lines.append(
                f"| {row.name} | {size(row.up)} | {row.up / whole.up:.1%} | {mean:.3f}{spread} | "
                f"{mean - fmean(whole.accuracies):+.3f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure everything and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--cache", type=Path, default=None)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    vars(backbone)["load_backbone"] = functools.cache(backbone.load_backbone)  # one model for all tables
    world = world_of(asked.shared, asked.cache)
    tables: dict[str, list[Row]] = {}
    for unit in UNITS:
        tables[unit.title] = measure(unit, world, asked.seeds)
        if asked.out is not None:
            asked.out.write_text(page(tables, asked.seeds))
    print(page(tables, asked.seeds))


if __name__ == "__main__":
    main()
