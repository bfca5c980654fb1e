"""Rounds as lines of one CSV file, for a spreadsheet or a plot of one's own; needs no library."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from typing import Final

from ffm_secure.records import RoundRecord
from ffm_secure.storage.durable import PRIVATE_FILE, write_atomic
from ffm_secure.tracking.base import NUMBERS, TrackedRun

COLUMNS: Final = (
    "round",
    "phase",
    "metric_name",
    "metric",
    *NUMBERS,
    "cohort",
    "survivors",
    "lost",
    "aborted",
)
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r")


class CsvFile:
    """Keep `<name of the run>.csv`, one line a round."""

    def __init__(self, tracked: TrackedRun) -> None:
        self._path = tracked.folder / f"{tracked.name}.csv"

    def begin(self, records: Sequence[RoundRecord]) -> None:
        """Write the file anew from the rounds on disk, so that a torn last line is none."""
        lines = [_line(COLUMNS)]
        for record in records:
            lines.append(_line(_cells(record)))
        write_atomic(self._path, "".join(lines).encode())

    def log(self, record: RoundRecord) -> None:
        """Add a line; the run directory holds what a power cut could take from it."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self._path, flags, PRIVATE_FILE)
        with open(descriptor, "ab", buffering=0) as file:
            file.write(_line(_cells(record)).encode())

    def close(self) -> None:
        """Nothing is open between two rounds."""


def _cells(record: RoundRecord) -> list[str]:
    cells = [str(record.round), record.phase, _text(record.metric_name), repr(record.metric)]
    for name in NUMBERS:
        value = getattr(record, name)
        cells.append("" if value is None else repr(value))
    counts = (len(record.cohort), len(record.survivors), len(record.dropped))
    return [*cells, *map(str, counts), _text(record.aborted)]


def _text(value: str) -> str:
    """Return a text that no spreadsheet runs as a formula."""
    return "'" + value if value.startswith(_FORMULA) else value


def _line(cells: Sequence[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue()
