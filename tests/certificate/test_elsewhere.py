"""A certificate is checked where there is no model library, no checkout's environment and no network."""

from __future__ import annotations

import importlib.metadata
import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VERIFY = ROOT / "requirements" / "verify.txt"
NAMESPACE = ("unshare", "-rn")
PROGRAM = """
import sys
sys.path[:] = {paths!r} + [place for place in sys.path if "site-packages" not in place]
from importlib.util import find_spec
heavy = [name for name in ("torch", "transformers", "peft", "datasets", "safetensors") if find_spec(name)]
assert not heavy, heavy
from ffm_secure.cli import main
main()
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


def closure(names: list[str]) -> set[str]:
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


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lay out what requirements/verify.txt installs, and nothing else, with this package beside it."""
    lines = VERIFY.read_text().splitlines()
    names = [distribution(line) for line in lines if line.strip() and not line.startswith("#")]
    place = tmp_path_factory.mktemp("light")
    for name in closure(names):
        files = importlib.metadata.files(name) or []
        root = Path(str(importlib.metadata.distribution(name).locate_file("")))
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            if not (place / top).exists():
                (place / top).symlink_to(root / top)
    for package in ("ffm_secure", "defenses"):
        (place / package).symlink_to(ROOT / package)
    return place


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
