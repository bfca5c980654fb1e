"""Adapt foundation models together, and prove what the result reveals.

>>> import ffm_secure as ffm
>>> "load" in ffm.__all__
True
"""

from __future__ import annotations

from typing import Any

from ffm_secure.config import RunConfig
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
from ffm_secure.types import (
    AuditFinding,
    AuditSummary,
    PlanSummary,
    PrivacyStatement,
    RoundRecord,
    RunSummary,
)

_LAZY = {"Result": "run", "Run": "run", "load": "run"}

__all__ = [
    "AuditFinding", "AuditSummary", "BudgetExhausted", "ConfigError", "DataError", "FfmError", "Interrupted", "ModelError",
    "PlanRefused", "PlanSummary", "PrivacyStatement", "Result", "RoundRecord", "Run", "RunConfig", "RunSummary", "StoreError",
    "audit", "load",
]  # fmt: skip


def audit(result: Any, *, budget: str = "quick") -> AuditSummary:
    """Attack a finished run (a `Result` or its folder) and return what was found; the run's report is amended."""
    import importlib

    command: Any = importlib.import_module("ffm_secure.audit")  # a module that can be called
    found: AuditSummary = command(result, budget=budget)
    return found


def __getattr__(name: str) -> Any:
    """Load the run machinery (and torch) only when it is asked for."""
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(f"ffm_secure.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'ffm_secure' has no attribute {name!r}")
