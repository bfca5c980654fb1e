"""The data check that `plan` and `run` print: for the person at the terminal, who holds the rows."""

from __future__ import annotations

import numpy as np

from ffm_secure.api import Run
from ffm_secure.data import checks
from ffm_secure.data.checks import DataCheck

MOST_MEASURED = 2000  # private texts whose tokens are counted


def data_check(run: Run) -> DataCheck:
    """Look at the rows of a run that was loaded."""
    prepared = run.prepared()
    train, task = prepared.dataset.train, prepared.task
    sample = train.take(np.arange(0, len(train), -(-len(train) // MOST_MEASURED)))
    return checks.examine(
        prepared.dataset,
        owner_column=checks.owner_column(run.config),
        claims=run.config.privacy.unit != "none",
        lengths=task.full_lengths(sample),
        max_length=run.config.task.max_length,
        unanswered=task.unanswered(sample),
        notes=(*task.notes, *task.remarks(sample)),
    )
