"""Blocks: records with one and the same history, parted and joined so that every run pays for exactly the
rows it reads.

A ledger partitions all records it knows into blocks. A run that reads some of them parts the blocks it cuts
through, joins pieces whose histories are equal, and opens a block for records nobody knew. A new block starts
with the largest history of any block it comes from, event by event, so no record's account is ever below what
that record went through.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from defenses.dp.records import Flags, Keys, Records, contents_of

Indices = npt.NDArray[np.int64]
Ordered = TypeVar("Ordered", Keys, Indices)
HistoryOf = Callable[[frozenset[int]], Hashable]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Members:
    """Hold what a block is made of: its records, sorted, and further contents they are known by (`[m, 2]`:
    content, record).
    """

    keys: Keys
    links: Keys


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NewBlock:
    """Describe a block to open: it inherits from `parents`; from those it `closes` it takes records, and they
    end with it.
    """

    members: Members
    parents: tuple[int, ...]
    closes: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Arrangement:
    """Say which blocks hold the records of every request, once the new ones are written.

    A request's member is the number of a standing block, or `-1 - i` for the i-th new block.
    """

    opened: tuple[NewBlock, ...]
    requests: tuple[tuple[int, ...], ...]


class Directory:
    """Look records up in the standing blocks of a ledger.

    Assumes: no record stands in two of them.
    """

    def __init__(self, blocks: dict[int, Members]) -> None:
        numbers = np.fromiter(blocks, dtype=np.int64, count=len(blocks))
        sizes = [len(members.keys) for members in blocks.values()]
        keys = _concatenated([members.keys for members in blocks.values()])
        # A block is stored in order, so a ledger of one block needs no sorting.
        order = np.argsort(keys) if len(sizes) > 1 else slice(None)
        self.keys = keys[order]
        self.blocks = np.repeat(numbers, sizes)[order]
        self.contents = contents_of(self.keys)
        links = _stacked([members.links for members in blocks.values()])
        self.links = links[np.argsort(links[:, 0], kind="stable")]
        self.sizes = dict(zip(blocks, sizes, strict=True))

    def positions(self, keys: Keys) -> tuple[Indices, Flags]:
        """Return where records stand, and which of them are known at all."""
        places = np.searchsorted(self.keys, keys)
        return places, _equal_at(self.keys, keys, places)

    def kin(self, keys: Keys, links: Keys) -> tuple[Indices, Indices]:
        """Return pairs (index into `keys`, block): every block with a record of the same content, or known by
        it.
        """
        rows, places = _matches(self.contents, contents_of(keys))
        pairs = [(rows, self.blocks[places])]
        if len(self.links):
            pairs.append(self._through_links(contents_of(keys), np.arange(len(keys))))
        if len(links):
            owners = np.searchsorted(keys, links[:, 1])
            rows, places = _matches(self.contents, links[:, 0])
            pairs.append((owners[rows], self.blocks[places]))
            pairs.append(self._through_links(links[:, 0], owners))
        if len(pairs) == 1:
            return pairs[0]
        return np.concatenate([rows for rows, _ in pairs]), np.concatenate([blocks for _, blocks in pairs])

    def _through_links(self, contents: Keys, owners: Indices) -> tuple[Indices, Indices]:
        rows, places = _matches(self.links[:, 0], contents)
        where, _ = self.positions(self.links[places, 1])
        return owners[rows], self.blocks[where]


@dataclass(frozen=True, slots=True, eq=False)
class _Request:
    """All records asked for, each once: who asks for it, and what it is known by."""

    keys: Keys
    links: Keys
    askers: Indices  # number of the set of requests that hold the record
    asker_sets: tuple[tuple[int, ...], ...]


def arrange(directory: Directory, requests: Sequence[Records], history_of: HistoryOf) -> Arrangement:
    """Part, join and open blocks so that every request is a union of blocks.

    `history_of` gives equal values for sets of blocks whose largest histories are equal; of no block, for
    records nobody knew.
    Guarantee: the records of a request are exactly those of its blocks; a block that is new comes from every
    block that held one of its records, a copy of one or one known by the same content. Nothing is written.
    """
    wanted = _collect(requests)
    sources, source_sets = _sources(directory, wanted)
    numbers: dict[Hashable, int] = {}
    tokens = np.array(
        [numbers.setdefault(history_of(members), len(numbers)) for members in source_sets], dtype=np.int64
    )
    group_of, groups = _group(wanted.askers, tokens[sources])
    places, known = directory.positions(wanted.keys)
    own = np.zeros(len(wanted.keys), dtype=np.int64)
    own[known] = directory.blocks[places[known]]

    def history_stays(block: int, group: int) -> bool:
        return numbers.get(history_of(frozenset({block}))) == int(groups[group, 1])

    standing = _standing(directory, wanted, group_of, len(groups), own, history_stays)
    moves = standing[group_of] == 0
    moved = places[known & moves]
    links = _merged_links(directory, wanted, moves)
    opened: list[NewBlock] = []
    members = standing.copy()
    for number, chosen in enumerate(_by_group(group_of, len(groups))):
        if standing[number]:
            continue
        parents = {block for source in _distinct(sources[chosen]).tolist() for block in source_sets[source]}
        keys = wanted.keys[chosen]
        closes = _distinct(own[chosen])
        block = NewBlock(
            members=Members(keys=keys, links=_links_of(links, keys)),
            parents=tuple(sorted(parents)),
            closes=tuple(closes[closes > 0].tolist()),
        )
        opened.append(block)
        members[number] = -len(opened)
    opened += _remainders(directory, _distinct(directory.blocks[moved]), moved)
    return Arrangement(opened=tuple(opened), requests=_members_of(requests, wanted, groups[:, 0], members))


def _collect(requests: Sequence[Records]) -> _Request:
    if len(requests) == 1:
        keys = _distinct(requests[0].keys)
        links = _unique_pairs(_links(requests[0]))
        return _Request(keys=keys, links=links, askers=np.zeros(len(keys), np.int64), asker_sets=((0,),))
    keys = _concatenated([request.keys for request in requests])
    askers = np.repeat(np.arange(len(requests)), [len(request) for request in requests])
    links = _stacked([_links(request) for request in requests])
    order = np.lexsort((askers, keys))
    keys, askers = keys[order], askers[order]
    first = _changes(keys, askers)
    keys, askers = keys[first], askers[first]
    alone = _changes(keys)
    sets: list[tuple[int, ...]] = [(number,) for number in range(len(requests))]
    if not alone.all():
        askers = _shared_askers(askers, alone, sets)
        keys = keys[alone]
    return _Request(keys=keys, links=_unique_pairs(links), askers=askers, asker_sets=tuple(sets))


def _shared_askers(askers: Indices, alone: Flags, sets: list[tuple[int, ...]]) -> Indices:
    """Number the sets of requests that hold the same record; new sets are appended to `sets`."""
    starts = np.flatnonzero(alone)
    ends = np.append(starts[1:], len(alone))
    numbers = {members: number for number, members in enumerate(sets)}
    result = askers[starts].copy()
    for index in np.flatnonzero(ends - starts > 1):
        members = tuple(askers[starts[index] : ends[index]].tolist())
        if members not in numbers:
            numbers[members] = len(sets)
            sets.append(members)
        result[index] = numbers[members]
    return result


def _links(records: Records) -> Keys:
    if not records.cells.shape[1]:
        return np.zeros((0, 2), dtype=np.uint64)
    cells = records.cells.reshape(-1)
    owners = np.repeat(records.keys, records.cells.shape[1])
    used = (cells != 0) & (cells != contents_of(owners))
    return np.stack([cells[used], owners[used]], axis=1)


def _sources(directory: Directory, wanted: _Request) -> tuple[Indices, tuple[frozenset[int], ...]]:
    """Return for every record the number of the set of blocks it may come from, and these sets; the first is
    empty.
    """
    rows, blocks = directory.kin(wanted.keys, wanted.links)
    sets: list[frozenset[int]] = [frozenset()]
    result = np.zeros(len(wanted.keys), dtype=np.int64)
    if not len(rows):
        return result, tuple(sets)
    if not _increasing(rows):
        order = np.lexsort((blocks, rows))
        rows, blocks = rows[order], blocks[order]
        distinct = _changes(rows, blocks)
        rows, blocks = rows[distinct], blocks[distinct]
    starts = np.flatnonzero(_changes(rows))
    single = np.diff(np.append(starts, len(rows))) == 1
    numbers, which = np.unique(blocks[starts[single]], return_inverse=True)
    result[rows[starts[single]]] = which + 1
    sets += [frozenset({number}) for number in numbers.tolist()]
    _several(rows, blocks, starts[~single], sets, result)
    return result, tuple(sets)


def _several(
    rows: Indices, blocks: Indices, starts: Indices, sets: list[frozenset[int]], out: Indices
) -> None:
    """Number the sets of several blocks; new ones are appended to `sets`."""
    numbers = {members: number for number, members in enumerate(sets)}
    ends = np.searchsorted(rows, rows[starts], side="right")
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        members = frozenset(blocks[start:end].tolist())
        if members not in numbers:
            numbers[members] = len(sets)
            sets.append(members)
        out[rows[start]] = numbers[members]


def _group(askers: Indices, tokens: Indices) -> tuple[Indices, Indices]:
    """Return the group of every record, and the groups `[g, 2]`: a set of askers, a history."""
    width = int(tokens.max(initial=0)) + 1
    pairs, group_of = np.unique(askers * width + tokens, return_inverse=True)
    return group_of, np.stack([pairs // width, pairs % width], axis=1)


def _standing(
    directory: Directory,
    wanted: _Request,
    group_of: Indices,
    groups: int,
    own: Indices,
    history_stays: Callable[[int, int], bool],
) -> Indices:
    """Return for every group the block that is exactly it and may stay as it is, or 0."""
    lowest = np.full(groups, np.iinfo(np.int64).max)
    highest = np.zeros(groups, dtype=np.int64)
    np.minimum.at(lowest, group_of, own)
    np.maximum.at(highest, group_of, own)
    sizes = np.bincount(group_of, minlength=groups)
    renewed = np.zeros(groups, dtype=bool)
    renewed[group_of[_fresh_links(directory, wanted)]] = True
    result = np.zeros(groups, dtype=np.int64)
    for number in np.flatnonzero((lowest == highest) & (lowest > 0) & ~renewed).tolist():
        block = int(lowest[number])
        if directory.sizes[block] == sizes[number] and history_stays(block, number):
            result[number] = block
    return result


def _fresh_links(directory: Directory, wanted: _Request) -> Indices:
    """Return the indices of records with a content this directory does not know them by."""
    if not len(wanted.links):
        return np.zeros(0, dtype=np.int64)
    both = np.concatenate([directory.links, wanted.links])
    fresh = np.concatenate([np.zeros(len(directory.links), bool), np.ones(len(wanted.links), bool)])
    order = np.lexsort((fresh, both[:, 1], both[:, 0]))
    both, fresh = both[order], fresh[order]
    new = _changes(both[:, 0], both[:, 1]) & fresh
    places: Indices = np.searchsorted(wanted.keys, _distinct(both[new, 1]))
    return places


def _merged_links(directory: Directory, wanted: _Request, moving: Flags) -> Keys:
    """Return all links of the records that move, old and new, sorted by record."""
    if not len(wanted.links) and not len(directory.links):
        return wanted.links
    pairs = _unique_pairs(np.concatenate([directory.links, wanted.links]))
    moving_keys = wanted.keys[moving]
    pairs = pairs[_isin(pairs[:, 1], moving_keys)]
    return pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))]


def _links_of(links: Keys, keys: Keys) -> Keys:
    return links[_isin(links[:, 1], keys)] if len(links) else links


def _remainders(directory: Directory, closed: Indices, moved: Indices) -> list[NewBlock]:
    """Return one block for what is left of each closed one."""
    left = np.isin(directory.blocks, closed)
    left[moved] = False
    blocks, keys = directory.blocks[left], directory.keys[left]
    numbers, group_of = np.unique(blocks, return_inverse=True)
    result = []
    for block, chosen in zip(numbers.tolist(), _by_group(group_of, len(numbers)), strict=True):
        own = keys[chosen]
        members = Members(keys=own, links=_links_of(directory.links, own))
        result.append(NewBlock(members=members, parents=(block,), closes=(block,)))
    return result


def _members_of(
    requests: Sequence[Records], wanted: _Request, groups: Indices, members: Indices
) -> tuple[tuple[int, ...], ...]:
    result: list[list[int]] = [[] for _ in requests]
    for askers, member in zip(groups.tolist(), members.tolist(), strict=True):
        for asker in wanted.asker_sets[askers]:
            result[asker].append(member)
    return tuple(tuple(blocks) for blocks in result)


def _by_group(group_of: Indices, groups: int) -> list[Indices]:
    """Return the indices of the members of every group, increasing."""
    order = np.argsort(group_of, kind="stable")
    if groups:
        return np.split(order, np.cumsum(np.bincount(group_of, minlength=groups))[:-1])
    return []


def _matches(known: Keys, asked: Keys) -> tuple[Indices, Indices]:
    """Return pairs (index into `asked`, index into sorted `known`) of equal values."""
    starts = np.searchsorted(known, asked)
    rows = np.flatnonzero(_equal_at(known, asked, starts))
    places = starts[rows]
    if not _equal_at(known, asked[rows], places + 1).any():
        return rows, places
    counts = np.searchsorted(known, asked[rows], side="right") - places
    offsets = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(rows, counts), np.repeat(places, counts) + offsets


def _equal_at(known: Keys, asked: Keys, places: Indices) -> Flags:
    """Mark where `known` holds what is asked for at a place that may lie beyond its end."""
    result = np.zeros(len(asked), dtype=bool)
    inside = places < len(known)
    result[inside] = known[places[inside]] == asked[inside]
    return result


def _changes(*columns: npt.NDArray[np.generic]) -> Flags:
    """Mark the first of every run of equal entries."""
    result = np.zeros(len(columns[0]), dtype=bool)
    result[:1] = True
    for column in columns:
        result[1:] |= column[1:] != column[:-1]
    return result


def _distinct(values: Ordered) -> Ordered:
    """Return the distinct values in order; sorting a million is ten times as fast as hashing them."""
    ordered = np.sort(values)
    return ordered[_changes(ordered)]


def _increasing(values: Indices) -> bool:
    return bool((values[1:] > values[:-1]).all())


def _unique_pairs(pairs: Keys) -> Keys:
    ordered = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    return ordered[_changes(ordered[:, 0], ordered[:, 1])]


def _isin(values: Keys, ordered: Keys) -> Flags:
    """Mark the values that are among sorted ones."""
    if not len(ordered):
        return np.zeros(len(values), dtype=bool)
    places = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    result: Flags = ordered[places] == values
    return result


def _concatenated(parts: Sequence[Keys]) -> Keys:
    return np.concatenate([np.zeros(0, dtype=np.uint64), *parts])


def _stacked(parts: Sequence[Keys]) -> Keys:
    return np.concatenate([np.zeros((0, 2), dtype=np.uint64), *parts])
