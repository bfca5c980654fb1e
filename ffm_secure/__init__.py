"""Adapt foundation models together, and prove what the result reveals.

>>> import ffm_secure as ffm
>>> "load" in ffm.__all__
True
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ffm_secure.config.run_file import RunConfig
from ffm_secure.errors import (
    BudgetExhausted,
    ConfigError,
    DataError,
    FfmError,
    Interrupted,
    ModelError,
    PlanRefused,
    StoreError,
)
from ffm_secure.foreign import LazyName
from ffm_secure.records import (
    AuditFinding,
    AuditSummary,
    PlanSummary,
    PrivacyStatement,
    RoundRecord,
    RunSummary,
)

if TYPE_CHECKING:
    from ffm_secure.api import Result

_LAZY = {"Result": "api", "Run": "api", "load": "api"}

__all__ = [
    "AuditFinding",
    "AuditSummary",
    "BudgetExhausted",
    "ConfigError",
    "DataError",
    "FfmError",
    "Interrupted",
    "ModelError",
    "PlanRefused",
    "PlanSummary",
    "PrivacyStatement",
    "Result",
    "RoundRecord",
    "Run",
    "RunConfig",
    "RunSummary",
    "StoreError",
    "audit",
    "load",
]


def audit(result: Result | str | Path, *, budget: str = "quick", data: object = None) -> AuditSummary:
    """Attack a finished run (a `Result` or its folder) and return what was found; the run's report is
    amended.

    `data` are the rows of a run that was given them from Python.
    """
    from ffm_secure.auditing.run_audit import audit_run
    from ffm_secure.data.memory import from_memory

    if isinstance(result, str | Path):
        folder = Path(result)
    else:
        folder = result.folder
    summary = audit_run(folder, budget=budget, rows=None if data is None else from_memory(data)).audit
    assert summary is not None
    return summary


def __getattr__(name: str) -> LazyName:
    """Load the run machinery (and torch) only when it is asked for."""
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(f"ffm_secure.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'ffm_secure' has no attribute {name!r}")
