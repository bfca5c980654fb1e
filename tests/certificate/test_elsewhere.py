"""A certificate is checked where there is no model library, no checkout's environment and no network."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.environments import ROOT, START, laid_out

VERIFY = ROOT / "requirements" / "verify.txt"
NAMESPACE = ("unshare", "-rn")
PROGRAM = (
    START
    + """
from importlib.util import find_spec
heavy = [name for name in ("torch", "transformers", "peft", "datasets", "safetensors") if find_spec(name)]
assert not heavy, heavy
from ffm_secure.cli import main
main()
"""
)


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lay out what requirements/verify.txt installs, and nothing else, with this package beside it."""
    lines = VERIFY.read_text().splitlines()
    needed = [line for line in lines if line.strip() and not line.startswith("#")]
    return laid_out(tmp_path_factory.mktemp("light"), needed)


def can_unshare() -> bool:
    return subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode == 0


def test_it_holds_without_a_model_library_or_a_network_in_five_seconds(light: Path, finished: Path) -> None:
    """Seconds are of the processor, so that a busy machine fails nobody."""
    if not can_unshare():
        pytest.skip("this machine lets nobody make a network namespace")
    program = PROGRAM.format(paths=[str(light)])
    words = [sys.executable, "-I", "-S", "-c", program, "verify", str(finished / "certificate.json")]
    options = ["--ledger", str(finished / "ledger.sqlite"), "--json"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*NAMESPACE, *words, *options], capture_output=True, text=True, env={})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["holds"] is True
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5.0


def test_a_namespace_has_no_network() -> None:
    """The control: in it there is nothing but a loopback that is down."""
    if not can_unshare():
        pytest.skip("this machine lets nobody make a network namespace")
    ask = "import socket; socket.create_connection(('192.0.2.1', 9), timeout=2)"
    done = subprocess.run([*NAMESPACE, sys.executable, "-c", ask], capture_output=True, text=True)
    assert "unreachable" in done.stderr
