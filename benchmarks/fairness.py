"""Learn a head from a split in which one class is rare, with and without released counts of classes.

    python -m benchmarks.fairness ../shared --out docs/results/fairness.md [--cache FOLDER]

AG News, 2,160 rows of which 60 are of one class, over ten clients. The head is learned on MiniLM's frozen
features under record-level privacy with noise in shares; bound, noise, code, server step and offsets are the
product's own, only the gradient of a softmax head is written out, as features of frozen weights are computed
once. Each draw takes other rows, another rare class and fresh noise; settings are fixed in `SETTINGS` and
were chosen on training rows that no draw uses. Figures are of the whole validation part.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from benchmarks.heads import CASES, Part, part_of
from benchmarks.sums import opened_sum
from defenses.dp import poisson_sample
from defenses.random_source import RandomSource
from ffm_secure.agreed.loaded_model import LoadedModel, PublicFacts, load_model
from ffm_secure.aggregation import aggregate_of
from ffm_secure.config import run_file
from ffm_secure.privacy.expectations import site_noise_variance
from ffm_secure.queries.base import Opened, head_of
from ffm_secure.strategies.base import ServerState

CLIENTS, COMMON, RARE, DRAWS = 10, 700, 60, range(1, 13)
CHOOSING = 3_000  # training rows at the end, from which settings were chosen and no draw takes any
SETTINGS = {"rounds": 30, "batch": 32, "clip": 1.0, "momentum": 0.9}
COUNTS: dict[str, dict[str, str | float]] = {
    "": {},
    "finish": {"finish": "class_offsets", "finish_epsilon": 1.0},
    "start": {"start": "class_prior", "start_epsilon": 1.0},
}
WAYS = {
    "": "epsilon 8",
    "finish": "counts taken off at the end (`class_offsets`), epsilon 8 + 1",
    "start": "counts there from the start (`class_prior`), epsilon 8 + 1",
}
RATES = (1.0, 2.0, 4.0)  # the first learns too little for the rare class ever to be answered


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What a head answers right: the worst class, and the mean over classes."""

    worst: float
    mean: float


def config_of(epsilon: float, *, rate: float, counts: str = "") -> run_file.RunConfig:
    """Return the run file: the head alone is learned; 1 of the epsilon is for the counts of a `start` or
    `finish`, where there are any.
    """
    lifecycle = {
        "kind": "finetune",
        "local_steps": 1,
        "batch_size": SETTINGS["batch"],
        "learning_rate": rate,
        **COUNTS[counts],
    }
    return run_file.from_table(
        {
            "format": 1,
            "name": "fairness",
            "seed": 1,
            "task": {
                "kind": "text_classification",
                "data": "ag_news_subset",
                "clients": CLIENTS,
                "max_length": 64,
                "nominal_examples": (3 * COMMON + RARE) // CLIENTS,
            },
            "model": {"name": "builtin:minilm", "trainable": {"kind": "head"}},
            "federation": {
                "rounds": SETTINGS["rounds"],
                "cohort": CLIENTS,
                "lifecycle": lifecycle,
                "strategy": {"kind": "avgm", "momentum": SETTINGS["momentum"]},
            },
            "privacy": {
                "unit": "record",
                "epsilon": epsilon,
                "delta": 1e-5,
                "clip_norm": SETTINGS["clip"],
                "noise_shares": "sum",
                "ledger": "run",
            },
            "protection": {"kind": "secagg", "threshold": CLIENTS - 1},
        }
    )


def skewed(rows: Part, rare: int, draw: int) -> Part:
    """Return 700 rows of every class but one, and 60 of that one."""
    order = np.random.default_rng(draw).permutation(len(rows.labels))
    chosen: list[int] = []
    for label in np.unique(rows.labels):
        wanted = RARE if label == rare else COMMON
        chosen += [int(row) for row in order if rows.labels[row] == label][:wanted]
    places = np.array(chosen)
    return Part(features=rows.features[places], labels=rows.labels[places])


def bounded_gradients(state: ServerState, model: LoadedModel, rows: Part, clip: float) -> Tensor:
    """Return the sum [d] of every row's gradient of the loss of a softmax head, each within the bound."""
    head = head_of(model.trainable)
    weight = state.vector[head.weight].view(head.classes, head.width).double()
    features = rows.features.double()
    scores = features @ weight.T
    if head.bias is not None:
        scores = scores + state.vector[head.bias].double()
    errors = scores.softmax(dim=1) - torch.nn.functional.one_hot(torch.from_numpy(rows.labels), head.classes)
    lengths = features.square().sum(dim=1) + (1.0 if head.bias is not None else 0.0)
    norms = errors.norm(dim=1) * lengths.sqrt()
    errors = errors * (clip / norms.clamp(min=clip))[:, None]
    total = torch.zeros(state.vector.numel(), dtype=torch.float64)
    total[head.weight] = (errors.T @ features).reshape(-1)
    if head.bias is not None:
        total[head.bias] = errors.sum(dim=0)
    return total


def untrained(model: LoadedModel) -> ServerState:
    """Return the state before the first round: zeros."""
    return model.spec.strategy.start(torch.zeros(model.trainable.size))


