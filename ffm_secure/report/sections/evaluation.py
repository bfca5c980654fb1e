"""What a charged evaluation of held-back private rows released, each share with its interval."""

from __future__ import annotations

from ffm_secure.records import ReleasedEvaluation
from ffm_secure.report.markup import Column, Html, table


def evaluation_body(released: ReleasedEvaluation) -> Html:
    """Tabulate accuracy, over all and by class; by group, with the gap, where groups were declared; by owner
    where that was asked; and the worst of each.
    """
    estimates = [released.accuracy, *released.classes]
    if released.gap is not None:
        estimates += [*released.groups, released.gap]
    estimates += [*released.owners, *released.worst]
    columns = [
        Column(heading="Of", cell=lambda item: item.name, field="name"),
        Column(heading="Share right", cell=lambda item: f"{item.value:.3f}", field="value"),
        Column(heading="From", cell=lambda item: f"{item.low:.3f}", field="low"),
        Column(heading="To", cell=lambda item: f"{item.high:.3f}", field="high"),
        Column(heading="Rows, noisy", cell=lambda item: f"{item.rows:.0f}", field="rows"),
    ]
    caption = (
        "Private rows that were never learned from, counted once with noise of "
        f"{released.deviation:.2f} a count. Intervals hold noise and chance, at {released.level:.0%}; that "
        "of a worst one holds for the truly worst, whichever it is."
    )
    return table(columns, estimates, caption=caption)
