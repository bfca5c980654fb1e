"""Whether what a run file names locally is there; looked at before anything heavy is imported."""

from __future__ import annotations

import re
from pathlib import Path

from ffm_secure.config.run_file import Task
from ffm_secure.errors import DataError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?", re.ASCII)


def require_data(task: Task, *, beside: Path) -> None:
    """Refuse a data set that is no file here and cannot be a name on the hub.

    Raises:
      DataError: with the places that were looked at.
    """
    name = task.data
    if name.startswith("builtin:") or HUB_NAME.fullmatch(name):
        return
    try:
        candidates = []
        for place in (Path.cwd(), beside):
            candidates.append(place / Path(name).expanduser())
        exists = any(candidate.exists() for candidate in candidates)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"data = {name[:80]!r}: not a usable path ({error})") from error
    if not exists:
        raise DataError(
            f"data = {name!r}: there is no {candidates[-1]}; give a file, a folder or builtin:<name>"
        )
