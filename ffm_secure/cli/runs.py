"""List runs, or compare some: what each reached, what it spent, and the settings they differ in."""

from __future__ import annotations

import json as json_module
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from ffm_secure.display.console import console, print_json
from ffm_secure.config import run_file
from ffm_secure.config.schema import to_table
from ffm_secure.errors import ConfigError, StoreError
from ffm_secure.foreign import JsonValue
from ffm_secure.record_codec import read_json
from ffm_secure.quantities import bound, metric
from ffm_secure.queries import agenda
from ffm_secure.record_codec import read_regular


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLine:
    """Hold what a table shows of one run; empty where it has no report yet."""

    name: str
    folder: str
    status: str
    rounds: int
    planned_rounds: int
    metric_name: str = ""
    metric: float | None = None
    best: float | None = None
    epsilon: float | str | None = None
    settings: Mapping[str, Any]


def runs(folders: tuple[Path, ...], *, under: Path, json: bool) -> None:
    """Print a line for each run, and for named runs the settings that are not the same.

    Raises:
      StoreError: a named folder holds no run, or there is none at all.
    """
    chosen = folders or tuple(sorted(path.parent for path in under.glob("*/run.toml")))
    if not chosen:
        raise StoreError(f"{under}: holds no runs; name the folder with --runs")
    read = []
    for folder in chosen:
        read.append(read_run(folder))
    if folders:
        different = differences([line.settings for line in read])
    else:
        different = {}
    if json:
        shown = []
        for line in read:
            shown.append(
                {key: getattr(line, key) for key in RunLine.__dataclass_fields__ if key != "settings"}
            )
        print_json({"runs": shown, "differences": different})
        return
    console.print(_table(read))
    if different:
        console.print(_differences(read, different))


def read_run(folder: Path) -> RunLine:
    """Read one run directory: its settings, its rounds, and its report where there is one.

    Raises:
      StoreError: it is no run directory, or a file of it is damaged.
    """
    if not (folder / "run.toml").is_file():
        raise StoreError(f"{folder}: is not a run directory (no run.toml)")
    try:
        config = run_file.load(folder / "run.toml")
    except ConfigError as error:
        raise StoreError(f"{folder}: run.toml is damaged\n{error}") from None
    rounds = _rounds(folder / "rounds.jsonl")
    metrics = []
    for item in rounds:
        if _is_number(item.get("metric")):
            metrics.append(float(item["metric"]))
    report = _report(folder / "report.json")
    worse = report.get("higher_is_better") is False
    statements = report.get("statements") or [{}]
    return RunLine(
        name=config.name,
        folder=str(folder),
        status=str(report.get("status", "unfinished")),
        rounds=len(rounds),
        planned_rounds=agenda.rounds(config),
        metric_name=str(rounds[-1].get("metric_name", "")) if rounds else "",
        metric=metrics[-1] if metrics else None,
        best=(min if worse else max)(metrics, default=None),
        epsilon=statements[0].get("epsilon"),
        settings=flat(to_table(config)),
    )


def _rounds(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        rounds: list[dict[str, Any]] = []
        for line in read_regular(path).decode().splitlines():
            if line.strip():
                rounds.append(json_module.loads(line))
        return rounds
    except (OSError, ValueError, RecursionError):
        raise StoreError(f"{path}: is damaged") from None


def _report(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = read_json(path)
    except (OSError, ValueError):
        raise StoreError(f"{path}: is damaged; write it anew with ffm-secure report") from None
    if isinstance(value, dict):
        return value
    return {}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Name every setting by its dotted path.

    >>> flat({"task": {"kind": "x"}, "seed": 7})
    {'task.kind': 'x', 'seed': 7}
    """
    settings: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            settings |= flat(value, f"{prefix}{key}.")
        else:
            settings[f"{prefix}{key}"] = value
    return settings


def differences(settings: Sequence[Mapping[str, JsonValue]]) -> dict[str, list[JsonValue]]:
    """Return the settings that are not the same in all runs, with the value of each; names are no setting."""
    names = dict.fromkeys(name for run in settings for name in run)
    values = {}
    for name in names:
        if name != "name":
            values[name] = [run.get(name) for run in settings]
    differences: dict[str, list[JsonValue]] = {}
    for name, each in values.items():
        if any(value != each[0] for value in each):
            differences[name] = each
    return differences


def _table(read: Sequence[RunLine]) -> Table:
    table = Table("run", "status", "rounds", "metric", "last", "best", "epsilon", box=None, pad_edge=False)
    for line in read:
        progress = f"{line.rounds} of {line.planned_rounds}"
        spent = bound(line.epsilon) if isinstance(line.epsilon, float) else str(line.epsilon or "")
        numbers = (metric(line.metric), metric(line.best), spent)
        table.add_row(line.name, line.status, progress, line.metric_name, *numbers)
    return table


def _differences(read: Sequence[RunLine], different: Mapping[str, Sequence[Any]]) -> Table:
    table = Table("setting", *(line.name for line in read), box=None, pad_edge=False)
    for name, values in different.items():
        table.add_row(name, *map(str, values))
    return table
