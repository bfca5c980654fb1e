"""The sections drawn over rounds: utility, traffic and time, survivors and aborts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ffm_secure.records import RoundRecord, RunSummary
from ffm_secure.report.charts import Level, Series, line_chart, seconds
from ffm_secure.quantities import metric, amount, duration, figure, size
from ffm_secure.report.markup import Column, Html, facts, folded, number, phase_column, table, tag

_NO_ROUNDS = "No round has finished yet."


def opened(rounds: Sequence[RoundRecord]) -> list[RoundRecord]:
    """Return the rounds whose sum was opened."""
    return [record for record in rounds if not record.aborted]


def _figure(heading: str, chart: Html, caption: str = "") -> Html:
    return tag("figure", tag("h3", heading), chart, tag("figcaption", caption) if caption else None)


def _aborted(rounds: Sequence[RoundRecord]) -> list[int]:
    return [record.round for record in rounds if record.aborted]


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
    x = [record.round for record in rounds]
    scores, loss = [record.metric for record in rounds], [record.loss for record in rounds]
    levels = (
        [Level(label="before", value=summary.metric_zero_round)]
        if math.isfinite(summary.metric_zero_round)
        else []
    )
    if summary.metric_majority is not None and math.isfinite(summary.metric_majority):
        levels.append(Level(label="majority", value=summary.metric_majority, role="second"))
    direction = "Higher is better." if summary.higher_is_better else "Lower is better."
    lost = sum(not math.isfinite(value) for value in scores)
    gaps = f" Not a finite number in {amount(lost, 'round')}: gaps in the line." if lost else ""
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
    baseline = "Dashed: the model before training" + (
        ", and always guessing the most common class." if summary.metric_majority is not None else "."
    )
    return tag(
        "div",
        tag(
            "div",
            _figure(
                summary.metric_name[:1].upper() + summary.metric_name[1:],
                metric_chart,
                f"{direction} {baseline}{gaps}",
            ),
            _figure("Loss", loss_chart, "Nats per sample on the public evaluation set. Lower is better."),
            class_="figures",
        ),
        folded("The numbers behind these charts", numbers),
    )


def cost_body(summary: RunSummary) -> Html:
    """Draw bytes and seconds per round, with their totals."""
    rounds = summary.rounds
    if not rounds:
        return tag("p", _NO_ROUNDS, class_="empty")
    x, lost = [record.round for record in rounds], _aborted(rounds)
    up, down = [float(record.bytes_up) for record in rounds], [float(record.bytes_down) for record in rounds]
    whole, inside = [record.seconds for record in rounds], [record.client_seconds for record in rounds]
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
    x, lost = [record.round for record in rounds], _aborted(rounds)
    asked, arrived = [float(len(r.cohort)) for r in rounds], [float(len(r.survivors)) for r in rounds]
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
    asked, arrived = sum(len(r.cohort) for r in rounds), sum(len(r.survivors) for r in rounds)
    smallest = min((len(r.survivors) for r in opened(rounds)), default=0)
    return facts(
        [
            ("Updates asked for", f"{asked:,}"),
            ("Updates that arrived", f"{arrived:,}" + (f" ({100 * arrived / asked:.3g} %)" if asked else "")),
            ("Smallest sum opened", f"over {amount(smallest, 'client')}" if smallest else "none"),
            ("Rounds aborted", f"{len(rounds) - len(opened(rounds)):,}"),
        ]
    )


def _dropped(record: RoundRecord) -> str:
    return ", ".join(f"client {client}: {record.dropped[client]}" for client in sorted(record.dropped))


def _aborts(rounds: Sequence[RoundRecord]) -> Html:
    items = [tag("li", tag("strong", f"Round {r.round}: "), r.aborted) for r in rounds if r.aborted]
    more = (
        folded(f"and {len(items) - 6} more", tag("ul", *items[6:], class_="plain"))
        if len(items) > 6
        else None
    )
    return tag("div", tag("h3", "Aborted rounds"), tag("ul", *items[:6], class_="plain"), more)
