"""Environments that hold some distributions with what they need, and nothing else of this machine's."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
START = """
import sys
sys.path[:] = {paths!r} + [place for place in sys.path if "site-packages" not in place]
"""


def distribution(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None
    return match[0]


def is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def closure(names: Iterable[str]) -> set[str]:
    """Return the distributions that some need, themselves included, without their extras."""
    waiting, known = list(names), set[str]()
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in known or not is_installed(name):
            continue
        known.add(name)
        for requirement in importlib.metadata.requires(name) or []:
            if "extra ==" not in requirement:
                waiting.append(distribution(requirement))
    return known


def laid_out(place: Path, requirements: Iterable[str]) -> Path:
    """Lay out what some requirements install, with this package beside it, and return the folder."""
    for name in closure([distribution(line) for line in requirements]):
        files = importlib.metadata.files(name) or []
        root = Path(str(importlib.metadata.distribution(name).locate_file("")))
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            if not (place / top).exists():
                (place / top).symlink_to(root / top)
    for package in ("ffm_secure", "defenses", "attacks"):
        (place / package).symlink_to(ROOT / package)
    return place
