"""What a stream of stages did to a model: average accuracy, forgetting, transfer backward and forward."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from ffm_secure.records import RoundRecord, StageScore, StreamMeasures, StreamSummary

Table = Sequence[Sequence[float]]  # [stages + 1, stages]: before the first stage, then after each


def measures(table: Table) -> StreamMeasures:
    """Return the measures of accuracies: row 0 before the first stage, row i after the i-th; column j the
    j-th stage's rows.

    Average accuracy: of the last row. Forgetting: over all stages but the last, the best accuracy a stage had
    after it was learned, the last row apart, less that in the last row. Backward transfer: the accuracy in
    the last row less that right after a stage was learned. Forward transfer: over all stages but the first,
    the accuracy right before a stage was learned less that before the first one.
    Source: Chaudhry et al. 2018, arXiv:1801.10112 (forgetting); Lopez-Paz and Ranzato 2017, arXiv:1706.08840
    (transfer).
    """
    before, last = table[0], table[-1]
    lost, changed, gained = [], [], []
    for stage, end in enumerate(last[:-1]):
        later = [row[stage] for row in table[stage + 1 : -1]]
        lost.append(max(later) - end)
        changed.append(end - later[0])
    for stage in range(1, len(last)):
        gained.append(table[stage][stage] - before[stage])
    return StreamMeasures(
        average=fmean(last), forgetting=fmean(lost), backward=fmean(changed), forward=fmean(gained)
    )


def summary_of(before: Sequence[StageScore], records: Sequence[RoundRecord]) -> StreamSummary | None:
    """Return a stream's accuracies and measures; None until every stage is over.

    `before` are the scores of the model a run starts from.
    """
    after = [record.stages for record in records if record.stages]
    if len(after) != len(before):
        return None
    unknown, known = [], []
    for scores in (before, *after):
        unknown.append(tuple(score.unknown for score in scores))
        known.append(tuple(score.known for score in scores))
    return StreamSummary(
        stages=tuple(score.stage for score in before),
        unknown=tuple(unknown),
        known=tuple(known),
        measures_unknown=measures(unknown),
        measures_known=measures(known),
    )
