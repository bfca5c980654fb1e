"""The calculator and the ledger answer without loading a model library."""

from __future__ import annotations

import subprocess
import sys

import pytest

import defenses.dp

HEAVY = ("torch", "transformers", "opacus", "datasets", "scipy.stats", "scipy.optimize")
ASK = """
import sys
from ffm_secure.cli.app import main
sys.argv = ["ffm-secure", "epsilon", "--q", "0.01", "--sigma", "1.0", "--steps", "1000", "--delta", "1e-5"]
try:
    main()
except SystemExit as leaving:
    assert not leaving.code
"""
LEDGER = """
import sys
from defenses.dp import Accountant, GaussianEvent, Ledger, RecordMechanism  # the last one needs torch
assert "torch" in sys.modules
"""


def loaded(code: str) -> tuple[str, set[str]]:
    """Run code in a fresh interpreter; return what it printed and which heavy modules it loaded."""
    tail = f"\nprint('loaded', *[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code + tail], capture_output=True, text=True, check=True)
    *lines, last = done.stdout.splitlines()
    return "\n".join(lines), set(last.split()[1:])


def test_the_calculator_loads_no_model_library() -> None:
    printed, heavy = loaded(ASK)
    assert "epsilon: 1.828" in printed
    assert not heavy


def test_the_ledger_loads_no_model_library_and_the_check_would_notice_one() -> None:
    assert not loaded(
        "import sys\nfrom defenses.dp import Accountant, GaussianEvent, Ledger, poisson_sample"
    )[1]
    assert "torch" in loaded(LEDGER)[1]


def test_every_public_name_has_a_home() -> None:
    assert sorted(defenses.dp._HOMES) == sorted(defenses.dp.__all__)
    for name in defenses.dp.__all__:
        assert (
            getattr(defenses.dp, name).__module__ == f"defenses.dp.{defenses.dp._HOMES[name]}"
            or name == "Event"
        )
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        defenses.dp.nothing  # noqa: B018
