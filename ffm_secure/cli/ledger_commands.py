"""What an owner does with a ledger: open it with a budget, raise the budget, hold it against an anchor kept
elsewhere.
"""

from __future__ import annotations

from pathlib import Path

from defenses.dp import Ledger
from defenses.dp.ledger_entries import EVERYBODY
from defenses.dp.ledger_file import Head
from defenses.errors import ParameterError
from ffm_secure.quantities import small
from ffm_secure.display.console import clear_errors, say
from ffm_secure.cli.ledger_table import open_for_reading, withdrawal_line, withdrawals
from ffm_secure.errors import ConfigError, StoreError
from ffm_secure.site.ledger_place import FILE, data_home, open_ledger
from ffm_secure.record_codec import read_json


def place_of(path: Path | None) -> Path:
    """Return the ledger a command means: the named one, or this user's own."""
    if path is not None:
        return path.expanduser()
    return data_home() / FILE


def init(path: Path | None, *, epsilon: float, delta: float, unit: str, json: bool) -> None:
    """Make a ledger and set the lifetime budget of every row in it."""
    place = place_of(path)
    with clear_errors():
        existing = place.is_file()
        with open_ledger(place) as ledger:
            implied = existing and ledger.is_implied(unit)
            known = None
            if existing and not implied:
                known = ledger.lifetime(unit)
            if known is not None:
                raise StoreError(
                    f"{place}: holds a lifetime budget of {known.epsilon:g} at delta "
                    f"{small(known.delta)} per {unit} already; raise it with: ffm-secure ledger budget raise"
                )
            _granting(ledger, unit, epsilon, delta, because="set by its owner" if implied else "")
            ledger.record_key()
    answer = {"ledger": str(place), "unit": unit, "epsilon": epsilon, "delta": delta}
    say(
        answer,
        [f"{place}: lifetime budget of every row {epsilon:g} at delta {small(delta)} per {unit}"],
        json=json,
    )


def raise_budget(path: Path | None, *, epsilon: float, because: str, unit: str, json: bool) -> None:
    """Set a lifetime budget anew; a higher one with its reason, which stays in the ledger."""
    place = place_of(path)
    with clear_errors():
        if not place.is_file():
            raise StoreError(f"{place}: is not a ledger; make one with: ffm-secure ledger init")
        with Ledger.open(place, create=False) as ledger:
            known = ledger.lifetime(unit)
            if known is None:
                raise StoreError(f"{place}: holds no budget per {unit}; set one with: ffm-secure ledger init")
            _granting(ledger, unit, epsilon, known.delta, because=because)
    answer = {"ledger": str(place), "unit": unit, "before": known.epsilon, "epsilon": epsilon}
    say(answer, [f"{place}: lifetime budget per {unit} was {known.epsilon:g}, is {epsilon:g}"], json=json)


def withdraw(path: Path | None, *, owner: str, blocks: tuple[int, ...], because: str, json: bool) -> None:
    """Close an owner, or some blocks, for every later charge; say what released models may still reveal."""
    place = place_of(path)
    with clear_errors():
        if bool(owner) == bool(blocks):
            raise ConfigError("ledger withdraw", ["give --owner NAME or --block N, one of the two"])
        if not because.strip():
            raise ConfigError("ledger withdraw", ["--because: missing; say why, it is recorded for good"])
        with open_for_reading(place) as ledger:
            if owner:
                _require_owner(ledger, owner)
            try:
                sequence = ledger.withdraw(because=because, owner=owner, blocks=blocks).sequence
            except ParameterError as error:
                raise ConfigError("ledger withdraw", [str(error)]) from None
            (entry,) = [item for item in withdrawals(ledger) if item["sequence"] == sequence]
    say(entry, [f"{place}: {withdrawal_line(entry)}", "no later run is charged for them"], json=json)


def _require_owner(ledger: Ledger, owner: str) -> None:
    """Refuse a name the ledger does not know: a withdrawal is for good, so a slip must not become one."""
    owners = sorted({entry.owner for entry in ledger.entries()} - {EVERYBODY})
    if owner not in owners:
        raise StoreError(f"--owner = {owner!r}: the ledger knows {', '.join(owners) or 'nobody'}")


def verify(path: Path | None, *, anchor: str, json: bool) -> None:
    """Check every row; against an anchor kept elsewhere, also that nothing was taken back."""
    place = place_of(path)
    with clear_errors():
        if not place.is_file():
            raise StoreError(f"{place}: is not a ledger")
        held_against = None
        if anchor:
            held_against = read_anchor(anchor)
        with Ledger.open(place, create=False) as ledger:
            ledger.verify(held_against)
            head = ledger.head()
            left = withdrawals(ledger)
    words = f"{head.sequence}:{head.hash}"
    lines = [f"{place}: {head.sequence} entries, authentic; keep this anchor elsewhere: {words}"]
    lines += [f"holds everything up to the anchor {held_against.sequence}"] if held_against else []
    for item in left:
        lines.append(withdrawal_line(item))
    answer = {"ledger": str(place), "verified": True, "anchor": words, "withdrawals": left}
    say(answer, lines, json=json)


def read_anchor(text: str) -> Head:
    """Read an anchor: `number:hash` as verify prints it, or the report.json of a run."""
    file = Path(text)
    if file.is_file():
        try:
            report = read_json(file)
            return Head(sequence=int(report["ledger_entries"]), hash=str(report["ledger_head"]))
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            raise StoreError(
                f"{file}: holds no anchor; give number:hash, or the report.json of a run"
            ) from None
    number, _, digest = text.partition(":")
    if not number.isdecimal() or len(digest) != 64:
        raise ConfigError("ledger verify", [f"--anchor = {text!r}: must be number:hash, or a report.json"])
    return Head(sequence=int(number[:18]), hash=digest.lower())


def _granting(ledger: Ledger, unit: str, epsilon: float, delta: float, *, because: str) -> None:
    try:
        ledger.grant(unit, epsilon, delta, raise_because=because)
    except ParameterError as error:
        text = str(error)
        if "raise_because" in text:
            text = f"--epsilon = {epsilon:g}: raises the budget, which needs a reason: --because '...'"
        raise ConfigError("ledger", [text]) from None
