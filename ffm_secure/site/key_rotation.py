"""A site's new key in the place of its old one: the memories go over to it whole, the old key is gone."""

from __future__ import annotations

import os
from typing import Final

from defenses.random_source import RandomSource
from defenses.secagg import Identity
from ffm_secure.errors import StoreError
from ffm_secure.site.folder import ROUNDS, SiteFolder
from ffm_secure.site.identity import KEY, MEMORY, ROTATION
from ffm_secure.storage.durable import create_folder, remove, sync_folder
from ffm_secure.storage.key_file import create_key

_ORDER: Final = (MEMORY, ROUNDS, KEY)  # the key is written last and moved last


def rotate_key(folder: SiteFolder, source: RandomSource) -> Identity:
    """Give a site a new key, and its memories to the new key; one that was interrupted is finished.

    Guarantee: what the old key entered or sent, the new one enters and sends no more; after a crash at any
    moment the old key holds, or a second call leaves the new one.

    Raises:
      StoreError: a process serves the site, or its key or memories cannot be used.
    """
    lock = folder.lock()
    try:
        if not (folder.place / ROTATION / KEY).exists():
            _prepare(folder, source)
        _move(folder)
    except OSError as error:
        raise StoreError(
            f"{folder.place}: cannot be written: {error.strerror}; nothing is lost: mend it, and say it again"
        ) from None
    finally:
        os.close(lock)
    return folder.identity()


def _prepare(folder: SiteFolder, source: RandomSource) -> None:
    """Write the new files apart, the key last: until it is there, nothing has happened."""
    old, rounds, apart = folder.identity(), folder.rounds(), folder.place / ROTATION
    remove(apart)
    create_folder(apart)
    beside = apart / "new.key"
    identity = create_key(beside, source)
    old.guard.hand_over(apart / MEMORY, owner=identity.id)
    rounds.hand_over(apart / ROUNDS, owner=identity.id)
    os.replace(beside, apart / KEY)
    sync_folder(apart)


def _move(folder: SiteFolder) -> None:
    for name in _ORDER:
        if (folder.place / ROTATION / name).exists():
            os.replace(folder.place / ROTATION / name, folder.place / name)
            sync_folder(folder.place)
    remove(folder.place / ROTATION)
