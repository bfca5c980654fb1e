"""The signed uploads of a round whose sum no honest cohort can have sent: kept to find out who it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ffm_secure.records import RoundPlan
from ffm_secure.agreed.run_spec import RunSpec
from ffm_secure.storage.durable import create_folder, remove, sync_folder, write_atomic

FORMAT = 1
LARGEST = 64 << 20  # bytes of one round's uploads that are kept whole; beyond that their digests are


def evidence_of(spec: RunSpec, folder: Path) -> Evidence | None:
    """Return where a run keeps its evidence; None without a protection, under which nothing is signed."""
    if spec.config.protection.kind == "none" or not folder.is_dir():
        return None
    return Evidence(folder=folder / "evidence", owners=spec.owners)


@dataclass(slots=True, kw_only=True)
class Evidence:
    """Hold a round's uploads until it is known whether their sum was one.

    Layout: `round-NNNNNN/SITE.upload` as they came, signed by their senders, and `index.json` with site,
    owner, size and SHA-256 of each, and why the sum was refused.
    Guarantee: nothing but what the server was sent is kept, and of a round that went well nothing at all;
    memory holds one upload at a time.
    """

    folder: Path
    owners: tuple[str, ...]  # by site
    limit: int = LARGEST
    _digests: dict[int, str] = field(default_factory=dict)
    _sizes: dict[int, int] = field(default_factory=dict)

    @property
    def _open(self) -> Path:
        return self.folder / ".now"

    def begin(self) -> None:
        """Forget the uploads of the round before."""
        self._digests.clear()
        self._sizes.clear()
        if self._open.exists():
            remove(self._open)

    def upload(self, site: int, content: bytes | memoryview) -> None:
        """Take in what one site sent and its session accepted."""
        self._digests[site] = hashlib.sha256(content).hexdigest()
        if sum(self._sizes.values()) + len(content) <= self.limit:
            create_folder(self._open)
            write_atomic(self._open / f"{site}.upload", bytes(content))
        self._sizes[site] = len(content)

    def keep(self, plan: RoundPlan, reason: str) -> Mapping[int, str]:
        """Keep the round's uploads for good; return the SHA-256 of each."""
        create_folder(self._open)
        uploads = [
            {
                "site": site,
                "owner": self.owners[site],
                "bytes": self._sizes[site],
                "sha256": digest,
                "file": name if (self._open / (name := f"{site}.upload")).is_file() else "",
            }
            for site, digest in sorted(self._digests.items())
        ]
        index = {
            "format": FORMAT,
            "run": plan.run_id.hex(),
            "round": plan.round,
            "attempt": plan.attempt,
            "reason": reason,
            "uploads": uploads,
        }
        write_atomic(self._open / "index.json", (json.dumps(index, indent=1) + "\n").encode())
        final = self.folder / f"round-{plan.round:06d}"
        remove(final)
        os.replace(self._open, final)
        sync_folder(self.folder)
        return dict(self._digests)
