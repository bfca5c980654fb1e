"""What a query is: a small bounded vector for every record, and what the server makes of their sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from defenses.dp import MomentRows
from ffm_secure.config.run_file import RunConfig
from ffm_secure.errors import ModelError
from ffm_secure.strategies.base import ServerState
from ffm_secure.tasks.base import Task, logits
from ffm_secure.tasks.encoded import Encoded
from ffm_secure.trainable.base import TrainableModel

Answers = Tensor | MomentRows
"""One bounded vector a record: written out as [n, size], or where that is long, as what it is made of."""

_PREFIX = "answer."  # of the slots of a server's state that hold what was opened


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The private rows a site answers a query from; they never leave it."""

    encoded: Encoded
    groups: NDArray[np.int64] | None = None  # [n], index into the declared groups; -1 for none of them
    owner: int = 0  # whose rows these are, by number

    def __len__(self) -> int:
        return len(self.encoded)

    def labels(self) -> NDArray[np.int64]:
        """Return the class of every row, int64 [n]."""
        labels = self.encoded.labels
        assert labels is not None, "the plan refuses such queries where there are no classes"
        return labels

    def take(self, places: NDArray[np.int64]) -> Rows:
        """Return some of the rows."""
        groups = None if self.groups is None else self.groups[places]
        return Rows(encoded=self.encoded.take(places), groups=groups, owner=self.owner)


