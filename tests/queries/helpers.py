"""Questions for tests, and rows to ask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ffm_secure.config.run_file import RunConfig
from tests.federation.helpers import make

HEAD = {"name": "builtin:tiny-vit", "trainable": {"kind": "head"}}
STEPS = {"kind": "finetune", "local_steps": 2, "batch_size": 8, "learning_rate": 0.1}


def one_shot(kind: str = "class_sums", *, rounds: int = 1, cohort: int = 4, **sections: Any) -> RunConfig:
    """Return a run that asks for sums and learns nothing else."""
    federation = {"rounds": rounds, "cohort": cohort, "lifecycle": {"kind": kind}}
    return make(model=HEAD, federation=federation, **sections)


def with_start(start: str = "class_sums", *, cohort: int = 4, rounds: int = 2, **sections: Any) -> RunConfig:
    """Return a run of fine-tuning whose head is made from sums first."""
    federation = {"rounds": rounds, "cohort": cohort, "lifecycle": {**STEPS, "start": start}}
    return make(federation=federation, **sections)


def queries(records: Sequence[Any]) -> list[str]:
    """Return what each round asked."""
    return [record.query for record in records]
