"""A privacy ledger nobody can overspend: append-only, hash-chained, reserve before release, crash counts as spent.

One SQLite file holds one data owner, or many in a simulation. Rows are budgets, reservations and spends, each with the
hash of its predecessor; events are truth, epsilon is derived from them. After every change the last row's number and
hash are written to `<ledger>.head`, so that a shortened file is noticed.

What is noticed: any change, insertion, removal or reordering of rows, changed columns, dropped or changed triggers, a
damaged file, rows missing from the end (unless the process died in the instant between the commit and the anchor, and
only those last rows). What cannot be noticed: both files put back together to an older state, or both rewritten, by
someone who may write them; whoever needs that keeps `Ledger.head()` elsewhere (every report prints it) and gives it to
`verify`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from defenses.dp.accountant import LARGEST_DELTA, SMALLEST_DELTA, Accountant
from defenses.dp.events import UNITS, Event, Statement, from_dict, price_of, statement_of
from defenses.dp.ledger_file import Head, LedgerFile, Row
from defenses.errors import BudgetExceeded, ParameterError, TamperedError

ANY_UNIT = "*"
_LONGEST_LABEL = 300
_REMEMBERED_ACCOUNTANTS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """One release about to happen, and who pays for it.

    `commitment` may hold a hash that binds seed, model and mechanism: a later charge with the same one is the identical
    release replayed after a crash and costs nothing.
    """

    owner: str
    dataset: str
    event: Event
    run: str
    round: int
    release: str
    commitment: bytes = b""


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


@dataclass(frozen=True, slots=True)
class _Account:
    owner: str
    dataset: str
    unit: str


class _History:
    """The events one account has paid for, as a multiset with a digest that is updated in constant time."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.digest = 0
        self.statement: Statement | None = None

    def add(self, price: str, statement: Statement | None) -> None:
        self.counts[price] += 1
        self.digest = _added(self.digest, price)
        self.statement = self.statement or statement


def _added(digest: int, price: str) -> int:
    return (digest + int.from_bytes(hashlib.sha256(price.encode()).digest(), "big")) % 2**256