@dataclass(frozen=True, slots=True, kw_only=True)
class Viewed:
    """The released model as a query sees it: the broadcast one, with what turns rows into batches."""

    trainable: TrainableModel
    task: Task
    device: str = "cpu"
    batch_size: int = 64
    asked: tuple[int, ...] = ()  # which of its choices a round's question is about; all where it says none

    def scores(self, rows: Rows) -> Tensor:
        """Return the logits of every row, float32 [n, classes]."""
        return self._run(rows, lambda batch: logits(self.trainable.model, batch).float())

    def features(self, rows: Rows) -> Tensor:
        """Return what the last linear layer of the head reads, float32 [n, width]."""
        head = head_of(self.trainable)
        return self._run(rows, lambda batch: self._features(head, batch))

    def _features(self, head: Head, batch: dict[str, Tensor]) -> Tensor:
        caught: list[Tensor] = []
        handle = head.module.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0].detach()))
        try:
            logits(self.trainable.model, batch)
        finally:
            handle.remove()
        if len(caught) != 1 or caught[0].dim() != 2:
            raise ModelError(
                "the head of this model answers from several places of a text, so no single vector stands "
                "before it; start without class_sums or ridge_sums"
            )
        return caught[0].float()

    def _run(self, rows: Rows, answer: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        model = self.trainable.model
        training = model.training
        model.eval()
        parts: list[Tensor] = []
        order = by_length(rows.encoded)
        try:
            with torch.inference_mode():
                for start in range(0, len(order), self.batch_size):
                    indices = order[start : start + self.batch_size]
                    batch = self.task.evaluation_batch(rows.encoded, indices, self.device)
                    parts.append(answer(batch).cpu())
        finally:
            model.train(training)
        if not parts:
            return torch.zeros((0, 1))
        answers = torch.cat(parts)
        back = torch.empty_like(answers)
        back[torch.from_numpy(order)] = answers
        return back


def by_length(encoded: Encoded) -> NDArray[np.int64]:
    """Return an order in which rows of one batch are about as long, so that little is padded."""
    if hasattr(encoded, "lengths"):
        return np.argsort(-encoded.lengths(), kind="stable").astype(np.int64)
    return np.arange(len(encoded), dtype=np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """What the server knows of a query so far: the sum over all records asked, and the noise it carries."""

    values: NDArray[np.float64]  # [size]
    deviation: float  # of the noise of every coordinate; 0 where nothing is guaranteed
    sites: int  # that answered
    by_class: NDArray[np.float64] | None = None  # deviation of every class's part, where stages ask for some


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a query is built for: the run file, and public facts about model and data."""

    config: RunConfig
    trainable: TrainableModel
    classes: int | None
    groups: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()  # public texts that records vote on


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """Ask every record for one small vector, and make something of the noisy sum.

    `bound` is the largest L2 norm one record's vector has; longer ones are cut to it, whatever `answer`
    returns. `answer` maps rows [n] and the released model to [n, size]; it runs at the site, on private rows.
    `use` maps the server's state and the opened sum to the next state; it is pure, and runs on the server
    alone; so does `settle`, once learning is over. Guarantee: no other way leads from the rows to the server;
    what is done with the sum costs nothing more.
    """

    name: str
    size: int
    bound: float
    answer: Callable[[Rows, Viewed], Answers]
    use: Callable[[ServerState, Opened], ServerState]
    settle: Callable[[ServerState, Opened], ServerState] | None = None  # of an answer asked before learning
    words: str = ""  # for the plan: what is summed
    whole_numbers: bool = False  # every answer consists of whole numbers: counts, votes
    by_class: int | None = None  # from this place on the answer is a table with one row a class
    about: str = ""  # digest of public things an answer compares rows with: all parties must have the same
    choices: int = 0  # of so many public things some are asked about in a round
    room: int = 0  # how many of them at once
    asks: Callable[[ServerState], tuple[int, ...]] | None = None  # which of them, in the round after a state

    def __post_init__(self) -> None:
        if self.size < 1 or not 0.0 < self.bound < math.inf:
            raise ValueError(f"query {self.name}: size and bound must be positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The last linear layer of a classifier, and where its numbers stand in the vector [d]."""

    module: nn.Module
    weight: slice
    bias: slice | None
    classes: int
    width: int


def head_of(trainable: TrainableModel) -> Head:
    """Return the layer whose outputs are the classes.

    Raises:
      ModelError: it is not trained, or there is none.
    """
    places, start = {}, 0
    for parameter in trainable.parameters.values():
        places[id(parameter)] = slice(start, start + parameter.numel())
        start += parameter.numel()
    classes = getattr(trainable.backbone.config, "num_labels", None)
    for module in reversed(list(_linear(trainable.model))):
        weight = places.get(id(module.weight))
        if weight is None or module.out_features != classes:
            continue
        bias = None if module.bias is None else places.get(id(module.bias))
        return Head(
            module=module, weight=weight, bias=bias, classes=module.out_features, width=module.in_features
        )
    raise ModelError(
        f"model.trainable.kind = {trainable.kind!r}: no linear layer with one output a class is trained, "
        "so a head cannot be set from sums; choose head, lora or full"
    )


def _linear(model: nn.Module) -> Iterator[nn.Linear]:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            yield module


def with_head(state: ServerState, head: Head, weight: Tensor, bias: Tensor | None = None) -> ServerState:
    """Return a state whose head has these numbers, float [classes, width] and [classes]; zeros without a
    bias.
    """
    vector = state.vector.clone()
    vector[head.weight] = weight.reshape(-1).to(vector.dtype)
    if head.bias is not None:
        vector[head.bias] = 0.0 if bias is None else bias.to(vector.dtype)
    return ServerState(round=state.round, vector=vector, optimizer_state=state.optimizer_state)


def keep_absent(state: ServerState, head: Head, weight: Tensor, opened: Opened) -> Tensor:
    """Return weights [classes, width] of a head in which classes that no stage has had yet keep what they
    have: a row of the pooled mean would be the same for all of them, as in a crafted model.
    """
    if opened.by_class is None:
        return weight
    current = state.vector[head.weight].view(head.classes, head.width).to(weight.dtype)
    absent = torch.from_numpy(opened.by_class == 0.0)
    return torch.where(absent[:, None], current, weight)


def remember(state: ServerState, name: str, opened: Opened) -> tuple[ServerState, Opened]:
    """Add an opened sum to what a query's earlier cohorts answered; return the state that keeps it, and the
    total.
    """
    earlier = recall(state, name)
    total = opened if earlier is None else _added(earlier, opened)
    facts = torch.tensor([total.deviation, float(total.sites)], dtype=torch.float64)
    slots = {
        **state.optimizer_state,
        f"{_PREFIX}{name}": torch.from_numpy(total.values.copy()),
        f"{_PREFIX}{name}.facts": facts,
    }
    if total.by_class is not None:
        slots[f"{_PREFIX}{name}.classes"] = torch.from_numpy(total.by_class.copy())
    return ServerState(round=state.round, vector=state.vector, optimizer_state=slots), total


def slot(name: str, part: str) -> str:
    """Return where a query keeps something of its own beside the server's state."""
    return f"{_PREFIX}{name}.{part}"


def forget(state: ServerState, name: str) -> ServerState:
    """Return a state without a query's answers so far: the next one stands for itself."""
    answers = {f"{_PREFIX}{name}", slot(name, "facts"), slot(name, "classes")}
    slots = {key: value for key, value in state.optimizer_state.items() if key not in answers}
    return replace(state, optimizer_state=slots)


def recall(state: ServerState, name: str) -> Opened | None:
    """Return what a query has been answered so far; None before its first answer."""
    values = state.optimizer_state.get(f"{_PREFIX}{name}")
    facts = state.optimizer_state.get(f"{_PREFIX}{name}.facts")
    if values is None or facts is None:
        return None
    opened = Opened(values=values.numpy(), deviation=float(facts[0]), sites=round(float(facts[1])))
    by_class = state.optimizer_state.get(f"{_PREFIX}{name}.classes")
    if by_class is not None:
        opened = replace(opened, by_class=by_class.numpy())
    return opened


def settled(state: ServerState, queries: Iterable[Query]) -> ServerState:
    """Let every question asked before learning finish what it began, now that learning is over."""
    for query in queries:
        answer = recall(state, query.name)
        if query.settle is not None and answer is not None:
            state = query.settle(state, answer)
    return state


def keep_answers(before: ServerState, after: ServerState) -> ServerState:
    """Carry the answers of the state before a step into the state after it; a strategy keeps only its own
    slots.
    """
    answers = {name: value for name, value in before.optimizer_state.items() if name.startswith(_PREFIX)}
    if not answers:
        return after
    slots = {**after.optimizer_state, **answers}
    return ServerState(round=after.round, vector=after.vector, optimizer_state=slots)


def _added(first: Opened, second: Opened) -> Opened:
    total = Opened(
        values=first.values + second.values,
        deviation=math.hypot(first.deviation, second.deviation),
        sites=first.sites + second.sites,
    )
    if first.by_class is not None and second.by_class is not None:
        total = replace(total, by_class=np.hypot(first.by_class, second.by_class))
    return total


def of_classes(query: Query, opened: Opened, present: NDArray[np.bool_]) -> Opened:
    """Return an answer without the parts of classes that nobody was asked about: they are noise alone.

    `present` [classes] is public, so this is post-processing. The deviation of every class's part goes along.
    """
    if query.by_class is None:
        return opened
    values = opened.values.copy()
    values[query.by_class :].reshape(len(present), -1)[~present] = 0.0
    deviations = np.where(present, opened.deviation, 0.0)
    return Opened(values=values, deviation=opened.deviation, sites=opened.sites, by_class=deviations)
