"""The lifetime budget of a site's rows: what its file says, and what its ledger holds."""

from __future__ import annotations

from defenses.dp import Ledger
from defenses.errors import ParameterError
from ffm_secure.errors import StoreError
from ffm_secure.site.site_file import SiteFile


def require_budget(ledger: Ledger, site: SiteFile) -> bool:
    """Tell whether a ledger holds the budget of the site's file; a new one holds none.

    Raises:
      StoreError: it holds another.
    """
    budget = site.budget
    known = ledger.lifetime(budget.unit)
    if known is None:
        return False
    if (known.epsilon, known.delta) != (budget.epsilon, budget.delta):
        raise StoreError(
            f"budget: site.toml says {budget.epsilon:g} at delta {budget.delta:g}, the ledger "
            f"{known.epsilon:g} at delta {known.delta:g}; correct site.toml, or change the ledger with: "
            "ffm-secure ledger budget raise"
        )
    return True


def grant(ledger: Ledger, site: SiteFile) -> None:
    """Give a ledger the lifetime budget of the site's file where it has none.

    Raises:
      StoreError: it holds another, or its rows were used without any.
    """
    if not require_budget(ledger, site):
        budget = site.budget
        try:
            ledger.grant(budget.unit, budget.epsilon, budget.delta)
        except ParameterError as error:
            raise StoreError(f"budget: {error}") from None
