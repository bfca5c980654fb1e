"""Measure what a round of questions costs a site beside the forward pass over the rows that are asked.

    python -m benchmarks.query_round [--rows 96] [--quick] [--json]

MiniLM, texts of 64 tokens, one thread; the site's whole answer (rows in, integers of the ring out: features,
bound, sum, rounding, noise, code) and the bare forward pass in the same batches take turns. A ratio is the
median over repeats of processor seconds. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

import ffm_secure as ffm
from defenses.random_source import RandomSource
from ffm_secure.agreed.loaded_model import PublicFacts, load_model
from ffm_secure.config import run_file
from ffm_secure.queries.base import Rows, Viewed
from ffm_secure.records import RoundPlan
from ffm_secure.site.trainer import SiteData, SiteTrainer

CLIENTS, BATCH, CLASSES = 4, 64, 4
WORDS = "the ward reports a mild fever and a good night after the second treatment of this patient "


def config_of(query: str) -> run_file.RunConfig:
    """Return a run that asks one question."""
    return run_file.from_table(
        {
            "format": 1,
            "name": "query-round",
            "seed": 1,
            "task": {
                "kind": "text_classification",
                "data": "texts",
                "clients": CLIENTS,
                "max_length": 64,
                "nominal_examples": 1000,
            },
            "model": {"name": "builtin:minilm", "trainable": {"kind": "head"}},
            "federation": {"rounds": 1, "cohort": CLIENTS, "lifecycle": {"kind": query}},
            "privacy": {
                "unit": "record",
                "epsilon": 8.0,
                "delta": 1e-5,
                "clip_norm": 1.0,
                "noise_shares": "sum",
                "ledger": "run",
            },
            "protection": {"kind": "secagg", "threshold": 3},
            "speed": {"microbatch": BATCH, "threads": 1},
        }
    )


def measure(query: str, rows: int, repeats: int) -> dict[str, float]:
    """Return seconds of the bare pass and of the whole answer, and their ratio."""
    config = config_of(query)
    texts = {"text": [WORDS * 5] * rows, "label": [row % CLASSES for row in range(rows)]}
    ready = ffm.Run(config, data={"train": texts, "validation": texts}).prepared()
    encoded = ready.task.encode(ready.dataset.train)
    facts = PublicFacts(public_client_size=1000, classes=CLASSES)
    model = load_model(config, Path.cwd(), facts)
    trainer = SiteTrainer(spec=model.spec, trainable=model.trainable, task=ready.task)
    view = Viewed(trainable=model.trainable, task=ready.task, batch_size=BATCH)
    data = SiteData(index=0, name="site", examples=encoded)
    start, source = model.trainable.flatten(), RandomSource.system()
    plan = RoundPlan(run_id=bytes(16), round=1, cohort=(0,), fingerprint="", mechanism="", query=query)

    def pass_alone() -> None:
        view.scores(Rows(encoded=encoded))

    def whole_answer() -> None:
        trainer.answer(data, plan, start, source)

    seconds: dict[str, list[float]] = {"pass": [], "answer": []}
    for repeat in range(repeats + 1):
        pairs = [("pass", pass_alone), ("answer", whole_answer)]
        for name, work in pairs if repeat % 2 else pairs[::-1]:
            began = time.process_time()
            work()
            if repeat:
                seconds[name].append(time.process_time() - began)
    ratios = [own / bare for own, bare in zip(seconds["answer"], seconds["pass"], strict=True)]
    return {
        "pass": statistics.median(seconds["pass"]),
        "answer": statistics.median(seconds["answer"]),
        "ratio": statistics.median(ratios),
    }


def main() -> None:
    """Print the table, then one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--quick", action="store_true", help="one repeat of few rows")
    parser.add_argument("--json", action="store_true", help="kept for symmetry: JSON is always the last line")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, repeats = (16, 1) if options.quick else (options.rows, 5)
    result = {}
    print(f"{'query':14} {'pass, s':>8} {'answer, s':>10} {'ratio':>7}")
    for query in ("class_sums", "ridge_sums"):
        result[query] = measure(query, rows, repeats)
        row = result[query]
        print(f"{query:14} {row['pass']:8.3f} {row['answer']:10.3f} {row['ratio']:7.3f}", flush=True)
    print(json.dumps({"benchmark": "query_round", "machine": platform.machine(), "rows": result}))


if __name__ == "__main__":
    main()
