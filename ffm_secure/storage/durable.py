"""Write files so that a reader, or a crash at any moment, sees the old content or the new, never a part of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file by new content, durably."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        write_synced(temporary, content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until the disk has it; its name may still be lost."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def append_synced(path: Path, content: bytes) -> None:
    """Add to the end of a file and wait until the disk has it; a crash may leave a part at the end."""
    with open(path, "ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_folder(final: Path, fill: Callable[[Path], None]) -> None:
    """Fill a new folder and swap it in whole; what fails while it is filled leaves the old one."""
    temporary = final.with_name(f".{final.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    fill(temporary)
    sync_folder(temporary)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    sync_folder(final.parent)
