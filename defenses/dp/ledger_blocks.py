"""The blocks of a ledger in memory: which stand, what came after those that do not, and what they are made
of.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from defenses.dp.blocks import Directory, Members, NewBlock
from defenses.dp.records import Keys
from defenses.errors import TamperedError

NAMED_ACCOUNTS = 0  # stands for all that was charged without naming rows: nobody can say whose it was
Load = Callable[[int], tuple[bytes, bytes]]


class BlockBook:
    """Follow the blocks through the rows that open them."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start again from the first row."""
        self._digests: dict[int, str] = {}
        self._standing: set[int] = set()
        self._successors: dict[int, list[int]] = {}
        self._directory: Directory | None = None

    def apply(self, sequence: int, body: Mapping[str, Any]) -> None:
        """Open the block of a row and close those whose records it took."""
        self._digests[sequence] = body["members"]
        self._standing.add(sequence)
        for closed in body["closes"]:
            self._standing.discard(closed)
            self._successors.setdefault(closed, []).append(sequence)
        self._directory = None

    def standing(self, numbers: Iterable[int]) -> tuple[int, ...]:
        """Return the standing blocks that hold the records of these, in order; a closed one is followed to
        all its heirs.
        """
        result: set[int] = set()
        waiting, visited = list(numbers), set[int]()
        while waiting:
            number = waiting.pop()
            if number in visited:
                continue
            visited.add(number)
            if number in self._standing or number == NAMED_ACCOUNTS:
                result.add(number)
            elif number in self._successors:
                waiting.extend(self._successors[number])
            else:
                raise KeyError(number)
        return tuple(sorted(result))

    def all(self) -> tuple[int, ...]:
        """Return every standing block."""
        return tuple(sorted(self._standing))

    def directory(self, load: Load) -> Directory:
        """Return where to look records up; read once, and again after blocks changed."""
        if self._directory is None:
            blocks = {number: self.members(number, load) for number in sorted(self._standing)}
            self._directory = Directory(blocks)
        return self._directory

    def of_contents(self, contents: Keys, load: Load) -> npt.NDArray[np.int64]:
        """Return for every content the block of a record that says just this, `[n]`; 0 for none."""
        directory = self.directory(load)
        places = np.searchsorted(directory.contents, contents)
        result = np.zeros(len(contents), dtype=np.int64)
        inside = np.flatnonzero(places < len(directory.contents))
        held = inside[directory.contents[places[inside]] == contents[inside]]
        result[held] = directory.blocks[places[held]]
        return result

    def members(self, number: int, load: Load) -> Members:
        """Read what a block is made of.

        Raises: TamperedError when it is not what its row says.
        """
        keys, links = load(number)
        if members_digest(keys, links) != self._digests[number]:
            raise TamperedError
        return Members(keys=_array(keys), links=_array(links).reshape(-1, 2))

    def verify(self, load: Load) -> None:
        """Check every block, closed ones too."""
        for number in self._digests:
            self.members(number, load)


def block_body(block: NewBlock, keys: bytes, links: bytes) -> dict[str, Any]:
    """Return what a row says about a new block."""
    return {
        "parents": list(block.parents),
        "closes": list(block.closes),
        "records": len(block.members.keys),
        "members": members_digest(keys, links),
    }


def to_bytes(members: Members) -> tuple[bytes, bytes]:
    """Return the stored form of what a block is made of."""
    return members.keys.astype("<u8").tobytes(), members.links.astype("<u8").tobytes()


def members_digest(keys: bytes, links: bytes) -> str:
    """Return the digest that binds a block's records to its row."""
    state = hashlib.sha256(len(keys).to_bytes(8, "little"))
    state.update(keys)
    state.update(links)
    return state.hexdigest()


def resolved(members: Sequence[Sequence[int]], opened: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Replace the places of new blocks by the numbers they were given."""
    return tuple(
        tuple(sorted(number if number > 0 else opened[-1 - number] for number in numbers))
        for numbers in members
    )


def _array(stored: bytes) -> Keys:
    if len(stored) % 8:
        raise TamperedError
    return np.frombuffer(stored, dtype="<u8").astype(np.uint64, copy=False)