def learned(model: LoadedModel, parts: list[Part], source: RandomSource, state: ServerState) -> ServerState:
    """Return the state after all rounds of learning, noise included."""
    spec, mechanism = model.spec, model.mechanism.sum_level
    assert mechanism is not None
    variance = site_noise_variance(model.mechanism, spec.config.federation.lifecycle)
    for number in range(1, spec.config.federation.rounds + 1):
        vectors = []
        for part in parts:
            rows = poisson_sample(len(part.labels), rate=mechanism.inner.sampling_rate, source=source)
            drawn_rows = Part(features=part.features[rows], labels=part.labels[rows])
            gradients = bounded_gradients(state, model, drawn_rows, mechanism.clip_norm)
            update = mechanism.update_of(gradients)
            protected = mechanism.protect(update, loss=0.0, weight=1, source=source)
            sent = spec.codec.quantise(protected, source=source)
            vectors.append(sent)
        opened = opened_sum(spec.codec, vectors, round=number, survivors=tuple(range(CLIENTS)))
        state = spec.strategy.step(state, aggregate_of(spec.config, [opened], site_noise_variance=variance))
    return state


def counted(model: LoadedModel, query: str, parts: list[Part], source: RandomSource) -> Opened:
    """Return noisy counts of classes, as a query of the run opens them."""
    question, head = model.spec.questions[query], head_of(model.trainable)
    vectors = []
    for part in parts:
        answers = torch.nn.functional.one_hot(torch.from_numpy(part.labels), head.classes).double()
        protected = question.mechanism.protect_total(question.mechanism.total([answers]), source)
        sent = question.codec.quantise(protected, source=source)
        vectors.append(sent)
    opened = opened_sum(question.codec, vectors, round=1, survivors=tuple(range(CLIENTS)))
    return Opened(values=opened.values, deviation=question.mechanism.deviation(CLIENTS), sites=CLIENTS)


def after_learning(model: LoadedModel, counts: str, parts: list[Part], source: RandomSource) -> ServerState:
    """Return what is released: learned without counts, corrected by them, or learned beside them."""
    state = untrained(model)
    if not counts:
        return learned(model, parts, source, state)
    name = str(COUNTS[counts][counts])
    query, answer = model.spec.questions[name].query, counted(model, name, parts, source)
    if query.settle is None:
        return query.use(learned(model, parts, source, state), answer)
    return query.settle(learned(model, parts, source, query.use(state, answer)), answer)


def figures_of(model: LoadedModel, state: ServerState, rows: Part) -> Figures:
    """Return what a model answers right of rows."""
    head = head_of(model.trainable)
    scores = rows.features @ state.vector[head.weight].view(head.classes, head.width).T
    if head.bias is not None:
        scores = scores + state.vector[head.bias]
    right = scores.argmax(dim=1).numpy() == rows.labels
    by_class = [float(right[rows.labels == label].mean()) for label in range(head.classes)]
    return Figures(worst=min(by_class), mean=fmean(by_class))


def drawn_figures(train: Part, validation: Part, draws: range, rate: float, counts: str) -> Iterator[Figures]:
    """Yield what is right, for every draw."""
    facts = PublicFacts(public_client_size=(3 * COMMON + RARE) // CLIENTS, classes=4)
    config = config_of(9.0 if counts else 8.0, rate=rate, counts=counts)
    model = load_model(config, Path.cwd(), facts)
    for draw in draws:
        rows = skewed(train, draw % 4, draw)
        order = np.array_split(np.random.default_rng(draw).permutation(len(rows.labels)), CLIENTS)
        parts = [Part(features=rows.features[piece], labels=rows.labels[piece]) for piece in order]
        state = after_learning(model, counts, parts, RandomSource.system())
        yield figures_of(model, state, validation)


HEAD = """# A rare class, lifted by offsets

AG News, 2,160 rows of which 60 are of one class, over ten clients; a head on MiniLM's frozen features under
record-level privacy at delta 1e-5, noise in shares, at least nine of ten in every sum. Twelve draws of rows
and noise, each class rare in three of them; figures of the whole validation part, which is balanced, so that
the mean over classes is the accuracy. Settings were chosen on training rows that no draw uses.

Made by `python -m benchmarks.fairness ../shared --out docs/results/fairness.md`; how is said there.

| learned | worst class | over the draws | mean over classes | over the draws |
|---|---|---|---|---|
"""


def line(title: str, figures: list[Figures]) -> str:
    """Return one row of the table."""
    worst, mean = [item.worst for item in figures], [item.mean for item in figures]
    return (
        f"| {title} | **{fmean(worst):.3f}** | {min(worst):.3f} to {max(worst):.3f} "
        f"| **{fmean(mean):.3f}** | {min(mean):.3f} to {max(mean):.3f} |\n"
    )


def main() -> None:
    """Draw, learn and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cache", type=Path, default=None)
    parser.add_argument("--choose", action="store_true", help="on the rows set aside for choosing settings")
    asked = parser.parse_args()
    case = CASES[0]
    train, validation = (part_of(asked.shared, case, part, asked.cache) for part in ("train", "validation"))
    order = np.random.default_rng(0).permutation(len(train.labels))
    apart, used = order[:CHOOSING], order[CHOOSING:]
    if asked.choose:
        half = CHOOSING * 4 // 5
        validation = Part(features=train.features[apart[half:]], labels=train.labels[apart[half:]])
        used = apart[:half]
    train = Part(features=train.features[used], labels=train.labels[used])
    table = ""
    draws = range(1, 5) if asked.choose else DRAWS
    for rate in RATES:
        for counts, words in WAYS.items():
            figures = list(drawn_figures(train, validation, draws, rate, counts))
            table += line(f"learning rate {rate:g}, {words}", figures)
    print(table)
    if asked.out:
        asked.out.write_text(HEAD + table)


if __name__ == "__main__":
    main()
