"""Votes on public candidates: every private record votes for the texts nearest to it, under its label."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ffm_secure.errors import ModelError
from ffm_secure.foreign import Cells
from ffm_secure.queries import agenda
from ffm_secure.queries.base import (
    Head,
    Opened,
    Query,
    Rows,
    Setting,
    Viewed,
    forget,
    head_of,
    slot,
    with_head,
)
from ffm_secure.queries.class_sums import class_head, unit_rows
from ffm_secure.strategies.base import ServerState
from ffm_secure.tasks import TaskData, build_task

NAME = "candidate_votes"
_GRID = 2.0**20  # levels in 1.0 of what a row is compared by
_TEXT, _LABEL = "text", "label"  # columns of the candidates, as the task is given them


@dataclass(frozen=True, slots=True, kw_only=True)
class _Texts:
    """The candidates as a table for the task; their labels are not read."""

    texts: Sequence[str]

    def __len__(self) -> int:
        return len(self.texts)

    def column(self, name: str) -> Cells:
        """Return the texts, or as many zeros for the labels."""
        return list(self.texts) if name == _TEXT else np.zeros(len(self.texts), dtype=np.int64)


class Pool:
    """Public candidates with their features under the frozen model, which are worked out once."""

    def __init__(self, setting: Setting) -> None:
        self.texts = setting.candidates
        self._setting = setting
        self._task = build_task(
            setting.config.task.kind,
            backbone=setting.trainable.backbone,
            dataset=TaskData(text_columns=(_TEXT,), label_column=_LABEL),
            max_length=setting.config.task.max_length,
        )
        self._features: Tensor | None = None

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def digest(self) -> str:
        """Return the hash of all candidates in their order."""
        content = hashlib.sha256()
        for text in self.texts:
            encoded = text.encode("utf-8", "surrogatepass")
            content.update(len(encoded).to_bytes(8, "big") + encoded)
        return content.hexdigest()

    def features(self) -> Tensor:
        """Return unit-length features, float64 [candidates, width].

        Assumes: nothing in front of the head is trained, so they are the same in every round.
        """
        if self._features is None:
            trainable = self._setting.trainable
            device = str(next(iter(trainable.parameters.values())).device)
            view = Viewed(trainable=trainable, task=self._task, device=device)
            encoded = self._task.encode(_Texts(texts=self.texts))
            self._features = unit_rows(view.features(Rows(encoded=encoded)))
        return self._features


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What whole questions have said so far: which candidates are kept, and what is asked about next."""

    answers: int = 0  # opened, of this question and all before
    asked: tuple[int, ...] = ()  # candidates of the next question
    before: tuple[int, ...] = ()  # candidates that were asked about already
    chosen: tuple[int, ...] = ()  # candidates, class by class, the best first
    labels: tuple[int, ...] = ()  # of those chosen
    votes: tuple[float, ...] = ()  # for each under its label, with noise
    counts: tuple[float, ...] = ()  # votes by label, with noise: `nearest` times the label counts
    deviation: float = 0.0  # of the noise of one candidate's votes

    def slots(self) -> dict[str, Tensor]:
        """Return this as tensors beside the server's state."""
        whole = ("asked", "before", "chosen", "labels")
        tensors = {slot(NAME, part): torch.tensor(getattr(self, part), dtype=torch.int64) for part in whole}
        for part in ("votes", "counts"):
            tensors[slot(NAME, part)] = torch.tensor(getattr(self, part), dtype=torch.float64)
        tensors[slot(NAME, "standing")] = torch.tensor([self.answers, self.deviation], dtype=torch.float64)
        return tensors


def standing_of(state: ServerState) -> Standing:
    """Return what a state holds of votes; the beginning where it holds nothing."""
    facts = state.optimizer_state.get(slot(NAME, "standing"))
    if facts is None:
        return Standing()

    def part(name: str) -> list[float]:
        values: list[float] = state.optimizer_state[slot(NAME, name)].tolist()
        return values

    return Standing(
        answers=round(float(facts[0])),
        asked=tuple(map(int, part("asked"))),
        before=tuple(map(int, part("before"))),
        chosen=tuple(map(int, part("chosen"))),
        labels=tuple(map(int, part("labels"))),
        votes=tuple(part("votes")),
        counts=tuple(part("counts")),
        deviation=float(facts[1]),
    )


