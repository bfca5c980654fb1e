"""Read what somebody else may have put there: a pipe never holds us, a device never fills the memory."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Final

LARGEST: Final = 1 << 30  # bytes of a file that is read whole and is no table, picture or model


def read_regular(path: Path, most: int = LARGEST) -> bytes:
    """Read a whole file.

    Guarantee: returns for a pipe, too, and never reads more than `most` bytes.

    Raises:
      OSError: it cannot be read, is no regular file, or is larger; `strerror` says which.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
        status = os.fstat(stream.fileno())
        _require_mode(status.st_mode, path)
        if status.st_size > most:
            raise OSError(errno.EINVAL, f"is larger than {most:,} bytes, as no such file is", str(path))
        return stream.read(most)


def require_regular(path: Path) -> None:
    """Refuse what a library must not open by its name.

    Raises:
      OSError: it is not there, or no regular file.
    """
    _require_mode(path.stat().st_mode, path)


def _require_mode(mode: int, path: Path) -> None:
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "is no regular file", str(path))
