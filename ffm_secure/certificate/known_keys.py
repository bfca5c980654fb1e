"""Keys of others that somebody knows from elsewhere: one a line, a name and a key."""

from __future__ import annotations

from pathlib import Path

from ffm_secure.errors import ConfigError
from ffm_secure.transport.roster import read_key


def read_known_keys(path: Path) -> dict[str, str]:
    """Read a name, blanks and a key as `operator init` or `site init` prints it on every line.

    Returns: key -> name.

    Raises:
      ConfigError: with every line that holds none, or a key twice.
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
        name, _, words = line.strip().rpartition(" ")
        try:
            read_key(words)
        except ValueError as error:
            problems.append(f"{path}, line {number}: {error}")
            continue
        if not name.strip() or words in known:
            problems.append(f"{path}, line {number}: must be a name and a key, each key once")
            continue
        known[words] = name.strip()
    if not known and not problems:
        problems.append(f"{path}: names no key")
    if problems:
        raise ConfigError("keys", problems)
    return known
