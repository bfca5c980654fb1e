"""The adversary: attacks that see only an observation, never the truth.

Every registered attack is also a command: `python -m attacks.<name> --help`.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

from attacks.contract import (
    Attack,
    Budget,
    Finding,
    Item,
    NotApplicable,
    PlainAttack,
    Prior,
    Reconstruction,
    not_applicable,
)
from attacks.observation import Knowledge, Observation, ObservationError, load_observation, save_observation

__all__ = [
    "Attack",
    "Budget",
    "Finding",
    "Item",
    "Knowledge",
    "NotApplicable",
    "Observation",
    "ObservationError",
    "PlainAttack",
    "Prior",
    "Reconstruction",
    "load_observation",
    "not_applicable",
    "save_observation",
]


class _Commands(MetaPathFinder):
    """Let `python -m attacks.<name>` find a command for every registered attack: all share `__main__.py`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the shared command for the name of an attack, nothing for any other name."""
        parent, _, name = fullname.rpartition(".")
        if parent != __name__:
            return None
        from attacks.registry import ATTACKS

        if name in ATTACKS:
            return spec_from_file_location(fullname, Path(__file__).with_name("__main__.py"))
        return None


sys.meta_path.append(_Commands())  # last, so that it is asked only for names no file answers to
