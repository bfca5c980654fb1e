"""What the commands on runs do: call the library, print for people or for machines."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

from rich.table import Table

from ffm_secure import record_codec
from ffm_secure.api import Result, load
from ffm_secure.cli import doctor as checkup
from ffm_secure.cli.audit_table import audit_lines
from ffm_secure.display.console import clear_errors, console, print_json, print_lines, say
from ffm_secure.cli.data_check import data_check
from ffm_secure.cli.patience import patience
from ffm_secure.display.progress import AuditBar, Bars
from ffm_secure.data import checks
from ffm_secure.errors import BudgetExhausted, ConfigError, FfmError, LeakFound, StoreError
from ffm_secure.privacy.statements import SEEDED
from ffm_secure.quantities import INFINITE, bound, metric, size, small
from ffm_secure.queries import agenda
from ffm_secure.records import PlannedQuery, PlanSummary, PrivacyStatement
from ffm_secure.report import outcome
from ffm_secure.storage.run_directory import Store
from ffm_secure.tracking.trackers import require_trackers

_KNOWN = (
    "this run is complete: {rounds} rounds; nothing was trained or charged. To go on: --set "
    "federation.rounds=N with a larger N; to attack it again: ffm-secure audit {folder}"
)


def plan(file: Path, overrides: tuple[str, ...], *, json: bool) -> None:
    """Print the plan of a run file."""
    with clear_errors():
        planned = load(file, overrides)
        described, check = planned.plan(), data_check(planned)
    lines = [*_plan_lines(described), "", *checks.lines(check)]
    answer: dict[str, object] = {**record_codec.encode(described), "data_check": check}
    say(answer, lines, json=json)


def run(
    file: Path,
    overrides: tuple[str, ...],
    *,
    runs: Path,
    json: bool,
    quiet: bool,
    track: tuple[str, ...] = (),
    track_to: Path | None = None,
) -> None:
    """Train, audit if the run file asks for it, write the report."""
    require_trackers(track)
    with clear_errors():
        started = load(file, overrides, runs=runs)
        silent = quiet or json
        described = started.plan()
        if not silent:
            print_lines([*_plan_lines(described), "", *checks.lines(data_check(started)), ""])
        budget = started.config.privacy.epsilon
        with (
            patience() as should_stop,
            Bars(rounds=agenda.rounds(started.config), budget=budget, quiet=silent) as bars,
        ):
            result = started.start(callback=bars, should_stop=should_stop, track=track, track_to=track_to)
        if result.known and not silent:
            print_lines([_KNOWN.format(rounds=len(result.summary.rounds), folder=result.folder)])
        if started.config.audit.observers and result.summary.rounds and result.summary.audit is None:
            from ffm_secure.auditing.run_audit import audit_run

            if not silent:
                console.print(f"auditing ({started.config.audit.budget}) ...")
            with AuditBar(quiet=silent) as bar:
                summary = audit_run(result.folder, budget=started.config.audit.budget, watch=bar.watch)
            result = dataclasses.replace(result, summary=summary)
    say(_result_table(result), _result_lines(result), json=json, quiet=quiet)
    if result.summary.status == "budget exhausted":
        raise BudgetExhausted(
            "the privacy budget ended the run before its last round; what was trained is kept"
        )
    if outcome.all_aborted(result.summary):
        raise FfmError(
            f"every round was aborted, so nothing was learned: {result.summary.rounds[0].aborted}; "
            "what was charged stays spent"
        )


_ONE_OF = (
    "give a run directory, --observation FOLDER for somebody's update, or --model FOLDER with --members or "
    "--secrets for a released model, exactly one of them"
)


def experiment(file: Path, *, out: Path, quick: bool, jobs: int, json: bool, quiet: bool) -> None:
    """Run what is missing of a grid; write its table and curves."""
    from ffm_secure.experiments import grid as experiments

    if json or quiet:
        shown = lambda line: None
    else:
        shown = console.print
    with clear_errors():
        html, summary = experiments.run(file, out=out, quick=quick, jobs=jobs, say=shown)
    say(summary, [f"table and curves: {html}"], json=json, quiet=quiet)
    if summary["stopped"]:
        names = ", ".join(item["run"] for item in summary["stopped"])
        raise BudgetExhausted(
            f"not complete: {names}; run the grid anew with another --out, or with more budget"
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A stored observation, its model folder, what its client trained on, and unused records."""

    observation: Path | None
    model: Path | None = None
    adapter: Path | None = None
    truth: Path | None = None
    unused: Path | None = None
    out: Path | None = None


