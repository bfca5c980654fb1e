"""Read a ledger for people: every charge, and the epsilon they add up to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from defenses.dp import Budget, Entry, Ledger
from defenses.dp.events import UNITS
from defenses.dp.ledger_entries import ANY_UNIT, EVERYBODY
from ffm_secure.errors import StoreError
from ffm_secure.quantities import bound, small
from ffm_secure.site.ledger_place import ledger_path
from ffm_secure.storage.run_directory import Store

_SHOWN = 40


def open_for_reading(place: Path) -> Ledger:
    """Open the ledger of a run directory, or a ledger file.

    Raises:
      StoreError: there is none.
    """
    if place.is_dir():
        located = ledger_path(Store.read(place).config().privacy, place)
        assert located is not None
        place = located
    if not place.is_file():
        raise StoreError(f"{place}: is not a ledger; give a run directory or a ledger file")
    return Ledger.open(place, create=False)


def ledger_table(ledger: Ledger, *, owner: str) -> dict[str, Any]:
    """Collect the accounts of a ledger: owner, data set, unit, charges, spent and granted.

    Raises:
      StoreError: the named owner has no entry.
    """
    entries = ledger.entries()
    owners = sorted({entry.owner for entry in entries} - {EVERYBODY})
    if owner and owner not in owners:
        raise StoreError(f"owner = {owner!r}: the ledger knows {', '.join(owners) or 'nobody'}")
    chosen = []
    for entry in entries:
        if not owner or entry.owner == owner:
            chosen.append(entry)
    charges = []
    for entry in chosen:
        if entry.kind == "reserve":
            charges.append(entry)
    head = ledger.head()
    return {
        "verified": True,
        "entries": head.sequence,
        "head": head.hash,
        "accounts": _accounts(ledger, chosen),
        "lifetime": _lifetimes(ledger),
        "withdrawals": withdrawals(ledger, owner=owner),
        "charges": [
            {
                "sequence": entry.sequence,
                "time": entry.time,
                "owner": entry.owner,
                "run": entry.run,
                "round": entry.round,
                "unit": entry.unit,
                "release": entry.release,
                "spent": entry.spent,
                "event": entry.event.to_dict() if entry.event else {},
            }
            for entry in charges
        ],
    }


def withdrawals(ledger: Ledger, *, owner: str = "") -> list[dict[str, Any]]:
    """Return who left, and for each what released models may still reveal: the epsilon of the closed rows.

    No later charge can raise it. An owner that was charged by name alone has the epsilon of its accounts.
    """
    lines = []
    for withdrawal in ledger.withdrawals():
        if owner and withdrawal.owner != owner:
            continue
        bounds = []
        for unit in UNITS:
            budget = ledger.lifetime(unit)
            delta = 1e-5 if budget is None else budget.delta
            if withdrawal.blocks and unit in ledger.charged_units(withdrawal.blocks):
                spent = ledger.epsilon_of(withdrawal.blocks, unit, delta)
                bounds.append({"unit": unit, "epsilon": spent, "delta": delta})
        for name, dataset, unit in ledger.accounts():
            if name == withdrawal.owner and ledger.events(name, dataset, unit):
                delta = ledger.budget(name, dataset, unit).delta
                spent = ledger.epsilon(name, dataset, unit, delta)
                bounds.append({"unit": unit, "epsilon": spent, "delta": delta})
        lines.append(
            {
                "sequence": withdrawal.sequence,
                "time": withdrawal.time,
                "owner": withdrawal.owner,
                "because": withdrawal.because,
                "blocks": list(withdrawal.blocks),
                "bounds": bounds,
            }
        )
    return lines


def withdrawal_line(item: dict[str, Any]) -> str:
    """Say who left, when and why, and what released models may still reveal."""
    name = item["owner"] or "rows"
    blocks = f"{len(item['blocks'])} block{'' if len(item['blocks']) == 1 else 's'}"
    bounds = []
    for stated in item["bounds"]:
        size = bound(stated["epsilon"])
        bounds.append(f"epsilon {size} at delta {small(stated['delta'])} per {stated['unit']}")
    still = "nothing was released from them"
    if bounds:
        still = f"released models may still reveal at most {', '.join(bounds)}"
    return f"withdrawn {item['time'][:10]}: {name}, {blocks} ({item['because']}); {still}"


def _lifetimes(ledger: Ledger) -> dict[str, dict[str, float]]:
    budgets = {}
    for unit in UNITS:
        budgets[unit] = ledger.lifetime(unit)
    lifetimes: dict[str, dict[str, float]] = {}
    for unit, budget in budgets.items():
        if budget is not None:
            lifetimes[unit] = {"epsilon": budget.epsilon, "delta": budget.delta}
    return lifetimes


def _accounts(ledger: Ledger, entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Add up what every owner was charged for its rows: the row that has spent most counts."""
    charges = []
    for entry in entries:
        if entry.kind == "reserve":
            charges.append(entry)
    named = set()
    for entry in entries:
        if entry.kind == "budget" and entry.owner != EVERYBODY:
            named.add((entry.owner, entry.dataset, entry.unit))
    keys = sorted({(entry.owner, entry.dataset, entry.unit) for entry in charges} | named)
    accounts = []
    for owner, dataset, unit in keys:
        own = []
        for entry in charges:
            if (entry.owner, entry.dataset, entry.unit) == (owner, dataset, unit):
                own.append(entry)
        blocks = sorted({block for entry in own for block in entry.blocks})
        budget = _budget(ledger, (owner, dataset, unit), blocks)
        delta = budget.delta
        if blocks:
            spent = ledger.epsilon_of(blocks, "record" if unit == ANY_UNIT else unit, delta)
        else:
            spent = ledger.epsilon(owner, dataset, unit, delta)
        accounts.append(
            {
                "owner": owner,
                "dataset": dataset,
                "unit": unit,
                "charges": len(own),
                "unconfirmed": sum(not entry.spent for entry in own),
                "epsilon": spent,
                "budget": budget.epsilon,
                "delta": delta,
            }
        )
    return accounts


