"""The evidence folder: everything an officer files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ffm_secure.certificate.check import Materials
from ffm_secure.certificate.envelope import Envelope
from ffm_secure.certificate.files import READABLE, readable
from ffm_secure.certificate.statement import FILE, Statement
from ffm_secure.certificate.verify import verify
from ffm_secure.errors import PlanRefused, StoreError
from ffm_secure.storage.durable import replace_folder, write_synced

CERTIFICATE = "certificate.json"


def write_evidence(run: Path, content: bytes, out: Path) -> tuple[Path, ...]:
    """Write the evidence folder of a certified run and return its files.

    Guarantee: the folder is new, appears whole, and holds the certificate, what it certifies, and a readable
    copy of what is signed; the certificate held in every part before anything was written.

    Raises:
      RecordError: the bytes are no certificate.
      PlanRefused: it does not hold, or is not signed by everybody yet.
      StoreError: the folder exists, or a file of the run is missing.
    """
    if os.path.lexists(out):
        raise StoreError(f"{out}: exists; name a new folder")
    result = verify(content, Materials(folder=run))
    broken = [f"{check.claim}: {check.detail}" for check in result.checks if not check.holds]
    if broken:
        raise PlanRefused(["the certificate does not hold", *broken])
    payload = Envelope.from_bytes(content).payload
    names = [subject.name for subject in Statement.from_bytes(payload).subjects if FILE in subject.digest]

    def fill(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(run / name, folder / name, follow_symlinks=False)
        write_synced(folder / CERTIFICATE, content)
        write_synced(folder / READABLE, readable(payload))

    out.parent.mkdir(parents=True, exist_ok=True)
    replace_folder(out, fill)
    return tuple(sorted(path for path in out.rglob("*") if path.is_file()))
