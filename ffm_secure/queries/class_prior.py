"""How common each class is, asked first: the head begins at it, learns beside it, and ends without it."""

from __future__ import annotations

from dataclasses import replace

import torch

from ffm_secure.queries import class_offsets
from ffm_secure.queries.base import Opened, Query, Setting, head_of
from ffm_secure.queries.class_offsets import offsets
from ffm_secure.strategies.base import ServerState

NAME = "class_prior"


def build(setting: Setting) -> Query:
    """Return the query. One record adds 1 to the count of its class: bound 1, whole numbers, size classes.

    The bias begins at the logarithms of the shares, so no step has to learn how rare a class is, and a rare
    one is not pushed away by all records of the others; after the last round of learning the same numbers are
    taken off. That is a loss adjusted by the prior, without any site having to know it.
    Source: Menon et al. 2021, arXiv:2007.07314, section 5 (logit-adjusted loss).

    Raises:
      ModelError: the head has no bias that is trained.
    """
    counting = class_offsets.build(setting)
    places = head_of(setting.trainable).bias
    assert places is not None, "else there is nothing to count for"

    def use(state: ServerState, opened: Opened) -> ServerState:
        return _with_bias(state, places, -_offsets(opened))

    def settle(state: ServerState, opened: Opened) -> ServerState:
        return _with_bias(state, places, state.vector[places].double() + _offsets(opened))

    return replace(counting, name=NAME, use=use, settle=settle)


def _offsets(opened: Opened) -> torch.Tensor:
    return offsets(torch.from_numpy(opened.values), deviation=opened.deviation)


def _with_bias(state: ServerState, places: slice, bias: torch.Tensor) -> ServerState:
    vector = state.vector.clone()
    vector[places] = bias.to(vector.dtype)
    return replace(state, vector=vector)
