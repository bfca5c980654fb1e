"""Where a site's ledger lies: outside every run by default, so that no folder of a run takes a budget with
it.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from defenses.dp import Ledger
from defenses.dp.records import RecordKey
from ffm_secure.config.run_file import Privacy
from ffm_secure.errors import StoreError

IN_RUN = "run"
FILE = "ledger.sqlite"


def data_home() -> Path:
    """Return the folder of what outlives runs: FFM_SECURE_HOME, or this user's data folder."""
    chosen = os.environ.get("FFM_SECURE_HOME")
    if chosen:
        return Path(chosen).expanduser()
    shared = os.environ.get("XDG_DATA_HOME")
    return (Path(shared) if shared else Path.home() / ".local" / "share") / "ffm-secure"


def ledger_path(privacy: Privacy, folder: Path | None) -> Path | None:
    """Return the file of the ledger a run charges; none for a ledger inside a run that has no folder yet.

    A run of earlier software, which kept its ledger inside, is continued with that one.
    """
    inside = None
    if folder is not None:
        inside = folder / FILE
    if privacy.ledger == IN_RUN:
        return inside
    if not privacy.ledger and inside is not None and inside.is_file():
        return inside
    if privacy.ledger:
        return Path(privacy.ledger).expanduser()
    return data_home() / FILE


def open_ledger(path: Path) -> Ledger:
    """Open a ledger, made when there is none, in a folder nobody else may read.

    Raises:
      StoreError: everybody may write into its folder, and put another in its place.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    mode = path.parent.stat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise StoreError(
            f"{path.parent}: everybody may write here and put another ledger in the place of this one; check "
            f"what it holds, then run: chmod o-w {path.parent}"
        )
    return Ledger.open(path, create=True)


def record_key(privacy: Privacy, folder: Path | None) -> RecordKey:
    """Return the key rows are named with: the ledger's own, or for a ledger inside a run the one everybody
    has.

    Rows that are said to be fictitious or public need no secret, and a run of them repeats to the bit.
    """
    path = ledger_path(privacy, folder)
    if privacy.ledger == IN_RUN or path is None:
        return RecordKey.public()
    with open_ledger(path) as ledger:
        return ledger.record_key()
