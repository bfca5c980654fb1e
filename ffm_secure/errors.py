"""The tree of errors a user can meet, each with the exit code of the command line."""

from __future__ import annotations

from collections.abc import Sequence


class FfmError(Exception):
    """Base of everything ffm-secure raises on purpose."""

    exit_code = 1


class ConfigError(FfmError, ValueError):
    """The run file has problems; the message lists all of them."""

    exit_code = 2

    def __init__(self, where: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        count = f"{len(self.problems)} problem" + ("s" if len(self.problems) != 1 else "")
        super().__init__("\n".join([f"{where}: {count}", *(f"  {line}" for line in self.problems)]))


class DataError(FfmError, ValueError):
    """A data set cannot be read or split; the message names the file and what to do."""

    exit_code = 2


class ModelError(FfmError, ValueError):
    """A model cannot be loaded or does not fit the task; the message says what to do."""

    exit_code = 2


class PlanRefused(FfmError):
    """The choices of a run file do not add up to something sound; the message gives every reason."""

    exit_code = 3

    def __init__(self, reasons: Sequence[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__("\n".join(["this combination is refused:", *(f"  {line}" for line in self.reasons)]))


class BudgetExhausted(FfmError):
    """The privacy budget cannot pay for any further round; what was trained so far is kept."""

    exit_code = 4


class StoreError(FfmError):
    """A run directory is damaged, belongs to another run, or is in use."""

    exit_code = 5


class RecordError(StoreError):
    """A record does not have the form its type declares; the message names the field."""


class LeakFound(FfmError):
    """An audit asked to fail on leaks found one."""

    exit_code = 6


class BroadcastRefused(FfmError):
    """A client refuses a broadcast that looks crafted to read its data; the message gives every reason."""

    exit_code = 7

    def __init__(self, reasons: Sequence[str]) -> None:
        self.reasons = tuple(reasons)
        lines = ["the broadcast is refused before any training:", *(f"  {line}" for line in self.reasons)]
        super().__init__("\n".join(lines))


class Interrupted(FfmError):
    """The user stopped the run; it can be resumed."""

    exit_code = 130
