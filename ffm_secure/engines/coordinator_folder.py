"""A coordinator's folder: its file, its key, its roster, its runs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from defenses.random_source import RandomSource
from defenses.secagg import Identity
from ffm_secure.errors import StoreError
from ffm_secure.coordinator import coordinator_file
from ffm_secure.coordinator.coordinator_file import CoordinatorFile
from ffm_secure.storage.durable import create_folder, require_own_folder, write_atomic
from ffm_secure.storage.key_file import create_key, read_key_file
from ffm_secure.transport.roster import FederationRoster, read_roster

FILE: Final = "coordinator.toml"
KEY: Final = "coordinator.key"
ROSTER: Final = "roster.json"
RUNS: Final = "runs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Headquarters:
    """Name the places of a coordinator's folder."""

    place: Path

    def read(self) -> CoordinatorFile:
        """Read the coordinator's file.

        Raises:
          ConfigError, StoreError: with every problem.
        """
        if not self.place.is_dir():
            raise StoreError(
                f"{self.place}: is no folder; make a coordinator with: ffm-secure coordinator init "
                f"{self.place}"
            )
        require_own_folder(self.place)
        return coordinator_file.load(self.place / FILE)

    def key(self) -> Identity:
        """Read the key the coordinator signs with."""
        return read_key_file(self.place / KEY)

    def roster(self, file: CoordinatorFile, *, now: float) -> FederationRoster:
        """Read the roster.

        Raises:
          StoreError: there is none, it is not the operator's, has expired, or names another coordinator.
        """
        path = self.place / ROSTER
        roster = read_roster(path, operator=file.operator, now=now)
        if roster.statement.coordinator != self.key().public_key:
            raise StoreError(
                f"{path}: names another coordinator; send the operator this one's key and ask again"
            )
        return roster

    def run_folder(self, name: str) -> Path:
        """Return where a run lies."""
        return self.place / RUNS / name


def create(place: Path, file: CoordinatorFile, source: RandomSource) -> Identity:
    """Make a coordinator's folder with a new key; return the key.

    Raises:
      StoreError: there is one already, or the folder cannot be written.
    """
    try:
        create_folder(place)
        require_own_folder(place)
        if os.path.lexists(place / FILE):
            raise StoreError(f"{place / FILE}: exists; a coordinator is made once, in a folder of its own")
        key = create_key(place / KEY, source)
        create_folder(place / RUNS)
        write_atomic(place / FILE, coordinator_file.dump(file).encode())
    except OSError as error:
        raise StoreError(f"{place}: cannot be written: {error.strerror}") from None
    return key