def audit(
    folder: Path | None, observed: Seen, *, budget: str, fail_on_leak: bool, json: bool, quiet: bool
) -> None:
    """Attack a run, or a stored observation of any system."""
    from ffm_secure.auditing.run_audit import audit_run
    from ffm_secure.auditing.standalone import audit_observation
    from ffm_secure.report.document import write_audit

    if (folder is None) == (observed.observation is None):
        raise ConfigError("audit", [_ONE_OF])
    if folder is not None and (observed.model or observed.adapter or observed.truth or observed.unused):
        belong = "--model, --adapter, --truth and --unused belong to --observation; a run knows its own"
        raise ConfigError("audit", [belong])
    if folder is not None and observed.out is not None:
        raise ConfigError("audit", ["--out belongs to --observation; a run's report lies in its directory"])
    if observed.out is not None and observed.out.exists():
        raise ConfigError("audit", [f"--out = {observed.out}: exists, must be a new folder"])
    if observed.adapter is not None and observed.model is None:
        raise ConfigError("audit", ["--adapter needs --model, the model it adapts"])
    if budget not in ("quick", "standard", "exhaustive"):
        raise ConfigError(
            "audit", [f"--budget = {budget!r}: must be one of 'quick', 'standard', 'exhaustive'"]
        )
    with clear_errors(), AuditBar(quiet=quiet or json) as bar:
        if folder is not None:
            summary = audit_run(folder, budget=budget, watch=bar.watch).audit
        else:
            assert observed.observation is not None
            summary = audit_observation(
                observed.observation,
                model=observed.model,
                adapter=observed.adapter,
                truth=observed.truth,
                unused=observed.unused,
                budget=budget,
                watch=bar.watch,
            )
    assert summary is not None
    if observed.out is not None and observed.observation is not None:
        with clear_errors():
            write_audit(summary, observed.out, name=observed.observation.name, notes=summary.notes)
    say(summary, [*audit_lines(summary), *_places(folder, observed)], json=json, quiet=quiet)
    if fail_on_leak and any(item.verdict == "leaked" for item in summary.findings):
        raise LeakFound("at least one attack recovered private data; see the findings above")


def _places(folder: Path | None, observed: Seen) -> list[str]:
    """Say where the report lies and which part of it must not leave."""
    place = folder or observed.out
    if place is None:
        return []
    return [f"  report   {place / 'report.html'}; scores and what was recovered: {place / 'internal.html'}"]


def ledger(folder: Path, *, owner: str, export: str, json: bool) -> None:
    """Verify a ledger and print it."""
    from ffm_secure.cli.ledger_table import ledger_lines, ledger_table, open_for_reading

    if export not in ("", "csv", "json"):
        raise ConfigError("ledger", [f"--export = {export!r}: must be 'csv' or 'json'"])
    with clear_errors():
        opened = open_for_reading(folder)
        opened.verify()
        if export:
            sys.stdout.write(opened.export("csv" if export == "csv" else "json"))
            return
        table = ledger_table(opened, owner=owner)
        if folder.is_dir() and Store.read(folder).config().privacy.noise == "seeded":
            table["stamp"] = SEEDED
    say(table, [*ledger_lines(table), *([table["stamp"]] if "stamp" in table else [])], json=json)


def report(folder: Path, *, internal: bool, json: bool) -> None:
    """Write the report of a run anew: what may leave, and if asked also what must not."""
    from ffm_secure.report import document as page

    with clear_errors():
        Store.read(folder).config()
        summary = page.read(folder)
        if internal and summary.view != "internal":
            raise StoreError(f"{folder}: holds only what was released; internal.json is not there")
        older = (
            summary.view == "internal" and not (folder / page.INTERNAL_DATA).is_file()
        )  # keep all it holds
        files = page.write(summary, folder, internal=internal or older)
    written = {path.name: str(path) for path in files}
    answer = {"html": written["report.html"], "json": written["report.json"], "files": list(written.values())}
    say(answer, [_file_line(name, path) for name, path in written.items()], json=json)


def _file_line(name: str, path: str) -> str:
    return f"{path}  INTERNAL: must not leave" if name.startswith("internal") else path


