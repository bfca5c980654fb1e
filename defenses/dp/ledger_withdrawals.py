"""Who has left: the blocks and owners that a ledger charges no more, and the sentence a later charge gets.

A withdrawal closes; it takes nothing back. What was released stays released, and the epsilon of a closed
block stays what it was: the bound on what released models may still reveal about its rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from defenses.dp.ledger_entries import EVERYBODY, Charge, label
from defenses.dp.ledger_file import Row
from defenses.errors import ParameterError


@dataclass(frozen=True, slots=True, kw_only=True)
class Withdrawal:
    """One entry that closes blocks, and the name of an owner where one left."""

    sequence: int
    time: str
    owner: str  # empty where blocks alone were closed
    because: str
    blocks: tuple[int, ...]

    def words(self) -> str:
        """Say it in a few words."""
        count = len(self.blocks)
        subject = repr(self.owner) if self.owner else f"{count} block{'s' if count > 1 else ''} of rows"
        return f"{subject} withdrawn on {self.time[:10]}: {self.because}"


class WithdrawalBook:
    """Follow what is closed through the rows of a ledger.

    Guarantee: a block that came of a closed one, in whole or in part, is closed; nothing opens it again.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start again from the first row."""
        self._by_block: dict[int, Withdrawal] = {}
        self._by_owner: dict[str, Withdrawal] = {}
        self._all: list[Withdrawal] = []

    def apply(self, row: Row, body: Mapping[str, Any]) -> None:
        """Close what a row names."""
        owner = "" if row.owner == EVERYBODY else row.owner
        withdrawal = Withdrawal(
            sequence=row.sequence,
            time=body["time"],
            owner=owner,
            because=body["reason"],
            blocks=tuple(body["blocks"]),
        )
        self._all.append(withdrawal)
        for block in withdrawal.blocks:
            self._by_block.setdefault(block, withdrawal)
        if owner:
            self._by_owner.setdefault(owner, withdrawal)

    def inherit(self, block: int, parents: Iterable[int]) -> None:
        """Close a new block that came of a closed one."""
        withdrawals = self.of_blocks(parents)
        if withdrawals:
            self._by_block[block] = withdrawals[0]

    def all(self) -> tuple[Withdrawal, ...]:
        """Return every withdrawal, oldest first."""
        return tuple(self._all)

    def of_blocks(self, blocks: Iterable[int]) -> tuple[Withdrawal, ...]:
        """Return the withdrawals that closed some of these blocks, oldest first."""
        withdrawals = {}
        for block in blocks:
            if block in self._by_block:
                withdrawals[self._by_block[block].sequence] = self._by_block[block]
        return tuple(withdrawals[sequence] for sequence in sorted(withdrawals))

    def of_owner(self, owner: str) -> tuple[Withdrawal, ...]:
        """Return the withdrawal of an owner, if there is one."""
        return (self._by_owner[owner],) if owner in self._by_owner else ()

    def refusals(self, charge: Charge, blocks: Sequence[int]) -> list[str]:
        """Say why a charge is refused; `blocks` are the standing ones it would be charged to."""
        sentences = []
        for withdrawal in self.of_owner(charge.owner):
            sentences.append(f"{withdrawal.words()}; nothing is charged to this owner any more")
        for withdrawal in self.of_blocks(blocks):
            if withdrawal not in self.of_owner(charge.owner):
                sentences.append(f"{charge.owner!r} would use rows of {withdrawal.words()}; leave them out")
        return sentences

    def new_body(self, owner: str, blocks: Sequence[int], because: str) -> dict[str, Any]:
        """Return the stored form of a withdrawal.

        Raises: ParameterError when there is no reason, nothing to close, or all of it is closed already.
        """
        label("because", because)
        if owner:
            label("owner", owner)
        closed = [block for block in blocks if block in self._by_block]
        if not owner and not blocks:
            raise ParameterError("owner and blocks: nothing was named that could be withdrawn")
        if len(closed) == len(blocks) and (not owner or owner in self._by_owner):
            known = (*self.of_owner(owner), *self.of_blocks(blocks))[0]
            raise ParameterError(f"closed already: {known.words()}")
        return {"blocks": list(blocks), "reason": because}


def blocks_charged(bodies: Iterable[Mapping[str, Any]]) -> tuple[int, ...]:
    """Return the blocks that the charges of one owner name, whether they stand or not."""
    blocks: set[int] = set()
    for body in bodies:
        if body["kind"] == "reserve":
            blocks.update(body.get("blocks", ()))
    return tuple(sorted(blocks))
