"""Five domains one after the other at a lifetime epsilon: sums, and LoRA with and without replay.

    python -m benchmarks.continual ../shared --out docs/results/continual.md --cache FOLDER [--lora]

Sums are answered from features that are computed once, with the noise, the code and the head of a run. LoRA
runs are runs of the product, one for each row of their table; `--lora` plays them, which takes minutes of one
core each, and keeps their figures in `FOLDER/lora.json`; without it those are read from there.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

import ffm_secure as ffm
from benchmarks import heads
from benchmarks.heads import Case, Part, part_of
from benchmarks.sums import opened_sum
from defenses.random_source import RandomSource
from ffm_secure.agreed.loaded_model import LoadedModel, PublicFacts, load_model
from ffm_secure.agreed.run_spec import Question
from ffm_secure.config import run_file
from ffm_secure.lifecycle.stream_measures import measures
from ffm_secure.privacy.query_noise import Total
from ffm_secure.queries.base import Head, Opened, head_of, of_classes, remember
from ffm_secure.queries.class_sums import unit_rows
from ffm_secure.server.public_stages import PublicStages
from ffm_secure.strategies.base import ServerState

CLIENTS, SEEDS = 10, (1, 2, 3)
NOT_ASKED = (0.0, 0.0)  # what another page expects of a set
DOMAINS = (
    Case(folder="ag_news_subset", title="AG News", rows=3000, classes=4, expected=NOT_ASKED),
    Case(
        folder="glue_sst2",
        title="SST-2",
        rows=3000,
        classes=2,
        expected=NOT_ASKED,
        text="sentence",
        most=4500,
    ),
    Case(folder="medical_abstracts", title="Medical abstracts", rows=1400, classes=5, expected=NOT_ASKED),
    Case(
        folder="twitter_financial_topic",
        title="Financial topics",
        rows=1800,
        classes=20,
        expected=NOT_ASKED,
        most=2700,
    ),
    Case(folder="banking77", title="Banking77", rows=4000, classes=77, expected=NOT_ASKED),
)
CLASSES = sum(case.classes for case in DOMAINS)
OFFSETS = np.cumsum([0, *(case.classes for case in DOMAINS[:-1])])
ORDERS = (tuple(range(5)), (4, 2, 0, 3, 1))
SETTINGS = (("class_sums", 8.0), ("class_sums", 3.0), ("class_sums", 1.0), ("ridge_sums", 8.0))
SETTINGS_LORA = {"rate": 0.02, "rounds": 16, "batch": 64, "length": 32, "alpha": 2.0}
ADAM = {"momentum": 0.8, "beta2": 0.95, "tau": 0.001}  # of the server, with the noise taken out
TARGETS = [f"layer.{layer}.attention.self.{name}" for layer in (4, 5) for name in ("query", "value")]
REPLAYS = (("naive", 0.0), ("replay of a fifth", 0.2))


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """The rows of one domain, with labels among all classes."""

    case: Case
    train: Part
    validation: Part


def domains_of(shared: Path, cache: Path | None) -> tuple[Domain, ...]:
    """Return the features of all domains."""
    domains = []
    for case, offset in zip(DOMAINS, OFFSETS, strict=True):
        parts = []
        for name in ("train", "validation"):
            part = part_of(shared, case, name, cache)
            parts.append(Part(features=part.features, labels=part.labels + int(offset)))
        domains.append(Domain(case=case, train=parts[0], validation=parts[1]))
    return tuple(domains)


def table(kind: str, epsilon: float) -> dict[str, Any]:
    """Return the run file of a stream: ten clients, all sums of at least nine."""
    table = heads.table_of(DOMAINS[0], epsilon=epsilon, shares="sum", clients=CLIENTS)
    names = [str(place) for place in range(len(DOMAINS))]
    table["name"] = f"continual-{kind}"
    table["task"] |= {"stream": {"column": "domain", "order": names}, "nominal_examples": 1320}
    table["federation"] |= {"rounds": len(DOMAINS), "lifecycle": {"kind": kind}}
    return table


def summed(question: Question, model: LoadedModel, parts: Sequence[Part], stage: int) -> Opened:
    """Return what the server opens of one stage: every owner's answers, rounded, noised and added up."""
    head, source = head_of(model.trainable), RandomSource.system()
    vectors = []
    for part in parts:
        protected = question.mechanism.protect_total(total_of(question, head, part), source)
        sent = question.codec.quantise(protected, source=source)
        vectors.append(sent)
    opened = opened_sum(question.codec, vectors, round=stage + 1, survivors=tuple(range(len(parts))))
    deviation = question.mechanism.deviation(len(parts))
    return Opened(values=opened.values, deviation=deviation, sites=len(parts))


