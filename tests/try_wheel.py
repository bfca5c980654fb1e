"""Try an installed copy of the package from outside the checkout: imports, data files, a command, a run of
two rounds.

Not a test of the suite: `make dist` runs it with the unpacked wheel first on the path.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import tempfile
from pathlib import Path

import attacks
import defenses
import ffm_secure as ffm

ROOT = Path(__file__).resolve().parents[1]
DATA_FILES = ("py.typed", "report.schema.json", "report.css")


def check_files() -> None:
    """Refuse a wheel that was not imported, or that lacks a file the code reads."""
    for package in (attacks, defenses, ffm):
        place = Path(str(package.__file__)).resolve()
        assert "installed" in place.parts, f"{package.__name__} was imported from {place}"
        assert (place.parent / "py.typed").exists(), f"{package.__name__} lost its mark for type checkers"
    names = {path.name for path in Path(str(ffm.__file__)).resolve().parent.rglob("*")}
    assert names >= set(DATA_FILES), f"missing from the wheel: {set(DATA_FILES) - names}"
    tops = {path.name for path in Path("installed").iterdir() if not path.name.endswith(".dist-info")}
    assert tops - {"bin"} == {"attacks", "defenses", "ffm_secure"}, f"the wheel holds {sorted(tops)}"


def check_run() -> None:
    """Train the smallest run file and write its report."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FFM_SECURE_HOME"] = folder  # never the ledger of whoever builds the package
        result = ffm.load(ROOT / "examples" / "tiny.toml", runs=folder).start()
        assert result.epsilon > 0


def main() -> None:
    """Say which version works."""
    check_files()
    check_run()
    print(
        f"ffm-secure {importlib.metadata.version('ffm-secure')} works from its wheel, Python "
        f"{sys.version.split()[0]}"
    )


if __name__ == "__main__":
    main()