def _budget(ledger: Ledger, account: tuple[str, str, str], blocks: Sequence[int]) -> Budget:
    if blocks:
        lifetime = None
        if account[2] != ANY_UNIT:
            lifetime = ledger.lifetime(account[2])
        return lifetime or Budget(epsilon=math.inf, delta=1e-5)
    return ledger.budget(*account)


def ledger_lines(table: dict[str, Any]) -> list[str]:
    """Say a ledger in lines: the newest charges, then what every account adds up to."""
    lines = []
    charges = table["charges"]
    if len(charges) > _SHOWN:
        lines.append(f"(the first {len(charges) - _SHOWN} charges are left out; --export csv prints all)")
    for charge in charges[-_SHOWN:]:
        state = "reserved, counts as spent"
        if charge["spent"]:
            state = "spent"
        lines.append(
            f"{charge['sequence']:>6}  {charge['owner']:<14} round {charge['round']:>4}  "
            f"{_event_words(charge['event'])}  {state}"
        )
    lines.append("")
    for account in table["accounts"]:
        spent = bound(account["epsilon"])
        budget = (
            "no budget"
            if account["budget"] is None or math.isinf(account["budget"])
            else f"of {account['budget']:g} at delta {small(account['delta'])}"
        )
        lines.append(
            f"{account['owner']:<14} {account['dataset']}  per {account['unit']}: epsilon {spent} "
            f"{budget}, {account['charges']} charges"
            + (f", {account['unconfirmed']} of them never confirmed" if account["unconfirmed"] else "")
        )
    lines += [
        f"lifetime budget of every row, per {unit}: {budget['epsilon']:g} at delta {small(budget['delta'])}"
        for unit, budget in table["lifetime"].items()
    ]
    for item in table["withdrawals"]:
        lines.append(withdrawal_line(item))
    return [*lines, f"verified: {table['entries']} entries, head {table['head'][:16]}"]


def _event_words(event: dict[str, Any]) -> str:
    if event.get("kind") == "gaussian":
        sampling = f"{event['sampling']}({event['sampling_rate']:.4g})"
        return f"{event['steps']} x {sampling} Gaussian({event['noise_multiplier']:.4g})"
    if event.get("kind") == "skellam":
        return f"{event['steps']} x Skellam({math.sqrt(event['variance']) / event['l2_sensitivity']:.4g})"
    return str(event.get("kind", ""))
