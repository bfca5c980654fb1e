"""A model of an owner's own, made at home from the last shared one: what it is made from, and what a kind is.

Nothing of it leaves: no message reads it, so it costs no epsilon and its rows need no noise. It holds them as
any model does that was made without: whoever passes it on releases its owner's rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ffm_secure.config.run_file import Lifecycle, Personal
from ffm_secure.lifecycle.finetune import PlainGradient, finetune
from ffm_secure.tasks.base import Task
from ffm_secure.tasks.encoded import Encoded
from ffm_secure.trainable.base import TrainableModel


@dataclass(frozen=True, slots=True, kw_only=True)
class AtHome:
    """What an owner brings to a model of its own; it stays where it is."""

    trainable: TrainableModel
    task: Task
    rows: Encoded  # of this owner
    start: Tensor  # float32 [d]: the last shared model, with what the owner keeps at home
    spec: Personal
    seed: tuple[int, ...]
    device: str
    microbatch: int


class Personalisation(Protocol):
    """One kind of own model: a function of what is at home."""

    def __call__(self, home: AtHome) -> Tensor:
        """Return the own model as a vector [d], on the processor."""


def learned_at_home(home: AtHome, *, pull: float = 0.0) -> Tensor:
    """Return the vector [d] after plain steps on the owner's rows, drawn back to the start by `pull`.

    Minimises the mean loss plus pull / 2 times the squared distance to the start.
    Source: Li et al. 2021, arXiv:2012.04221 (Ditto); Liu et al. 2022, arXiv:2206.07902.
    """
    spec = Lifecycle(
        kind="finetune",
        local_steps=home.spec.steps,
        batch_size=home.spec.batch_size,
        learning_rate=home.spec.learning_rate,
        proximal=pull,
    )
    rule = PlainGradient(
        trainable=home.trainable,
        task=home.task,
        encoded=home.rows,
        spec=spec,
        seed=home.seed,
        device=home.device,
        microbatch=home.microbatch,
        contained=True,
    )
    update = finetune(trainable=home.trainable, start=home.start, spec=spec, rule=rule)
    return home.start.cpu() + update.vector.cpu()
