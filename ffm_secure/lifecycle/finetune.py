"""Fine-tuning at home: some optimizer steps from the broadcast model; the gradient rule decides what is
private.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from defenses.dp import ClippedSum, Clipping, PerSampleEngine, RecordMechanism, poisson_sample
from defenses.random_source import RandomSource
from ffm_secure.config.run_file import Lifecycle
from ffm_secure.tasks.base import Task
from ffm_secure.tasks.encoded import Encoded, EncodedText
from ffm_secure.trainable.base import TrainableModel


TOKENS_OF_A_PASS = 64  # what both passes of MiniLM cost besides their tokens, in tokens, on one or two cores
MACHINE_ERRORS = (MemoryError, torch.OutOfMemoryError)
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrived:
    """Which rows a round may draw: new ones, and those of a reservoir, at a rate of their own."""

    new: NDArray[np.int64]
    reservoir: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    replay_rate: float = 0.0

    @classmethod
    def everything(cls, count: int) -> Arrived:
        """Return all of so many rows as new ones."""
        return cls(new=np.arange(count, dtype=np.int64))

    @property
    def rows(self) -> NDArray[np.int64]:
        """Return all rows that may be drawn."""
        return np.concatenate([self.new, self.reservoir])

    def drawn(self, new: NDArray[np.int64], source: RandomSource) -> NDArray[np.int64]:
        """Return the rows of one step: drawn places of new rows, and a Poisson sample of the reservoir."""
        if not self.replay_rate:
            return self.new[new]
        again = poisson_sample(len(self.reservoir), rate=self.replay_rate, source=source)
        return np.concatenate([self.new[new], self.reservoir[again]])


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelUpdate:
    """Hold what one client learned. Private: it never leaves the client as it is."""

    vector: Tensor  # [d], new minus broadcast; float32, or float64 where it is a bounded sum
    loss: float  # mean training loss, nats; nan when the rule does not measure it
    steps: int


class GradientRule(Protocol):
    """Yield one gradient a step, each a mapping of parameter name to tensor."""

    rows_used: set[int]  # private: which rows the round was learned from; for a site's own audit

    def steps(self) -> Iterator[Mapping[str, Tensor]]:
        """Iterate over the steps of this round; the model may change between them."""

    def loss(self) -> float:
        """Return the mean loss over the samples used, or nan."""


class PlainGradient:
    """Plain minibatch gradients over reshuffled epochs: nothing here is private."""

    def __init__(
        self,
        *,
        trainable: TrainableModel,
        task: Task,
        encoded: Encoded,
        spec: Lifecycle,
        seed: tuple[int, ...],
        device: str,
        microbatch: int,
        contained: bool = False,
    ) -> None:
        self.trainable, self.task, self.encoded, self.spec = trainable, task, encoded, spec
        self.contained = contained  # an error on one row counts as a row that teaches nothing
        self.order = np.random.default_rng(list(seed))
        self.task_draws = torch.Generator().manual_seed(int(self.order.integers(2**62)))
        self.device, self.microbatch = device, microbatch
        self.loss_sum, self.rows_read = 0.0, 0
        self.rows_used: set[int] = set()

    def steps(self) -> Iterator[Mapping[str, Tensor]]:
        """Iterate over the minibatches of the round."""
        size, count = self.spec.batch_size, len(self.encoded)
        if count == 0:
            return
        wanted = self.spec.local_steps or self.spec.local_epochs * -(-count // size)
        steps_finished = 0
        while steps_finished < wanted:
            order = self.order.permutation(count)
            for start in range(0, count, size):
                if steps_finished == wanted:
                    return
                yield self._gradient(order[start : start + size])
                steps_finished += 1

    def _gradient(self, indices: np.ndarray) -> dict[str, Tensor]:
        parameters = self.trainable.active
        self.rows_used.update(indices.tolist())
        for parameter in parameters.values():
            parameter.grad = None
        for part in similar_lengths(
            self.encoded, indices, self.microbatch, length=self.task.length, device=self.device
        ):
            if self.contained:
                one_by_one_if_needed(lambda rows: self._add_or_leave(rows, len(indices)), part)
            else:
                self._add(part, len(indices))
        self.rows_read += len(indices)
        gradients = {}
        for name, parameter in parameters.items():
            gradients[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        return gradients

    def _add(self, rows: np.ndarray, divisor: int) -> None:
        batch = self.task.batch(self.encoded, rows, device=self.device, generator=self.task_draws)
        losses = self.task.losses(self.trainable.model, batch)
        torch.autograd.backward(losses.sum() / divisor)
        self.loss_sum += float(losses.detach().sum())

    def _add_or_leave(self, rows: np.ndarray, divisor: int) -> None:
        """Add the gradient of some rows, or leave the sum as it was."""
        parameters = self.trainable.active
        before = {name: None if p.grad is None else p.grad.clone() for name, p in parameters.items()}
        try:
            self._add(rows, divisor)
        except BaseException:
            for name, parameter in parameters.items():
                parameter.grad = before[name]
            raise

    def loss(self) -> float:
        """Return the mean loss over the samples used."""
        if self.rows_read:
            return self.loss_sum / self.rows_read
        return float("nan")


class PrivateGradient:
    """DP-SGD: Poisson sample, per-sample clip, noise, public divisor. An empty sample is a step of noise
    alone.

    Guarantee: each step is one use of the mechanism; nothing else of the client's data reaches the yielded
    gradients. A row on which the model fails contributes zero, and no error says that it was drawn.
    """

    def __init__(
        self,
        *,
        trainable: TrainableModel,
        task: Task,
        encoded: Encoded,
        mechanism: RecordMechanism,
        engine: PerSampleEngine,
        source: RandomSource,
        device: str,
        microbatch: int,
        arrived: Arrived | None = None,
    ) -> None:
        self.arrived = arrived or Arrived.everything(len(encoded))
        self.trainable, self.task, self.encoded = trainable, task, encoded
        self.mechanism, self.engine = mechanism, engine
        self.sampling, self.noise = source.derive("sampling"), source.derive("noise")
        self.task_draws = torch.Generator().manual_seed(source.derive("masks").below(2**62))
        self.device, self.microbatch = device, microbatch
        self.rows_used: set[int] = set()

    def steps(self) -> Iterator[Mapping[str, Tensor]]:
        """Iterate over the steps the mechanism was charged for, no more and no fewer."""
        run = self.mechanism.start()
        for _ in range(self.mechanism.steps):
            new = run.sample(len(self.arrived.new), self.sampling)
            indices = self.arrived.drawn(new, self.sampling)
            self.rows_used.update(indices.tolist())
            yield run.privatise(self._clipped_sum(indices, run.bound), self.noise)

    def _clipped_sum(self, indices: np.ndarray, bound: Clipping) -> ClippedSum:
        total = self.engine.empty(bound)
        for part in similar_lengths(
            self.encoded, indices, self.microbatch, length=self.task.length, device=self.device
        ):
            for clipped in one_by_one_if_needed(lambda rows: self._clipped(rows, bound), part):
                total = total + clipped
        return total

    def _clipped(self, rows: np.ndarray, bound: Clipping) -> ClippedSum:
        batch = self.task.batch(self.encoded, rows, device=self.device, generator=self.task_draws)
        losses = partial(self.task.losses, self.trainable.model, batch)
        return self.engine.clipped_sum(losses, clip=bound)

    def loss(self) -> float:
        """Return nan: the private loss is not measured, so that it cannot leak."""
        return float("nan")


class BoundedSum:
    """The sum of one Poisson sample's bounded gradients at the broadcast model, without noise.

    Guarantee: one record adds at most the bound, one on which the model fails nothing; an empty sample is a
    sum of zeros. Private until a share of the noise is on it: `SumNoise.protect` adds it, and nothing else
    may take the sum.
    """

    def __init__(
        self,
        *,
        trainable: TrainableModel,
        task: Task,
        encoded: Encoded,
        sampling_rate: float,
        clipping: Clipping,
        engine: PerSampleEngine,
        source: RandomSource,
        device: str,
        microbatch: int,
        arrived: Arrived | None = None,
    ) -> None:
        self.arrived = arrived or Arrived.everything(len(encoded))
        self.trainable, self.task, self.encoded = trainable, task, encoded
        self.sampling_rate, self.clipping, self.engine = sampling_rate, clipping, engine
        self.sampling = source.derive("sampling")
        self.task_draws = torch.Generator().manual_seed(source.derive("masks").below(2**62))
        self.device, self.microbatch = device, microbatch
        self.rows_used: set[int] = set()

    def gradient_sum(self) -> Tensor:
        """Return the sum [d] in the order of the vector, float64 on the processor; 0 for what is not
        trained.
        """
        new = poisson_sample(len(self.arrived.new), rate=self.sampling_rate, source=self.sampling)
        indices = self.arrived.drawn(new, self.sampling)
        self.rows_used.update(indices.tolist())
        total = self.engine.empty(self.clipping)
        for part in similar_lengths(
            self.encoded, indices, self.microbatch, length=self.task.length, device=self.device
        ):
            for clipped in one_by_one_if_needed(self._clipped, part):
                total = total + clipped
        parts = []
        for name, parameter in self.trainable.parameters.items():
            gradient = total.gradients.get(name)
            parts.append(torch.zeros(parameter.numel()) if gradient is None else gradient.cpu())
        return torch.cat([part.reshape(-1).double() for part in parts])

    def _clipped(self, rows: np.ndarray) -> ClippedSum:
        batch = self.task.batch(self.encoded, rows, device=self.device, generator=self.task_draws)
        losses = partial(self.task.losses, self.trainable.model, batch)
        return self.engine.clipped_sum(losses, clip=self.clipping)


def one_by_one_if_needed(work: Callable[[np.ndarray], Result], rows: np.ndarray) -> list[Result]:
    """Do some work on rows together; if that fails, on each alone, leaving out those on which it fails.

    That the model can be trained at all was tried on public rows before (`site` and `engines`): what fails
    here fails because of one private row, and an error would say that the row was drawn. Memory is another
    matter: no row is longer than `max_length`.
    """
    try:
        return [work(rows)]
    except MACHINE_ERRORS:
        raise
    except Exception:  # whatever it is, it may not leave the site
        pass
    results = []
    for row in rows if len(rows) > 1 else ():
        try:
            results.append(work(np.array([row])))
        except MACHINE_ERRORS:
            raise
        except Exception:
            continue
    return results


def similar_lengths(
    encoded: Encoded, indices: np.ndarray, size: int, *, length: int | None = None, device: str = "cpu"
) -> Iterator[np.ndarray]:
    """Cut one batch into parts of at most `size` samples of similar length, so that little is padded.

    Texts are padded to the longest of their part, or to `length` all of them. The parts are summed, so which
    sample is in which part changes nothing but speed and rounding.
    """
    ends = [*range(size, len(indices), size), len(indices)]
    if isinstance(encoded, EncodedText) and length is None:
        lengths = encoded.lengths()[indices]
        order = np.argsort(lengths, kind="stable")
        indices = indices[order]
        if device == "cpu":
            ends = cheapest_ends(lengths[order], size)
    for start, end in pairwise([0, *ends]):
        if start < end:
            yield indices[start:end]


def cheapest_ends(lengths: np.ndarray, size: int) -> list[int]:
    """Return where to cut texts of rising `lengths`, int64 [n], so that passes over the parts cost least.

    A pass costs as its tokens do, those of padding among them, and `TOKENS_OF_A_PASS` besides.
    """
    least, begins = np.zeros(len(lengths) + 1), np.zeros(len(lengths) + 1, dtype=np.int64)
    for end in range(1, len(lengths) + 1):
        starts = np.arange(max(0, end - size), end)
        costs = least[starts] + TOKENS_OF_A_PASS + (end - starts) * lengths[end - 1]
        cheapest = int(np.argmin(costs))
        least[end], begins[end] = costs[cheapest], starts[cheapest]
    ends = [len(lengths)]
    while begins[ends[-1]]:
        ends.append(int(begins[ends[-1]]))
    return ends[::-1]


def finetune(
    *,
    trainable: TrainableModel,
    start: Tensor,
    spec: Lifecycle,
    rule: GradientRule,
    mask: Tensor | None = None,
) -> ModelUpdate:
    """Run the local steps of one round from the broadcast vector; leave the model's other tensors untouched.

    Only `trainable.active` is trained. Where `mask` [d] is 0 the numbers are 0 and stay 0, noise included.
    Guarantee: with a private rule the result is post-processing of the rule's gradients and the broadcast
    model: momentum, Adam's moments, weight decay and the proximal term never see data.
    Source: Li et al. 2020, arXiv:1812.06127 (proximal term).
    """
    trainable.load_vector(start)
    parameters = trainable.active
    masks: dict[str, Tensor] = {}
    if mask is not None:
        masks = named_parts(trainable, mask)
    anchors: dict[str, Tensor] = {}
    if spec.proximal:
        for name, parameter in parameters.items():
            anchors[name] = parameter.detach().clone()
    optimizer = _optimizer(spec, list(parameters.values()))
    steps_finished = 0
    for gradients in rule.steps():
        for name, parameter in parameters.items():
            gradient = gradients[name].to(parameter.device, parameter.dtype)
            if name in masks:
                gradient = gradient * masks[name]
            if spec.proximal:
                gradient = gradient + spec.proximal * (parameter.detach() - anchors[name])
            parameter.grad = gradient
        optimizer.step()
        steps_finished += 1
    after = trainable.flatten()
    change = after - start.to(after.device)
    for parameter in parameters.values():
        parameter.grad = None
    return ModelUpdate(vector=change, loss=rule.loss(), steps=steps_finished)


def named_parts(trainable: TrainableModel, vector: Tensor) -> dict[str, Tensor]:
    """Cut a vector [d] into the tensors it is made of."""
    sizes = []
    for p in trainable.parameters.values():
        sizes.append(p.numel())
    parts = zip(trainable.parameters.items(), torch.split(vector, sizes), strict=True)
    named_parts: dict[str, Tensor] = {}
    for (name, p), part in parts:
        named_parts[name] = part.view(p.shape).to(p.device, p.dtype)
    return named_parts


def _optimizer(spec: Lifecycle, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    if spec.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=spec.learning_rate, momentum=spec.momentum, weight_decay=spec.weight_decay
        )
    if spec.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=spec.learning_rate, weight_decay=spec.weight_decay)
    return torch.optim.AdamW(parameters, lr=spec.learning_rate, weight_decay=spec.weight_decay)
