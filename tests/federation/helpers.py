"""Small complete runs for tests: a tiny real transformer, real data, real protocols."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffm_secure.cli import app as cli
from ffm_secure.config import run_file as config
from ffm_secure.config.run_file import RunConfig
from ffm_secure.engines import simulation
from ffm_secure.federation import Callback, TrainingResult, run
from ffm_secure.records import RoundPlan
from ffm_secure.server.rounds import plan_round
from ffm_secure.storage.run_directory import Store
from ffm_secure.transport.courier import Courier

ROOT = Path(__file__).resolve().parents[2]


def table(**sections: dict[str, Any]) -> dict[str, Any]:
    """Return a run of three rounds over four clients; keyword tables are merged into its sections."""
    base: dict[str, Any] = {
        "format": 1,
        "name": "test",
        "seed": 3,
        "task": {
            "kind": "image_classification",
            "data": "builtin:digits",
            "clients": 4,
            "evaluation_examples": 60,
        },
        "model": {"name": "builtin:tiny-vit", "trainable": {"kind": "lora", "rank": 2}},
        "federation": {
            "rounds": 3,
            "cohort": 4,
            "lifecycle": {"kind": "finetune", "local_steps": 2, "batch_size": 8, "learning_rate": 0.1},
        },
        "privacy": {"unit": "none", "reason": "test data"},
        "protection": {"kind": "none"},
    }
    for section, values in sections.items():
        if isinstance(values, dict) and section in base and "kind" not in values and "unit" not in values:
            base[section] = {**base[section], **values}
        else:
            base[section] = values
    base["privacy"] = {"ledger": "run", **base["privacy"]}
    return base


RECORD = {"unit": "record", "epsilon": 8.0, "delta": 1e-5, "clip_norm": 1.0, "noise": "seeded"}
CLIENT = {"unit": "client", "epsilon": 8.0, "delta": 1e-5, "clip_norm": 1.0, "noise": "seeded"}
SECAGG = {"kind": "secagg", "threshold": 3}


def make(**sections: Any) -> RunConfig:
    """Return the checked config of a small run."""
    return config.from_table(table(**sections))


def prepared(made: RunConfig) -> simulation.Prepared:
    """Load data and model."""
    return simulation.prepare(made, Path.cwd())


def train(made: RunConfig, folder: Path) -> tuple[simulation.Simulation, TrainingResult]:
    """Run the loop in a fresh folder."""
    ready = simulation.build(prepared(made), folder)
    return ready, finish(ready, folder)


def finish(
    ready: simulation.Simulation,
    folder: Path,
    *,
    courier: Courier | None = None,
    callback: Callback | None = None,
) -> TrainingResult:
    """Run the loop of a simulation to its end, or to its interruption."""
    with Store.open(folder, ready.config) as store:
        start = ready.begin(store)
        return run(ready.server, courier or ready.courier, store, start=start, callback=callback)


def first_plan(ready: simulation.Simulation) -> RoundPlan:
    """Return the plan of the first round."""
    state = ready.spec.strategy.start(ready.trainable.flatten().cpu())
    return plan_round(ready.server, 1, state)


def charge_everybody(ready: simulation.Simulation) -> None:
    """Let every site pay for the first round, as if the process had died right after."""
    for site in ready.sites:
        site.ledger.reserve(first_plan(ready))


@dataclass(frozen=True, kw_only=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def call(*words: str, cwd: Path = ROOT) -> Done:
    """Run the command line's own entry point, in this process: what is printed, and the exit code."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    old_words, old_place = sys.argv, Path.cwd()
    try:
        sys.argv = ["ffm-secure", *words]
        os.chdir(cwd)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    finally:
        sys.argv = old_words
        os.chdir(old_place)
    return Done(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())
