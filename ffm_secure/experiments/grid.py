"""A grid of runs from one file: every cell is an ordinary run file with some keys varied; what is finished is
not run again.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

from defenses.dp import Ledger
from ffm_secure.queries import agenda
from ffm_secure.api import Run, place
from ffm_secure.config import run_file
from ffm_secure.engines import simulation
from ffm_secure.errors import ConfigError, FfmError, StoreError
from ffm_secure.experiments import grid_cost
from ffm_secure.experiments import grid_report as page
from ffm_secure.experiments import grid_summary as experiments_summary
from ffm_secure.experiments.grid_file import Cell, load
from ffm_secure.experiments.grid_report import Row
from ffm_secure.privacy.accounts import holds_other_rows
from ffm_secure.records import RunSummary
from ffm_secure.report import document as report
from ffm_secure.storage.durable import create_folder, write_atomic
from ffm_secure.storage.run_directory import Store, changed_rows

__all__ = ["finished", "load", "row_of", "run"]


def run(
    path: Path,
    *,
    out: Path,
    quick: bool = False,
    jobs: int = 1,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Path, dict[str, Any]]:
    """Run what is missing of a grid, `jobs` cells at once, and write its results; return the page and the
    results.

    Before the first run it says what the private ones cost the rows they share, together.

    Guarantee: a finished run is read, not repeated; an interrupted one continues where it stopped;
    `results.json`, `report.html`, `results.md` and `results.svg` are written anew after every run, so an
    interrupted grid leaves the table of what it has.
    """
    if jobs < 1:
        raise ConfigError("experiment", [f"--jobs = {jobs}: must be at least 1"])
    experiment, cells = load(path, quick=quick)
    folder = out / experiment.name
    create_folder(folder / "runs")
    base = path.resolve().parent
    costs = grid_cost.costs_of(cells, base)
    for cost in costs:
        say(cost.words())

    def made(number: int) -> Run:
        return place(
            cells[number].config, base=base, runs=folder / "runs"
        )  # anew each time: a run holds its model

    rows: dict[int, Row] = {}
    results: dict[str, Any] = {}
    for number, summary, known in _summaries(made, len(cells), jobs=jobs):
        rows[number] = row_of(cells[number], summary)
        shown = f"{summary.metric_name} {summary.metric_final:.4f}"
        name = cells[number].config.name
        say(
            f"{len(rows)}/{len(cells)} {name}: {shown}{' (known)' if known else f', {summary.seconds:.0f} s'}"
        )
        if not rows[number].whole:
            say(_stopped(rows[number], rounds=agenda.rounds(cells[number].config)))
        results = page.results(
            name=experiment.name,
            about=experiment.about,
            command=f"ffm-secure experiment {path.name}{' --quick' if quick else ''}",
            rows=[rows[index] for index in sorted(rows)],
            wanted=len(cells),
            compare=experiment.compare,
            references=experiment.references,
            costs=[grid_cost.as_table(cost) for cost in costs],
        )
        _write(folder, results)
    return folder / "report.html", results


def _stopped(row: Row, *, rounds: int) -> str:
    """Say that a run is no result: to continue it would meet the same empty budget."""
    ended = f"{row.run}: {row.status} after {len(row.curve)} of {rounds} rounds"
    return f"{ended}, left out of means and differences"


def _write(folder: Path, results: dict[str, Any]) -> None:
    for name, text in (
        ("results.json", page.to_json(results)),
        ("report.html", page.to_html(results)),
        ("results.md", experiments_summary.to_markdown(results)),
        ("results.svg", experiments_summary.to_svg(results)),
    ):
        write_atomic(folder / name, text.encode())


def _summaries(
    run_at: Callable[[int], Run], count: int, *, jobs: int
) -> Iterator[tuple[int, RunSummary, bool]]:
    """Yield number, summary, and whether it was known: first what is finished, then each cell as it ends."""
    missing, rows = [], Rows()
    for number in range(count):
        summary = finished(run_at(number), rows)
        if summary is None:
            missing.append(number)
        else:
            yield number, summary, True
    if jobs == 1 or len(missing) < 2:
        for number in missing:
            yield (
                number,
                run_at(number).start(fairness=False, complete=False).summary,
                False,
            )  # a grid compares runs, not clients
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_end_with_parent) as pool:
        work = {}
        for number in missing:
            work[pool.submit(_start, *_words(run_at(number)), threads)] = number
        try:
            for future in as_completed(work):
                run = run_at(work[future])
                problem, summary = future.result(), finished(run, rows)
                if problem or summary is None:
                    raise FfmError(
                        f"{run.folder.name}: {problem or 'was stopped; the same command continues it'}"
                    )
                yield work[future], summary, False
        finally:
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Let a worker end when the command that started it was killed: it would hold the folder of its cell for
    nothing.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:

        def wait_and_end() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=wait_and_end, daemon=True).start()


def _words(run: Run) -> tuple[str, str, str]:
    """Write a run as the words another process makes it from."""
    return run_file.dump(run.config), str(run.base), str(run.folder.parent)


def _start(text: str, base: str, runs: str, threads: int) -> str:
    """Run one cell in a process of its own, from the text of its run file;
    return what went wrong, in words.
    """
    import torch

    torch.set_num_threads(threads)
    try:
        table = tomllib.loads(text)
        Run(run_file.from_table(table), base=Path(base), runs=Path(runs)).start(
            fairness=False, complete=False
        )
    except FfmError as error:
        return str(error) or type(error).__name__
    return ""


def finished(run: Run, rows: Rows) -> RunSummary | None:
    """Return the summary of a run that has ended, at its last round or where its budget did; None if it has
    to go on.

    Raises:
      StoreError: its folder holds a run of other settings, or of rows that have changed.
    """
    if not report.is_there(run.folder):
        return None
    stored = Store.read(run.folder).config()
    if replace(stored, speed=run.config.speed, document=run.config.document) != run.config:
        raise StoreError(f"{run.folder}: holds a run with other settings; give another --out")
    rows.require(run)
    summary = report.read(run.folder)
    return summary if summary.status != "interrupted" else None


class Rows:
    """Hold the rows of finished runs against those that their run files mean now; every data set is read
    once.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], simulation.Contents] = {}

    def require(self, run: Run) -> None:
        """Refuse a finished run whose rows have changed since; its figure would stand for other data.

        A run of before digests were noted is known by its own ledger, which names the training rows alone.
        """
        stored, now = Store.read(run.folder).contents(), self._of(run)
        if stored and stored not in (now.digests, now.bare):
            raise StoreError(f"{run.folder}: {changed_rows(stored, now.digests)}")
        own = run.folder / "ledger.sqlite"
        if not stored and own.is_file():
            ledger = Ledger.open(own, create=False)
            try:
                if holds_other_rows(ledger, now.account):
                    raise StoreError(f"{run.folder}: {changed_rows('data:', '')}")
            finally:
                ledger.close()

    def _of(self, run: Run) -> simulation.Contents:
        task = run.config.task
        public = run.config.federation.lifecycle.public_data
        key = (task.data, task.kind, task.text_column, task.label_column, public)
        contents = self._known.get(key)
        if contents is None:
            contents = simulation.contents(run.config, run.base)
            self._known[key] = contents
        return contents


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
