"""How the last model answers public rows, class by class: precision, recall, F1 and who is taken for whom."""

from __future__ import annotations

from dataclasses import dataclass

from ffm_secure.quantities import count, metric
from ffm_secure.records import ClassMeasures
from ffm_secure.report.markup import Column, Html, facts, folded, number, table, tag


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """One class: how many rows it has, how many were answered with it, and how many rightly."""

    name: str
    counts: tuple[int, ...]
    answered: int
    right: int

    @property
    def rows(self) -> int:
        return sum(self.counts)


def classes_body(measures: ClassMeasures) -> Html:
    """Show macro F1, balanced accuracy and calibration, and behind them every class."""
    lead = facts(
        (
            ("Macro F1", number(measures.macro_f1, metric(measures.macro_f1), "classes.macro_f1")),
            (
                "Balanced accuracy",
                number(
                    measures.balanced_accuracy,
                    metric(measures.balanced_accuracy),
                    "classes.balanced_accuracy",
                ),
            ),
            (
                "Calibration error",
                number(
                    measures.calibration_error,
                    metric(measures.calibration_error),
                    "classes.calibration_error",
                ),
            ),
        )
    )
    words = (
        f"Of the last round's model, on {count(measures.rows)} public rows. F1 and balanced accuracy "
        "count every class alike, however rare. The calibration error is how far confidence lies from the "
        "share that is right; 0 is best."
    )
    return tag("div", lead, tag("p", words), *_tables(measures))


def _tables(measures: ClassMeasures) -> tuple[Html, ...]:
    if not measures.confusion:
        return ()
    rows = []
    for place, (name, counts) in enumerate(zip(measures.names, measures.confusion, strict=True)):
        answered = sum(line[place] for line in measures.confusion)
        rows.append(_Row(name=name, counts=counts, answered=answered, right=counts[place]))
    single = table(
        [
            Column(heading="Class", cell=lambda row: row.name, text=True),
            Column(heading="Rows", cell=lambda row: count(row.rows)),
            Column(heading="Precision", cell=lambda row: _share(row.right, row.answered)),
            Column(heading="Recall", cell=lambda row: _share(row.right, row.rows)),
            Column(heading="F1", cell=lambda row: _share(2 * row.right, row.rows + row.answered)),
        ],
        rows,
        caption="Public rows by class",
    )
    columns = [Column(heading="Is, answered", cell=lambda row: row.name, text=True)]
    columns += [_counted(name, place) for place, name in enumerate(measures.names)]
    confusion = table(columns, rows, caption="Rows of a class, by the class they were answered with")
    return folded("Precision and recall", single), folded("Who is taken for whom", confusion)


def _counted(name: str, place: int) -> Column:
    return Column(heading=name, cell=lambda row: count(row.counts[place]))


def _share(part: int, whole: int) -> str:
    return metric(part / whole) if whole else "–"
