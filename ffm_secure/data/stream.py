"""When rows arrive: the stage of every row of a stream, and which rows stay in a reservoir at home."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from defenses.dp.records import RecordKey
from ffm_secure.config.run_file import Stream
from ffm_secure.data.dataset import Dataset, Examples
from ffm_secure.data.table import listed
from ffm_secure.errors import DataError

NO_STAGE = -1


def stages_of(examples: Examples, stream: Stream, dataset: Dataset) -> NDArray[np.int64]:
    """Return the stage of every row, int64 [n]; `NO_STAGE` for a row of no declared value.

    Raises:
      DataError: there is no such column.
    """
    if stream.column not in examples.columns:
        raise DataError(
            f"task.stream.column = {stream.column!r}: {examples.origin} has no such column; there are "
            f"{listed(examples.columns)}"
        )
    places: dict[str, int] = {}
    for stage, values in enumerate(stream.order):
        places |= dict.fromkeys(values.split("|"), stage)
    cells: Sequence[object] = examples.column(stream.column)
    if stream.column == dataset.label_column and dataset.label_names:
        cells = list(np.array(dataset.label_names, dtype=object)[examples.labels])
    stages = np.full(len(examples), NO_STAGE, dtype=np.int64)
    for row, cell in enumerate(cells):
        stages[row] = places.get(str(cell), NO_STAGE)
    return stages


def staying_rows(examples: Examples, stream: Stream, key: RecordKey) -> NDArray[np.bool_]:
    """Return which rows stay in a reservoir, bool [n]: those whose lot falls below the share.

    A row's lot is drawn from what it says with the ledger's key, so no other row has a say in it, and equal
    rows stay together.
    """
    if not stream.replay:
        return np.zeros(len(examples), dtype=bool)
    contents = examples.contents
    assert contents is not None, "rows are named before they are dealt"
    lots = key.lots(b"reservoir" + int(value).to_bytes(8, "little") for value in contents)
    return np.asarray(lots < np.uint64(stream.replay * 2**64))


def classes_by_stage(
    labels: NDArray[np.int64], stages: NDArray[np.int64], *, count: int, classes: int
) -> NDArray[np.bool_]:
    """Return which classes occur in which stage of public rows, bool [stages, classes]."""
    table = np.zeros((count, classes), dtype=bool)
    known = stages != NO_STAGE
    table[stages[known], labels[known]] = True
    return table
