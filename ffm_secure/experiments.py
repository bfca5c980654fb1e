"""A grid of runs from one file: every cell is an ordinary run file with some keys varied; what is finished is not run again."""

from __future__ import annotations

import copy
import itertools
import multiprocessing
import os
import re
import threading
import tomllib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ffm_secure import config as run_file
from ffm_secure import experiments_report as page
from ffm_secure import experiments_summary, plan, report
from ffm_secure.config import RunConfig
from ffm_secure.errors import ConfigError, FfmError, PlanRefused, StoreError
from ffm_secure.experiments_report import Row
from ffm_secure.run import Run, place
from ffm_secure.schema import Problems, option, parse_toml, read_table, set_value
from ffm_secure.store import Store, write_atomic
from ffm_secure.types import RunSummary

_LABEL = r"[^=,]{1,60}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """One value of an axis: a label for the table, and what it changes in the run file."""

    label: str = option(pattern=_LABEL, help="1 to 60 characters, no comma, no equals sign")
    set: tuple[str, ...] = option((), help="section.key=value, as with --set")


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One thing that is varied."""

    name: str = option(pattern=_LABEL, help="1 to 60 characters, no comma, no equals sign")
    values: tuple[Value, ...] = option(help="at least one [[axes.values]] with a label")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quick:
    """What `--quick` runs instead of the whole: fewer cells, fewer seeds, other settings."""

    seeds: tuple[int, ...] = option((1,), minimum=0)
    set: tuple[str, ...] = option(())
    only: tuple[str, ...] = option((), help="axis=label; of an axis named here only these labels are run")


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """A grid: all combinations of the axes, each with every seed."""

    format: int = option(choices=(1,))
    name: str = option(pattern=r"[A-Za-z0-9][A-Za-z0-9._-]{0,40}", help="letters, digits, dot, dash, underscore")
    about: str = option("", help="the question the grid answers")
    seeds: tuple[int, ...] = option(minimum=0, help="one run of every cell for each")
    run: dict = option(help="a whole run file; name and seed are set by the grid")  # type: ignore[type-arg]
    axes: tuple[Axis, ...] = option(help="at least one [[axes]]")
    compare: str = option("", help="the axis whose labels are compared in pairs")
    references: tuple[str, ...] = option((), help="labels of that axis that the others are compared with")
    skip: tuple[str, ...] = option((), help="axis=label,axis=label: combinations left out")
    quick: Quick = option(Quick())


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run of a grid."""

    labels: tuple[tuple[str, str], ...]  # (axis, label)
    seed: int
    config: RunConfig


def load(path: Path, *, quick: bool = False) -> tuple[Experiment, tuple[Cell, ...]]:
    """Read a grid and check every one of its run files before the first is run.

    Raises:
      ConfigError: with every problem of the grid, or of every cell, at once.
    """
    problems = Problems()
    table = parse_toml(path)
    experiment = read_table(Experiment, table, "", problems)
    if experiment is not None and not problems:
        _check(experiment, problems)
    if experiment is None or problems:
        raise ConfigError(str(path), list(problems))
    if quick:
        experiment = replace(experiment, name=f"{experiment.name}-quick", seeds=experiment.quick.seeds)
    cells: list[Cell] = []
    refused: dict[str, list[str]] = {}  # a mistake in the shared part is one mistake, however many cells have it
    for labels, sets in _combinations(experiment, quick=quick):
        for seed in experiment.seeds:
            try:
                cells.append(Cell(labels=labels, seed=seed, config=_configure(experiment, labels, sets, seed)))
            except (ConfigError, PlanRefused) as error:
                for problem in error.problems if isinstance(error, ConfigError) else error.reasons:
                    refused.setdefault(problem, []).append(_name(labels, seed))
    for problem, where in refused.items():
        more = f" and {len(where) - 1} more" if len(where) > 1 else ""
        problems.append(f"{where[0]}{more}: {problem}")
    names = [cell.config.name for cell in cells]
    if not problems and len(set(names)) < max(1, len(names)):
        problems.add("axes", len(names), "no cell is left, or labels differ only in what a folder name cannot hold")
    if problems:
        raise ConfigError(str(path), list(problems))
    return experiment, tuple(cells)


def _check(experiment: Experiment, problems: Problems) -> None:
    known = {axis.name: {value.label for value in axis.values} for axis in experiment.axes}
    for name, values in (
        ("seeds", experiment.seeds),
        ("axes", experiment.axes),
        *((a.name, a.values) for a in experiment.axes),
    ):
        if not values:
            problems.add(name, values, "must not be empty")
    if len(known) < len(experiment.axes) or any(len(known[a.name]) < len(a.values) for a in experiment.axes):
        problems.add("axes", sorted(known), "names of axes, and labels of an axis, must differ")
    if experiment.compare and experiment.compare not in known:
        problems.add("compare", experiment.compare, f"must be the name of an axis: {', '.join(known)}")
    for label in experiment.references:
        if label not in known.get(experiment.compare, ()):
            problems.add("references", label, f"must be a label of the axis {experiment.compare!r}")
    for text in (*experiment.skip, *experiment.quick.only):
        for axis, label in _pairs(text):
            if label not in known.get(axis, ()):
                problems.add(
                    "skip" if text in experiment.skip else "quick.only", text, "names no axis with such a label"
                )


def _pairs(text: str) -> list[tuple[str, str]]:
    parts = [part.partition("=") for part in text.split(",")]
    return [(axis.strip(), label.strip()) for axis, _, label in parts]


def _combinations(experiment: Experiment, *, quick: bool) -> list[tuple[tuple[tuple[str, str], ...], tuple[str, ...]]]:
    """List the cells of the grid, without seeds: labels, and what they set."""
    only = [pair for text in experiment.quick.only for pair in _pairs(text)] if quick else []
    kept = []
    for axis in experiment.axes:
        named = {label for name, label in only if name == axis.name}
        kept.append([(axis.name, value) for value in axis.values if not named or value.label in named])
    found = []
    for chosen in itertools.product(*kept):
        labels = tuple((name, value.label) for name, value in chosen)
        if any(set(_pairs(text)) <= set(labels) for text in experiment.skip):
            continue
        sets = [override for _, value in chosen for override in value.set]
        found.append((labels, (*sets, *(experiment.quick.set if quick else ()))))
    return found


def _configure(experiment: Experiment, labels: Any, sets: Sequence[str], seed: int) -> RunConfig:
    table, problems, name = copy.deepcopy(experiment.run), Problems(), _name(labels, seed)
    for override in sets:
        set_value(table, override, problems)
    table |= {"format": 1, "name": name, "seed": seed}
    made = run_file.from_table(table, where=name, problems=problems)
    plan.check(made)
    return made


def _name(labels: Sequence[tuple[str, str]], seed: int) -> str:
    words = [re.sub(r"[^A-Za-z0-9]+", "-", label).strip("-").lower()[:20] or "x" for _, label in labels]
    return f"{'_'.join(words)}_s{seed}"[:80]


def run(
    path: Path, *, out: Path, quick: bool = False, jobs: int = 1, say: Callable[[str], None] = lambda line: None
) -> tuple[Path, dict[str, Any]]:
    """Run what is missing of a grid, `jobs` cells at once, and write its results; return the page and the results.

    Guarantee: a finished run is read, not repeated; an interrupted one continues where it stopped; `results.json`, `report.html`,
    `results.md` and `results.svg` are written anew after every run, so an interrupted grid leaves the table of what it has.
    """
    if jobs < 1:
        raise ConfigError("experiment", [f"--jobs = {jobs}: must be at least 1"])
    experiment, cells = load(path, quick=quick)
    folder = out / experiment.name
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    base = path.resolve().parent

    def made(number: int) -> Run:
        return place(cells[number].config, base=base, runs=folder / "runs")  # anew each time: a run holds its model

    rows: dict[int, Row] = {}
    results: dict[str, Any] = {}
    for number, summary, known in _summaries(made, len(cells), jobs=jobs):
        rows[number] = row_of(cells[number], summary)
        shown = f"{summary.metric_name} {summary.metric_final:.4f}"
        name = cells[number].config.name
        say(f"{len(rows)}/{len(cells)} {name}: {shown}{' (known)' if known else f', {summary.seconds:.0f} s'}")
        results = page.results(
            name=experiment.name,
            about=experiment.about,
            command=f"ffm-secure experiment {path.name}{' --quick' if quick else ''}",
            rows=[rows[index] for index in sorted(rows)],
            wanted=len(cells),
            compare=experiment.compare,
            references=experiment.references,
        )
        _write(folder, results)
    return folder / "report.html", results


def _write(folder: Path, results: dict[str, Any]) -> None:
    for name, text in (
        ("results.json", page.to_json(results)),
        ("report.html", page.to_html(results)),
        ("results.md", experiments_summary.to_markdown(results)),
        ("results.svg", experiments_summary.to_svg(results)),
    ):
        write_atomic(folder / name, text.encode())


def _summaries(made: Callable[[int], Run], count: int, *, jobs: int) -> Iterator[tuple[int, RunSummary, bool]]:
    """Yield number, summary, and whether it was known: first what is finished, then each cell as it ends."""
    missing = []
    for number in range(count):
        summary = finished(made(number))
        if summary is None:
            missing.append(number)
        else:
            yield number, summary, True
    if jobs == 1 or len(missing) < 2:
        for number in missing:
            yield number, made(number).start(fairness=False).summary, False  # a grid compares runs, not clients
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_end_with_parent) as pool:
        work = {pool.submit(_start, *_words(made(number)), threads): number for number in missing}
        try:
            for future in as_completed(work):
                run = made(work[future])
                problem, summary = future.result(), finished(run)
                if problem or summary is None:
                    raise FfmError(f"{run.folder.name}: {problem or 'was stopped; the same command continues it'}")
                yield work[future], summary, False
        finally:
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Let a worker end when the command that started it was killed: it would hold the folder of its cell for nothing."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _words(run: Run) -> tuple[str, str, str]:
    """Write a run as the words another process makes it from."""
    return run_file.dump(run.config), str(run.base), str(run.folder.parent)


def _start(text: str, base: str, runs: str, threads: int) -> str:
    """Run one cell in a process of its own, from the text of its run file; return what went wrong, in words."""
    import torch

    torch.set_num_threads(threads)
    try:
        table = tomllib.loads(text)
        Run(run_file.from_table(table), base=Path(base), runs=Path(runs)).start(fairness=False)
    except FfmError as error:
        return str(error) or type(error).__name__
    return ""


def finished(made: Run) -> RunSummary | None:
    """Return the summary of a run that has ended, None if it has to be run or continued.

    Raises:
      StoreError: its folder holds a run of other settings.
    """
    if not (made.folder / "report.json").is_file():
        return None
    if replace(Store.read(made.folder).config(), speed=made.config.speed) != made.config:
        raise StoreError(f"{made.folder}: holds a run with other settings; remove it, or give another --out")
    summary = report.from_json((made.folder / "report.json").read_text())
    return summary if summary.status != "interrupted" else None


def row_of(cell: Cell, summary: RunSummary) -> Row:
    """Keep what the table and the charts of a grid need of one run."""
    return Row(
        labels=cell.labels,
        seed=cell.seed,
        run=cell.config.name,
        status=summary.status,
        metric_name=summary.metric_name,
        higher_is_better=summary.higher_is_better,
        metric=summary.metric_final,
        before=summary.metric_zero_round,
        majority=summary.metric_majority,
        curve=tuple(record.metric for record in summary.rounds),
        phases=tuple(record.phase for record in summary.rounds),
        epsilon=summary.statements[0].epsilon,
        bytes_up=sum(record.bytes_up for record in summary.rounds),
        numbers_sent=summary.plan.bytes_up_per_client_round,
        seconds=summary.seconds,
    )
