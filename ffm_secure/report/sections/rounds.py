"""The sections drawn over rounds: utility, traffic and time, survivors and aborts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from ffm_secure.records import RoundRecord, RunSummary
from ffm_secure.report.charts import Level, Series, line_chart, seconds
from ffm_secure.quantities import metric, amount, duration, figure, size
from ffm_secure.report.markup import Column, Html, facts, folded, number, phase_column, table, tag

_NO_ROUNDS = "No round has finished yet."


def opened(rounds: Sequence[RoundRecord]) -> list[RoundRecord]:
    """Return the rounds whose sum was opened."""
    return [record for record in rounds if not record.aborted]


def _numbers(rounds: Sequence[RoundRecord]) -> list[int]:
    return [record.round for record in rounds]


def _over(rounds: Sequence[RoundRecord], value: Callable[[RoundRecord], float]) -> list[float]:
    """Return one figure of every round, as a line of a chart wants them."""
    return [float(value(record)) for record in rounds]


def _figure(heading: str, chart: Html, caption: str = "") -> Html:
    return tag("figure", tag("h3", heading), chart, tag("figcaption", caption) if caption else None)


def _aborted(rounds: Sequence[RoundRecord]) -> list[int]:
    return _numbers([record for record in rounds if record.aborted])


def _described(name: str, rounds: Sequence[RoundRecord], values: Sequence[float]) -> str:
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return f"{name}: no finite value in {amount(len(rounds), 'round')}."
    return (
        f"{name} over {amount(len(rounds), 'round')}: starts at {metric(values[0])}, ends at "
        f"{metric(values[-1])}, "
        f"lowest {metric(min(finite))}, highest {metric(max(finite))}."
    )


def utility_body(summary: RunSummary) -> Html:
    """Draw the metric beside its baselines, and the loss."""
    rounds = summary.rounds
    if not rounds:
        return tag("p", _NO_ROUNDS, class_="empty")
    x = _numbers(rounds)
    scores, loss = _over(rounds, lambda r: r.metric), _over(rounds, lambda r: r.loss)
    levels = []
    if math.isfinite(summary.metric_zero_round):
        levels.append(Level(label="before", value=summary.metric_zero_round))
    if summary.metric_majority is not None and math.isfinite(summary.metric_majority):
        levels.append(Level(label="majority", value=summary.metric_majority, role="second"))
    metric_chart = line_chart(
        [Series(label="after", x=x, y=scores)],
        description=_described(summary.metric_name, rounds, scores),
        levels=levels,
    )
    loss_chart = line_chart(
        [Series(label="loss", x=x, y=loss, role="second")], description=_described("Loss", rounds, loss)
    )
    numbers = table(
        [
            Column(heading="Round", cell=lambda r: str(r.round), field="round"),
            Column(heading=summary.metric_name, cell=lambda r: metric(r.metric), field="metric"),
            Column(heading="Loss, nats", cell=lambda r: figure(r.loss), field="loss"),
            *phase_column(rounds, trained=summary.plan.trainable_parameters),
        ],
        rounds,
        caption="Global model on the public evaluation set, after each round",
        of="rounds",
    )
    return tag(
        "div",
        tag(
            "div",
            _figure(
                summary.metric_name[:1].upper() + summary.metric_name[1:],
                metric_chart,
                _reading(summary, scores),
            ),
            _figure("Loss", loss_chart, "Nats per sample on the public evaluation set. Lower is better."),
            class_="figures",
        ),
        folded("The numbers behind these charts", numbers),
    )


def _reading(summary: RunSummary, scores: Sequence[float]) -> str:
    """Say how the chart of the metric is read."""
    words = "Lower is better."
    if summary.higher_is_better:
        words = "Higher is better."
    words += " Dashed: the model before training"
    if summary.metric_majority is not None:
        words += ", and always guessing the most common class"
    words += "."
    lost = len(scores) - int(np.isfinite(scores).sum())
    if lost:
        words += f" Not a finite number in {amount(lost, 'round')}: gaps in the line."
    return words


def cost_body(summary: RunSummary) -> Html:
    """Draw bytes and seconds per round, with their totals."""
    rounds = summary.rounds
    if not rounds:
        return tag("p", _NO_ROUNDS, class_="empty")
    x, lost = _numbers(rounds), _aborted(rounds)
    up, down = _over(rounds, lambda r: r.bytes_up), _over(rounds, lambda r: r.bytes_down)
    whole, inside = _over(rounds, lambda r: r.seconds), _over(rounds, lambda r: r.client_seconds)
    traffic = line_chart(
        [Series(label="up", x=x, y=up), Series(label="down", x=x, y=down, role="second")],
        description=(
            f"Bytes per round, all clients together: {size(sum(up))} up and {size(sum(down))} down in total."
        ),
        shown=size,
        from_zero=True,
        aborted=lost,
    )
    time = line_chart(
        [Series(label="whole", x=x, y=whole), Series(label="clients", x=x, y=inside, role="second")],
        description=(
            f"Seconds per round: {duration(sum(whole))} in total, {duration(sum(inside))} inside "
            "clients' training."
        ),
        shown=seconds,
        from_zero=True,
        aborted=lost,
    )
    numbers = table(
        [
            Column(heading="Round", cell=lambda r: str(r.round), field="round"),
            Column(heading="Up", cell=lambda r: size(r.bytes_up), field="bytes_up"),
            Column(heading="Down", cell=lambda r: size(r.bytes_down), field="bytes_down"),
            Column(heading="Whole", cell=lambda r: duration(r.seconds), field="seconds"),
            Column(heading="Training", cell=lambda r: duration(r.client_seconds), field="client_seconds"),
            Column(
                heading="Evaluation",
                cell=lambda r: duration(r.evaluation_seconds),
                field="evaluation_seconds",
            ),
        ],
        rounds,
        caption="Traffic of all clients together and wall time, round by round",
        of="rounds",
        kind="tight",
    )
    total = tag(
        "p",
        f"In total {size(sum(up))} up, {size(sum(down))} down; the run took ",
        number(summary.seconds, duration(summary.seconds), "seconds"),
        ".",
        class_="lede",
    )
    return tag(
        "div",
        total,
        tag(
            "div",
            _figure("Bytes per round", traffic, "All clients together."),
            _figure(
                "Seconds per round",
                time,
                "Wall time of the whole round, and the part in which clients trained.",
            ),
            class_="figures",
        ),
        folded("The numbers behind these charts", numbers),
    )


def participation_body(summary: RunSummary) -> Html:
    """Draw who was asked, who arrived, and which rounds were given up."""
    rounds = summary.rounds
    if not rounds:
        return tag("p", _NO_ROUNDS, class_="empty")
    x, lost = _numbers(rounds), _aborted(rounds)
    asked, arrived = _over(rounds, lambda r: len(r.cohort)), _over(rounds, lambda r: len(r.survivors))
    words = (
        f"{amount(int(sum(arrived)), 'update')} arrived of {int(sum(asked)):,} asked for; "
        f"{amount(len(lost), 'round')} aborted."
    )
    chart = line_chart(
        [Series(label="asked", x=x, y=asked, role="quiet"), Series(label="arrived", x=x, y=arrived)],
        description=words,
        from_zero=True,
        aborted=lost,
        shown=lambda value: f"{value:g}",
        whole=True,
    )
    numbers = table(
        [
            Column(heading="Round", cell=lambda r: str(r.round), field="round"),
            Column(heading="Asked", cell=lambda r: str(len(r.cohort)), field="cohort"),
            Column(heading="Arrived", cell=lambda r: str(len(r.survivors)), field="survivors"),
            Column(heading="Lost, and where", cell=_dropped, field="dropped", text=True),
            Column(heading="Aborted", cell=lambda r: r.aborted, field="aborted", text=True),
        ],
        rounds,
        caption="Clients asked and arrived, round by round",
        of="rounds",
        kind="tight",
    )
    return tag(
        "div",
        tag(
            "div",
            _figure(
                "Clients per round",
                chart,
                "A cross on the axis marks an aborted round; what it reserved stays spent." if lost else "",
            ),
            tag("div", _turnout(rounds), _aborts(rounds) if lost else None),
            class_="figures",
        ),
        folded("The numbers behind this chart", numbers),
    )


def _turnout(rounds: Sequence[RoundRecord]) -> Html:
    asked = int(sum(_over(rounds, lambda r: len(r.cohort))))
    arrived = int(sum(_over(rounds, lambda r: len(r.survivors))))
    turnout = f"{arrived:,}"
    if asked:
        turnout += f" ({100 * arrived / asked:.3g} %)"
    smallest = int(min(_over(opened(rounds), lambda r: len(r.survivors)), default=0))
    return facts(
        [
            ("Updates asked for", f"{asked:,}"),
            ("Updates that arrived", turnout),
            ("Smallest sum opened", f"over {amount(smallest, 'client')}" if smallest else "none"),
            ("Rounds aborted", f"{len(rounds) - len(opened(rounds)):,}"),
        ]
    )


def _dropped(record: RoundRecord) -> str:
    return ", ".join(f"client {client}: {record.dropped[client]}" for client in sorted(record.dropped))


def _aborts(rounds: Sequence[RoundRecord]) -> Html:
    items = []
    for record in rounds:
        if record.aborted:
            items.append(tag("li", tag("strong", f"Round {record.round}: "), record.aborted))
    more = None
    if len(items) > 6:
        more = folded(f"and {len(items) - 6} more", tag("ul", *items[6:], class_="plain"))
    return tag("div", tag("h3", "Aborted rounds"), tag("ul", *items[:6], class_="plain"), more)
