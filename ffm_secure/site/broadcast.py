"""Read a broadcast: the tensors, their fingerprint, and whether they carry the marks of a crafted model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from defenses.errors import ProtocolError
from ffm_secure import record_codec
from ffm_secure.errors import RecordError
from ffm_secure.models.backbone import vector_fingerprint
from ffm_secure.records import RoundPlan
from ffm_secure.agreed.run_spec import RunSpec
from ffm_secure.site.broadcast_guard import AnswersGuard, BroadcastGuard
from ffm_secure.trainable import TrainableModel
from ffm_secure.transport.stages import split_plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Broadcast:
    """A plan as it came, and the model that came with it."""

    plan: RoundPlan
    vector: Tensor  # float32 [d]
    fingerprint: str  # of the vector as it came, whatever the plan says


def plan_of(message: bytes) -> RoundPlan:
    """Return the plan in a message of `stages.join_plan`, whatever model comes with it.

    Raises:
      ProtocolError: it holds none.
    """
    try:
        return record_codec.from_bytes(RoundPlan, split_plan(message)[0], "the plan of a round")
    except RecordError:
        raise ProtocolError from None


class BroadcastReader:
    """Decode, fingerprint and judge broadcasts; the same bytes object is read once.

    The sites of a simulation share one, for they are all sent the same object; a site of its own has its own.
    Raises (by `read`): ProtocolError for anything malformed; BroadcastRefused for the marks of a crafted
    model.
    """

    def __init__(self, guard: BroadcastGuard | AnswersGuard, *sizes: int) -> None:
        self._guard, self._sizes = guard, sizes
        self._last: tuple[bytes, Broadcast] | None = None

    def read(self, message: bytes) -> Broadcast:
        """Return what a message of `stages.join_plan` holds."""
        if self._last is None or self._last[0] is not message:
            self._last = (message, self._decode(message))
        return self._last[1]

    def _decode(self, message: bytes) -> Broadcast:
        plan, payload = plan_of(message), split_plan(message)[1]
        if len(payload) not in [4 * size for size in self._sizes]:
            raise ProtocolError
        vector = torch.zeros(0)
        if payload:
            vector = torch.from_numpy(np.frombuffer(payload, dtype="<f4").astype(np.float32))
        self._guard.accept(vector)
        return Broadcast(plan=plan, vector=vector, fingerprint=vector_fingerprint(vector))


def reader_of(spec: RunSpec, trainable: TrainableModel) -> BroadcastReader:
    """Return what reads the broadcasts of a run: of a model, or of a student's answers, which come once it
    has learned.
    """
    if spec.sheet is None:
        return BroadcastReader(BroadcastGuard(trainable), trainable.size)
    return BroadcastReader(AnswersGuard(spec.sheet), 0, spec.sheet.size)
