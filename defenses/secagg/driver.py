"""Run one session in process: every client's bytes to the server and back,
with clients lost where you say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from defenses.errors import ProtocolError
from defenses.secagg.client import ClientSession, Stage
from defenses.secagg.complaints import Complaint
from defenses.secagg.masks import RingVector
from defenses.secagg.server import RingSum, ServerSession, Traffic


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """Hold what one client brings: its ring vector, and the digests that name the update in it and the model
    it is of.
    """

    vector: RingVector
    update: bytes
    model_hash: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Hold what a session gave: the sum, the bytes of each client, where each missing client was lost, and
    complaints.
    """

    sum: RingSum
    traffic: Mapping[bytes, Traffic]
    lost: Mapping[bytes, Stage]
    complaints: tuple[Complaint, ...] = ()


def drive(
    clients: Mapping[bytes, ClientSession],
    server: ServerSession,
    inputs: Callable[[bytes], Contribution | None],
    drop: Mapping[bytes, Stage] | None = None,
) -> Outcome:
    """Carry one session from adverts to sum.

    `inputs` is asked for a client's contribution when that client masks, not before, and one is held at a
    time: local training can happen inside, and None says that it failed and the client is lost. A client
    named in `drop` sends nothing from that stage on. A client whose own session refuses a message counts as
    lost at that stage; its complaint, if it has one, goes to the server.

    Guarantee: `inputs` is called at most once per client and never for one that was lost before masking.
    Raises: NotEnoughClients or ProtocolError when the sum cannot be opened; then nothing of it is known.
    """
    lost: dict[bytes, Stage] = {}

    def each(stage: Stage, send: Callable[[bytes, ClientSession], bytes]) -> None:
        """Let every remaining client act at one stage."""
        for owner, session in clients.items():
            if owner not in lost and drop is not None and drop.get(owner) is stage:
                lost[owner] = stage
                session.discard()
            if owner in lost:
                continue
            try:
                send(owner, session)
            except ProtocolError:
                lost[owner] = stage
                session.discard()
                if session.complaint:
                    server.receive_complaint(session.complaint)

    def upload(owner: bytes, session: ClientSession) -> bytes:
        delivery, brought = server.delivery_for(owner), inputs(owner)
        if brought is None:
            raise ProtocolError
        masked = session.mask(delivery, brought.vector, update=brought.update, model_hash=brought.model_hash)
        return server.receive_masked_input(masked)

    def confirm(owner: bytes, session: ClientSession) -> bytes:
        return server.receive_confirmation(session.confirm(server.survivors_message(owner)))

    def share(owner: bytes, session: ClientSession) -> bytes:
        return server.receive_shares(session.share(server.roster_message(owner)))

    def unmask(owner: bytes, session: ClientSession) -> bytes:
        return server.receive_response(session.unmask(server.request_for(owner)))

    each(Stage.ADVERTISE, lambda owner, session: server.receive_advertisement(session.advertise()))
    stages = {Stage.SHARE: share, Stage.MASK: upload, Stage.CONFIRM: confirm, Stage.UNMASK: unmask}
    while (stage := server.close_stage()) is not Stage.UNMASK:
        each(stage, stages[stage])
    each(Stage.UNMASK, unmask)
    return Outcome(sum=server.finish(), traffic=server.traffic, lost=lost, complaints=server.complaints)
