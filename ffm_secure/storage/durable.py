"""The one durable write: old content or new, never a part; private from the first moment; through no link."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

from ffm_secure.errors import StoreError

PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
LARGEST_DIGESTED = 64 << 30
"""Bytes of the largest file that a certificate may name; one that merely claims more takes hours to read."""


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file by new content; a reader, or a crash at any moment, sees the old or the new.

    Guarantee: a link of that name is replaced, never followed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    temporary.unlink(missing_ok=True)
    try:
        write_synced(temporary, content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal.

    Raises:
      StoreError: it cannot be read, or is larger than any file of a model that is exported here.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > LARGEST_DIGESTED:
                raise StoreError(f"{path}: {too_large(size)}")
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from None


def too_large(size: int) -> str:
    """Say that a file is larger than any that is certified."""
    return f"has {size:,} bytes, and no certified file more than {LARGEST_DIGESTED:,}; it was not read"


def write_synced(path: Path, content: bytes) -> None:
    """Write a new file and wait until the disk has it; its name may still be lost."""
    descriptor = os.open(
        path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, PRIVATE_FILE
    )
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def append_synced(path: Path, content: bytes) -> None:
    """Add to the end of a file and wait until the disk has it; a crash may leave a part at the end."""
    descriptor = os.open(
        path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, PRIVATE_FILE
    )
    with open(descriptor, "ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def create_folder(folder: Path) -> None:
    """Create a folder and what is missing above it, each its owner's alone; one that exists stays so."""
    missing = []
    place = folder
    while not place.exists():
        missing.append(place)
        place = place.parent
    for part in reversed(missing):
        part.mkdir(mode=PRIVATE_FOLDER, exist_ok=True)
    if not folder.is_dir():
        raise NotADirectoryError(20, "is not a folder", str(folder))


def require_own_folder(folder: Path) -> None:
    """Refuse a folder in which somebody else could plant a file or a link.

    Raises:
      StoreError: it is a link, of another owner, writable by others, or a link stands in it.
    """
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise StoreError(f"{folder}: is a link or a file, not a folder; name the real place")
    if status.st_uid != os.geteuid():
        raise StoreError(f"{folder}: belongs to another user; choose a folder of your own")
    if status.st_mode & OTHERS_WRITE:
        raise StoreError(
            f"{folder}: others may write here; check what it holds, then run: chmod -R go-w '{folder}'"
        )
    for entry in folder.iterdir():
        if entry.is_symlink():
            raise StoreError(
                f"{entry}: is a link, and would be followed elsewhere; put the file itself there"
            )


def replace_folder(final: Path, fill: Callable[[Path], None]) -> None:
    """Fill a new folder and swap it in whole; what fails while it is filled leaves the old one."""
    temporary, old = final.with_name(f".{final.name}.new"), final.with_name(f".{final.name}.old")
    remove(temporary)
    temporary.mkdir(mode=PRIVATE_FOLDER)
    try:
        fill(temporary)
        _make_private(temporary)
    except BaseException:
        remove(temporary)
        raise
    remove(old)
    if os.path.lexists(final):
        os.replace(final, old)
    os.replace(temporary, final)
    sync_folder(final.parent)
    remove(old)


def remove(path: Path) -> None:
    """Remove a folder with all it holds, or the link or file that stands in its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _make_private(folder: Path) -> None:
    """Make durable and private what others wrote into a folder that only its owner could enter."""
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            entry.chmod(PRIVATE_FOLDER)
            _make_private(entry)
            continue
        descriptor = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fchmod(descriptor, PRIVATE_FILE)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    sync_folder(folder)
