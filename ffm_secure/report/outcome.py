"""How a run ended, in sentences: the page and the terminal say the same."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ffm_secure.records import ClassMeasures, RoundRecord, RunSummary
from ffm_secure.quantities import figure, metric


def warnings(summary: RunSummary) -> list[str]:
    """Say what a reader must know before any figure: how a run ended, and where it learned nothing."""
    notes: list[str] = []
    if summary.status == "interrupted":
        notes.append(
            "Interrupted: the figures cover the rounds so far; running it again continues from there."
        )
    if summary.status == "budget exhausted":
        notes.append("Budget exhausted: the next round could not be paid for, so it was not started.")
    if not summary.rounds:
        return notes
    if all_aborted(summary):
        count = f"all {len(summary.rounds)} rounds were" if len(summary.rounds) > 1 else "the one round was"
        notes.append(f"Nothing was learned: {count} aborted ({summary.rounds[0].aborted}).")
        return notes
    if not math.isfinite(summary.metric_final):
        notes.append(f"Diverged: the final {summary.metric_name} is {figure(summary.metric_final)}.")
    elif not beats(summary, summary.metric_zero_round):
        notes.append(f"No gain: the final {summary.metric_name} is no better than before training.")
    elif summary.metric_majority is not None and not beats(summary, summary.metric_majority):
        notes.append(
            f"No gain: the final {summary.metric_name} is no better than always guessing the most "
            "common class."
        )
    return notes


def best_round(summary: RunSummary) -> RoundRecord | None:
    """Return the first round with the best public metric; None where that is the last one, or none was
    opened.
    """
    best = best_of(summary.rounds, higher_is_better=summary.higher_is_better)
    return None if best is None or best.metric == summary.metric_final else best


def best_of(rounds: Sequence[RoundRecord], *, higher_is_better: bool) -> RoundRecord | None:
    """Return the first of the opened rounds with the best metric; None where no round was opened."""
    opened = [record for record in rounds if not record.aborted and math.isfinite(record.metric)]
    if not opened:
        return None
    choose = max if higher_is_better else min
    return choose(opened, key=lambda record: record.metric)


def all_aborted(summary: RunSummary) -> bool:
    """Tell whether a run had rounds and none of them was opened."""
    return bool(summary.rounds) and all(record.aborted for record in summary.rounds)


def beats(summary: RunSummary, other: float) -> bool:
    """Tell whether the final metric is better than another; anything is better than not a number."""
    if math.isnan(other):
        return True
    return summary.metric_final > other if summary.higher_is_better else summary.metric_final < other


def class_line(measures: ClassMeasures) -> str:
    """Say in a line how a classifier answers public rows, beyond the share it gets right."""
    return (
        f"classes  macro F1 {metric(measures.macro_f1)}, balanced accuracy "
        f"{metric(measures.balanced_accuracy)}, calibration error "
        f"{metric(measures.calibration_error)} on {measures.rows:,} public rows"
    )