class Ledger:
    """Keep what every owner allowed and paid, and refuse what cannot be paid.

    Guarantee: `reserve` writes all charges or none, and none unless every owner's epsilon stays within budget at its
    delta; two processes and `kill -9` at any instant never lose a reservation that was returned, and never let the sum
    of reservations pass a budget. Reservations count as spent from the moment they are written.
    Assumes: the file lies on a local disk that honours fsync. A charge is reserved before any data are touched.
    Raises: BudgetExceeded, ParameterError for misuse, TamperedError when the record is not authentic.
    """

    def __init__(self, file: LedgerFile, clock: Callable[[], str]) -> None:
        self._file = file
        self._clock = clock
        self._prices: dict[str, Event] = {}
        self._epsilons: OrderedDict[tuple[int, float], float] = OrderedDict()
        self._forget()

    def _forget(self) -> None:
        """Start reading from the first row again."""
        self._budgets: dict[_Account, Budget] = {}
        self._histories: dict[_Account, _History] = {}
        self._holders: Counter[int] = Counter()
        self._commitments: dict[tuple[str, str, str], Row] = {}
        self._spent: set[int] = set()
        self._reserved: dict[int, Row] = {}
        self._accountants: OrderedDict[int, Accountant] = OrderedDict()
        self._seen = 0

    @classmethod
    def open(cls, path: str | Path, *, create: bool = True, clock: Callable[[], str] | None = None) -> Ledger:
        """Open a ledger, verify its whole chain, and create it first when it does not exist.

        Raises: ParameterError when it does not exist and `create` is false; TamperedError when it is not authentic.
        """
        file = LedgerFile(Path(path), create=create)
        ledger = cls(file, clock or _utc_now)
        try:
            with file.transaction():
                ledger._catch_up()
        except BaseException:
            file.close()
            raise
        return ledger

    def close(self) -> None:
        """Close the file; unspent reservations stay spent."""
        self._file.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def set_budget(
        self, owner: str, dataset: str, unit: str, epsilon: float, delta: float, *, raise_because: str = ""
    ) -> None:
        """Allow `epsilon` at `delta` for one owner, data set and unit, over all runs.

        A later budget may be equal or lower. Raising either number needs `raise_because`, which is recorded for good.
        """
        self.set_budgets([owner], dataset, unit, epsilon, delta, raise_because=raise_because)

    def set_budgets(
        self,
        owners: Sequence[str],
        dataset: str,
        unit: str,
        epsilon: float,
        delta: float,
        *,
        raise_because: str = "",
    ) -> None:
        """Do `set_budget` for many owners in one transaction."""
        problems = [] if unit in UNITS else [f"unit = {unit!r}: must be one of {', '.join(UNITS)}"]
        if not isinstance(epsilon, (int, float)) or isinstance(epsilon, bool) or not epsilon > 0:
            problems.append(f"epsilon = {epsilon!r}: must be above 0 (math.inf for a run without a bound)")
        if not isinstance(delta, float) or not SMALLEST_DELTA <= delta <= LARGEST_DELTA:
            problems.append(f"delta = {delta!r}: must lie between {SMALLEST_DELTA:g} and {LARGEST_DELTA:g}")
        if problems:
            raise ParameterError("; ".join(problems))
        budget = Budget(epsilon=float(epsilon), delta=delta)
        with self._change():
            for owner in owners:
                self._set_budget(
                    _Account(_label("owner", owner), _label("dataset", dataset), unit), budget, raise_because
                )

    def _set_budget(self, account: _Account, budget: Budget, reason: str) -> None:
        old = self._budgets.get(account)
        if old == budget:
            return
        raised = old is not None and (budget.epsilon > old.epsilon or budget.delta > old.delta)
        if raised and not reason.strip():
            raise ParameterError(
                f"budget of {account.owner!r} for {account.dataset!r}: {old} can only be raised with raise_because, "
                "which is recorded"
            )
        body = {"epsilon": _number(budget.epsilon), "delta": budget.delta, "raised": raised, "reason": reason}
        self._append("budget", account, body)

    def reserve(self, entries: Sequence[Charge]) -> tuple[Reservation, ...]:
        """Pay for all releases at once, before any of them happens.

        Raises: BudgetExceeded naming every owner who cannot pay; then nothing was written.
        """
        for charge in entries:
            _check_charge(charge)
        self._refuse_unpayable(entries)  # Fills the caches before the file is locked.
        with self._change():
            fresh = self._refuse_unpayable(entries)
            result = []
            for charge, is_new in zip(entries, fresh):
                account = _Account(charge.owner, charge.dataset, _unit_of(charge.event))
                known = self._commitments.get(_commitment_key(charge))
                row = (
                    known
                    if known is not None and not is_new
                    else self._append("reserve", account, _charge_body(charge))
                )
                result.append(_reservation(row, account, replayed=not is_new))
        return tuple(result)

    def spend(self, reservations: Sequence[Reservation]) -> None:
        """Confirm that reserved releases happened; confirming twice changes nothing."""
        with self._change():
            for reservation in reservations:
                row = self._reserved.get(reservation.sequence)
                if row is None or (row.owner, row.dataset) != (reservation.owner, reservation.dataset):
                    raise ParameterError(
                        f"sequence = {reservation.sequence}: this ledger holds no such reservation"
                    )
                if reservation.sequence not in self._spent:
                    account = _Account(row.owner, row.dataset, row.unit)
                    self._append("spend", account, {"reservation": reservation.sequence})

    def epsilon(self, owner: str, dataset: str, unit: str, delta: float) -> float:
        """Return the epsilon of everything this owner paid for, confirmed or not; infinity after a release without bound."""
        self._refresh()
        account = _Account(owner, dataset, unit)
        if account not in self._budgets:
            raise ParameterError(
                f"owner = {owner!r}, dataset = {dataset!r}, unit = {unit!r}: no such account"
            )
        return self._projected(self._history(account), [], delta)

    def budget(self, owner: str, dataset: str, unit: str) -> Budget:
        """Return the budget in force."""
        self._refresh()
        known = self._budgets.get(_Account(owner, dataset, unit))
        if known is None:
            raise ParameterError(
                f"owner = {owner!r}, dataset = {dataset!r}, unit = {unit!r}: no such account"
            )
        return known

    def accounts(self) -> tuple[tuple[str, str, str], ...]:
        """Return every (owner, dataset, unit) that has a budget, in order."""
        self._refresh()
        return tuple(sorted((account.owner, account.dataset, account.unit) for account in self._budgets))

    def events(self, owner: str, dataset: str, unit: str) -> tuple[Event, ...]:
        """Return what one account has paid for, oldest first; the history a calibration must start from."""
        rows = self.entries(owner=owner, dataset=dataset)
        return tuple(row.event for row in rows if row.event is not None and row.unit in (unit, ANY_UNIT))

    def entries(self, *, owner: str | None = None, dataset: str | None = None) -> tuple[Entry, ...]:
        """Return the rows in order, of one owner or data set if asked."""
        self._refresh()
        rows = self._file.rows(after=0, owner=owner, dataset=dataset)
        return tuple(self._entry(row) for row in rows if row.kind != "genesis")

    def head(self) -> Head:
        """Return number and hash of the last row, to be kept elsewhere."""
        self._refresh()
        return self._file.last()

    def verify(self, anchor: Head | None = None) -> None:
        """Check every row, the chain, the columns, the triggers and the anchors.

        Raises: TamperedError when anything does not match.
        """
        with self._file.transaction():
            self._file.verify(anchor)
            if self._file.last().sequence < self._seen:
                raise TamperedError

    def export(self, format: Literal["csv", "json"]) -> str:
        """Return all rows as text; JSON holds everything needed to recompute the chain."""
        self._refresh()
        rows = list(self._file.rows(after=0))
        if format == "json":
            head = rows[-1]
            document = {
                "version": 1,
                "head": {"sequence": head.sequence, "hash": head.hash.hex()},
                "rows": [
                    {"body": json.loads(row.body), "sequence": row.sequence, "hash": row.hash.hex()}
                    for row in rows
                ],
            }
            return json.dumps(document, indent=1, sort_keys=True)
        if format == "csv":
            return _csv([self._entry(row) for row in rows if row.kind != "genesis"])
        raise ParameterError(f"format = {format!r}: must be 'csv' or 'json'")

    @contextmanager
    def _change(self) -> Iterator[None]:
        try:
            with self._file.transaction():
                self._catch_up()
                yield
        except BaseException:
            self._forget()  # What was applied here may have been undone in the file.
            raise
        self._file.write_head()

    def _refresh(self) -> None:
        with self._file.transaction(write=False):
            self._catch_up()

    def _catch_up(self) -> None:
        """Read rows other processes appended since; the chain is checked on the way."""
        for row in self._file.new_rows(self._seen):
            self._apply(row)

    def _append(self, kind: str, account: _Account, body: dict[str, Any]) -> Row:
        whole = {
            "kind": kind,
            "owner": account.owner,
            "dataset": account.dataset,
            "unit": account.unit,
            **body,
        }
        row = self._file.append({**whole, "time": self._clock()})
        self._apply(row)
        return row

    def _apply(self, row: Row) -> None:
        self._seen = row.sequence
        account = _Account(row.owner, row.dataset, row.unit)
        body = json.loads(row.body)
        if row.kind == "budget":
            self._budgets[account] = Budget(epsilon=float(body["epsilon"]), delta=body["delta"])
            self._history(account)
        elif row.kind == "reserve":
            event = from_dict(body["event"])
            self._reserved[row.sequence] = row
            if body["commitment"]:
                self._commitments[(row.owner, row.dataset, body["commitment"])] = row
            for payer in self._payers(account):
                self._charge(payer, event)
        elif row.kind == "spend":
            self._spent.add(body["reservation"])

    def _payers(self, account: _Account) -> list[_Account]:
        """A release without a unit (nothing bounds it) is charged to every unit of the owner's data set."""
        if account.unit != ANY_UNIT:
            return [account]
        return [_Account(account.owner, account.dataset, unit) for unit in UNITS]

    def _history(self, account: _Account) -> _History:
        history = self._histories.get(account)
        if history is None:
            history = self._histories[account] = _History()
            self._holders[history.digest] += 1
        return history

    def _charge(self, account: _Account, event: Event) -> None:
        history, price = self._history(account), price_of(event)
        self._prices.setdefault(price, event)
        before = history.digest
        history.add(price, statement_of(event))
        self._holders[before] -= 1
        self._holders[history.digest] += 1
        accountant = self._accountants.get(before)
        if accountant is not None and history.digest not in self._accountants:
            moved = accountant if self._holders[before] == 0 else accountant.copy()
            moved.compose(event)
            self._accountants[history.digest] = moved
        if self._holders[before] == 0:
            self._accountants.pop(before, None)
        while len(self._accountants) > _REMEMBERED_ACCOUNTANTS:
            self._accountants.popitem(last=False)

    def _refuse_unpayable(self, entries: Sequence[Charge]) -> list[bool]:
        """Return which charges are new; raise when an account cannot pay for its new ones."""
        seen: dict[tuple[str, str, str], Charge] = {}
        fresh: list[bool] = []
        wanted: dict[_Account, list[Event]] = {}
        for charge in entries:
            is_new = self._is_new(charge, seen)
            fresh.append(is_new)
            if is_new:
                account = _Account(charge.owner, charge.dataset, _unit_of(charge.event))
                payers = [payer for payer in self._payers(account) if payer in self._budgets] or [account]
                for payer in payers:
                    wanted.setdefault(payer, []).append(charge.event)
        problems = [
            problem for account, events in wanted.items() if (problem := self._problem(account, events))
        ]
        if problems:
            raise BudgetExceeded("nothing was released; " + "; ".join(problems))
        return fresh

    def _is_new(self, charge: Charge, seen: dict[tuple[str, str, str], Charge]) -> bool:
        if not charge.commitment:
            return True
        key = _commitment_key(charge)
        known = self._commitments.get(key)
        earlier = (
            from_dict(json.loads(known.body)["event"])
            if known
            else (seen[key].event if key in seen else None)
        )
        if earlier is None:
            seen[key] = charge
            return True
        if price_of(earlier) != price_of(charge.event):
            raise ParameterError(
                f"commitment of {charge.owner!r}: the same commitment was charged with another event"
            )
        return False

    def _problem(self, account: _Account, events: list[Event]) -> str:
        budget = self._budgets.get(account)
        name = f"{account.owner!r} ({account.dataset!r}, {account.unit})"
        if budget is None:
            return f"{name} has set no budget"
        history = self._history(account)
        statements = {history.statement, *map(statement_of, events)} - {None}
        if len(statements) > 1:
            return f"{name} would mix {', '.join(sorted(map(str, statements)))}"
        if math.isinf(budget.epsilon):
            return ""
        after = self._projected(history, events, budget.delta)
        if after <= budget.epsilon:
            return ""
        now = self._projected(history, [], budget.delta)
        return f"{name} has spent {now:.4g} and would reach {after:.4g} of epsilon {budget.epsilon:g} at delta {budget.delta:g}"

    def _projected(self, history: _History, events: list[Event], delta: float) -> float:
        """Return epsilon after more events; equal histories are computed once, whoever owns them."""
        digest = history.digest
        for event in events:
            digest = _added(digest, price_of(event))
        key = (digest, delta)
        if key not in self._epsilons:
            self._epsilons[key] = self._compute(history, events, delta)
            while len(self._epsilons) > 4096:
                self._epsilons.popitem(last=False)
        return self._epsilons[key]

    def _compute(self, history: _History, events: list[Event], delta: float) -> float:
        accountant = self._accountant(history)
        if not events:
            return accountant.epsilon(delta).epsilon
        if len(events) == 1:
            return accountant.epsilon_with(events[0], delta).epsilon
        trial = accountant.copy()
        for event in events:
            trial.compose(event)
        return trial.epsilon(delta).epsilon

    def _accountant(self, history: _History) -> Accountant:
        accountant = self._accountants.get(history.digest)
        if accountant is None:
            accountant = Accountant()
            for price, count in history.counts.items():
                accountant.compose(self._prices[price], count)
            self._accountants[history.digest] = accountant
        self._accountants.move_to_end(history.digest)
        return accountant

    def _entry(self, row: Row) -> Entry:
        body = json.loads(row.body)
        common = {"sequence": row.sequence, "kind": row.kind, "time": body["time"], "owner": row.owner}
        common |= {"dataset": row.dataset, "unit": row.unit}
        if row.kind == "budget":
            return Entry(**common, epsilon=float(body["epsilon"]), delta=body["delta"], reason=body["reason"])
        reserved = row if row.kind == "reserve" else self._reserved[body["reservation"]]
        charge = json.loads(reserved.body)
        return Entry(
            **common,
            run=charge["run"],
            round=charge["round"],
            release=charge["release"],
            event=from_dict(charge["event"]) if row.kind == "reserve" else None,
            commitment=charge["commitment"],
            spent=reserved.sequence in self._spent,
        )


