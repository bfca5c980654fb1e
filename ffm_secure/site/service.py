"""Open the folder of a site: its policy, its identity, its ledger and its rows, behind one session."""

from __future__ import annotations

from pathlib import Path

from ffm_secure.errors import FfmError
from ffm_secure.site.session import SiteSession


def open_session(folder: Path) -> SiteSession:
    """Open the folder that `ffm-secure site init` made, and answer for it from now on; one process at a time.

    Raises:
      FfmError: every problem of the folder at once, each with who must do what.
    """
    raise FfmError(f"{folder}: this release opens no site folders yet")
