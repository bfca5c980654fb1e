"""What goes into a ledger and what comes out of it: charges, reservations, budgets, and its rows as a reader
sees them.
"""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from defenses.dp.accountant import LARGEST_DELTA, SMALLEST_DELTA
from defenses.dp.events import UNITS, Event, from_dict, statement_of
from defenses.dp.ledger_file import Row
from defenses.errors import ParameterError

ANY_UNIT = "*"
EVERYBODY = "*"  # owner and data set of the lifetime budget of all records in a ledger
IMPLIED = "implied by a run"  # the reason of a lifetime budget that no owner has set
_LONGEST_LABEL = 300
_LONGEST_REASON = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """One release about to happen, and who pays for it.

    With `blocks` (from `Ledger.blocks_for`) these blocks of records pay, within the lifetime budget of the
    ledger, and owner and data set are labels; without, the account named by owner and data set pays.
    `commitment` may hold a hash that binds seed, model and mechanism: a later charge with the same one is the
    identical release replayed after a crash and costs nothing.
    """

    owner: str
    dataset: str
    event: Event
    run: str
    round: int
    release: str
    commitment: bytes = b""
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """A paid-for release; `sequence` is its row. A replayed one was paid for earlier."""

    sequence: int
    owner: str
    dataset: str
    unit: str
    replayed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What an owner allows for one data set and unit, over its whole life."""

    epsilon: float
    delta: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One row of the ledger, as a reader sees it; `spent` tells whether a reservation was confirmed."""

    sequence: int
    kind: str
    time: str
    owner: str
    dataset: str
    unit: str
    run: str = ""
    round: int = 0
    release: str = ""
    event: Event | None = None
    commitment: str = ""
    spent: bool = False
    epsilon: float | None = None
    delta: float | None = None
    reason: str = ""
    blocks: tuple[int, ...] = ()
    records: int = 0


@dataclass(frozen=True, slots=True)
class Account:
    """Name who pays: an owner's data set, or a block of records, in one unit."""

    owner: str
    dataset: str
    unit: str


def account_of_block(number: int, unit: str) -> Account:
    """Return the account of one block of records; no owner can bear its name."""
    return Account("", f"block {number}", unit)


def payers_of(account: Account, blocks: Sequence[int]) -> list[Account]:
    """Return who is charged: blocks or a named account; for a release that nothing bounds, in every unit."""
    units = UNITS if account.unit == ANY_UNIT else (account.unit,)
    if blocks:
        return [account_of_block(block, unit) for block in blocks for unit in units]
    return [Account(account.owner, account.dataset, unit) for unit in units]


def unit_of(event: Event) -> str:
    """Return the unit an event is charged to; a release that nothing bounds is charged to all."""
    statement = statement_of(event)
    return ANY_UNIT if statement is None else statement.unit


def commitment_key(charge: Charge) -> tuple[str, str, str]:
    """Return what two charges for the identical release share."""
    return charge.owner, charge.dataset, charge.commitment.hex()


def charge_body(charge: Charge, blocks: Sequence[int]) -> dict[str, Any]:
    """Return the stored form of a charge; charges to named accounts are stored as they always were."""
    body = {
        "event": charge.event.to_dict(),
        "run": charge.run,
        "round": charge.round,
        "release": charge.release,
        "commitment": charge.commitment.hex(),
    }
    return {**body, "blocks": list(blocks)} if charge.blocks else body


def reservation_of(row: Row, account: Account, *, replayed: bool) -> Reservation:
    """Return a reservation as whoever paid for it holds it."""
    return Reservation(
        sequence=row.sequence,
        owner=account.owner,
        dataset=account.dataset,
        unit=account.unit,
        replayed=replayed,
    )


def check_charge(charge: Charge) -> None:
    """Refuse a malformed charge."""
    if not isinstance(charge, Charge) or not isinstance(charge.event, Event):
        raise ParameterError("entries: must be charges, each with an event")
    for name in ("owner", "dataset", "run", "release"):
        label(name, getattr(charge, name))
    if not isinstance(charge.round, int) or isinstance(charge.round, bool) or charge.round < 0:
        raise ParameterError(f"round = {charge.round!r}: must be an integer of at least 0")
    if not isinstance(charge.commitment, bytes) or len(charge.commitment) not in (0, *range(16, 65)):
        raise ParameterError("commitment: must be empty, or 16 to 64 bytes of a hash")


