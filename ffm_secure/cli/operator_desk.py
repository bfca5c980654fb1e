"""The operator's folder: an offline key, and the list of who is in the federation; nothing else."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from defenses.random_source import RandomSource
from defenses.secagg import Identity
from ffm_secure import record_codec
from ffm_secure.errors import ConfigError, RecordError, StoreError
from ffm_secure.storage.durable import create_folder, require_own_folder, write_atomic
from ffm_secure.storage.key_file import create_key, read_key_file
from ffm_secure.transport.roster import NAME, NAME_HELP, FederationRoster, Member, read_key
from ffm_secure.record_codec import read_regular

KEY: Final = "operator.key"
MEMBERS: Final = "members.json"
ROSTER: Final = "roster.json"
COORDINATOR: Final = "coordinator"
DAY: Final = 86_400


@dataclass(frozen=True, slots=True, kw_only=True)
class Members:
    """Whom the operator knows; the roster is this, signed."""

    federation: str
    serial: int = 0  # of the roster signed last
    coordinator: bytes = b""
    sites: tuple[Member, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorDesk:
    """Keep the list and sign it."""

    place: Path

    def key(self) -> Identity:
        """Read the operator's key."""
        return read_key_file(self.place / KEY)

    def members(self) -> Members:
        """Read the list.

        Raises:
          StoreError: there is none, or it is damaged.
        """
        path = self.place / MEMBERS
        try:
            return record_codec.from_bytes(Members, read_regular(path).strip(), str(path))
        except (OSError, RecordError):
            raise StoreError(
                f"{path}: is missing or damaged; make an operator with: ffm-secure operator init {self.place}"
            ) from None

    def keys(self) -> dict[str, bytes]:
        """Return every known key by name."""
        members = self.members()
        keys = {member.name: member.key for member in members.sites}
        return keys | ({COORDINATOR: members.coordinator} if members.coordinator else {})

    def add(self, name: str, key: str) -> Members:
        """Put a site on the list, or the coordinator under its name; a known name gets the new key.

        Raises:
          ConfigError: every problem of name and key.
        """
        problems = []
        if not re.fullmatch(NAME, name):
            problems.append(f"name = {name[:80]!r}: must be {NAME_HELP}")
        try:
            public = read_key(key)
        except ValueError as error:
            problems.append(f"key = {key[:80]!r}: {error}; ask {name[:80]} for its line again")
        if problems:
            raise ConfigError("operator roster add", problems)
        members = self.members()
        if name == COORDINATOR:
            changed = replace(members, coordinator=public)
        else:
            changed = replace(members, sites=_with(members.sites, Member(name=name, key=public)))
        self._write(changed)
        return changed

    def remove(self, name: str) -> Members:
        """Take a site off the list; it is out once everybody has the next roster.

        Raises:
          ConfigError: it is not on it.
        """
        members = self.members()
        rest = tuple(member for member in members.sites if member.name != name)
        if len(rest) == len(members.sites):
            raise ConfigError("operator roster revoke", [f"name = {name[:80]!r}: is not on the list"])
        changed = replace(members, sites=rest)
        self._write(changed)
        return changed

    def sign(self, *, now: float, days: float) -> FederationRoster:
        """Sign the list under the next serial number.

        Raises:
          ConfigError: nobody is on it, or no coordinator.
        """
        members = self.members()
        problems = []
        if not members.coordinator:
            problems.append(
                "no coordinator: ask it for its line, then: "
                f"ffm-secure operator roster add {self.place} coordinator KEY"
            )
        if days <= 0:
            problems.append(f"--days = {days:g}: must be above 0")
        if problems:
            raise ConfigError("operator roster sign", problems)
        roster = FederationRoster.issue(
            self.key(),
            federation=members.federation,
            serial=members.serial + 1,
            expires=int(now + days * DAY),
            coordinator=members.coordinator,
            sites=members.sites,
        )
        self._write(replace(members, serial=members.serial + 1))
        write_atomic(self.place / ROSTER, roster.to_bytes())
        return roster

    def _write(self, members: Members) -> None:
        write_atomic(self.place / MEMBERS, record_codec.canonical_bytes(members) + b"\n")


def create(place: Path, federation: str, source: RandomSource) -> OperatorDesk:
    """Make an operator's folder with a new key.

    Raises:
      ConfigError: the federation's name cannot be used.
      StoreError: there is one already, or the folder cannot be written.
    """
    if not (federation.isprintable() and 1 <= len(federation.encode()) <= 200):
        raise ConfigError("operator init", ["--federation: name it with 1 to 200 bytes of printable text"])
    desk = OperatorDesk(place=place)
    try:
        create_folder(place)
        require_own_folder(place)
        if os.path.lexists(place / MEMBERS):
            raise StoreError(f"{place / MEMBERS}: exists; an operator is made once, in a folder of its own")
        create_key(place / KEY, source)
        desk._write(Members(federation=federation))
    except OSError as error:
        raise StoreError(f"{place}: cannot be written: {error.strerror}") from None
    return desk


def _with(sites: tuple[Member, ...], added: Member) -> tuple[Member, ...]:
    """Return the list with a site in its place, or at the end: a site's number stays what it was."""
    if any(member.name == added.name for member in sites):
        return tuple(added if member.name == added.name else member for member in sites)
    return (*sites, added)
