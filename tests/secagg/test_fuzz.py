"""Truncated, bit-flipped, spliced and random messages at every stage, both directions: refused, never a
crash.

By default 5,000 messages a stage and direction; under the marker `slow` 100,000. Every client message goes to
a real session whose state is restored afterwards, so that each one meets a live stage and not one that has
already aborted.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from defenses.errors import ProtocolError
from defenses.secagg import ClientSession, ReplayGuard, ServerSession, Stage, messages
from defenses.secagg.client import _Secrets
from tests.secagg.parties import Table, gather, mask, play

QUICK, MANY = 5_000, 100_000
LENGTH = 3
MODES = ["active", "semi_honest"]


def mutations(valid: list[bytes], count: int, seed: int) -> Iterator[bytes]:
    """Damage valid messages in every way a wire or an attacker can."""
    dice = random.Random(seed)
    for number in range(count):
        message = bytearray(dice.choice(valid))
        kind = number % 8
        if kind == 0:
            message = message[: dice.randrange(len(message))]
        elif kind == 1:
            message[dice.randrange(len(message))] ^= 1 << dice.randrange(8)
        elif kind == 2:
            message[2:] = dice.randbytes(len(message) - 2)
        elif kind == 3:
            message += dice.randbytes(dice.randrange(1, 200))
        elif kind == 4:
            start = dice.randrange(len(message))
            message[start : start + dice.randrange(1, 100)] = dice.randbytes(dice.randrange(100))
        elif kind == 5:
            other = dice.choice(valid)
            cut = dice.randrange(len(message))
            message = message[:cut] + other[cut + dice.randrange(-1, 2) :]
        elif kind == 6:
            message = bytearray(dice.randbytes(dice.randrange(400)))
        else:
            for _ in range(dice.randrange(2, 6)):
                message[dice.randrange(len(message))] = dice.randrange(256)
        if bytes(message) not in valid:
            yield bytes(message)


def assert_says_nothing(error: ProtocolError) -> None:
    assert str(error) == "protocol aborted"
    assert error.__context__ is None


# Towards the server


def valid_for_server(table: Table, stage: Stage) -> list[bytes]:
    """Return what every client would send at this stage, without handing it over."""
    server = table.server
    acts: dict[Stage, Callable[[bytes, ClientSession], bytes]] = {
        Stage.ADVERTISE: lambda owner, session: session.advertise(),
        Stage.SHARE: lambda owner, session: session.share(server.roster_message()),
        Stage.MASK: lambda owner, session: bytes(
            mask(session, server.delivery_for(owner), table.vectors[owner])
        ),
        Stage.CONFIRM: lambda owner, session: session.confirm(server.survivors_message()),
        Stage.UNMASK: lambda owner, session: session.unmask(server.request_for(owner)),
    }
    return [acts[stage](owner, session) for owner, session in table.clients.items()]


def receivers(server: ServerSession) -> dict[Stage, Callable[[bytes], bytes]]:
    return {
        Stage.ADVERTISE: server.receive_advertisement,
        Stage.SHARE: server.receive_shares,
        Stage.MASK: server.receive_masked_input,
        Stage.CONFIRM: server.receive_confirmation,
        Stage.UNMASK: server.receive_response,
    }


def fuzz_server(stage: Stage, mode: str, count: int) -> None:
    table = play(gather(4, mode=mode, length=LENGTH), stage)
    valid = valid_for_server(table, stage)
    receive, refused = receivers(table.server)[stage], 0
    for message in mutations(valid, count, seed=stage):
        try:
            receive(message)
        except ProtocolError as error:
            assert_says_nothing(error)
            refused += 1
            continue
        raise AssertionError(f"accepted a damaged message of {len(message)} bytes at {stage.name}")
    assert refused > 0.9 * count
    for message in valid:  # and the session is none the worse for it
        receive(message)


# Towards a client


def valid_for_client(table: Table, stage: Stage) -> list[bytes]:
    server = table.server
    if stage is Stage.SHARE:
        return [server.roster_message()]
    if stage is Stage.MASK:
        return [server.delivery_for(owner) for owner in table.ids]
    if stage is Stage.CONFIRM:
        return [server.survivors_message()]
    return [server.request_for(owner) for owner in table.ids]


def respond(session: ClientSession, stage: Stage, message: bytes) -> object:
    if stage is Stage.SHARE:
        return session.share(message)
    if stage is Stage.MASK:
        return mask(session, message, np.zeros(LENGTH, dtype=np.uint32))
    return session.confirm(message) if stage is Stage.CONFIRM else session.unmask(message)


class Snapshot:
    """Put a client session back to where it was; only a test can do this, sessions themselves refuse."""

    def __init__(self, session: ClientSession) -> None:
        self._session, self._state = session, dict(vars(session))
        held = session._held()
        self._held = (bytes(held.mask_key), bytes(held.self_secret), dict(held.shares))
        self._channels = {place: bytes(key) for place, key in held.channels.items()}
        self._channel_key = session._channel_key and bytes(session._channel_key)

    def restore(self) -> None:
        held = _Secrets(self._held[0], self._held[1])
        held.shares = dict(self._held[2])
        held.channels = {place: bytearray(key) for place, key in self._channels.items()}
        vars(self._session).update(self._state)
        self._session._secrets = held
        self._session._identity.guard = ReplayGuard.in_memory()
        self._session._channel_key = self._channel_key and bytearray(self._channel_key)


def fuzz_client(stage: Stage, mode: str, count: int) -> None:
    """Damage server messages. What is accepted must be what the server was free to send."""
    table = play(gather(6, mode=mode, length=LENGTH), stage)
    valid = valid_for_client(table, stage)
    session = table.clients[table.ids[0]]
    snapshot, refused = Snapshot(session), 0
    for message in mutations(valid, count, seed=100 + stage):
        try:
            respond(session, stage, message)
        except ProtocolError as error:
            assert_says_nothing(error)
            assert session.stage is Stage.ABORTED
            assert session._secrets is None
            refused += 1
        else:
            assert may_be_accepted(stage, mode, message, valid), (stage, message.hex())
        snapshot.restore()
    assert refused > 0.5 * count
    respond(session, stage, valid[0])


def may_be_accepted(stage: Stage, mode: str, message: bytes, valid: list[bytes]) -> bool:
    """Say whether a changed message is one that the server was free to send:
    fewer clients, never other ones.
    """
    if stage is Stage.SHARE:
        genuine, shown = messages.read_roster(valid[0]), messages.read_roster(message)
        return len(shown) >= 3 and genuine[0] in shown and all(advert in genuine for advert in shown)
    if stage is Stage.MASK or (stage is Stage.UNMASK and mode == "active"):
        rows = (
            messages.read_delivery(message, 5)
            if stage is Stage.MASK
            else messages.read_active_request(message, 5)
        )
        return len(rows) >= gather(6, mode=mode).parameters.threshold
    if stage in (Stage.CONFIRM, Stage.UNMASK):
        kind = messages.Kind.SURVIVORS if stage is Stage.CONFIRM else messages.Kind.REQUEST
        survivors = messages.read_survivors(message, 6, kind)
        return 0 in survivors and len(survivors) >= 3
    return False


SERVER_STAGES = [
    (stage, mode)
    for mode in MODES
    for stage in list(Stage)[:5]
    if (stage, mode) != (Stage.CONFIRM, "semi_honest")
]
CLIENT_STAGES = [row for row in SERVER_STAGES if row[0] is not Stage.ADVERTISE]


@pytest.mark.parametrize("stage, mode", SERVER_STAGES)
def test_damaged_client_messages(stage: Stage, mode: str):
    fuzz_server(stage, mode, QUICK)


@pytest.mark.parametrize("stage, mode", CLIENT_STAGES)
def test_damaged_server_messages(stage: Stage, mode: str):
    fuzz_client(stage, mode, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("stage, mode", SERVER_STAGES)
def test_a_hundred_thousand_damaged_client_messages(stage: Stage, mode: str):
    fuzz_server(stage, mode, MANY)


@pytest.mark.slow
@pytest.mark.parametrize("stage, mode", CLIENT_STAGES)
def test_a_hundred_thousand_damaged_server_messages(stage: Stage, mode: str):
    fuzz_client(stage, mode, MANY)