def total_of(question: Question, head: Head, part: Part) -> Total:
    """Return the sum of an owner's answers: those of `queries.class_sums` and `queries.ridge_sums`, whose
    rows have unit length and are within the bound, added up by matrix products instead of one by one.
    """
    features = unit_rows(part.features)
    sums = torch.zeros(head.classes, head.width, dtype=torch.float64)
    sums.index_add_(0, torch.from_numpy(part.labels), features)
    values = sums.reshape(-1)
    if question.query.by_class:
        corners = torch.triu_indices(head.width, head.width)
        scale = torch.where(corners[0] == corners[1], 1.0, math.sqrt(2.0)).double()
        moments = features.T @ features
        values = torch.cat((moments[corners[0], corners[1]] * scale, values))
    return Total(values=values.numpy(), rows=len(part.labels))


def stream_of_sums(
    model: LoadedModel, kind: str, domains: Sequence[Domain], order: Sequence[int], seed: int
) -> list[tuple[list[float], list[float]]]:
    """Return the accuracies on all domains, unknown and known, before the first stage and after each."""
    question, head = model.spec.questions[kind], head_of(model.trainable)
    present = np.zeros((len(domains), CLASSES), dtype=bool)
    for place, domain in enumerate(domains):
        present[place, np.unique(domain.validation.labels)] = True
    state = ServerState(round=0, vector=torch.zeros(model.trainable.size))
    results = [scores(state, head, domains, present, order)]
    for stage, place in enumerate(order):
        rows, train = DOMAINS[place].rows, domains[place].train
        chosen = np.random.default_rng([seed, place]).permutation(len(train.labels))[:rows]
        parts = [
            Part(features=train.features[piece], labels=train.labels[piece])
            for piece in np.array_split(chosen, CLIENTS)
        ]
        opened = of_classes(question.query, summed(question, model, parts, stage), present[place])
        remembering, whole = remember(state, kind, opened)
        state = question.query.use(remembering, whole)
        results.append(scores(state, head, domains, present, order))
    return results


def scores(
    state: ServerState,
    head: Head,
    domains: Sequence[Domain],
    present: NDArray[np.bool_],
    order: Sequence[int],
) -> tuple[list[float], list[float]]:
    """Return the accuracy on every domain in the order of the stream, unknown and known."""
    weight = state.vector[head.weight].view(head.classes, head.width)
    unknown, known = [], []
    for place in order:
        rows = domains[place].validation
        public = PublicStages(
            names=("one",), of_row=np.zeros(len(rows.labels), dtype=np.int64), classes=present[[place]]
        )
        (score,) = public.scores((rows.features.float() @ weight.T).numpy(), rows.labels)
        unknown.append(score.unknown)
        known.append(score.known)
    return unknown, known


def figures_of_sums(domains: Sequence[Domain]) -> Iterator[tuple[str, ...]]:
    """Yield a row of the table for every kind, epsilon and order."""
    for kind, epsilon in SETTINGS:
        facts = PublicFacts(public_client_size=1320, classes=CLASSES)
        model = load_model(run_file.from_table(table(kind, epsilon)), Path.cwd(), facts)
        for order in ORDERS if epsilon == 8.0 else ORDERS[:1]:
            results = [stream_of_sums(model, kind, domains, order, seed) for seed in SEEDS]
            row = [kind, f"{epsilon:g}", "as listed" if order == ORDERS[0] else "another"]
            for which in (0, 1):
                measured = [measures([stage[which] for stage in result]) for result in results]
                row += [
                    f"**{fmean(one.average for one in measured):.3f}**",
                    f"{fmean(one.forgetting for one in measured):.3f}",
                ]
            print(*row, flush=True)
            yield tuple(row)


def lora_config(replay: float) -> run_file.RunConfig:
    """Return the run file of LoRA on the stream: one step a round, noise in shares."""
    settings = SETTINGS_LORA
    return run_file.from_table(
        {
            "format": 1,
            "name": f"lora-replay-{replay:g}",
            "seed": 5,
            "task": {
                "kind": "text_classification",
                "data": "memory",
                "clients": CLIENTS,
                "max_length": int(settings["length"]),
                "label_column": "label",
                "text_column": "text",
                "stream": {
                    "column": "domain",
                    "order": [case.title for case in DOMAINS],
                    "replay": replay,
                },
                "evaluation_examples": 500,
            },
            "model": {
                "name": "builtin:minilm",
                "trainable": {
                    "kind": "lora",
                    "rank": 4,
                    "alpha": settings["alpha"],
                    "target_modules": TARGETS,
                },
            },
            "federation": {
                "rounds": int(settings["rounds"]) * len(DOMAINS),
                "cohort": CLIENTS,
                "evaluate_every": 1000,
                "lifecycle": {
                    "kind": "finetune",
                    "local_steps": 1,
                    "batch_size": int(settings["batch"]),
                    "learning_rate": 1.0,
                },
                "strategy": {"kind": "adam_debiased", **ADAM, "learning_rate": settings["rate"]},
            },
            "privacy": {
                "unit": "record",
                "epsilon": 8.0,
                "delta": 1e-5,
                "clip_norm": 1.0,
                "noise_shares": "sum",
                "ledger": "run",
            },
            "protection": {"kind": "secagg", "threshold": CLIENTS - 1},
            "speed": {"microbatch": 16},
        }
    )


