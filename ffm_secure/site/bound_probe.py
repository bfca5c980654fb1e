"""Try the bound on one record on public rows, before any private row is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from torch import Tensor

from defenses.dp import Clipping, PerSampleEngine, probe_sensitivity
from ffm_secure.agreed.run_spec import RunSpec
from ffm_secure.tasks.base import Task
from ffm_secure.tasks.encoded import Encoded
from ffm_secure.trainable import TrainableModel

PROBED = 3  # public rows the bound on one record is tried on


def probe_bound(
    spec: RunSpec, trained: TrainableModel, task: Task, public: Encoded, *, samples: int = PROBED
) -> None:
    """Measure that no sample moves the clipped sum by more than the bound.

    Raises:
      NotPrivateError: it does, or samples are coupled; the message names the module or the loss at fault.
    """
    mechanism = spec.mechanism
    if not mechanism.clips_records:
        return
    bound = Clipping(kind=spec.config.privacy.clipping, clip_norm=mechanism.clip_norm)

    def losses_of(rows: Sequence[int]) -> Callable[[], Tensor]:
        batch = task.evaluation_batch(
            public, np.asarray(rows), spec.device
        )  # a row's masks do not depend on the others
        return partial(task.losses, trained.model, batch)

    exact = spec.config.model.dtype == "float32"
    with (
        trained.training_only(spec.strategy.trains(0)),
        PerSampleEngine(trained.model, parameters=trained.active) as engine,
    ):
        probe_sensitivity(
            engine,
            losses_of,
            samples=samples,
            clip_norm=mechanism.clip_norm,
            clip=bound,
            tolerance=1e-5 if exact else 1e-2,
            coupling_tolerance=1e-3 if exact else 0.1,
        )
