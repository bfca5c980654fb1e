"""What simulating clients costs beyond their own computing: the loop's share of a round, and memory against
clients.

Run: python -m benchmarks.simulation --json [--quick]
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch


def measure(clients: int, rounds: int, model: str, seed: int) -> dict[str, float]:
    """Run a small federation in this process; return the shares of a round and the peak memory."""
    from ffm_secure.api import Run
    from ffm_secure.config import run_file as config

    torch.set_num_threads(1)
    table = {
        "format": 1,
        "name": f"clients-{clients}",
        "seed": seed,
        "task": {
            "kind": "text_classification",
            "data": "builtin:clinic_notes",
            "clients": clients,
            "evaluation_examples": 100,
        },
        "model": {"name": model, "trainable": {"kind": "lora", "rank": 4}},
        "federation": {
            "rounds": rounds,
            "cohort": 10,
            "evaluate_every": rounds,
            "lifecycle": {"kind": "finetune", "local_steps": 4, "batch_size": 32, "learning_rate": 0.01},
        },
        "privacy": {"ledger": "run", "unit": "record", "epsilon": 8.0, "delta": 1e-5, "clip_norm": 0.5},
        "protection": {"kind": "secagg", "threshold": 7},
        "speed": {"microbatch": 16},
    }
    with tempfile.TemporaryDirectory() as folder:
        result = Run(config.from_table(table), base=Path.cwd(), runs=Path(folder)).start()
    records = result.summary.rounds
    seconds = sum(record.seconds for record in records)
    inside = sum(record.client_seconds for record in records)
    evaluation = sum(record.evaluation_seconds for record in records)
    return {
        "clients": clients,
        "round_seconds": seconds / rounds,
        "client_share": inside / seconds,
        "evaluation_share": evaluation / seconds,
        "loop_share": (seconds - inside - evaluation) / seconds,
        "peak_mebibytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    """Measure each size in a process of its own, so that peaks do not mix."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="tiny model, 10 and 100 clients")
    parser.add_argument("--one", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--model", default="")
    parser.add_argument("--seed", type=int, default=1)
    words = parser.parse_args()
    model = words.model or ("builtin:tiny-bert" if words.quick else "builtin:minilm")
    rounds = 2
    if words.one:
        print(json.dumps(measure(words.one, rounds, model, words.seed)))
        return
    sizes = (10, 100) if words.quick else (10, 100, 1000)
    rows = []
    for size in sizes:
        command = [
            sys.executable,
            "-m",
            "benchmarks.simulation",
            "--one",
            str(size),
            "--model",
            model,
            "--seed",
            str(words.seed),
        ]
        rows.append(
            json.loads(
                subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            )
        )
    print(
        f"{'clients':>8} {'round s':>9} {'clients %':>10} {'evaluation %':>13} {'loop %':>8} {'peak MiB':>9}"
    )
    for row in rows:
        print(
            f"{row['clients']:>8} {row['round_seconds']:>9.2f} {100 * row['client_share']:>10.1f} "
            f"{100 * row['evaluation_share']:>13.1f} {100 * row['loop_share']:>8.2f} "
            f"{row['peak_mebibytes']:>9.0f}"
        )
    growth = rows[-1]["peak_mebibytes"] / rows[0]["peak_mebibytes"]
    print(f"peak memory at {sizes[-1]} clients over {sizes[0]}: {growth:.3f}")
    print(
        json.dumps(
            {
                "benchmark": "simulation",
                "model": model,
                "seed": words.seed,
                "rounds": rounds,
                "machine": platform.processor() or platform.machine(),
                "rows": rows,
                "memory_growth": growth,
            }
        )
    )


if __name__ == "__main__":
    main()