def build(setting: Setting) -> Query:
    """Return the query: one vote a record, in the row of its label: whole numbers, size classes x candidates.

    Bound: a record votes for its `nearest` candidates under its own label, so its vector has that many ones
    and zeros elsewhere; its L2 norm is sqrt(nearest), whatever the record, the candidates and the features
    are. Adding or removing the record changes the sum by exactly that vector, for nothing of how others vote
    depends on it: candidates and features are public, and every record is looked at alone, since in a batch
    it would shift the last bits of others, and their votes between candidates made to be level. What is asked
    about later is a function of opened sums, so questions compose like any other releases.

    Label counts are free: the votes in a row add up to `nearest` times the label's count, with the noise of
    so many candidates in it.
    Source: Xie et al. 2024, arXiv:2403.01749 (private evolution of texts); Hou et al. 2024, arXiv:2406.02958
    (votes in federations). Here no generator is asked: variations are neighbours among the other candidates.

    Raises:
      ModelError: the candidates do not suffice for what is asked of them.
    """
    head, pool = head_of(setting.trainable), Pool(setting)
    votes = setting.config.federation.lifecycle.votes
    room = votes.asked or len(pool)
    _require_enough(setting, len(pool), room, head.classes)
    first = _first(len(pool), room, setting.config.seed)
    cohorts = agenda.cohorts(setting.config)

    def answer(rows: Rows, model: Viewed) -> Tensor:
        places = list(model.asked or first)
        alone = replace(model, batch_size=1)  # in a batch the last bits depend on who else is in it
        return one_hot_votes(
            unit_rows(alone.features(rows)),
            rows.labels(),
            pool.features()[places],
            classes=head.classes,
            nearest=votes.nearest,
        )

    def asks(state: ServerState) -> tuple[int, ...]:
        return standing_of(state).asked or first

    def use(state: ServerState, opened: Opened) -> ServerState:
        before = replace(standing_of(state), answers=standing_of(state).answers + 1)
        if before.answers % cohorts:  # the other owners have not voted yet
            return replace(state, optimizer_state={**state.optimizer_state, **before.slots()})
        table = opened.values.reshape(head.classes, room)
        standing = after_votes(table, pool.features(), before, first=first, keep=votes.keep)
        standing = replace(standing, deviation=opened.deviation)
        counted = forget(state, NAME)
        slots = {**counted.optimizer_state, **standing.slots()}
        slots[slot(NAME, "table")] = torch.from_numpy(table.copy())
        return head_of_kept(replace(counted, optimizer_state=slots), head, pool.features(), standing)

    return Query(
        name=NAME,
        size=head.classes * room,
        bound=float(np.sqrt(votes.nearest)),
        answer=answer,
        use=use,
        words=f"{votes.nearest} vote(s) a record among {room} public candidates, by label",
        whole_numbers=True,
        about=pool.digest,
        choices=len(pool),
        room=room,
        asks=asks if room < len(pool) else None,
    )


def _require_enough(setting: Setting, candidates: int, room: int, classes: int) -> None:
    """Refuse numbers with which nothing could be kept, or nothing new could be asked about."""
    votes, config = setting.config.federation.lifecycle.votes, setting.config
    where = "federation.lifecycle.votes"
    problems = []
    if candidates < 2 * classes:
        problems.append(
            f"{where}.candidates: has {candidates} different texts, must have at least {2 * classes}"
        )
    if room > candidates:
        problems.append(f"{where}.asked = {votes.asked}: there are {candidates} candidates only")
    if votes.nearest >= room:
        problems.append(f"{where}.nearest = {votes.nearest}: must be below the {room} asked about")
    if not classes <= votes.keep <= room:
        problems.append(
            f"{where}.keep = {votes.keep}: must be from {classes}, one a class, to {room}, those asked about"
        )
    if config.federation.rounds > agenda.cohorts(config) and room >= candidates:
        problems.append(
            f"federation.rounds = {config.federation.rounds}: all {candidates} candidates are asked about at "
            f"once, and asking again would only add noise; set {where}.asked below {candidates}, or ask "
            "every owner once"
        )
    if problems:
        raise ModelError("; ".join(problems))


def _first(candidates: int, room: int, seed: int) -> tuple[int, ...]:
    """Return what the first question is about: all, or so many drawn by the run's public seed."""
    order = np.random.Generator(np.random.PCG64(seed)).permutation(candidates)
    return tuple(sorted(int(place) for place in order[:room]))


def one_hot_votes(
    features: Tensor, labels: NDArray[np.int64], candidates: Tensor, *, classes: int, nearest: int
) -> Tensor:
    """Return the votes of every row, 0 or 1, float64 [n, classes * candidates]: `nearest` ones a row.

    Shapes: features [n, width] and candidates [m, width], of unit length.
    Guarantee: the votes of a row are the same bits whichever other rows are there, however level the
    candidates are: on the grid every sum is exact in any order, and of equal ones the first wins.
    """
    count = len(labels)
    votes = torch.zeros((count, classes, len(candidates)), dtype=torch.float64)
    if count:
        similar = on_grid(features) @ on_grid(candidates).T
        chosen = similar.sort(dim=1, descending=True, stable=True).indices[:, :nearest]
        votes[torch.arange(count)[:, None], torch.from_numpy(labels)[:, None], chosen] = 1.0
    return votes.view(count, -1)


