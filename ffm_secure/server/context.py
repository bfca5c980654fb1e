"""What the server has: the agreed spec, its own replica of the model, public rows, its half of the
protection, receipts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ffm_secure.lifecycle.base import ServerPhase
from ffm_secure.protection.base import ServerSide
from ffm_secure.records import Receipt
from ffm_secure.agreed.run_spec import RunSpec
from ffm_secure.server.evidence import Evidence
from ffm_secure.server.public_stages import PublicStages
from ffm_secure.server.transcript import Transcript
from ffm_secure.tasks.base import Evaluation, Task
from ffm_secure.tasks.encoded import Encoded
from ffm_secure.trainable import TrainableModel


@dataclass(slots=True, kw_only=True)
class ServerContext:
    """Hold the server of one run.

    Guarantee: no private row, no ledger and no secret of a site can be reached from here; a test walks the
    imports of this room and the objects that hang on this one.
    """

    spec: RunSpec
    trainable: TrainableModel
    task: Task
    evaluation: Encoded  # public validation rows
    public: Encoded | None  # public rows of phases of the server's own
    protection: ServerSide
    run_id: bytes
    root: Encoded | None = None  # public rows that sums over groups are compared by
    answers: Mapping[str, ServerSide] = field(default_factory=dict)  # what queries travel by
    transcript: Transcript | None = None  # what observers see, where the run file asks for it
    evidence: Evidence | None = None  # uploads of rounds whose sum is impossible, where uploads are signed
    stages: PublicStages | None = None  # of a stream, as far as public rows tell
    receipts: dict[int, Receipt] = field(default_factory=dict)  # the newest of every site that sent one

    def protection_of(self, query: str) -> ServerSide:
        """Return the server's half of what a kind of message travels by."""
        return self.answers.get(query, self.protection)

    def phase(self, round: int) -> ServerPhase:
        """Return what the server brings to what it learns itself in a round."""
        return ServerPhase(
            config=self.spec.config,
            trainable=self.trainable,
            task=self.task,
            public=self.public,
            round=round,
            device=self.spec.device,
        )

    def epsilon(self) -> float:
        """Return the largest epsilon any receipt states, 0 before the first; infinity without a guarantee."""
        if not self.spec.has_dp_guarantee:
            return math.inf
        return max((receipt.epsilon for receipt in self.receipts.values()), default=0.0)

    def note(self, receipts: Mapping[int, Receipt]) -> None:
        """Keep the newest receipts; one that states no epsilon is none."""
        self.receipts.update({site: item for site, item in receipts.items() if item.epsilon >= 0.0})

    def evaluate(self, vector: Tensor) -> Evaluation:
        """Evaluate a global vector [d] on the public validation rows."""
        self.trainable.load_vector(vector)
        return self.task.evaluate(self.trainable.model, self.evaluation, device=self.spec.device)
