"""A site's identity and its memory of what it took part in, on its own disk: one is worth nothing without the
other.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from defenses.errors import ParameterError, TamperedError
from defenses.random_source import RandomSource
from defenses.secagg import Identity, ReplayGuard
from defenses.secagg.keys import KEY_BYTES
from ffm_secure.errors import StoreError
from ffm_secure.storage.durable import create_folder, require_own_folder, write_atomic
from ffm_secure.storage.key_file import read_seed

KEY, MEMORY = "identity.key", "replay_guard.json"
ROTATION = ".rotation"  # holds the new files while a key is changed, and not a moment longer


def open_identity(folder: Path, source: RandomSource) -> Identity:
    """Return the identity kept in a site's folder, with its memory; the first time, a new one.

    Guarantee: an identity that exists is never given a new memory: what it entered, and what it sent, it
    enters and sends no more, in this process and the next. Both files are their owner's alone.
    Raises:
      StoreError: one of the two is missing, damaged, or readable by others.
    """
    create_folder(folder)
    require_own_folder(folder)
    with _problems(folder):
        if os.path.lexists(folder / KEY):
            return _read(folder)
        return _create(folder, source)


def read_identity(folder: Path) -> Identity:
    """Return the identity kept in a site's folder, with its memory.

    Raises:
      StoreError: one of the two is missing, damaged, or readable by others, or a change of keys was
        interrupted.
    """
    if (folder / ROTATION / KEY).exists():
        raise StoreError(
            f"{folder}: a change of keys was interrupted; finish it with: ffm-secure site rotate-key {folder}"
        )
    with _problems(folder):
        return _read(folder)


@contextmanager
def _problems(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ParameterError, TamperedError, StoreError) as error:
        reason = str(error) or "is damaged"
        raise StoreError(
            f"{folder}: the site's identity or its memory of past rounds cannot be used ({reason}); "
            "restore both files, or start the run under another name"
        ) from None


def _create(folder: Path, source: RandomSource) -> Identity:
    """Make the memory first: an identity exists from the moment its key is on the disk."""
    seed = source.random_bytes(KEY_BYTES)
    memory = folder / MEMORY
    memory.unlink(missing_ok=True)  # of an identity that never came to be
    guard = ReplayGuard.create(memory, owner=_name(seed))
    write_atomic(folder / KEY, seed)
    return Identity(seed, guard=guard)


def _read(folder: Path) -> Identity:
    seed = read_seed(folder / KEY)
    guard = ReplayGuard.open(folder / MEMORY, owner=_name(seed))
    return Identity(seed, guard=guard)


def _name(seed: bytes) -> bytes:
    return Identity(seed, guard=ReplayGuard.in_memory()).id