def doctor(*, json: bool) -> None:
    """Print what this machine offers."""
    examination = checkup.examine()
    if json:
        print_json(examination)
        return
    table = Table("what", "found", "", box=None, pad_edge=False)
    for item in examination["checks"]:
        table.add_row(item["name"], item["found"], "ok" if item["ok"] else item["advice"])
    console.print(table)
    if not examination["ok"]:
        raise FfmError("something this machine needs is missing; see above")


def _plan_lines(described: PlanSummary) -> list[str]:
    lines = [
        described.headline,
        "",
        f"  trains   {described.trains}",
        f"  sends    {described.sends}",
        f"  spends   {described.spends}",
        *(f"  asks     {asked_line(item)}" for item in described.queries),
    ]
    for index, (observer, content) in enumerate(described.reveals.items()):
        lines.append(f"  {'sees' if index == 0 else '':<8} {observer:<17} {content}")
    lines += [
        f"  breaks   {described.breaks}",
        *(f"  {_statement_line(item)}" for item in described.statements),
    ]
    for warning in described.warnings:
        lines.append(f"  warning  {warning}")
    return lines


def asked_line(item: PlannedQuery) -> str:
    """Say what one question sends and costs."""
    cost = f"epsilon {bound(item.epsilon)}" if math.isfinite(item.epsilon) else "no guarantee"
    times = "once" if item.asks == 1 else f"of {item.asks} cohorts, each once"
    if item.answers > 1:
        times = f"in {item.asks} rounds, every owner {item.answers} times"
    return (
        f"{item.query} {times}: {item.words}; {item.numbers:,} numbers, {size(item.bytes_up)} up; "
        f"{cost}, noise {item.noise_multiplier:.3f} x bound, of rows {item.rows}"
    )


def _statement_line(statement: PrivacyStatement) -> str:
    amount = f"{bound(statement.epsilon)} at delta {small(statement.delta)}" if statement.finite else INFINITE
    note = f" ({statement.note})" if statement.note else ""
    return (
        f"epsilon  {statement.observer:<17} {amount}; unit {statement.unit}; adjacency "
        f"{statement.adjacency}; "
        f"{statement.accountant}{note}"
    )


def _result_table(result: Result) -> dict[str, Any]:
    summary = result.summary
    return {
        "name": summary.name,
        "status": summary.status,
        "already_complete": result.known,
        "warnings": outcome.warnings(summary),
        "best_round": best.round if (best := outcome.best_round(summary)) else len(summary.rounds),
        "stamps": summary.stamps,
        "folder": str(result.folder),
        "report": str(result.folder / "report.html"),
        "rounds": len(summary.rounds),
        "metric_name": summary.metric_name,
        "metric": summary.metric_final,
        "metric_zero_round": summary.metric_zero_round,
        "metric_majority": summary.metric_majority,
        "classes": summary.classes,
        "loss": summary.rounds[-1].loss if summary.rounds else math.nan,
        "epsilon": summary.statements[0].epsilon,
        "delta": summary.statements[0].delta,
        "unit": summary.statements[0].unit,
        "budget": summary.budget_epsilon,
        "bytes_up": sum(record.bytes_up for record in summary.rounds),
        "bytes_down": sum(record.bytes_down for record in summary.rounds),
        "noise_multiplier": summary.plan.noise_multiplier,
        "trainable_parameters": summary.plan.trainable_parameters,
        "round_seconds": sum(record.seconds for record in summary.rounds),
        "client_seconds": sum(record.client_seconds for record in summary.rounds),
        "seconds": summary.seconds,
        "audit": summary.audit,
    }


def _result_lines(result: Result) -> list[str]:
    summary = result.summary
    majority = "" if summary.metric_majority is None else f", majority {metric(summary.metric_majority)}"
    lines = [
        "",
        *(f"  {stamp}" for stamp in summary.stamps),
        *(f"  {warning}" for warning in outcome.warnings(summary)),
        f"  {summary.metric_name} {metric(summary.metric_final)} (before training "
        f"{metric(summary.metric_zero_round)}{majority})",
        f"  {_statement_line(summary.statements[0])}",
    ]
    if summary.classes is not None:
        lines.insert(-1, f"  {outcome.class_line(summary.classes)}")
    best = outcome.best_round(summary)
    if best is not None:
        place = f"kept in {result.folder / 'best' / 'adapter'}; adapter/ holds the last"
        lines.append(
            f"  best     {summary.metric_name} {metric(best.metric)} after round {best.round}, {place}"
        )
    lines += audit_lines(summary.audit) if summary.audit else []
    return [*lines, f"  report   {result.folder / 'report.html'}"]
