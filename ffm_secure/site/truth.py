"""What a site trained on in a round, kept at the site for the audit's scoring alone: no attack is given its
path.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
import safetensors.torch
from numpy.typing import NDArray

from ffm_secure.lifecycle.finetune import one_by_one_if_needed
from ffm_secure.site.client_state import folder_name
from ffm_secure.storage.durable import create_folder, write_atomic
from ffm_secure.tasks.base import Task
from ffm_secure.tasks.encoded import Encoded

MOST_ROWS = 256
_RENAMED = {
    "input_ids": "token_ids",
    "attention_mask": "attention_mask",
    "pixel_values": "images",
    "labels": "labels",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TruthKeeper:
    """Write, below a site's own folder, the rows that its recorded rounds were learned from."""

    folder: Path
    rounds: frozenset[int]
    task: Task

    def keep(self, owner: str, round: int, examples: Encoded, rows: Collection[int]) -> None:
        """Write the rows of one round, at most `MOST_ROWS`; a round in which nobody was sampled writes
        nothing.
        """
        chosen = np.asarray(sorted(rows), dtype=np.int64)[:MOST_ROWS]
        if round not in self.rounds or len(chosen) == 0:
            return
        batches = one_by_one_if_needed(lambda part: self.task.evaluation_batch(examples, part, "cpu"), chosen)
        if len(batches) != 1:  # a row that cannot be read taught nothing, so it is no part of the truth
            return
        tensors = {}
        for name, value in batches[0].items():
            if name in _RENAMED and (name != "labels" or value.dim() == 1):
                tensors[_RENAMED[name]] = value.contiguous()
        path = truth_path(self.folder, owner, round)
        create_folder(path.parent)
        write_atomic(path, safetensors.torch.save(tensors))

    def keep_update(self, owner: str, round: int, values: NDArray[np.float64]) -> None:
        """Write what this site sent, as a colluder would tell the server."""
        if round not in self.rounds:
            return
        create_folder(update_path(self.folder, owner, round).parent)
        content = safetensors.numpy.save({"values": np.ascontiguousarray(values)})
        write_atomic(update_path(self.folder, owner, round), content)


def update_path(folder: Path, owner: str, round: int) -> Path:
    """Return where a colluder keeps what it sent in a round."""
    return folder / folder_name(owner) / "sent" / f"round-{round:06d}.safetensors"


def truth_path(folder: Path, owner: str, round: int) -> Path:
    """Return where a site keeps what one round was learned from."""
    return folder / folder_name(owner) / "truth" / f"round-{round:06d}.safetensors"