def on_grid(features: Tensor) -> Tensor:
    """Round unit-length rows to multiples of 2**-20, so that float64 adds up their products exactly.

    A product is a multiple of 2**-40, and partial sums over unit rows stay below 2: far below 2**13, up to
    which such multiples fit into 53 bits.

    >>> on_grid(torch.tensor([0.1], dtype=torch.float64)).mul(2**20).tolist()
    [104858.0]
    """
    return (features.double() * _GRID).round() / _GRID


def after_votes(
    table: NDArray[np.float64], features: Tensor, before: Standing, *, first: Sequence[int], keep: int
) -> Standing:
    """Return what a whole question said: post-processing of its opened sum.

    Shapes: table [classes, asked], features [candidates, width].
    """
    asked = np.asarray(before.asked or first, dtype=np.int64)
    counts = np.clip(table.sum(axis=1), 0.0, None)
    places, labels = best_by_class(table, quotas(counts, keep))
    chosen = asked[places]
    known = {*before.before, *map(int, asked)}
    return Standing(
        answers=before.answers,
        asked=varied(chosen, features, before=known, room=len(asked)),
        before=tuple(sorted(known)),
        chosen=tuple(map(int, chosen)),
        labels=tuple(map(int, labels)),
        votes=tuple(map(float, table[labels, places])),
        counts=tuple(map(float, counts)),
    )


def quotas(counts: NDArray[np.float64], keep: int) -> NDArray[np.int64]:
    """Deal the candidates to keep to the classes by their counts, one a class at least, by largest remainder.

    >>> quotas(np.array([30.0, 10.0, 0.0]), 7).tolist()
    [4, 2, 1]
    """
    classes = len(counts)
    total = float(counts.sum())
    shares = np.full(classes, 1.0 / classes)
    if total > 0.0:
        shares = counts / total
    exact = shares * (keep - classes)
    dealt: NDArray[np.int64] = 1 + np.floor(exact).astype(np.int64)
    order = np.argsort(np.floor(exact) - exact, kind="stable")
    dealt[order[: keep - int(dealt.sum())]] += 1
    return dealt


def best_by_class(
    table: NDArray[np.float64], quota: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return places and labels of the best candidates of every class; each has the label most votes gave it.

    One without more votes than none is not kept, so there may be fewer than the quota.
    """
    label_of = table.argmax(axis=0)
    places: list[int] = []
    labels: list[int] = []
    for label in range(len(table)):
        members = np.flatnonzero((label_of == label) & (table[label] > 0.0))
        order = np.argsort(-table[label, members], kind="stable")
        best = members[order[: quota[label]]]
        places += map(int, best)
        labels += [label] * len(best)
    return np.asarray(places, dtype=np.int64), np.asarray(labels, dtype=np.int64)


def varied(staying: NDArray[np.int64], features: Tensor, *, before: set[int], room: int) -> tuple[int, ...]:
    """Return the candidates of the next question: those kept, and the nearest to any of them that are new.

    Where too few are new, the nearest of the others fill the room.
    """
    candidates = len(features)
    if room >= candidates:
        return tuple(range(candidates))
    near = np.zeros(candidates)
    if len(staying):
        near = (features @ features[staying].T).max(dim=1).values.numpy().copy()
    old = np.zeros(candidates, dtype=bool)
    old[list(before)] = True
    stays = np.zeros(candidates, dtype=bool)
    stays[staying] = True
    order = np.lexsort((-near, old, ~stays))
    return tuple(sorted(int(place) for place in order[:room]))


def head_of_kept(state: ServerState, head: Head, features: Tensor, standing: Standing) -> ServerState:
    """Return a state whose head is made from the candidates kept, each counted as often as it was voted for.

    A class of which none is kept stays as it was.
    """
    if not standing.chosen:
        return state
    labels, places = torch.tensor(standing.labels), torch.tensor(standing.chosen)
    weighted = features[places] * torch.tensor(standing.votes, dtype=torch.float64)[:, None]
    sums = torch.zeros((head.classes, head.width), dtype=torch.float64).index_add(0, labels, weighted)
    weight = class_head(sums, deviation=0.0)
    current = state.vector[head.weight].view(head.classes, head.width).to(weight.dtype)
    absent = torch.bincount(labels, minlength=head.classes) == 0
    return with_head(state, head, torch.where(absent[:, None], current, weight))
