"""From the rows of a grid to a table with confidence intervals, paired differences and curves: pure, as JSON
and as one page.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.resources import files
from typing import Any

import numpy as np
from scipy import stats

from ffm_secure import record_codec
from ffm_secure.report.charts import Series, line_chart
from ffm_secure.quantities import figure, size
from ffm_secure.report.markup import Column, Html, table, tag

Labels = tuple[tuple[str, str], ...]  # (axis, label)
FORMAT = 1
CONFIDENCE = 0.95
_ROLES = ("first", "second", "quiet")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one run of a grid reached and cost."""

    labels: Labels
    seed: int
    run: str
    status: str
    metric_name: str
    higher_is_better: bool
    metric: float
    before: float
    majority: float | None
    curve: tuple[float, ...]
    phases: tuple[str, ...]
    epsilon: float
    bytes_up: int  # all clients and rounds
    numbers_sent: int  # bytes of one client in one round
    seconds: float

    @property
    def whole(self) -> bool:
        """Tell whether the run reached its last round; another's metric is that of less training."""
        return self.status == "complete"


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean over seeds with its two-sided 95 % t-interval; infinitely wide with one seed, not a number with
    none.
    """

    mean: float
    low: float
    high: float
    count: int


def interval(values: Sequence[float]) -> Interval:
    """Return mean and t-interval.

    Source: Student 1908; the interval assumes seeds are independent and their means roughly normal.

    >>> found = interval([0.8, 0.9, 1.0])
    >>> round(found.mean, 3), round(found.low, 3), round(found.high, 3)
    (0.9, 0.652, 1.148)
    """
    data = np.asarray(values, dtype=np.float64)
    mean = _mean(data)
    if len(data) < 2:
        return Interval(mean=mean, low=-math.inf, high=math.inf, count=len(data))
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(data) - 1) * data.std(ddof=1) / math.sqrt(len(data)))
    return Interval(mean=mean, low=mean - half, high=mean + half, count=len(data))


def _mean(values: Sequence[float] | np.ndarray) -> float:
    if len(values):
        return float(np.mean(values))
    return math.nan


def _relabelled(labels: Labels, axis: str, label: str) -> Labels:
    """Return the labels of the cell that differs on one axis alone."""
    return tuple((name, label if name == axis else value) for name, value in labels)


def results(
    *,
    name: str,
    about: str,
    command: str,
    rows: Sequence[Row],
    wanted: int,
    compare: str,
    references: Sequence[str],
    costs: Sequence[Mapping[str, object]] = (),
) -> dict[str, Any]:
    """Summarise a grid: one entry a cell, with the paired difference to every reference; and all rows behind
    it.

    Guarantee: a run that ended before its last round is in `rows` and in `stopped`, and in no mean,
    difference or count; the grid is not complete while there is one.
    """
    groups: dict[Labels, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.labels, []).append(row)
    cells = []
    for labels, rows_of_cell in groups.items():
        first = rows_of_cell[0]
        group = []
        for row in rows_of_cell:
            if row.whole:
                group.append(row)
        differences: list[dict[str, Any]] = []
        entry: dict[str, Any] = {
            "labels": dict(labels),
            "metric_name": first.metric_name,
            "higher_is_better": first.higher_is_better,
            "metric": asdict(interval([row.metric for row in group])),
            "before": _mean([row.before for row in group]),
            "majority": first.majority,
            "epsilon": max(row.epsilon for row in rows_of_cell),  # spent is spent, by a stopped run too
            "bytes_up": _mean([row.bytes_up for row in group]),
            "bytes_per_client_round": first.numbers_sent,
            "seconds": _mean([row.seconds for row in group]),
            "public_phases": _mean([row.phases.count("public") for row in group]),
            "stopped": len(rows_of_cell) - len(group),
            "differences": differences,
        }
        for label in references:
            if label != dict(labels).get(compare):
                other = groups.get(_relabelled(labels, compare, label), [])
                if other:
                    differences.append(paired(group, other, against=label))
        cells.append(entry)
    whole = []
    for row in rows:
        if row.whole:
            whole.append(row)
    return {
        "format": FORMAT,
        "name": name,
        "about": about,
        "command": command,
        "complete": len(whole) == wanted,
        "runs": len(whole),
        "wanted": wanted,
        "compare": compare,
        "seconds": sum(row.seconds for row in whole),
        "stopped": [
            {"run": row.run, "status": row.status, "rounds": len(row.curve)} for row in rows if not row.whole
        ],
        "costs": list(costs),
        "cells": cells,
        "rows": [{**asdict(row), "labels": dict(row.labels)} for row in rows],
    }


def paired(group: Sequence[Row], other: Sequence[Row], *, against: str) -> dict[str, Any]:
    """Compare two cells seed by seed;
    `better` is true or false where the interval excludes zero, else null.
    """
    theirs = {}
    for row in other:
        if row.whole:
            theirs[row.seed] = row.metric
    differences = []
    for row in group:
        if row.whole and row.seed in theirs:
            differences.append(row.metric - theirs[row.seed])
    if not differences:
        return {
            "against": against,
            "better": None,
            **asdict(Interval(mean=math.nan, low=-math.inf, high=math.inf, count=0)),
        }
    difference_interval, up = interval(differences), group[0].higher_is_better
    better = None
    if difference_interval.low > 0 or difference_interval.high < 0:
        better = (difference_interval.low > 0) == up
    return {"against": against, "better": better, **asdict(difference_interval)}


def to_json(summary: Mapping[str, Any]) -> str:
    """Write results; infinity and not-a-number become words, as in report.json."""
    return json.dumps(record_codec.to_plain(summary, "results"), indent=1, allow_nan=False) + "\n"


def to_html(summary: Mapping[str, Any]) -> str:
    """Draw results as one self-contained page: no script, nothing fetched."""
    style = Html(files("ffm_secure.report").joinpath("report.css").read_text(encoding="utf-8"))
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("title", f"{summary['name']} – ffm-secure experiment"),
        tag("style", style),
    )
    state = _state(summary)
    intro = f"{summary['about']} {summary['runs']} runs, {summary['seconds']:.0f} seconds of training.{state}"
    main = [
        tag("section", tag("h2", "Table"), _table(summary)),
        tag("section", tag("h2", "Curves"), *_curves(summary)),
    ]
    body = tag(
        "body",
        tag(
            "header",
            tag("h1", summary["name"]),
            tag("p", intro.strip()),
            *_costs(summary),
            *_stopped(summary),
        ),
        tag("main", *main),
        tag(
            "footer",
            tag(
                "p",
                "Regenerate with: ",
                tag("code", summary["command"]),
                ". Every figure is in results.json beside this page.",
            ),
        ),
    )
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"


def _state(summary: Mapping[str, Any]) -> str:
    if summary["complete"]:
        return ""
    return f" Not complete: {summary['runs']} of {summary['wanted']} runs."


def stopped_lines(summary: Mapping[str, Any]) -> list[str]:
    """Say of every run that ended early how it ended, in words that a table has no place for."""
    stopped_lines: list[str] = []
    for item in summary["stopped"]:
        stopped_lines.append(f"{item['run']}: {item['status']} after {item['rounds']} rounds")
    return stopped_lines


def cost_lines(summary: Mapping[str, Any]) -> list[str]:
    """Say what the runs of a grid cost the rows they share, all of them together."""
    cost_lines: list[str] = []
    for cost in summary.get("costs", ()):
        cost_lines.append(f"Privacy of the whole grid: {cost['words']}.")
    return cost_lines


def _costs(summary: Mapping[str, Any]) -> list[Html]:
    costs: list[Html] = []
    for line in cost_lines(summary):
        costs.append(tag("p", line))
    return costs


LEFT_OUT = "Left out of means and differences, because they ended before their last round"


def _stopped(summary: Mapping[str, Any]) -> list[Html]:
    lines = stopped_lines(summary)
    if lines:
        return [tag("p", f"{LEFT_OUT}:"), tag("ul", *[tag("li", line) for line in lines])]
    return []


def _table(summary: Mapping[str, Any]) -> Html:
    cells = summary["cells"]
    if cells:
        names = list(cells[0]["labels"])
    else:
        names = []
    against = list(dict.fromkeys(item["against"] for cell in cells for item in cell["differences"]))
    columns = [
        *(Column(heading=name, cell=partial(_label, name), field="", text=True) for name in names),
        Column(
            heading=cells[0]["metric_name"] if cells else "metric",
            cell=_spread,
            field="metric",
        ),
        *(
            Column(
                heading=f"minus {label}",
                cell=partial(_difference_against, label),
                field="differences",
            )
            for label in against
        ),
        Column(heading="epsilon", cell=lambda cell: _epsilon(cell["epsilon"]), field="epsilon"),
        Column(
            heading="up, a client and round",
            cell=lambda cell: size(cell["bytes_per_client_round"]),
            field="bytes_up",
        ),
        Column(heading="seconds", cell=lambda cell: _seconds(cell["seconds"]), field="seconds"),
    ]
    caption = (
        "Mean over seeds with its 95 % t-interval; differences are paired by seed, and marked better or "
        "worse where their interval excludes zero"
    )
    return table(columns, cells, caption=caption, of="cells")


def _spread(cell: Mapping[str, Any]) -> str:
    metric = cell["metric"]
    left = ""
    if cell["stopped"]:
        left = f" ({cell['stopped']} stopped early, left out)"
    if metric["count"] == 0:
        return f"–{left}"
    if metric["count"] < 2:
        return f"{metric['mean']:.4f} (one seed){left}"
    return f"{metric['mean']:.4f} ± {metric['high'] - metric['mean']:.4f}{left}"


def _seconds(value: float) -> str:
    if math.isnan(value):
        return "–"
    return figure(value, 3)


def _label(name: str, cell: Mapping[str, Any]) -> str:
    return str(cell["labels"][name])


def _difference_against(label: str, cell: Mapping[str, Any]) -> str:
    return _difference(cell, label)


def _difference(cell: Mapping[str, Any], label: str) -> str:
    item = next((item for item in cell["differences"] if item["against"] == label), None)
    if item is None or item["count"] == 0:
        return "–"
    if item["count"] < 2:
        return f"{item['mean']:+.4f} (one seed)"
    verdict = {True: " better", False: " worse", None: ""}[item["better"]]
    return f"{item['mean']:+.4f} [{item['low']:+.4f}, {item['high']:+.4f}]{verdict}"


def _epsilon(value: float) -> str:
    if math.isinf(value):
        return "none (infinite)"
    return f"{value:.2f}"


def _curves(summary: Mapping[str, Any]) -> list[Html]:
    """Draw one chart for each combination of the axes that are not compared."""
    compare = summary["compare"]
    panels: dict[tuple[str, ...], dict[str, list[Any]]] = {}
    for row in summary["rows"]:
        if row["status"] != "complete":
            continue
        rest = tuple(f"{axis}: {label}" for axis, label in row["labels"].items() if axis != compare)
        panels.setdefault(rest, {}).setdefault(row["labels"].get(compare, "all"), []).append(row["curve"])
    charts = []
    for rest, lines in panels.items():
        series = []
        for place, (label, curves) in enumerate(lines.items()):
            length = min(len(curve) for curve in curves)
            mean = []
            for i in range(length):
                mean.append(float(np.mean([curve[i] for curve in curves])))
            series.append(
                Series(label=label, x=list(range(1, length + 1)), y=mean, role=_ROLES[place % len(_ROLES)])
            )
        heading = ", ".join(rest) or "all"
        chart = line_chart(series, description=f"Mean metric after each round, {heading}")
        charts.append(tag("figure", tag("figcaption", heading), chart))
    return charts
