"""What observers saw, kept for the audit: a bounded number of rounds, each observation a small folder of its
own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from ffm_secure import record_codec
from ffm_secure.errors import StoreError
from ffm_secure.records import RecordedObservation
from ffm_secure.storage.durable import create_folder, replace_folder, write_synced
from ffm_secure.record_codec import read_regular, require_regular

_DESCRIPTION, _TENSORS = "observation.json", "tensors.safetensors"
_BROADCAST = "broadcast"


@dataclass(slots=True, kw_only=True)
class ObservationStore:
    """Write observations below one folder until `limit` bytes are used; what would exceed it is counted, not
    written.

    Guarantee: a folder that is there is whole, and private to its owner.
    """

    folder: Path
    limit: int
    used: int = 0
    left_out: int = 0
    _seen: set[str] = field(default_factory=set)

    def write(
        self, description: RecordedObservation, values: Tensor, *, broadcast: Tensor | None = None
    ) -> None:
        """Keep one observation: `values` [d] as it crossed the wire, and the model that was broadcast."""
        tensors = {"values": values.detach().cpu().contiguous()}
        if broadcast is not None:
            tensors[_BROADCAST] = broadcast.detach().cpu().contiguous()
        content = safetensors.torch.save(tensors, metadata={"format": "1"})
        if self.used + len(content) > self.limit:
            self.left_out += 1
            return
        self.used += len(content)
        create_folder(self.folder)

        def fill(folder: Path) -> None:
            write_synced(folder / _DESCRIPTION, record_codec.canonical_bytes(description))
            write_synced(folder / _TENSORS, content)

        replace_folder(self.folder / _name(description), fill)


def _name(description: RecordedObservation) -> str:
    whose = ""
    if description.own >= 0:
        whose = f"-site-{description.own:05d}"
    if description.group >= 0:
        whose += f"-group-{description.group:05d}"
    return f"round-{description.round:06d}-{description.observer}{whose}"


def read_observations(folder: Path) -> Iterator[tuple[RecordedObservation, Mapping[str, Tensor]]]:
    """Yield what was kept, in the order of rounds: the description, and its tensors `values` and `broadcast`.

    Raises:
      StoreError: one of them is damaged.
    """
    for path in sorted(folder.glob("round-*")) if folder.is_dir() else ():
        try:
            description = record_codec.from_bytes(
                RecordedObservation, read_regular(path / _DESCRIPTION), str(path / _DESCRIPTION)
            )
            require_regular(path / _TENSORS)
            tensors = safetensors.torch.load_file(path / _TENSORS)
            if "values" not in tensors or tensors["values"].dim() != 1:
                raise ValueError("values")
        except (OSError, ValueError, safetensors.SafetensorError):
            raise StoreError(f"{path}: is damaged; remove it, or restore it") from None
        yield description, tensors
