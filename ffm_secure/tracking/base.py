"""What a tracker is told, and what of a round becomes a number in it."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from ffm_secure.errors import StoreError
from ffm_secure.records import RoundRecord

NUMBERS: Final = (
    "loss",
    "epsilon_spent",
    "bytes_up",
    "bytes_down",
    "seconds",
    "client_seconds",
    "evaluation_seconds",
    "norm",
    "alignment",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedRun:
    """Name the run that is tracked: under the same id a killed run continues the same curves."""

    folder: Path  # of one tracker; it exists
    name: str
    run_id: str  # hex


class Tracker(Protocol):
    """Show rounds somewhere on this disk."""

    def begin(self, records: Sequence[RoundRecord]) -> None:
        """Make sure that exactly these rounds are shown: those a killed process left out are added."""

    def log(self, record: RoundRecord) -> None:
        """Show one more round; a kill right after this returns does not lose it."""

    def close(self) -> None:
        """Let go of files; the run may go on later."""


def numbers(record: RoundRecord) -> dict[str, float]:
    """Return what of a round is drawn as a curve; what is absent or not finite is left out.

    >>> numbers(RoundRecord(round=1, phase="private", cohort=(0, 1), survivors=(0,), loss=0.5, metric=0.75,
    ...     metric_name="accuracy", epsilon_spent=math.inf, bytes_up=8, bytes_down=8, seconds=1.0,
    ...     client_seconds=1.0))["metric_accuracy"]
    0.75
    """
    values: dict[str, float | None] = {name: getattr(record, name) for name in NUMBERS}
    values[f"metric_{record.metric_name}"] = record.metric
    values["survivors"] = len(record.survivors)
    values["lost"] = len(record.dropped)
    values["aborted"] = bool(record.aborted)
    finite = {}
    for name, value in values.items():
        if value is not None and math.isfinite(value):
            finite[name] = float(value)
    return finite


def report_nothing(package: str, settings: Mapping[str, str]) -> None:
    """Switch a library's reporting of its own use off, by the environment it looks at when it is imported.

    Raises:
      StoreError: it was imported before without these settings, and may be reporting already.
    """
    unset = []
    for name, value in settings.items():
        if os.environ.get(name) != value:
            unset.append(f"{name}={value}")
    if package in sys.modules and unset:
        raise StoreError(
            f"track = '{package}': it was imported before its reporting of use was switched off; set "
            f"{' '.join(unset)} in the environment before the program starts"
        )
    os.environ.update(settings)
