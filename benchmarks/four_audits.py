"""Audit four runs that differ in nothing but their defence: none, local noise, secure aggregation, both.

    python -m benchmarks.four_audits --json [--quick] [--budget quick|standard] [--task text|picture] [--page
    FILE] python -m benchmarks.four_audits --join OUTPUT [OUTPUT ...] --page FILE

Each run of `examples/audit/` is trained and audited with the command's own functions. The table names, for
every observer, the attacks that leaked, those that did not although their control passed, and counts the
rest; beside it the processor and wall seconds of the audit alone. `--page` writes the same as a page of the
documentation.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

import ffm_secure as ffm
from ffm_secure.auditing.run_audit import audit_run
from ffm_secure.records import AuditSummary

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "audit"
LOCAL = (
    "privacy.unit=record",
    "privacy.epsilon=8.0",
    "privacy.delta=1e-5",
    "privacy.clip_norm=0.5",
    "privacy.reason=",
)
MASKED = ("protection.kind=secagg",)
DEFENCES: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "local noise, epsilon 8": LOCAL,
    "secure aggregation": MASKED,
    "both": (*LOCAL, *MASKED),
}


def audits(tasks: tuple[str, ...], defences: tuple[str, ...], budget: str) -> Iterator[dict[str, Any]]:
    """Train and audit; yield one row an observer."""
    for task in tasks:
        for defence in defences:
            with tempfile.TemporaryDirectory() as folder:
                run = ffm.load(EXAMPLES / f"{task}.toml", DEFENCES[defence], runs=Path(folder))
                trained = run.start()
                began = time.perf_counter()
                audit = audit_run(trained.folder, budget=budget).audit
                assert audit is not None
                wall = time.perf_counter() - began
            yield from rows(audit, task=task, defence=defence, wall=wall)


def joined(files: list[Path]) -> Iterator[dict[str, Any]]:
    """Yield the rows of earlier runs from the last line of their output."""
    for file in files:
        yield from json.loads(file.read_text(encoding="utf-8").strip().splitlines()[-1])["rows"]


def rows(audit: AuditSummary, *, task: str, defence: str, wall: float) -> Iterator[dict[str, Any]]:
    """Sum up an audit: for each observer what leaked, what did not with a passed control, and what stayed
    open.
    """
    for observer in dict.fromkeys(item.observer for item in audit.findings):
        mine = [item for item in audit.findings if item.observer == observer]
        yield {
            "task": task,
            "defence": defence,
            "observer": observer,
            "point": mine[0].point,
            "budget": audit.budget,
            "leaked": [_told(item) for item in mine if item.verdict == "leaked"],
            "not_leaked": [_told(item) for item in mine if item.verdict == "not leaked"],
            "inconclusive": sum(
                item.verdict == "inconclusive" and item.measure != "not run" for item in mine
            ),
            "not_run": sum(item.measure == "not run" for item in mine),
            "not_applicable": sum(item.verdict == "not applicable" for item in mine),
            "epsilon_lower": audit.epsilon_lower,
            "cpu_seconds": round(audit.cpu_seconds, 1),
            "wall_seconds": round(wall, 1),
        }


def _told(item: Any) -> str:
    without = "" if item.observed is None else f", as observed {item.observed:.2f}"
    reached = "nothing found" if item.score is None else f"{item.measure} {item.score:.2f}"
    control = "" if item.control is None else f", control {item.control:.2f}"
    return f"{item.attack} ({reached}{control}{without})"


def line(row: Mapping[str, Any]) -> str:
    """Write one row of the table."""
    rest = f"{row['inconclusive']} / {row['not_run']} / {row['not_applicable']}"
    cells = (
        row["task"],
        row["defence"],
        f"{row['observer']}, {row['point']}",
        "; ".join(row["leaked"]) or "nothing",
        "; ".join(row["not_leaked"]) or "none",
        rest,
        f"{row['cpu_seconds']:.0f} / {row['wall_seconds']:.0f}",
    )
    return f"| {' | '.join(cells)} |"


HEAD = (
    "| run | defence | observer, what it sees | leaked | not leaked, control passed | "
    "inconclusive / not tried / not applicable | CPU / wall seconds |\n|---|---|---|---|---|---|---|"
)


INTRODUCTION = """# Four audits

The runs of `examples/audit/`, seed 7, tiny models built in code, each trained and audited four times with
nothing changed but the defence. A number is the attack's score, cheap attacks the mean over draws of
records and noise; *control* is the same attack on the undefended step, *as observed* the same attack on
what the whole round really sends, with nothing granted. Attacks whose control fails prove nothing and are
only counted. Seconds are those of the audit alone, which both observers share.
"""


def page(table: list[dict[str, Any]]) -> str:
    """Write the documentation's page: one table a budget."""
    parts = [INTRODUCTION]
    for budget in dict.fromkeys(row["budget"] for row in table):
        own = [row for row in table if row["budget"] == budget]
        slowest = max(row["wall_seconds"] for row in own)
        parts += [
            f"## Budget {budget}",
            "",
            (
                f"The slowest of the {len({(row['task'], row['defence']) for row in own})} audits took "
                f"{slowest:.0f} seconds of wall time."
            ),
            "",
            f"```\npython -m benchmarks.four_audits --budget {budget} --json\n```",
            "",
            HEAD,
            *map(line, own),
            "",
        ]
    return "\n".join(parts)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--quick", action="store_true", help="one run and two defences, for smoke use")
    parser.add_argument("--budget", default="quick", choices=("quick", "standard"))
    parser.add_argument("--task", action="append", choices=("text", "picture"))
    parser.add_argument("--defence", action="append", choices=tuple(DEFENCES), help="audit this one alone")
    parser.add_argument("--page", type=Path, help="write the table as a Markdown page")
    parser.add_argument(
        "--join", type=Path, nargs="+", metavar="FILE", help="take rows from stored outputs, run nothing"
    )
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tasks = tuple(options.task or (("text",) if options.quick else ("text", "picture")))
    defences = tuple(options.defence or (("none", "both") if options.quick else DEFENCES))
    print(HEAD, flush=True)
    table = []
    for row in joined(options.join) if options.join else audits(tasks, defences, options.budget):
        table.append(row)
        print(line(row), flush=True)
    if options.page is not None:
        options.page.write_text(page(table))
    if options.json:
        print(json.dumps({"rows": table, "torch": torch.__version__, "machine": platform.machine()}))


if __name__ == "__main__":
    main()
