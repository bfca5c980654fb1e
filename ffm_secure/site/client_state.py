"""What a client keeps at home between rounds: its own numbers, in a folder of its own, never sent."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ffm_secure.agreed.run_spec import RunSpec
from ffm_secure.errors import StoreError
from ffm_secure.records import LEARN, RoundRecord
from ffm_secure.storage.durable import write_atomic
from ffm_secure.record_codec import require_regular

FORMAT = 1
KEPT = 3  # newest rounds: a run that continues from the checkpoint before its last still finds what it needs


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientStateStore:
    """Hold every simulated client's folder; a real client has only its own. Without `places` nothing is kept.

    Layout: `<client>/round-NNNNNN.safetensors`, what the client had after a round it took part in.
    Guarantee: a file belongs to a run and a round, and is replaced whole. A round that is played again after
    a kill starts from what the client had before it, whatever the killed attempt left behind. A client that
    was lost keeps what it had.
    """

    folder: Path = Path()
    owners: Sequence[str] = ()
    places: Sequence[slice] = ()  # of the kept numbers in the vector [d]

    def load(self, client: int, vector: Tensor, *, run_id: bytes, before: int) -> Tensor:
        """Return a global vector [d] with this client's own numbers of the rounds before one in their places.

        Raises:
          StoreError: what the client kept cannot be read.
        """
        if not self.places:
            return vector
        for path in reversed(self._files(client)):
            own = None
            if _round(path) < before:
                own = _read(path, run_id)
            if own is not None:
                return self._put(vector, own, path)
        return vector

    def save(self, client: int, vector: Tensor, *, run_id: bytes, round: int) -> None:
        """Keep this client's own numbers of a vector [d], durably, before anything of the round is sent."""
        if not self.places:
            return
        path = self._path(client, round)
        path.parent.mkdir(parents=True, exist_ok=True)
        own = torch.cat([vector[place] for place in self.places]).detach().cpu().contiguous()
        metadata = {"format": str(FORMAT), "run": run_id.hex(), "round": str(round)}
        write_atomic(path, safetensors.torch.save({"kept": own}, metadata=metadata))
        for old in [item for item in self._files(client) if _round(item) <= round][:-KEPT]:
            old.unlink(missing_ok=True)

    def require(self, records: Sequence[RoundRecord], run_id: bytes) -> None:
        """Refuse to continue a run when a client has lost what it kept: it would silently begin anew.

        Raises:
          StoreError: a client's numbers of its last round are missing.
        """
        if self.places:
            last = {}
            for record in records:
                for client in record.survivors:
                    last[client] = record.round
        else:
            last = {}
        for client, round in last.items():
            path = self._path(client, round)
            if not path.is_file() or _read(path, run_id) is None:
                raise StoreError(f"{path}: is missing; restore it, or start the run under another name")

    def _path(self, client: int, round: int) -> Path:
        return self.place(client) / f"round-{round:06d}.safetensors"

    def _files(self, client: int) -> list[Path]:
        return sorted(self.place(client).glob("round-*.safetensors"))

    def place(self, client: int) -> Path:
        """Return the folder of one client."""
        return self.folder / folder_name(self.owners[client])

    def _put(self, vector: Tensor, stored: Tensor, path: Path) -> Tensor:
        sizes = []
        for place in self.places:
            sizes.append(place.stop - place.start)
        if stored.numel() != sum(sizes):
            raise StoreError(f"{path}: holds {stored.numel()} numbers, this run keeps {sum(sizes)}")
        own = vector.clone()
        for place, part in zip(self.places, torch.split(stored, sizes), strict=True):
            own[place] = part.to(own.device)
        return own


def residual_store(spec: RunSpec, states: ClientStateStore) -> ClientStateStore:
    """Return where sites keep what a compression left out of their updates, beside what they keep anyway; a
    store that keeps nothing where the run file asks for none, or nobody keeps anything.
    """
    places = []
    if spec.config.compression.residual and states.owners:
        places = [slice(0, spec.compression.size)]
    return ClientStateStore(folder=states.folder / ".residual", owners=states.owners, places=places)


def own_models(spec: RunSpec, states: ClientStateStore, *, size: int = 1) -> ClientStateStore:
    """Return where owners of a distillation keep their own models of `size` numbers; a store that keeps
    nothing in any other run, or where nobody keeps anything.
    """
    places = [slice(0, size)] if spec.sheet is not None and states.owners else []
    return ClientStateStore(folder=states.folder / ".own", owners=states.owners, places=places)


def require_home(
    spec: RunSpec, states: ClientStateStore, records: Sequence[RoundRecord], run_id: bytes
) -> None:
    """Refuse to continue a run when a client has lost what it kept, or what a compression left out.

    Raises:
      StoreError: something of a client's last round is missing.
    """
    states.require(records, run_id)
    learned = [record for record in records if record.query == LEARN]
    residual_store(spec, states).require(learned, run_id)
    own_models(spec, states).require(learned, run_id)


def folder_name(owner: str) -> str:
    """Return a name for an owner's folder that stays inside its parent and differs from every other owner's.

    >>> folder_name("client-3")
    'client-3'
    >>> folder_name("St. Mary's / West")
    'St.-Mary-s-West-0aa63493'
    """
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", owner, re.ASCII):
        return owner
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", owner, flags=re.ASCII).strip(".-_")[:40]
    return f"{plain or 'owner'}-{hashlib.sha256(owner.encode()).hexdigest()[:8]}"


def _round(path: Path) -> int:
    digits = path.name.removeprefix("round-").removesuffix(".safetensors")
    if digits.isdecimal():
        return int(digits)
    return -1


def _read(path: Path, run_id: bytes) -> Tensor | None:
    """Return what a file holds; None if another run left it there."""
    try:
        require_regular(path)
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            own: Tensor = file.get_tensor("kept")
        if metadata.get("format") != str(FORMAT) or own.dtype != torch.float32 or own.dim() != 1:
            raise ValueError
        if not bool(torch.isfinite(own).all()) or metadata.get("round") != str(_round(path)):
            raise ValueError
    except (OSError, ValueError, safetensors.SafetensorError):
        raise StoreError(f"{path}: is damaged; restore it, or start the run under another name") from None
    if metadata.get("run") == run_id.hex():
        return own
    return None