def texts_of(shared: Path, part: str, most: int) -> dict[str, list[Any]]:
    """Return texts, labels among all classes and domains of a part of all sets."""
    columns: dict[str, list[Any]] = {"text": [], "label": [], "domain": []}
    for case, offset in zip(DOMAINS, OFFSETS, strict=True):
        read = pq.read_table(shared / "data" / case.folder / f"{part}.parquet")
        labels = read["label"].to_numpy()
        places = np.searchsorted(np.unique(labels), labels) + int(offset)
        limit = min(len(labels), most or case.rows)
        for row in np.random.default_rng(7).permutation(len(labels))[:limit]:
            columns["text"].append(str(read[case.text][int(row)].as_py()))
            columns["label"].append(int(places[row]))
            columns["domain"].append(case.title)
    return columns


def play_lora(shared: Path) -> list[dict[str, Any]]:
    """Run LoRA on the stream, without replay and with it; return what the reports say."""
    data = {"train": texts_of(shared, "train", 0), "validation": texts_of(shared, "validation", 300)}
    results = []
    for name, replay in REPLAYS:
        with TemporaryDirectory() as folder:
            run = ffm.Run(lora_config(replay), runs=folder, data=data)
            noise = run.plan().noise_multiplier
            summary = run.start(fairness=False, complete=False).summary
        stream = summary.stream
        assert stream is not None
        results.append(
            {
                "name": name,
                "noise": noise,
                "epsilon": summary.statements[0].epsilon,
                "unknown": stream.unknown,
                "known": stream.known,
            }
        )
        print(name, measures(stream.unknown), measures(stream.known), summary.seconds, flush=True)
    return results


def figures_of_lora(results: Sequence[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Yield a row of the table for every LoRA run."""
    for result in results:
        row = [result["name"], f"{result['epsilon']:.3f}", f"{result['noise']:.3f}"]
        for which in ("unknown", "known"):
            measured = measures(result[which])
            row += [f"**{measured.average:.3f}**", f"**{measured.forgetting:.3f}**"]
        yield tuple(row)


def lines(columns: Sequence[str], rows: Iterator[tuple[str, ...]]) -> list[str]:
    """Write a table."""
    written = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return [*written, *("| " + " | ".join(row) + " |" for row in rows), ""]


HEAD = """# Continual learning: five domains one after the other

AG News (4 classes, 3,000 rows), SST-2 (2, 3,000), medical abstracts (5, 1,400), financial topics (20, 1,800)
and Banking77 (77, 4,000): one head for all 108 classes. Ten clients, record unit, delta 1e-5, noise in
shares, at least nine of ten in a sum. Every row is asked in the stage of its domain only, so the epsilon of a
row is that of the whole stream, for life. *Unknown*: among all 108 classes; *known*: among those of the row's
domain. Accuracy is that on the validation parts, averaged over the domains.

"""
SUMS = """## Sums

One answer a row. Features are MiniLM's mean-pooled vectors of 64 tokens; noise, code and head are those of a
run. Mean over three draws of rows and noise. No setting was chosen on these rows: the head is that of
[heads](heads.md). Forgetting is competition: the more classes there are, the more can be mistaken.

"""
LORA = """## LoRA

MiniLM, LoRA of rank 4 (alpha {alpha:g}) on query and value of the last two layers, and the head from its
random start; {rounds} rounds a stage of one step of {batch} rows a client in expectation, {length} tokens,
Adam with the noise taken out on the server, rate {rate:g}. With replay, a fifth of every stage's rows stay at
home and are drawn at the rate of a new row; noise is larger, so that a row of the first stage that stays
costs epsilon 8 over all five. Rate, rounds and share were chosen on training rows outside these, by the head
alone on fixed features ([steps](continual-steps.md)); alpha was not tried. 500 validation rows; one run each.

"""
COLUMNS_SUMS = ("", "epsilon", "order", "unknown", "forgetting", "known", "forgetting, known")
COLUMNS_LORA = ("", "epsilon", "noise x clip", "unknown", "forgetting", "known", "forgetting, known")


def main() -> None:
    """Play the streams and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--lora", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    stored = asked.cache / "lora.json"
    if asked.lora:
        stored.write_text(json.dumps(play_lora(asked.shared)))
    domains = domains_of(asked.shared, asked.cache)
    page = [HEAD + SUMS + "\n".join(lines(COLUMNS_SUMS, figures_of_sums(domains)))]
    if stored.is_file():
        results = json.loads(stored.read_text())
        page.append(LORA.format(**SETTINGS_LORA) + "\n".join(lines(COLUMNS_LORA, figures_of_lora(results))))
    page.append(
        "Made by `python -m benchmarks.continual ../shared --out docs/results/continual.md --lora "
        "--cache FOLDER`."
    )
    asked.out.write_text("\n".join(page) + "\n")


if __name__ == "__main__":
    main()
