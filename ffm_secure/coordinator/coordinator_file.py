"""`coordinator.toml`: what the coordinator's own people decided; it decides nothing for a site."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ffm_secure.config.schema import dump_toml, load_file, option
from ffm_secure.server.timetable import Timetable
from ffm_secure.transport.roster import KEY_PATTERN


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorFile:
    """Everything `coordinator.toml` says."""

    format: int = option(choices=(1,))
    operator: str = option(pattern=KEY_PATTERN, help="the operator's key, as `operator init` printed it")
    deadlines: Timetable = option(Timetable())


def load(path: Path) -> CoordinatorFile:
    """Read a coordinator's file.

    Raises:
      ConfigError: with every problem at once.
    """
    return load_file(CoordinatorFile, path)


def dump(coordinator: CoordinatorFile) -> str:
    """Write a coordinator's file as TOML that `load` reads back to an equal value."""
    return dump_toml(coordinator)
