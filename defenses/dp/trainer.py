"""DP-SGD inside a trainer of somebody else's: a mixin for a loop that asks for batches and takes their steps.

Nothing of that library is imported here: the mixin stands before its class, `class Private(PrivateSteps,
Trainer)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from defenses.dp.events import Event
from defenses.dp.mechanism import RecordMechanism
from defenses.dp.per_sample import PerSampleEngine
from defenses.errors import NotPrivateError, ParameterError
from defenses.random_source import RandomSource

Batch = Mapping[str, Tensor]
LossOf = Callable[[nn.Module, Batch], Tensor]


class Rows(Protocol):
    """The rows a loop trains on."""

    def __len__(self) -> int:
        """Count them."""

    def __getitem__(self, place: int) -> object:
        """Return one."""


class Settings(Protocol):
    """What is read of the settings of a loop."""

    max_steps: int
    gradient_accumulation_steps: int
    n_gpu: int
    world_size: int


class Loop(Protocol):
    """What is read of a loop; that of Hugging Face's trainer has it."""

    args: Settings
    model: nn.Module
    train_dataset: Rows
    data_collator: Callable[[Sequence[object]], Batch]

    def _prepare_inputs(self, inputs: Batch) -> Batch: ...


def classification_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy of every row, from `logits` [batch, classes] and `labels` [batch]."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits: Tensor = model(**inputs).logits
    return nn.functional.cross_entropy(logits, batch["labels"], reduction="none")


class PrivateSteps:
    """Draw, bound and noise every step of a loop; stands before the loop's own class.

    The loop's sampler is not used: a batch is what the mechanism draws, of every row alike, and may be empty.
    Its loss is private and is reported as 0; what it logs of gradients is of the noisy ones.

    Guarantee: the gradients an optimizer sees are those of `mechanism`, and `event` is of the steps that ran.
    Assumes: a loss depends on its own row only; what is evaluated or stopped early by is public.

    Raises:
      ParameterError: the loop is set to other steps than the mechanism's, accumulates gradients, or runs on
        several devices.
      NotPrivateError: a layer is not covered, or a run is resumed, which would repeat what was not counted.
    """

    def __init__(
        self,
        *positional: object,
        mechanism: RecordMechanism,
        losses: LossOf = classification_losses,
        source: RandomSource | None = None,
        **named: object,
    ) -> None:
        super().__init__(*positional, **named)
        loop = cast(Loop, self)
        _require_settings(loop.args, mechanism.steps)
        self._losses, self._source = losses, source or RandomSource.system()
        self._engine, self._run = PerSampleEngine(loop.model), mechanism.start()

    @property
    def event(self) -> Event | None:
        """Return the event of the steps that ran so far, for a ledger or an accountant."""
        return self._run.event("a model trained in a loop of somebody else's")

    def train(self, resume_from_checkpoint: str | bool | None = None, **named: object) -> object:
        """Run the loop from its first step.

        Raises:
          NotPrivateError: it is to be resumed.
        """
        if resume_from_checkpoint:
            raise NotPrivateError("a run that is resumed draws and releases again what no event counts")
        return cast(Callable[..., object], super().train)(**named)  # type: ignore[misc]

    def get_train_dataloader(self) -> DataLoader[int]:
        """Return as many empty batches as there are steps: rows are drawn when a step begins."""
        steps = range(self._run.mechanism.steps)
        return DataLoader(cast("torch.utils.data.Dataset[int]", steps), batch_size=1, collate_fn=_nothing)

    def training_step(self, model: nn.Module, *_: object, **__: object) -> Tensor:
        """Put the noisy mean gradient of a drawn batch where an optimizer looks for it."""
        model.train()
        loop, run = cast(Loop, self), self._run
        places = run.sample(len(loop.train_dataset), self._source)
        total = self._engine.empty(run.bound)
        if len(places):
            rows = [loop.train_dataset[int(place)] for place in places]
            batch = loop._prepare_inputs(loop.data_collator(rows))
            total = self._engine.clipped_sum(lambda: self._losses(model, batch), clip=run.bound)
        for name, gradient in run.privatise(total, self._source).items():
            parameter = self._engine.parameters[name]
            parameter.grad = gradient.to(device=parameter.device, dtype=parameter.dtype)
        return torch.zeros((), device=next(model.parameters()).device)


def _nothing(_: Sequence[int]) -> dict[str, Tensor]:
    return {}


def _require_settings(settings: Settings, steps: int) -> None:
    problems = []
    if settings.max_steps != steps:
        problems.append(f"max_steps = {settings.max_steps}: must be the mechanism's steps = {steps}")
    if settings.gradient_accumulation_steps != 1:
        problems.append(
            f"gradient_accumulation_steps = {settings.gradient_accumulation_steps}: must be 1; a batch is "
            "what the mechanism draws"
        )
    if settings.n_gpu > 1 or settings.world_size > 1:
        problems.append("n_gpu, world_size: must be at most 1; one sampler draws every batch")
    if problems:
        raise ParameterError("; ".join(problems))
