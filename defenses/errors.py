"""The errors every defence raises: mistakes say all they know, failures of secrecy say nothing."""

from __future__ import annotations


class DefenseError(Exception):
    """Base of everything raised on purpose in `defenses`."""


class ParameterError(DefenseError, ValueError):
    """A caller's mistake: the message holds name, value, bound and what to do."""


class NotPrivateError(DefenseError):
    """A mechanism cannot keep its promise for this model, loss or batch; the message names the culprit."""


class BudgetExceeded(DefenseError):
    """A privacy budget cannot pay for the next event. Nothing was released."""


class TamperedError(DefenseError):
    """A stored record does not match its hash chain."""

    def __init__(self) -> None:
        super().__init__("the record is not authentic")


class ProtocolError(DefenseError):
    """A cryptographic protocol was left; one constant message, so that an attacker learns nothing from it."""

    def __init__(self) -> None:
        super().__init__("protocol aborted")
