"""A privacy ledger nobody can overspend: append-only, hash-chained, reserve before release, crash counts as
spent.

One SQLite file holds one data owner, or many in a simulation. Rows are budgets, reservations and spends,
each with the hash of its predecessor; events are truth, epsilon is derived from them. After every change the
last row's number and hash are written to `<ledger>.head`, so that a shortened file is noticed.

What is noticed: any change, insertion, removal or reordering of rows, changed columns, dropped or changed
triggers, a damaged file, rows missing from the end (unless the process died in the instant between the commit
and the anchor, and only those last rows). What cannot be noticed: both files put back together to an older
state, or both rewritten, by someone who may write them; whoever needs that keeps `Ledger.head()` elsewhere
(every report prints it) and gives it to `verify`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from defenses.dp.blocks import Arrangement, Indices, NewBlock, arrange
from defenses.dp.events import UNITS, Event, NonPrivateEvent, from_dict, price_of
from defenses.dp.ledger_blocks import NAMED_ACCOUNTS, BlockBook, block_body, resolved, to_bytes
from defenses.dp.ledger_books import Books, History
from defenses.dp.ledger_budgets import BudgetBook
from defenses.dp.ledger_entries import (
    IMPLIED,
    ANY_UNIT,
    EVERYBODY,
    Account,
    Budget,
    Charge,
    Entry,
    Reservation,
    account_of_block,
    charge_body,
    check_charge,
    check_reason,
    checked_budget,
    commitment_key,
    entry_of,
    label,
    payers_of,
    reservation_of,
    to_csv,
    to_json,
    unit_of,
    utc_now,
)
from defenses.dp.ledger_file import Head, LedgerFile, Row
from defenses.dp.ledger_public import PublicBook, public_body
from defenses.dp.ledger_withdrawals import Withdrawal, WithdrawalBook, blocks_charged
from defenses.dp.records import Flags, Keys, RecordKey, Records
from defenses.errors import BudgetExceeded, ParameterError, TamperedError


class Ledger:
    """Keep what every owner allowed and paid, and refuse what cannot be paid.

    Guarantee: `reserve` writes all charges or none, and none unless every owner's epsilon stays within budget
    at its delta; two processes and `kill -9` at any instant never lose a reservation that was returned, and
    never let the sum of reservations pass a budget. Reservations count as spent from the moment they are
    written.
    Assumes: the file lies on a local disk that honours fsync. A charge is reserved before any data are
    touched.
    Raises: BudgetExceeded, ParameterError for misuse, TamperedError when the record is not authentic.
    """

    def __init__(self, file: LedgerFile, clock: Callable[[], str]) -> None:
        self._file = file
        self._clock = clock
        self._books = Books()
        self._blocks = BlockBook()
        self._withdrawals = WithdrawalBook()
        self._budgets = BudgetBook()
        self._public = PublicBook()
        self._forget()

    def _forget(self) -> None:
        """Start reading from the first row again."""
        self._books.forget()
        self._blocks.forget()
        self._withdrawals.forget()
        self._budgets.forget()
        self._public.forget()
        self._commitments: dict[tuple[str, str, str], Row] = {}
        self._spent: set[int] = set()
        self._paid: dict[tuple[str, str], Counter[Event]] = {}
        self._reserved: dict[int, Row] = {}
        self._key_check = ""
        self._seen = 0

    @classmethod
    def open(cls, path: str | Path, *, create: bool = True, clock: Callable[[], str] | None = None) -> Ledger:
        """Open a ledger, verify its whole chain, and create it first when it does not exist.

        Raises: ParameterError when it does not exist and `create` is false; TamperedError when it is not
        authentic.
        """
        file = LedgerFile(Path(path), create=create)
        ledger = cls(file, clock or utc_now)
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

        A later budget may be equal or lower. Raising either number needs `raise_because`, which is recorded
        for good.
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
        budget = checked_budget(unit, epsilon, delta)
        with self._change():
            for owner in owners:
                account = Account(label("owner", owner), label("dataset", dataset), unit)
                self._set_budget(account, budget, raise_because)

    def grant(self, unit: str, epsilon: float, delta: float, *, raise_because: str = "") -> None:
        """Set the lifetime budget of every record in this ledger, for one unit; raising it needs a reason, as
        in `set_budget`.
        """
        check_reason(raise_because)
        self.set_budget(EVERYBODY, EVERYBODY, unit, epsilon, delta, raise_because=raise_because)

    def lifetime(self, unit: str) -> Budget | None:
        """Return the lifetime budget of every record in this ledger, if its owner has set one."""
        self._refresh()
        return self._budgets.lifetime(unit)

    def imply(self, unit: str, epsilon: float, delta: float) -> None:
        """Give every record the largest lifetime budget that a run has asked for, where no owner set one."""
        known = self.lifetime(unit)
        if known is not None and (not self.is_implied(unit) or epsilon <= known.epsilon):
            return
        delta = delta if known is None else known.delta
        self.set_budget(EVERYBODY, EVERYBODY, unit, epsilon, delta, raise_because=IMPLIED)

    def is_implied(self, unit: str) -> bool:
        """Tell whether the lifetime budget for a unit was asked for by a run and set by no owner."""
        self._refresh()
        return self._budgets.is_implied(unit)

    def _set_budget(self, account: Account, budget: Budget, reason: str) -> None:
        body = self._budgets.new_body(account, budget, reason)
        if body is not None:
            self._append("budget", account, body)

    def record_key(self) -> RecordKey:
        """Return the secret this ledger names records with; made when it is first asked for.

        Raises: ParameterError when the key file is missing, damaged or another ledger's.
        """
        self._refresh()
        if not self._key_check:
            with self._change():
                if not self._key_check:
                    check = RecordKey(self._file.create_key()).check()
                    self._append("key", Account(EVERYBODY, EVERYBODY, ANY_UNIT), {"check": check})
        key = RecordKey(self._file.read_key())
        if key.check() != self._key_check:
            raise ParameterError(
                f"{self._file.key_path}: is not the key of this ledger; restore the right one from a backup"
            )
        return key

    def blocks_for(self, requests: Sequence[Records]) -> tuple[tuple[int, ...], ...]:
        """Return for each request the blocks that hold exactly its records; open, part and join blocks where
        needed.

        Records are found one by one, whatever file, order or split they come in. A record nobody knew gets a
        new block; where the ledger holds charges that name no rows, it may be one of theirs, and starts with
        the largest of these.
        Guarantee: the account of a record is never below what was charged for it, nor is that of any copy of
        it. A record whose text was read from another column is known by its other cells.
        Assumes: names are made with `record_key`, copies numbered before rows are dealt; a row is dealt to
        one request.
        """
        self._refresh()
        arrangement = self._arranged(requests)
        if not arrangement.opened:
            return resolved(arrangement.requests, ())
        with self._change():
            arrangement = self._arranged(requests)
            self._file.prepare_blocks()
            opened = [self._open_block(block) for block in arrangement.opened]
        return resolved(arrangement.requests, opened)

    def _arranged(self, requests: Sequence[Records]) -> Arrangement:
        return arrange(self._blocks.directory(self._file.load_block), requests, self._token)

    def _token(self, blocks: frozenset[int]) -> tuple[int, ...]:
        """Return what is equal for sets of blocks with equal largest histories in every unit, and equally
        closed: rows that were withdrawn never share a block with others.
        """
        histories = [self._largest(blocks or {NAMED_ACCOUNTS}, unit).digest for unit in UNITS]
        return (*histories, *(left.sequence for left in self._withdrawals.of_blocks(blocks)))

    def _open_block(self, block: NewBlock) -> int:
        keys, links = to_bytes(block.members)
        row = self._append("block", Account(EVERYBODY, EVERYBODY, ANY_UNIT), block_body(block, keys, links))
        self._file.store_block(row.sequence, keys, links)
        return row.sequence

    def publish(self, contents: Keys) -> None:
        """Note what rows say, `[n]`, that a run uses as public ones; what was noted before writes nothing."""
        if self.are_published(contents).all():
            return
        with self._change():
            keys = self._public.fresh(contents, self._file.load_block)
            self._file.prepare_blocks()
            row = self._append("public", Account(EVERYBODY, EVERYBODY, ANY_UNIT), public_body(keys))
            self._file.store_block(row.sequence, keys, b"")

    def are_published(self, contents: Keys) -> Flags:
        """Mark the contents, `[n]`, that some run has used as public rows."""
        self._refresh()
        return self._public.hold(contents, self._file.load_block)

    def blocks(self) -> tuple[int, ...]:
        """Return the numbers of all blocks that stand."""
        self._refresh()
        return self._blocks.all()

    def charged_units(self, blocks: Sequence[int]) -> tuple[str, ...]:
        """Return the units in which any of these blocks has paid for anything."""
        self._refresh()
        standing = set(self._standing(blocks))
        return tuple(unit for unit in UNITS if self._largest(standing, unit).counts)

    def blocks_of_contents(self, contents: Keys) -> Indices:
        """Return the block whose record says just this, for every content; 0 for none. Nothing is written."""
        self._refresh()
        return self._blocks.of_contents(contents, self._file.load_block)

    def known_blocks(self, requests: Sequence[Records]) -> tuple[int, ...]:
        """Return every block whose history records of these may share; nothing is written.

        `NAMED_ACCOUNTS` is among them when some record is in no block but the ledger holds charges that name
        no rows.
        """
        self._refresh()
        arrangement = self._arranged(requests)
        sources = {number for numbers in arrangement.requests for number in numbers if number > 0}
        for block in arrangement.opened:
            sources.update(block.parents or {NAMED_ACCOUNTS})
        return tuple(sorted(sources))

    def epsilon_of(
        self, blocks: Sequence[int], unit: str, delta: float, *, after: Sequence[Event] = ()
    ) -> float:
        """Return the largest epsilon of any of these blocks, after further events if asked; 0 for no block
        and no event.
        """
        self._refresh()
        standing = self._standing(blocks) or (NAMED_ACCOUNTS,)
        histories = {history.digest: history for history in (self._block_history(b, unit) for b in standing)}
        return max(self._books.epsilon(history, after, delta) for history in histories.values())

    def events_of(self, blocks: Sequence[int], unit: str, delta: float) -> tuple[Event, ...]:
        """Return what the block with the largest epsilon has paid for, equal events together."""
        self._refresh()
        histories = [self._block_history(block, unit) for block in self._standing(blocks)]
        if not histories:
            return ()
        worst = max(histories, key=lambda history: self._books.epsilon(history, (), delta))
        return self._books.events(worst)

    def _standing(self, blocks: Sequence[int]) -> tuple[int, ...]:
        try:
            return self._blocks.standing(blocks)
        except KeyError as error:
            raise ParameterError(f"block {error.args[0]}: this ledger holds no such block") from None

    def _block_history(self, block: int, unit: str) -> History:
        if block == NAMED_ACCOUNTS:
            return self._largest({NAMED_ACCOUNTS}, unit)
        return self._books.history(account_of_block(block, unit))

    def _largest(self, blocks: frozenset[int] | set[int], unit: str) -> History:
        return self._books.largest(self._accounts_of(blocks, unit))

    def _accounts_of(self, blocks: frozenset[int] | set[int], unit: str) -> list[Account]:
        accounts = [account_of_block(block, unit) for block in blocks if block != NAMED_ACCOUNTS]
        if NAMED_ACCOUNTS in blocks:
            accounts += [held for held in self._books.accounts() if held.owner and held.unit == unit]
        return accounts

    def reserve(self, entries: Sequence[Charge]) -> tuple[Reservation, ...]:
        """Pay for all releases at once, before any of them happens.

        Raises: BudgetExceeded naming every owner who cannot pay; then nothing was written.
        """
        for charge in entries:
            check_charge(charge)
        self._refuse_unpayable(entries)  # Fills the caches before the file is locked.
        with self._change():
            fresh = self._refuse_unpayable(entries)
            result = []
            for charge, is_new in zip(entries, fresh):
                account = Account(charge.owner, charge.dataset, unit_of(charge.event))
                row = self._commitments.get(commitment_key(charge))
                if row is None or is_new:
                    body = charge_body(charge, self._standing(charge.blocks))
                    row = self._append("reserve", account, body)
                result.append(reservation_of(row, account, replayed=not is_new))
        return tuple(result)

    def withdraw(self, *, because: str, owner: str = "", blocks: Sequence[int] = ()) -> Withdrawal:
        """Close blocks for every later charge; with `owner`, its name too and all it was ever charged for.

        Guarantee: from the moment this returns `reserve` and `check` refuse them, in every unit and in every
        block that rows of theirs move to; nothing opens them again. What was reserved before stays spent.
        """
        with self._change():
            rows = self._file.rows(after=0, owner=owner) if owner else ()
            charged = blocks_charged(json.loads(row.body) for row in rows)
            body = self._withdrawals.new_body(owner, self._standing((*blocks, *charged)), because)
            account = Account(owner or EVERYBODY, EVERYBODY, ANY_UNIT)
            self._append("withdrawal", account, body)
        return self._withdrawals.all()[-1]

    def withdrawals(self, blocks: Sequence[int] | None = None) -> tuple[Withdrawal, ...]:
        """Return every withdrawal, oldest first, or those that closed some of these blocks."""
        self._refresh()
        if blocks is None:
            return self._withdrawals.all()
        return self._withdrawals.of_blocks(self._standing(blocks))

    def check(self, entries: Sequence[Charge]) -> None:
        """Raise what `reserve` would raise for these charges now; nothing is written and nothing is promised.

        Raises: BudgetExceeded naming every owner who cannot pay.
        """
        for charge in entries:
            check_charge(charge)
        self._refresh()
        self._refuse_unpayable(entries)

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
                    account = Account(row.owner, row.dataset, row.unit)
                    self._append("spend", account, {"reservation": reservation.sequence})

    def epsilon(self, owner: str, dataset: str, unit: str, delta: float) -> float:
        """Return the epsilon of everything this owner paid for, confirmed or not; infinity after a release
        without bound.
        """
        self.budget(owner, dataset, unit)  # refuses where there is no such account
        return self._books.epsilon(self._books.history(Account(owner, dataset, unit)), (), delta)

    def budget(self, owner: str, dataset: str, unit: str) -> Budget:
        """Return the budget in force."""
        self._refresh()
        known = self._budgets.get(Account(owner, dataset, unit))
        if known is None:
            raise ParameterError(
                f"owner = {owner!r}, dataset = {dataset!r}, unit = {unit!r}: no such account"
            )
        return known

    def accounts(self) -> tuple[tuple[str, str, str], ...]:
        """Return every (owner, dataset, unit) that has a budget, in order."""
        self._refresh()
        named = self._budgets.named()
        return tuple(sorted((account.owner, account.dataset, account.unit) for account in named))

    def events(self, owner: str, dataset: str, unit: str) -> tuple[Event, ...]:
        """Return what one account has paid for, oldest first; the history a calibration must start from."""
        rows = self.entries(owner=owner, dataset=dataset)
        return tuple(row.event for row in rows if row.event is not None and row.unit in (unit, ANY_UNIT))

    def paid(self, owner: str, run: str) -> int:
        """Return how many releases of a run one owner was charged for, confirmed or not."""
        self._refresh()
        return self._paid.get((owner, run), Counter()).total()

    def charged(self, owner: str, run: str) -> tuple[tuple[Event, int], ...]:
        """Return what one owner was charged for in a run, and how often: a run that was extended has several
        events.
        """
        self._refresh()
        return tuple(self._paid.get((owner, run), Counter()).items())

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
            self._catch_up()
            self._blocks.verify(self._file.load_block)
            self._public.verify(self._file.load_block)

    def export(self, format: Literal["csv", "json"]) -> str:
        """Return all rows as text; JSON holds everything needed to recompute the chain."""
        self._refresh()
        rows = list(self._file.rows(after=0))
        if format == "json":
            return to_json(rows)
        if format == "csv":
            return to_csv([self._entry(row) for row in rows if row.kind != "genesis"])
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

    def _append(self, kind: str, account: Account, body: dict[str, Any]) -> Row:
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
        account = Account(row.owner, row.dataset, row.unit)
        body = json.loads(row.body)
        if row.kind == "budget":
            self._budgets.apply(account, body)
        elif row.kind == "reserve":
            event = from_dict(body["event"])
            self._reserved[row.sequence] = row
            self._paid.setdefault((row.owner, body["run"]), Counter())[event] += 1
            if body["commitment"]:
                self._commitments[(row.owner, row.dataset, body["commitment"])] = row
            for payer in payers_of(account, body.get("blocks", ())):
                self._books.charge(payer, event)
        elif row.kind == "spend":
            self._spent.add(body["reservation"])
        elif row.kind == "key":
            self._key_check = body["check"]
        elif row.kind == "withdrawal":
            self._withdrawals.apply(row, body)
        elif row.kind == "block":
            self._apply_block(row.sequence, body)
        elif row.kind == "public":
            self._public.apply(row.sequence, body)

    def _apply_block(self, sequence: int, body: dict[str, Any]) -> None:
        sources = set(body["parents"]) or {NAMED_ACCOUNTS}
        for unit in UNITS:
            self._books.inherit(account_of_block(sequence, unit), self._accounts_of(sources, unit))
        self._blocks.apply(sequence, body)
        self._withdrawals.inherit(sequence, (*body["parents"], *body["closes"]))

    def _refuse_unpayable(self, entries: Sequence[Charge]) -> list[bool]:
        """Return which charges are new; raise when an account cannot pay for its new ones."""
        charges_by_key: dict[tuple[str, str, str], Charge] = {}
        fresh: list[bool] = []
        wanted: dict[Account, list[Event]] = {}
        problems: dict[str, None] = {}
        for charge in entries:
            is_new = self._is_new(charge, charges_by_key)
            fresh.append(is_new)
            if is_new:
                blocks = self._standing(charge.blocks)
                problems |= dict.fromkeys(self._withdrawals.refusals(charge, blocks))
                for payer in self._paying(charge):
                    wanted.setdefault(payer, []).append(charge.event)
        problems |= {
            problem: None for payer, events in wanted.items() if (problem := self._problem(payer, events))
        }
        if problems:
            raise BudgetExceeded("nothing was released; " + "; ".join(problems))
        return fresh

    def _paying(self, charge: Charge) -> list[Account]:
        """Return the accounts whose budgets a charge is held against."""
        account = Account(charge.owner, charge.dataset, unit_of(charge.event))
        payers = payers_of(account, self._standing(charge.blocks))
        if charge.blocks:
            return payers
        return [payer for payer in payers if self._budgets.get(payer) is not None] or [account]

    def _is_new(self, charge: Charge, charges_by_key: dict[tuple[str, str, str], Charge]) -> bool:
        if not charge.commitment:
            return True
        key = commitment_key(charge)
        known = self._commitments.get(key)
        earlier = (
            from_dict(json.loads(known.body)["event"])
            if known
            else (charges_by_key[key].event if key in charges_by_key else None)
        )
        if earlier is None:
            charges_by_key[key] = charge
            return True
        if price_of(earlier) != price_of(charge.event):
            raise ParameterError(
                f"commitment of {charge.owner!r}: the same commitment was charged with another event"
            )
        return False

    def _problem(self, account: Account, events: list[Event]) -> str:
        if not account.owner:
            return self._problem_of_block(account, events)
        budget = self._budgets.get(account)
        name = f"{account.owner!r} ({account.dataset!r}, {account.unit})"
        if budget is None:
            return f"{name} has set no budget"
        return self._books.overdraft(name, account, events, budget)

    def _problem_of_block(self, account: Account, events: list[Event]) -> str:
        budget = self._budgets.lifetime(account.unit)
        if budget is None:
            bounded = not all(isinstance(event, NonPrivateEvent) for event in events)
            return f"the ledger holds no lifetime budget per {account.unit}; set one" if bounded else ""
        overdraft = self._books.overdraft(f"some row (per {account.unit})", account, events, budget)
        if overdraft or math.isinf(budget.epsilon):
            return overdraft
        for unit in UNITS:
            if unit != account.unit and self._books.charged(Account("", account.dataset, unit)):
                return (
                    f"rows were charged per {unit}; a charge per {account.unit} beside it would forget that"
                )
        return ""

    def _entry(self, row: Row) -> Entry:
        body = json.loads(row.body)
        reserved = self._reserved[body["reservation"]] if "reservation" in body else row
        return entry_of(row, reserved, spent=reserved.sequence in self._spent)
