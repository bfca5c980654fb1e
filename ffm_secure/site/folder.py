"""A site's folder: its file, its key, its memories, its roster, its ledger; one process has it at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

from defenses.errors import DefenseError
from defenses.random_source import RandomSource
from defenses.replay_guard import ReplayGuard
from defenses.secagg import Identity
from ffm_secure.config.federated import run_digest
from ffm_secure.config import run_file
from ffm_secure.config.run_file import RunConfig
from ffm_secure.errors import ConfigError, FfmError, StoreError
from ffm_secure.site import site_file
from ffm_secure.site.identity import KEY, MEMORY, open_identity, read_identity
from ffm_secure.site.site_file import SiteFile
from ffm_secure.storage.durable import (
    PRIVATE_FILE,
    create_folder,
    require_own_folder,
    write_atomic,
)
from ffm_secure.transport.roster import FederationRoster, key_words, read_roster

FILE: Final = "site.toml"
ROSTER: Final = "roster.json"
ROUNDS: Final = "rounds.guard"  # rounds this site has begun, in all runs
ALLOWED: Final = "allowed"
LOG: Final = "site.log"
HOME: Final = "home"
_LOCK: Final = ".lock"


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteFolder:
    """Name the places of a site's folder."""

    place: Path

    @property
    def file(self) -> Path:
        """Return where the site's file lies."""
        return self.place / FILE

    @property
    def log(self) -> Path:
        """Return where the site's own log lies."""
        return self.place / LOG

    def read(self) -> SiteFile:
        """Read the site's file.

        Raises:
          ConfigError, StoreError: with every problem.
        """
        if not self.place.is_dir():
            raise StoreError(
                f"{self.place}: is no folder; make a site with: ffm-secure site init {self.place}"
            )
        require_own_folder(self.place)
        return site_file.load(self.file)

    def ledger_path(self, site: SiteFile) -> Path:
        """Return where the site's ledger lies."""
        return self.place / Path(site.ledger).expanduser()

    def roster(self, site: SiteFile, *, now: float) -> FederationRoster:
        """Read the roster and find this site on it.

        Raises:
          StoreError: there is none, it is not the operator's, has expired, or this site's key is not on it.
        """
        path = self.place / ROSTER
        roster = read_roster(path, operator=site.operator, now=now)
        keys = dict(zip(roster.names, roster.keys, strict=True))
        if site.name not in keys:
            raise StoreError(
                f"{path}: {site.name} is not on it: the operator has not added this site yet, or has "
                "revoked it; "
                "ask the operator"
            )
        if keys[site.name] != self.identity().public_key:
            raise StoreError(
                f"{path}: holds another key for {site.name} than {self.place / KEY}; send the operator "
                "the line "
                "that ffm-secure site status prints"
            )
        return roster

    def identity(self) -> Identity:
        """Open the identity with its memory of the protocol.

        Raises:
          StoreError: one of the two files is missing or damaged.
        """
        return read_identity(self.place)

    def rounds(self) -> ReplayGuard:
        """Open the memory of rounds begun.

        Raises:
          StoreError: it is missing or damaged: then a new site must be made, under a new key.
        """
        try:
            return ReplayGuard.open(self.place / ROUNDS, owner=self.identity().id)
        except DefenseError as error:
            raise StoreError(
                f"{self.place / ROUNDS}: {error}; a site whose memory is lost must be made anew, under "
                "a new key"
            ) from None

    def allowed(self) -> Mapping[str, Path]:
        """Return the run files that a person here has allowed, by digest.

        Raises:
          StoreError: one of them was changed since.
        """
        files = {}
        for path in sorted((self.place / ALLOWED).glob("*.toml")):
            if self.load_allowed(path) is not None:
                files[path.stem] = path
        return files

    def load_allowed(self, path: Path) -> RunConfig:
        """Read an allowed run file.

        Raises:
          StoreError: it is not the one that was allowed.
        """
        try:
            about = path.stat()
        except OSError as error:
            raise StoreError(f"{path}: cannot be read: {error.strerror}; allow the run again") from None
        return _load_allowed(path, (about.st_ino, about.st_mtime_ns, about.st_size))

    def allow(self, config: RunConfig) -> str:
        """Keep a run file as allowed, for one run; return its digest."""
        digest = run_digest(config)
        create_folder(self.place / ALLOWED)
        write_atomic(self.place / ALLOWED / f"{digest}.toml", run_file.dump(config).encode())
        self._run_of(digest).unlink(missing_ok=True)
        return digest

    def run_of(self, digest: str) -> bytes | None:
        """Return the id of the run that an allowed run file was used for; None before it has begun."""
        try:
            return bytes.fromhex(self._run_of(digest).read_text("ascii").strip())
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            raise StoreError(f"{self._run_of(digest)}: is damaged; allow the run again") from None

    def bind_run(self, digest: str, run: bytes) -> None:
        """Note which run an allowed run file is used for, before the first round is paid."""
        write_atomic(self._run_of(digest), run.hex().encode() + b"\n")

    def _run_of(self, digest: str) -> Path:
        return self.place / ALLOWED / f"{digest}.run"

    def lock(self) -> int:
        """Take the folder for this process.

        Raises:
          StoreError: another process has it.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self.place / _LOCK, flags, PRIVATE_FILE)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise StoreError(f"{self.place}: another process serves this site; stop that one first") from None
        return descriptor

    def is_served(self) -> bool:
        """Tell whether a process has the folder."""
        try:
            os.close(self.lock())
        except StoreError:
            return True
        return False


def create(place: Path, site: SiteFile, source: RandomSource) -> SiteFolder:
    """Make a site's folder with a new key and its memories; nothing of it exists half.

    Raises:
      StoreError: there is a site already, or the folder cannot be written.
    """
    folder = SiteFolder(place=place)
    try:
        create_folder(place)
        require_own_folder(place)
        for name in (FILE, KEY, MEMORY, ROUNDS):
            if os.path.lexists(place / name):
                raise StoreError(f"{place / name}: exists; a site is made once, in a folder of its own")
        identity = open_identity(place, source)
        ReplayGuard.create(place / ROUNDS, owner=identity.id)
        create_folder(place / ALLOWED)
        write_atomic(folder.file, site_file.dump(site).encode())
    except OSError as error:
        raise StoreError(f"{place}: cannot be written: {error.strerror}") from None
    return folder


@lru_cache(maxsize=32)
def _load_allowed(path: Path, version: tuple[int, int, int]) -> RunConfig:
    """Read an allowed run file, once a version of it: a service needs it in every round.

    Raises:
      StoreError: it is not the one that was allowed.
    """
    try:
        config = run_file.load(path)
    except ConfigError as error:
        raise StoreError(f"{path}: is damaged; allow the run again\n{error}") from None
    if run_digest(config) != path.stem:
        raise StoreError(
            f"{path}: was changed after it was allowed, or since an upgrade of ffm-secure it means "
            "something else; remove it and allow the run again"
        )
    return config


def every_problem(checks: Mapping[str, Callable[[], object]]) -> list[str]:
    """Run checks that do not depend on each other; return what each had to say."""
    problems = []
    for check in checks.values():
        try:
            check()
        except (FfmError, DefenseError) as error:
            problems.append(str(error))
    return problems


def line_for_operator(name: str, key: bytes) -> str:
    """Return the one line a site sends to the operator."""
    return f"{name} {key_words(key)}"
