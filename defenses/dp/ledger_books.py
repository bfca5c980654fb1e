"""The accounts of a ledger in memory: what each has paid for, and its epsilon, computed once for equal
histories.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence

from defenses.dp.accountant import Accountant
from defenses.dp.events import Event, Statement, price_of, statement_of
from defenses.dp.ledger_entries import Account, Budget

_REMEMBERED_ACCOUNTANTS = 64
_REMEMBERED_EPSILONS = 4096


class History:
    """The events one account has paid for, as a multiset with a digest that is updated in constant time."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.digest = 0
        self.statements: frozenset[Statement] = frozenset()

    def add(self, price: str, statement: Statement | None, count: int = 1) -> None:
        """Add an event."""
        self.counts[price] += count
        self.digest = _added(self.digest, price, count)
        if statement is not None:
            self.statements |= {statement}


class Books:
    """Keep the histories of all accounts and answer for their epsilon."""

    def __init__(self) -> None:
        self._prices: dict[str, Event] = {}
        self._epsilons: OrderedDict[tuple[int, float], float] = OrderedDict()
        self.forget()

    def forget(self) -> None:
        """Drop all histories; what equal histories cost stays known."""
        self._histories: dict[Account, History] = {}
        self._holders: Counter[int] = Counter()
        self._accountants: OrderedDict[int, Accountant] = OrderedDict()

    def history(self, account: Account) -> History:
        """Return an account's history, empty at first."""
        history = self._histories.get(account)
        if history is None:
            history = self._histories[account] = History()
            self._holders[history.digest] += 1
        return history

    def charged(self, account: Account) -> bool:
        """Tell whether an account has paid for anything."""
        history = self._histories.get(account)
        return history is not None and bool(history.counts)

    def accounts(self) -> Iterator[Account]:
        """Yield every account that has paid for something."""
        for account, history in self._histories.items():
            if history.counts:
                yield account

    def charge(self, account: Account, event: Event) -> None:
        """Add one event to an account."""
        history, price = self.history(account), price_of(event)
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
        self._trim()

    def largest(self, accounts: Iterable[Account]) -> History:
        """Return the history that holds every event as often as the account that paid for it most often."""
        result = History()
        counts: Counter[str] = Counter()
        for account in accounts:
            history = self._histories.get(account)
            if history is not None:
                counts |= history.counts
        for price, count in counts.items():
            result.add(price, statement_of(self._prices[price]), count)
        return result

    def inherit(self, account: Account, sources: Iterable[Account]) -> None:
        """Start an account with the largest history of others."""
        history = self.largest(sources)
        self._histories[account] = history
        self._holders[history.digest] += 1

    def events(self, history: History) -> tuple[Event, ...]:
        """Return the events of a history, equal ones together."""
        return tuple(
            self._prices[price] for price, count in sorted(history.counts.items()) for _ in range(count)
        )

    def epsilon(self, history: History, events: Sequence[Event], delta: float) -> float:
        """Return epsilon after more events; equal histories are computed once, whoever owns them.

        What protects different units at once has no epsilon: infinity.
        """
        if len({*history.statements, *map(statement_of, events)} - {None}) > 1:
            return math.inf
        digest = history.digest
        for event in events:
            digest = _added(digest, price_of(event), 1)
        key = (digest, delta)
        if key not in self._epsilons:
            self._epsilons[key] = self._compute(history, events, delta)
            while len(self._epsilons) > _REMEMBERED_EPSILONS:
                self._epsilons.popitem(last=False)
        return self._epsilons[key]

    def overdraft(self, name: str, account: Account, events: Sequence[Event], budget: Budget) -> str:
        """Say why an account cannot pay for more events within a budget; nothing where it can."""
        history = self.history(account)
        statements = {*history.statements, *map(statement_of, events)} - {None}
        if len(statements) > 1:
            return f"{name} would mix {', '.join(sorted(map(str, statements)))}"
        if math.isinf(budget.epsilon):
            return ""
        after = self.epsilon(history, events, budget.delta)
        if after <= budget.epsilon:
            return ""
        now = self.epsilon(history, (), budget.delta)
        return (
            f"{name} has spent {now:.4g} and would reach {after:.4g} of epsilon {budget.epsilon:g} at "
            f"delta {budget.delta:g}"
        )

    def _compute(self, history: History, events: Sequence[Event], delta: float) -> float:
        accountant = self._accountant(history)
        if not events:
            return accountant.epsilon(delta).epsilon
        if len(events) == 1:
            return accountant.epsilon_with(events[0], delta).epsilon
        trial = accountant.copy()
        for event, count in Counter(events).items():
            trial.compose(event, count)
        return trial.epsilon(delta).epsilon

    def _accountant(self, history: History) -> Accountant:
        accountant = self._accountants.get(history.digest)
        if accountant is None:
            accountant = Accountant()
            for price, count in history.counts.items():
                accountant.compose(self._prices[price], count)
            self._accountants[history.digest] = accountant
            self._trim()
        self._accountants.move_to_end(history.digest)
        return accountant

    def _trim(self) -> None:
        while len(self._accountants) > _REMEMBERED_ACCOUNTANTS:
            self._accountants.popitem(last=False)


def _added(digest: int, price: str, count: int) -> int:
    return (digest + count * int.from_bytes(hashlib.sha256(price.encode()).digest(), "big")) % 2**256
