"""Measure a Hugging Face trainer with private steps beside the same trainer without.

    python -m benchmarks.alone_trainer [--steps N] [--repeats N]

MiniLM with rank-8 LoRA, about 32 rows of 64 tokens a step, SGD. The two take turns, each in runs of N steps;
seconds are of one thread of the processor and of a whole run, bookkeeping included; the first pair warms up
and is not counted. The ratio is of the sums. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, default_data_collator
from transformers.utils import logging

from benchmarks.dp_step import BATCH, LENGTH, build
from defenses.dp import PrivateSteps, RecordMechanism

ROWS = 1600


class PrivateTrainer(PrivateSteps, Trainer):
    """The trainer of the page."""


def rows() -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (ROWS, LENGTH), generator=draw)
    labels = torch.randint(0, 2, (ROWS,), generator=draw)
    return [{"input_ids": ids[place], "labels": labels[place]} for place in range(ROWS)]


def seconds(kind: str, steps: int, folder: Path) -> float:
    """Return the processor's seconds of one run."""
    settings = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-3,
        optim="sgd",
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    parts: dict[str, Any] = {"train_dataset": rows(), "data_collator": default_data_collator}
    model = build("LoRA query+value")
    if kind == "plain":
        trainer: Trainer = Trainer(model, settings, **parts)
    else:
        mechanism = RecordMechanism(
            sampling_rate=BATCH / ROWS,
            noise_multiplier=1.0,
            clip_norm=0.5,
            expected_batch_size=BATCH,
            steps=steps,
        )
        trainer = PrivateTrainer(model, settings, mechanism=mechanism, **parts)
    began = time.process_time()
    trainer.train()
    return time.process_time() - began


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(chosen.repeats + 1):
            pairs.append([seconds(kind, chosen.steps, Path(folder)) for kind in ("plain", "private")])
    counted = pairs[1:]
    plain, private = (sum(column) / len(counted) / chosen.steps for column in zip(*counted, strict=True))
    figures = {
        "seconds_plain": plain,
        "seconds_private": private,
        "ratio": private / plain,
        "ratios": [second / first for first, second in counted],
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
