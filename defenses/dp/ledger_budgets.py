"""The budgets of a ledger in memory: what owners allowed, and what runs asked for where no owner had."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from defenses.dp.ledger_entries import EVERYBODY, IMPLIED, Account, Budget, number
from defenses.errors import ParameterError


class BudgetBook:
    """Follow budgets through the rows that set them."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start again from the first row."""
        self._budgets: dict[Account, Budget] = {}
        self._implied: set[Account] = set()

    def apply(self, account: Account, body: Mapping[str, Any]) -> None:
        """Take in what a row sets."""
        self._budgets[account] = Budget(epsilon=float(body["epsilon"]), delta=body["delta"])
        self._implied.discard(account)
        if body["reason"] == IMPLIED:
            self._implied.add(account)

    def get(self, account: Account) -> Budget | None:
        """Return the budget in force for an account."""
        return self._budgets.get(account)

    def lifetime(self, unit: str) -> Budget | None:
        """Return the budget of every record, in one unit."""
        return self._budgets.get(Account(EVERYBODY, EVERYBODY, unit))

    def is_implied(self, unit: str) -> bool:
        """Tell whether no owner has set that budget, but a run asked for it."""
        return Account(EVERYBODY, EVERYBODY, unit) in self._implied

    def named(self) -> tuple[Account, ...]:
        """Return every account of one owner and data set that has a budget."""
        return tuple(account for account in self._budgets if account.owner != EVERYBODY)

    def new_body(self, account: Account, budget: Budget, reason: str) -> dict[str, Any] | None:
        """Return the stored form of a budget to be set; None where it stands already.

        Raises:
          ParameterError: it is raised without a reason.
        """
        old = self._budgets.get(account)
        if old == budget and (account in self._implied) == (reason == IMPLIED):
            return None
        raised = old is not None and (budget.epsilon > old.epsilon or budget.delta > old.delta)
        if raised and not reason.strip():
            raise ParameterError(
                f"budget of {account.owner!r} for {account.dataset!r}: {old} can only be raised with "
                "raise_because, which is recorded"
            )
        return {"epsilon": number(budget.epsilon), "delta": budget.delta, "raised": raised, "reason": reason}
