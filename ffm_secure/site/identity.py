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
NOISE_KEY, NOISE_MEMORY = "noise.key", "noise_guard.json"


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


def open_noise(folder: Path, source: RandomSource) -> tuple[bytes, ReplayGuard]:
    """Return the secret that a site's noise with a memory comes from, and which rounds it was drawn for; the
    first time, new ones. The guarantee of `open_identity` holds for the pair.

    Raises:
      StoreError: one of the two is missing, damaged, or readable by others.
    """
    create_folder(folder)
    require_own_folder(folder)
    with _problems(folder):
        if os.path.lexists(folder / NOISE_KEY):
            return _read_pair(folder, NOISE_KEY, NOISE_MEMORY)
        return _create_pair(folder, source, NOISE_KEY, NOISE_MEMORY)


def _create(folder: Path, source: RandomSource) -> Identity:
    seed, guard = _create_pair(folder, source, KEY, MEMORY)
    return Identity(seed, guard=guard)


def _read(folder: Path) -> Identity:
    seed, guard = _read_pair(folder, KEY, MEMORY)
    return Identity(seed, guard=guard)


def _create_pair(folder: Path, source: RandomSource, key: str, memory: str) -> tuple[bytes, ReplayGuard]:
    """Make the memory first: a secret exists from the moment its key is on the disk."""
    seed = source.random_bytes(KEY_BYTES)
    (folder / memory).unlink(missing_ok=True)  # of a secret that never came to be
    guard = ReplayGuard.create(folder / memory, owner=_name(seed))
    write_atomic(folder / key, seed)
    return seed, guard


def _read_pair(folder: Path, key: str, memory: str) -> tuple[bytes, ReplayGuard]:
    seed = read_seed(folder / key)
    return seed, ReplayGuard.open(folder / memory, owner=_name(seed))


def _name(seed: bytes) -> bytes:
    return Identity(seed, guard=ReplayGuard.in_memory()).id
