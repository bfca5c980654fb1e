"""What a run may still spend on the rows it reads: its own epsilon, and what their owner's lifetime budget
leaves.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from defenses.dp import Budget, Event, Ledger, NonPrivateEvent, accountant
from defenses.dp.records import Records
from ffm_secure.config.run_file import Privacy

# The running composition is within 1e-3 of all rounds at once, and the noise was chosen 1e-3 below the
# budget.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """Say what the rows of a run have spent, what the run means to spend, and what is left of their lifetime
    budget.
    """

    ledger: str
    before: float
    run: float
    together: float
    budget: float
    delta: float
    other_units: tuple[str, ...]  # units other than the run's in which these rows were charged
    implied: bool  # whether the budget is what runs asked for, because the owner has set none

    @property
    def left(self) -> float:
        """Return what remains of the lifetime budget after the run; negative where it does not pay."""
        return self.budget - self.together

    @property
    def pays(self) -> bool:
        """Tell whether the lifetime budget pays for the whole run."""
        return self.together <= self.budget and not self.other_units

    def words(self) -> str:
        """Say it in one line."""
        origin = "lifetime"
        if self.implied:
            origin = "lifetime, implied by runs: no ledger init yet"
        return (
            f"spent before {_number(self.before)}, this run {_number(self.run)}, together "
            f"{_number(self.together)}; left {_number(max(0.0, self.left))} of {_number(self.budget)} "
            f"({origin}) in {self.ledger}"
        )

    def refusal(self, unit: str) -> str:
        """Say why the run cannot be paid, and what to do."""
        if self.other_units and math.isfinite(self.before):
            return (
                f"privacy.unit = '{unit}': {self.ledger} holds charges per {', '.join(self.other_units)} "
                f"for these rows; a budget per {unit} beside them would forget them"
            )
        if math.isinf(self.before):
            return (
                f"the rows of this run were used without any bound before (see {self.ledger}): nothing can "
                "protect them any more; take other rows, or say privacy.ledger = 'run' if they are "
                "fictitious or public"
            )
        return (
            f"privacy.epsilon = {self.run:.4g}: these rows have spent {self.before:.4g} before, together "
            f"{self.together:.4g}, above the lifetime budget of {self.budget:g} per {unit} in "
            f"{self.ledger}; spend less, take other rows, raise it (ffm-secure ledger budget raise "
            f"{self.ledger} --epsilon {_rounded_up(self.together):g} --because '...'), or say "
            "privacy.ledger = 'run' if the rows are fictitious or public"
        )


def look_ahead(
    ledger: Ledger,
    path: Path,
    rows: Sequence[Records],
    privacy: Privacy,
    event: Event,
    rounds: int,
    answers: Sequence[Event] = (),
) -> Outlook:
    """Return the outlook of a run whose owners take part `rounds` times at most, and give these answers
    beside; nothing is written.
    """
    known = ledger.known_blocks(rows)
    budget, implied = lifetime_budget(ledger, privacy)
    events = [*answers, *[event] * rounds]
    return Outlook(
        ledger=str(path),
        before=ledger.epsilon_of(known, privacy.unit, budget.delta),
        run=composed(tuple(Counter(events).items()), budget.delta)
        if answers
        else run_epsilon(event, rounds, budget.delta),
        together=ledger.epsilon_of(known, privacy.unit, budget.delta, after=events),
        budget=budget.epsilon,
        delta=budget.delta,
        other_units=tuple(unit for unit in ledger.charged_units(known) if unit != privacy.unit),
        implied=implied,
    )


def lifetime_budget(ledger: Ledger, privacy: Privacy) -> tuple[Budget, bool]:
    """Return the lifetime budget that counts for a run, and whether it is implied.

    What an owner has set counts; then the smallest of the budgets a ledger of an earlier version held by
    name; then, implied, the largest epsilon that a run has asked for, this one included.
    """
    known = ledger.lifetime(privacy.unit)
    if known is not None and not ledger.is_implied(privacy.unit):
        return known, False
    if known is not None:
        return Budget(epsilon=max(known.epsilon, privacy.epsilon), delta=known.delta), True
    named = []
    for account in ledger.accounts():
        if account[2] == privacy.unit:
            named.append(ledger.budget(*account))
    if named:
        return min(named, key=lambda budget: budget.epsilon), False
    return Budget(epsilon=privacy.epsilon, delta=privacy.delta), True


def grant_lifetime(ledger: Ledger, privacy: Privacy) -> None:
    """Write the lifetime budget that counts for a run into its ledger, where no owner has set one."""
    budget, implied = lifetime_budget(ledger, privacy)
    if implied:
        ledger.imply(privacy.unit, budget.epsilon, budget.delta)
    elif ledger.lifetime(privacy.unit) is None:
        ledger.grant(privacy.unit, budget.epsilon, budget.delta)


def run_epsilon(event: Event, rounds: int, delta: float) -> float:
    """Return what `rounds` rounds of one event cost alone."""
    if rounds < 1 and not isinstance(event, NonPrivateEvent):
        return 0.0
    return composed(((event, rounds),), delta)


@lru_cache(maxsize=4096)
def composed(events: tuple[tuple[Event, int], ...], delta: float) -> float:
    """Return what events cost together, each as often as it says; remembered, for it is asked every round."""
    return accountant.composed(events, delta)


def within_run(
    charged: Sequence[tuple[Event, int]], event: Event, privacy: Privacy, *, epsilon: float | None = None
) -> bool:
    """Tell whether a run may charge one owner one more round: its own epsilon bounds it, whatever the
    lifetime allows.

    `epsilon` is another bound than the run's, for rows of their own. `charged` is what the owner has paid for
    in this run, which has other events where the run was extended.
    """
    if privacy.unit == "none":
        return True
    counts = Counter(dict(charged))
    counts[event] += 1
    return composed(tuple(counts.items()), privacy.delta) <= (epsilon or privacy.epsilon) * (1 + _ROUNDING)


def _rounded_up(value: float) -> float:
    return math.ceil(value * 1000) / 1000


def _number(value: float) -> str:
    if math.isinf(value):
        return "infinite"
    return f"{value:.4g}"
