"""Keys that sign certificates: read from their owner's file, or made for one simulation and forgotten."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ffm_secure.errors import ConfigError, StoreError

KEY_BYTES = 32


def read_key(path: Path) -> Ed25519PrivateKey:
    """Read a private key: the 32 raw bytes of an identity, in a file that is its owner's alone.

    Raises:
      StoreError: it is not there, readable by others, a link, or no key.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from None
    with os.fdopen(descriptor, "rb") as file:
        about = os.fstat(file.fileno())
        if about.st_mode & (stat.S_IRWXG | stat.S_IRWXO) or about.st_uid != os.geteuid():
            raise StoreError(f"{path}: must belong to this user and be readable by nobody else (chmod 600)")
        content = file.read(KEY_BYTES + 1)
    if len(content) != KEY_BYTES:
        raise StoreError(f"{path}: is no key; an identity has {KEY_BYTES} bytes")
    return Ed25519PrivateKey.from_private_bytes(content)


def public_text(key: Ed25519PrivateKey) -> str:
    """Return the public key in hexadecimal, as signers are named."""
    return key.public_key().public_bytes_raw().hex()


def read_public_keys(path: Path) -> dict[str, str]:
    """Read known keys, one a line: a name, blanks, and the key in hexadecimal. Return key -> name.

    Raises:
      ConfigError: with every line that is none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise ConfigError("keys", [f"{path}: cannot be read as text"]) from None
    known: dict[str, str] = {}
    problems = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, _, text = line.strip().rpartition(" ")
        if not name.strip() or not _is_key(text) or text in known:
            problems.append(
                f"{path}, line {number}: must be a name and a key of 64 hexadecimal digits, each once"
            )
            continue
        known[text] = name.strip()
    if not known and not problems:
        problems.append(f"{path}: names no key")
    if problems:
        raise ConfigError("keys", problems)
    return known


def _is_key(text: str) -> bool:
    return len(text) == 2 * KEY_BYTES and all(digit in "0123456789abcdef" for digit in text)
