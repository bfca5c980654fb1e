"""Play each observer against a run: the same update at every point of its way, each attack with its control."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import cast

from attacks.registry import ATTACKS
from ffm_secure.auditing import cohorts
from ffm_secure.auditing import replayed as client_replay
from ffm_secure.auditing.budget import AuditBudget
from ffm_secure.auditing.findings import Ran, run_attacks
from ffm_secure.auditing.leak_curves import leak_curves, place_on_curves
from ffm_secure.auditing.lower_bound import bounds_over_rounds, curve_over_rounds, measured_how, strongest
from ffm_secure.auditing.step import CANDIDATES, with_draws
from ffm_secure.auditing.wording import decoder, sentence
from ffm_secure.engines import simulation
from ffm_secure.errors import ConfigError, StoreError
from ffm_secure.records import (
    AuditSummary,
    Observer,
    RunSummary,
)
from ffm_secure.report import document as report
from ffm_secure.storage.run_directory import Store


def audit_run(folder: Path, *, budget: str = "quick") -> RunSummary:
    """Attack a finished run and write the findings into its report.

    Raises:
      StoreError: the folder holds no finished run.
      ConfigError: the run file names an attack that does not exist.
    """
    summary = _read_summary(folder)
    config = Store.read(folder).config()
    if unknown := sorted(set(config.audit.attacks) - {"all", *ATTACKS}):
        raise ConfigError(
            "audit.attacks", [f"there is no attack {', '.join(unknown)}; `python -m attacks list` names them"]
        )
    began = time.process_time()
    prepared = simulation.prepare(config, Path.cwd(), folder)
    resumed = Store.read(folder).resume()
    if resumed is None:
        raise StoreError(f"{folder}: no round was finished, so there is nothing to audit")
    vector = client_replay.next_start(prepared, folder, *resumed)
    stages = [with_draws(prepared, vector, records) for records in (CANDIDATES, 1)]
    observers = cast("tuple[Observer, ...]", config.audit.observers or ("server", "public"))
    decode, ran = decoder(prepared.backbone.tokenizer), Ran()
    witnesses = [
        observer
        for observer in observers
        if observer in cohorts.WITNESSES
        and client_replay.seen_by(observer, config, stages[0].points) == "aggregated"
    ]
    # Who sees each update alone needs no rounds to tell whose it is.
    text = config.task.kind != "image_classification" and "all" in config.audit.attacks
    read = cohorts.read_rounds(prepared, stages[0].model, resumed[1], budget) if witnesses and text else None
    whose = {} if read is None else dict.fromkeys(witnesses[:1], cohorts.attribution_question(read))
    purse = AuditBudget(name=budget)
    findings, questions = run_attacks(stages, observers, config, purse, decode, ran, whose)
    bounds = bounds_over_rounds(prepared)
    last = bounds[max(bounds)] if bounds else ()
    audit = AuditSummary(
        budget=budget,
        cpu_seconds=time.process_time() - began,
        findings=findings,
        epsilon_lower=strongest(last).epsilon if last else None,
        epsilon_lower_method=measured_how(last, summary) if last else "",
        sentence=sentence(findings),
        questions=questions,
        curves=(
            *place_on_curves(leak_curves(stages[0], ran, budget), stages[0], prepared),
            *curve_over_rounds(bounds),
            *cohorts.with_curve(read),
        ),
    )
    audited = replace(summary, audit=audit)
    report.write(audited, folder)
    return audited


def _read_summary(folder: Path) -> RunSummary:
    try:
        return report.from_json((folder / "report.json").read_text())
    except OSError:
        raise StoreError(f"{folder}: has no report.json yet; finish the run first (ffm-secure run)") from None
    except ValueError as error:
        raise StoreError(f"{folder / 'report.json'}: is damaged: {error}") from None
