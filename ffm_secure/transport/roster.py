"""Who is who in a federation, signed by the operator: the coordinator's key, every site's name and key."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from defenses import secagg
from defenses.errors import ParameterError, ProtocolError
from defenses.signatures import PUBLIC_KEY_BYTES, is_sound_key, verify_signature
from ffm_secure import record_codec
from ffm_secure.errors import ConfigError, RecordError, StoreError
from ffm_secure.record_codec import read_regular

NAME: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
NAME_HELP: Final = "1 to 64 letters, digits, dots, dashes or underscores, the first a letter or digit"
KEY_PATTERN: Final = r"ed25519:[0-9a-f]{64}"
_STATEMENT: Final = b"ffm-secure roster 1"


def key_words(public_key: bytes) -> str:
    """Write a public key as people copy it.

    >>> key_words(bytes(32))[:20]
    'ed25519:000000000000'
    """
    return f"ed25519:{public_key.hex()}"


def read_key(words: str) -> bytes:
    """Read a public key as `key_words` writes it.

    Raises:
      ValueError: it is none, or nobody should use it.
    """
    if not re.fullmatch(KEY_PATTERN, words):
        raise ValueError("must be ed25519: and 64 hexadecimal digits in small letters")
    key = bytes.fromhex(words.removeprefix("ed25519:"))
    if not is_sound_key(key):
        raise ValueError("is no key that anybody should use; make a new one")
    return key


def expired(when: int) -> str:
    """Say that a roster has expired, and what to do."""
    day = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(min(when, 1 << 40)))
    return f"the roster expired on {day}; ask the operator for a new one"


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One site: its name, and the key it signs with."""

    name: str
    key: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """What the operator says: all of it is signed."""

    federation: str
    serial: int
    expires: int  # seconds since 1970
    coordinator: bytes
    sites: tuple[Member, ...]  # a site's number is its place


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    format: int = 1
    statement: Statement
    signature: bytes
    sessions: bytes  # the same keys, as the protocol of secure aggregation signs them


@dataclass(frozen=True, slots=True, kw_only=True)
class FederationRoster:
    """List a federation's sites in the order of their numbers.

    Guarantee: one exists only with the operator's signature over names, keys, coordinator, serial and expiry.
    Assumes: it reaches a site from the operator, and the operator's key did not come from the coordinator.
    """

    statement: Statement
    sessions: secagg.Roster
    signature: bytes = field(repr=False)

    @classmethod
    def issue(
        cls,
        operator: secagg.Identity,
        *,
        federation: str,
        serial: int,
        expires: int,
        coordinator: bytes,
        sites: Sequence[Member],
    ) -> FederationRoster:
        """Sign a roster as the operator.

        Raises:
          ConfigError: with every name or key that cannot stand in it.
        """
        problems = _problems(sites)
        if problems:
            raise ConfigError("the roster", problems)
        statement = Statement(
            federation=federation,
            serial=serial,
            expires=expires,
            coordinator=coordinator,
            sites=tuple(sites),
        )
        try:
            sessions = secagg.Roster.issue(
                operator,
                [member.key for member in sites],
                federation=federation,
                serial=serial,
                expires=expires,
            )
        except ParameterError as error:
            raise ConfigError("the roster", str(error).split("; ")) from None
        signature = operator.sign(_STATEMENT + record_codec.canonical_bytes(statement))
        return cls(statement=statement, sessions=sessions, signature=signature)

    @classmethod
    def from_bytes(cls, data: bytes, *, operator: bytes) -> FederationRoster:
        """Read a roster and check it against the operator's key.

        Raises:
          StoreError: it is damaged, or not this operator's.
        """
        try:
            stored = record_codec.from_bytes(_File, data.strip(), "the roster")
            statement = stored.statement
            words = record_codec.canonical_bytes(statement)
            verify_signature(operator, stored.signature, _STATEMENT + words)
            sessions = secagg.Roster.from_bytes(stored.sessions, operator=operator)
        except (RecordError, ProtocolError):
            raise StoreError(
                "the roster is damaged, or not signed by the operator whose key is in site.toml; "
                "ask the operator for it again"
            ) from None
        same = (sessions.federation, sessions.serial, sessions.expires) == (
            statement.federation,
            statement.serial,
            statement.expires,
        )
        keys = {member.key for member in statement.sites}
        if not same or keys != set(sessions.public_keys) or _problems(statement.sites):
            raise StoreError("the roster contradicts itself; ask the operator to sign it again")
        return cls(statement=statement, sessions=sessions, signature=stored.signature)

    def to_bytes(self) -> bytes:
        """Write statement and signatures as one line of JSON."""
        stored = _File(statement=self.statement, signature=self.signature, sessions=self.sessions.to_bytes())
        return record_codec.canonical_bytes(stored) + b"\n"

    @property
    def names(self) -> tuple[str, ...]:
        """Return the name of every site, by number."""
        return tuple(member.name for member in self.statement.sites)

    @property
    def keys(self) -> tuple[bytes, ...]:
        """Return the key of every site, by number."""
        return tuple(member.key for member in self.statement.sites)

    @property
    def digest(self) -> str:
        """Return the hash of names, keys, order, serial and expiry."""
        content = record_codec.canonical_bytes(self.statement)
        return secagg.rule_digest("roster", {"statement": content.decode()}).hex()


def read_roster(path: Path, *, operator: str, now: float) -> FederationRoster:
    """Read the roster a party was given, and check that it holds now.

    Raises:
      StoreError: there is none, it is not the operator's, or it has expired.
    """
    try:
        content = read_regular(path)
    except OSError:
        raise StoreError(f"{path}: is missing; ask the operator for the roster and put it there") from None
    roster = FederationRoster.from_bytes(content, operator=read_key(operator))
    if now >= roster.statement.expires:
        raise StoreError(f"{path}: {expired(roster.statement.expires)}")
    return roster


def _problems(sites: Sequence[Member]) -> list[str]:
    problems = []
    names = [member.name for member in sites]
    for name in sorted(set(names)):
        if not re.fullmatch(NAME, name):
            problems.append(f"name = {name[:80]!r}: must be {NAME_HELP}")
        if names.count(name) > 1:
            problems.append(f"name = {name[:80]!r}: stands {names.count(name)} times; name every site once")
    keys = [member.key for member in sites]
    for member in sites:
        if len(member.key) != PUBLIC_KEY_BYTES or not is_sound_key(member.key):
            problems.append(f"{member.name}: its key is none that anybody should use; ask it for a new one")
        elif keys.count(member.key) > 1:
            problems.append(f"{member.name}: its key is another site's too; ask both for their lines again")
    return problems or (
        [] if sites else ["no site stands in it; add some with: ffm-secure operator roster add"]
    )
