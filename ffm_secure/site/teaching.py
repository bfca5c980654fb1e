"""An owner's own model, which it learns at home and answers public rows from: how it is made and kept."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from defenses.dp import PerSampleEngine
from ffm_secure import tasks, trainable
from ffm_secure.config.models import OwnModel
from ffm_secure.config.run_file import Lifecycle, RunConfig
from ffm_secure.config.schema import to_table
from ffm_secure.data.dataset import Dataset
from ffm_secure.models import backbone as models
from ffm_secure.tasks.base import Classification
from ffm_secure.tasks.encoded import Encoded
from ffm_secure.trainable import TrainableModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One architecture that owners may have: loaded once, with how it reads rows."""

    model: OwnModel
    trainable: TrainableModel
    task: Classification


@dataclass(slots=True, kw_only=True)
class Teacher:
    """One owner's own model: its numbers, its rows as it reads them, and the public rows. It stays at
    home.
    """

    trainable: TrainableModel
    task: Classification
    examples: Encoded
    public: Encoded
    start: Tensor  # float32 [d], before the first round
    learning_rate: float
    engines: dict[tuple[str, ...], PerSampleEngine] = field(default_factory=dict)

    def __repr__(self) -> str:
        return "Teacher(private)"


def load_architecture(
    config: RunConfig, own: OwnModel, base: Path, *, classes: int | None, dataset: Dataset
) -> Architecture:
    """Load what an owner trains at home.

    Raises:
      ModelError: with what to do.
    """
    backbone = models.load_backbone(
        own.name,
        kind=config.task.kind,
        labels=classes,
        base=base,
        seed=config.seed,
        dtype=config.model.dtype,
    )
    options = {**to_table(own.trainable), "folded": False}
    attached = trainable.attach(backbone, options, task_kind=config.task.kind, seed=config.seed)
    task = tasks.build_task(
        config.task.kind, backbone=backbone, dataset=dataset, max_length=config.task.max_length
    )
    assert isinstance(task, Classification), "the plan refuses tasks without classes"
    if config.privacy.unit in ("record", "person"):
        trainable.rehearse_per_sample(attached, None, clipping=config.privacy.clipping)
    return Architecture(model=own, trainable=attached, task=task)


def teacher_of(
    architecture: Architecture, config: RunConfig, *, examples: Encoded, public: Encoded, device: str
) -> Teacher:
    """Return one owner's own model, with numbers of its own and the frozen ones shared."""
    start = architecture.trainable.flatten().cpu()
    own = trainable.replicate(architecture.trainable)
    own.model.to(device)
    return Teacher(
        trainable=own,
        task=architecture.task,
        examples=examples,
        public=public,
        start=start,
        learning_rate=architecture.model.learning_rate or config.federation.lifecycle.learning_rate,
    )


def own_spec(config: RunConfig, teacher: Teacher) -> Lifecycle:
    """Return how an owner learns from its rows: as the run file says, at the rate of its own model."""
    return replace(config.federation.lifecycle, learning_rate=teacher.learning_rate)