def _unit_of(event: Event) -> str:
    statement = statement_of(event)
    return ANY_UNIT if statement is None else statement.unit


def _commitment_key(charge: Charge) -> tuple[str, str, str]:
    return charge.owner, charge.dataset, charge.commitment.hex()


def _charge_body(charge: Charge) -> dict[str, Any]:
    return {
        "event": charge.event.to_dict(),
        "run": charge.run,
        "round": charge.round,
        "release": charge.release,
        "commitment": charge.commitment.hex(),
    }


def _reservation(row: Row, account: _Account, *, replayed: bool) -> Reservation:
    return Reservation(
        sequence=row.sequence,
        owner=account.owner,
        dataset=account.dataset,
        unit=account.unit,
        replayed=replayed,
    )


def _check_charge(charge: Charge) -> None:
    if not isinstance(charge, Charge) or not isinstance(charge.event, Event):
        raise ParameterError("entries: must be charges, each with an event")
    for name in ("owner", "dataset", "run", "release"):
        _label(name, getattr(charge, name))
    if not isinstance(charge.round, int) or isinstance(charge.round, bool) or charge.round < 0:
        raise ParameterError(f"round = {charge.round!r}: must be an integer of at least 0")
    if not isinstance(charge.commitment, bytes) or len(charge.commitment) not in (0, *range(16, 65)):
        raise ParameterError("commitment: must be empty, or 16 to 64 bytes of a hash")


def _label(name: str, value: object) -> str:
    if (
        not isinstance(value, str)
        or not value.strip()
        or len(value) > _LONGEST_LABEL
        or not value.isprintable()
    ):
        raise ParameterError(f"{name} = {value!r}: must be 1 to {_LONGEST_LABEL} printable characters")
    return value


def _number(value: float) -> float | str:
    return "inf" if math.isinf(value) else float(value)


def _utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _csv(entries: list[Entry]) -> str:
    """One line a row; a leading quote keeps spreadsheets from running labels as formulas."""
    names = list(Entry.__dataclass_fields__)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(names)
    for entry in entries:
        cells = []
        for name in names:
            value = getattr(entry, name)
            text = "" if value is None else value.to_json() if isinstance(value, Event) else str(value)
            cells.append("'" + text if text[:1] in ("=", "+", "-", "@") else text)
        writer.writerow(cells)
    return buffer.getvalue()
