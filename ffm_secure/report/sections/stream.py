"""Stage by stage: how a model does on the public rows of every stage of a stream, and what it forgot."""

from __future__ import annotations

from collections.abc import Sequence

from ffm_secure.quantities import metric
from ffm_secure.records import StreamMeasures, StreamSummary
from ffm_secure.report.markup import Column, Html, facts, table, tag


def stream_body(stream: StreamSummary) -> Html:
    """Tabulate the accuracy on every stage's public rows after every stage, with the measures over all."""
    return tag(
        "div",
        facts(_measures("Stage unknown", stream.measures_unknown), "facts"),
        _table(stream.stages, stream.unknown, "Share right among all classes, after each stage."),
        facts(_measures("Stage known", stream.measures_known), "facts"),
        _table(stream.stages, stream.known, "Share right among the classes of the row's own stage."),
    )


def _measures(heading: str, measures: StreamMeasures) -> list[tuple[str, str]]:
    return [
        (f"{heading}: average accuracy", metric(measures.average)),
        ("Forgetting", metric(measures.forgetting)),
        ("Backward transfer", metric(measures.backward)),
        ("Forward transfer", metric(measures.forward)),
    ]


def _table(stages: Sequence[str], accuracies: Sequence[Sequence[float]], caption: str) -> Html:
    rows = [("before", accuracies[0]), *zip(stages, accuracies[1:], strict=True)]
    columns = [Column(heading="After", cell=lambda row: row[0], field="stage", text=True)]
    for place, name in enumerate(stages):
        columns.append(_column(name, place))
    return table(columns, rows, caption=caption)


def _column(name: str, place: int) -> Column:
    return Column(heading=name, cell=lambda row: metric(row[1][place]), field=f"stage_{place}")
