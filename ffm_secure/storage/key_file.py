"""A signing key in a file of its own, its owner's alone: the operator's, a coordinator's, a site's."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from defenses.random_source import RandomSource
from defenses.replay_guard import ReplayGuard
from defenses.secagg import Identity
from ffm_secure.errors import StoreError
from ffm_secure.storage.durable import write_atomic, write_synced

_SEED_BYTES: Final = 32


def create_key(path: Path, source: RandomSource) -> Identity:
    """Make a key in a file that must not exist.

    Raises:
      StoreError: it does.
    """
    if os.path.lexists(path):
        raise StoreError(f"{path}: exists; a key is made once")
    seed = source.random_bytes(_SEED_BYTES)
    write_synced(path, seed)
    return Identity(seed, guard=ReplayGuard.in_memory())


def replace_key(path: Path, source: RandomSource) -> Identity:
    """Make a new key in the place of the one in a file; the old one is gone.

    Raises:
      StoreError: there is none, or it cannot be read.
    """
    read_seed(path)
    seed = source.random_bytes(_SEED_BYTES)
    write_atomic(path, seed)
    return Identity(seed, guard=ReplayGuard.in_memory())


def read_key_file(path: Path) -> Identity:
    """Read a key that takes part in no protocol with a memory.

    Raises:
      StoreError: it is missing, damaged, or readable by others.
    """
    return Identity(read_seed(path), guard=ReplayGuard.in_memory())


def read_seed(path: Path) -> bytes:
    """Read the private half of a key.

    Raises:
      StoreError: it is missing, damaged, or readable by others.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            about = os.fstat(file.fileno())
            seed = file.read(_SEED_BYTES + 1)
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}; restore it from your backup") from None
    if about.st_mode & (stat.S_IRWXG | stat.S_IRWXO) or about.st_uid != os.geteuid():
        raise StoreError(f"{path}: must belong to this user and be readable by nobody else (0600)")
    if len(seed) != _SEED_BYTES:
        raise StoreError(f"{path}: is damaged; restore it from your backup")
    return seed
