"""Offsets by class: released label counts shift the head, so that common classes drown no rare one."""

from __future__ import annotations

import torch
from torch import Tensor

from ffm_secure.errors import ModelError
from ffm_secure.queries.base import Opened, Query, Rows, Setting, Viewed, head_of
from ffm_secure.strategies.base import ServerState

NAME = "class_offsets"


def build(setting: Setting) -> Query:
    """Return the query. One record adds 1 to the count of its class: bound 1, whole numbers, size classes.

    Raises:
      ModelError: the head has no bias that is trained, so the counts would be paid for and not used.
    """
    head = head_of(setting.trainable)
    if head.bias is None:
        raise ModelError("class_offsets and class_prior shift the bias of the head, and this one has none")
    places = head.bias

    def answer(rows: Rows, model: Viewed) -> Tensor:
        labels = torch.from_numpy(rows.labels())
        return torch.nn.functional.one_hot(labels, head.classes).double()

    def use(state: ServerState, opened: Opened) -> ServerState:
        counts = torch.from_numpy(opened.values)
        vector = state.vector.clone()
        shifted = vector[places].double() + offsets(counts, deviation=opened.deviation)
        vector[places] = shifted.to(vector.dtype)
        return ServerState(round=state.round, vector=vector, optimizer_state=state.optimizer_state)

    return Query(
        name=NAME,
        size=head.classes,
        bound=1.0,
        answer=answer,
        use=use,
        words="one count a class",
        whole_numbers=True,
    )


def offsets(counts: Tensor, *, deviation: float) -> Tensor:
    """Return what is added to the score of every class, float64 [classes]: minus the logarithm of its share.

    A count below its noise, or below one record, says no more than that the class is about so rare. The
    offsets have mean zero.
    Source: Menon et al. 2021, arXiv:2007.07314, section 4 (post-hoc logit adjustment).
    """
    least = max(1.0, deviation)
    logarithms = counts.double().clamp(min=least).log()
    return logarithms.mean() - logarithms
