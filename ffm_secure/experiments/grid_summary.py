"""The results of a grid as Markdown and as one picture, for a page that is kept beside the code."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ffm_secure.experiments.grid_report import LEFT_OUT, cost_lines, stopped_lines
from ffm_secure.report.charts import nice_ticks
from ffm_secure.quantities import size
from ffm_secure.report.markup import Html, tag

_WIDTH, _LEFT, _RIGHT, _LINE, _TOP, _GAP = 760.0, 330.0, 24.0, 20.0, 12.0, 12.0
_COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#805ad5", "#b83280", "#4a5568", "#975a16", "#2c7a7b")
_FONT = "font-family:system-ui,sans-serif;font-size:12px"


def to_markdown(summary: Mapping[str, Any]) -> str:
    """Write the table of a grid in Markdown: means with 95 % t-intervals, paired differences, what it cost.

    A difference is in bold where its interval excludes zero. A run that ended early is named and has no
    figure.
    """
    cells: Sequence[Mapping[str, Any]] = summary["cells"]
    if not cells:
        return "No run has finished.\n"
    axes = list(cells[0]["labels"])
    against = list(dict.fromkeys(item["against"] for cell in cells for item in cell["differences"]))
    seeds = len({row["seed"] for row in summary["rows"]})
    head = [*axes, *[f"seed {seed}" for seed in _seeds(summary)], "mean ± 95 %"]
    head += [f"minus {label}" for label in against] + ["epsilon spent", "up, a client and round", "seconds"]
    lines = [head, ["---"] * len(head)]
    for cell in cells:
        line = [*cell["labels"].values(), *_values(summary, cell), _spread(cell, seeds)]
        for label in against:
            line.append(_difference(cell, label))
        spent = float(cell["epsilon"])
        line += ["none" if math.isinf(spent) else f"{spent:.2f}", size(cell["bytes_per_client_round"])]
        lines.append([*line, "–" if math.isnan(cell["seconds"]) else f"{cell['seconds']:.0f}"])
    table = "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)
    state = ""
    if not summary["complete"]:
        state = f" Not complete: {summary['runs']} of {summary['wanted']} runs."
    text = (
        f"{cells[0]['metric_name']}, {summary['runs']} runs of together {summary['seconds'] / 60:.0f} "
        f"minutes.{state}\n\n{table}\n"
    )
    text += "".join(f"\n{line}\n" for line in cost_lines(summary))
    stopped = "\n".join(f"- {line}" for line in stopped_lines(summary))
    return text + (f"\n{LEFT_OUT}:\n\n{stopped}\n" if stopped else "")


def _seeds(summary: Mapping[str, Any]) -> list[int]:
    return sorted({row["seed"] for row in summary["rows"]})


def _values(summary: Mapping[str, Any], cell: Mapping[str, Any]) -> list[str]:
    by_seed = {}
    for row in summary["rows"]:
        if row["labels"] == cell["labels"]:
            by_seed[row["seed"]] = f"{row['metric']:.3f}" if row["status"] == "complete" else row["status"]
    values: list[str] = []
    for seed in _seeds(summary):
        values.append(by_seed.get(seed, "–"))
    return values


def _spread(cell: Mapping[str, Any], seeds: int) -> str:
    value = cell["metric"]
    if value["count"] == 0:
        return "–"
    if value["count"] < 2:
        return f"{value['mean']:.3f}" + (" (1 seed)" if cell["stopped"] else "")
    short = ""
    if value["count"] != seeds:
        short = f" ({value['count']} seeds)"
    return f"{value['mean']:.3f} ± {float(value['high']) - value['mean']:.3f}{short}"


def _difference(cell: Mapping[str, Any], label: str) -> str:
    item = next((item for item in cell["differences"] if item["against"] == label), None)
    if item is None or item["count"] == 0:
        return "–"
    if item["count"] < 2:
        return f"{item['mean']:+.3f}"
    text = f"{item['mean']:+.3f} [{float(item['low']):+.3f}, {float(item['high']):+.3f}]"
    if item["better"] is None:
        return text
    return f"**{text}**"


def to_svg(summary: Mapping[str, Any]) -> str:
    """Draw every cell as a line of dots, one for each seed, with a bar at the mean: a picture that needs no
    style sheet.
    """
    cells = summary["cells"]
    values = []
    for row in summary["rows"]:
        if _drawn(row):
            values.append(row["metric"])
    if not values:
        return str(tag("svg", xmlns="http://www.w3.org/2000/svg"))
    ticks = nice_ticks(min(values), max(values))
    low, high = ticks[0], ticks[-1]

    def across(value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (value - low) / (high - low)

    compare, panel, down = summary["compare"], None, _TOP
    parts: list[Html] = []
    places = {label: i for i, label in enumerate(dict.fromkeys(c["labels"].get(compare, "") for c in cells))}
    for cell in cells:
        rest = ", ".join(f"{axis} {label}" for axis, label in cell["labels"].items() if axis != compare)
        if rest != panel:
            panel, down = rest, down + _GAP
            parts.append(_text(8, down + 14, rest, weight="600"))
            down += _LINE
        label = cell["labels"].get(compare, "")
        parts += _line(summary, cell, across, down, _COLOURS[places[label] % len(_COLOURS)], label)
        down += _LINE
    grid = []
    for tick in ticks:
        grid.append(_rule(across(tick), _TOP, across(tick), down, "#e2e8f0"))
    for tick in ticks:
        grid.append(_text(across(tick), down + 16, f"{tick:g}", anchor="middle"))
    grid.append(_text((_LEFT + _WIDTH) / 2, down + 34, cells[0]["metric_name"], anchor="middle"))
    height = down + 42
    back = tag("rect", width=f"{_WIDTH:g}", height=f"{height:g}", fill="#ffffff")
    words = f"{summary['name']}: one dot for each seed, a bar at the mean"
    return (
        str(
            tag(
                "svg",
                tag("title", words),
                back,
                *grid,
                *parts,
                xmlns="http://www.w3.org/2000/svg",
                viewBox=f"0 0 {_WIDTH:g} {height:g}",
                role="img",
            )
        )
        + "\n"
    )


def _drawn(row: Mapping[str, Any]) -> bool:
    return row["status"] == "complete" and math.isfinite(row["metric"])


def _line(
    summary: Mapping[str, Any],
    cell: Mapping[str, Any],
    across: Callable[[float], float],
    down: float,
    colour: str,
    label: str,
) -> list[Html]:
    middle = down + _LINE / 2
    metrics = []
    for row in summary["rows"]:
        if row["labels"] == cell["labels"] and _drawn(row):
            metrics.append(row["metric"])
    elements = [_text(24, middle + 4, label)]
    for value in metrics:
        elements.append(
            tag(
                "circle",
                cx=f"{across(value):.1f}",
                cy=f"{middle:.1f}",
                r="4",
                fill=colour,
                fill_opacity="0.55",
            )
        )
    if metrics:
        mean = across(sum(metrics) / len(metrics))
        elements.append(_rule(mean, down + 3, mean, down + _LINE - 3, colour, width="2.5"))
    return elements


def _rule(x1: float, y1: float, x2: float, y2: float, colour: str, *, width: str = "1") -> Html:
    places = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
    return tag("line", **{k: f"{v:.1f}" for k, v in places.items()}, stroke=colour, stroke_width=width)


def _text(x: float, y: float, words: str, *, anchor: str = "start", weight: str = "400") -> Html:
    return tag(
        "text",
        words,
        x=f"{x:.1f}",
        y=f"{y:.1f}",
        text_anchor=anchor,
        font_weight=weight,
        style=_FONT,
        fill="#1a202c",
    )