def checked_budget(unit: str, epsilon: float, delta: float) -> Budget:
    """Return a budget, or refuse it with everything that is wrong."""
    if unit not in UNITS:
        problems = [f"unit = {unit!r}: must be one of {', '.join(UNITS)}"]
    else:
        problems = []
    if not _is_amount(epsilon):
        problems.append(f"epsilon = {epsilon!r}: must be above 0 (math.inf for a run without a bound)")
    if not isinstance(delta, float) or not SMALLEST_DELTA <= delta <= LARGEST_DELTA:
        problems.append(f"delta = {delta!r}: must lie between {SMALLEST_DELTA:g} and {LARGEST_DELTA:g}")
    if problems:
        raise ParameterError("; ".join(problems))
    return Budget(epsilon=float(epsilon), delta=delta)


def _is_amount(value: object) -> bool:
    """Tell whether a value is a number above 0 that a float can hold, or infinity."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return 0 < value <= sys.float_info.max or value == math.inf


def check_reason(reason: str) -> None:
    """Refuse a reason that an owner cannot give: one that a terminal obeys, or the one that runs give."""
    if reason.strip() == IMPLIED:
        raise ParameterError(f"raise_because = {reason!r}: is what a run says; say why its owner sets it")
    if not reason.isprintable() or len(reason) > _LONGEST_REASON:
        raise ParameterError(
            f"raise_because: must be one line of at most {_LONGEST_REASON} printable characters"
        )


def label(name: str, value: object) -> str:
    """Return a label, or refuse what cannot be one."""
    if (
        not isinstance(value, str)
        or not value.strip()
        or len(value) > _LONGEST_LABEL
        or not value.isprintable()
    ):
        raise ParameterError(f"{name} = {value!r}: must be 1 to {_LONGEST_LABEL} printable characters")
    return value


def utc_now() -> str:
    """Return the time as rows bear it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def number(value: float) -> float | str:
    """Return a number as JSON can hold it."""
    return "inf" if math.isinf(value) else float(value)


def entry_of(row: Row, reserved: Row, *, spent: bool) -> Entry:
    """Return a row as a reader sees it; `reserved` is the reservation that a row of a charge is about."""
    body = json.loads(row.body)
    common = {"sequence": row.sequence, "kind": row.kind, "time": body["time"], "owner": row.owner}
    common |= {"dataset": row.dataset, "unit": row.unit}
    if row.kind == "budget":
        return Entry(**common, epsilon=float(body["epsilon"]), delta=body["delta"], reason=body["reason"])
    if row.kind == "withdrawal":
        return Entry(**common, blocks=tuple(body["blocks"]), reason=body["reason"])
    if row.kind == "key":
        return Entry(**common)
    if row.kind == "public":
        return Entry(**common, records=body["records"])
    if row.kind == "block":
        return Entry(**common, blocks=tuple(body["parents"]), records=body["records"])
    charge = json.loads(reserved.body)
    return Entry(
        **common,
        run=charge["run"],
        round=charge["round"],
        release=charge["release"],
        event=from_dict(charge["event"]) if row.kind == "reserve" else None,
        commitment=charge["commitment"],
        spent=spent,
        blocks=tuple(charge.get("blocks", ())),
    )


def to_json(rows: Sequence[Row]) -> str:
    """Return all rows of a ledger with what is needed to recompute the chain."""
    head = rows[-1]
    document = {
        "version": 1,
        "head": {"sequence": head.sequence, "hash": head.hash.hex()},
        "rows": [
            {"body": json.loads(row.body), "sequence": row.sequence, "hash": row.hash.hex()} for row in rows
        ],
    }
    return json.dumps(document, indent=1, sort_keys=True)


def to_csv(entries: Sequence[Entry]) -> str:
    """One line a row; a leading quote keeps spreadsheets from running labels as formulas."""
    names = list(Entry.__dataclass_fields__)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(names)
    for entry in entries:
        cells = []
        for name in names:
            text = _cell(getattr(entry, name))
            cells.append("'" + text if text[:1] in ("=", "+", "-", "@") else text)
        writer.writerow(cells)
    return buffer.getvalue()


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, Event):
        return value.to_json()
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return str(value)
