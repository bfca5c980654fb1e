"""Own models made by steps at home: drawn to the shared model, free of it, or in the head alone."""

from __future__ import annotations

from torch import Tensor

from ffm_secure.lifecycle.personal import AtHome, learned_at_home
from ffm_secure.queries.base import head_of


def mean_regularised(home: AtHome) -> Tensor:
    """Return a model that fits the owner's rows and stays near the shared one."""
    return learned_at_home(home, pull=home.spec.pull)


def few_steps(home: AtHome) -> Tensor:
    """Return the shared model after some steps on the owner's rows."""
    return learned_at_home(home)


def head_at_home(home: AtHome) -> Tensor:
    """Return the shared model with a head of the owner's own; everything else stays as it was shared.

    Raises:
      ModelError: no linear head is trained.
    """
    head = head_of(home.trainable)
    names = [
        name
        for name, parameter in home.trainable.parameters.items()
        if parameter is head.module.weight or parameter is head.module.bias
    ]
    with home.trainable.training_only(names):
        return learned_at_home(home)
