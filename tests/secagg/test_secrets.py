"""Secrets are not printed, logged, pickled or copied, and do not outlive the session."""

from __future__ import annotations

import copy
import pickle
import traceback
from collections.abc import Callable

import numpy as np
import pytest

from defenses.errors import ParameterError, ProtocolError
from defenses.random_source import RandomSource
from defenses.secagg import ReplayGuard, ClientSession, Identity, Mask, ServerSession, Stage
from tests.secagg.parties import NOW, gather, mask, play


def spoken_forms(secret: bytes) -> list[str]:
    return [
        secret.hex(),
        repr(bytes(secret)),
        str(int.from_bytes(secret, "big")),
        repr(bytearray(secret)),
        str(list(secret)),
    ]


def session_secrets(session: ClientSession) -> list[bytes]:
    held = session._held()
    secrets = [bytes(held.mask_key), bytes(held.self_secret), *map(bytes, held.channels.values())]
    return [
        secret
        for secret in [*secrets, *(share for pair in held.shares.values() for share in pair)]
        if any(secret)
    ]


@pytest.mark.parametrize("stage", [Stage.SHARE, Stage.MASK, Stage.CONFIRM, Stage.UNMASK])
def test_no_printed_form_of_a_session_holds_a_secret(stage: Stage):
    table = play(gather(4), stage)
    session = table.clients[table.ids[0]]
    secrets = session_secrets(session)
    assert secrets
    shown = (
        f"{session!r} {session} {session._secrets!r} {table.clients} "
        f"{session._identity!r} {session._source!r}"
    )
    for secret in [*secrets, session._identity.seed()]:
        assert not any(form in shown for form in spoken_forms(secret))


def test_nothing_secret_can_be_pickled_or_copied():
    table = play(gather(4), Stage.MASK)
    session = table.clients[table.ids[0]]
    holders = [session, session._identity, session._source, Mask(b"k" * 32)]
    for holder in holders:
        for duplicate in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError):
                duplicate(holder)
    assert "6b6b" not in repr(Mask(b"k" * 32))
    assert "kk" not in repr(Mask(b"k" * 32))


def everything_in_the_error(call: Callable[[], object]) -> str:
    """Format the error with all local variables of all its frames, as a crash reporter would."""
    with pytest.raises(ProtocolError) as caught:
        call()
    assert str(caught.value) == "protocol aborted"
    assert caught.value.__context__ is None
    return "".join(traceback.TracebackException.from_exception(caught.value, capture_locals=True).format())


def test_errors_carry_no_secret_and_no_cause():
    for stage, call in (
        (Stage.SHARE, lambda session: session.share(b"\x02\x01rubbish")),
        (Stage.MASK, lambda session: mask(session, b"\x02\x03rubbish", np.zeros(11, dtype=np.uint32))),
        (Stage.CONFIRM, lambda session: session.confirm(b"\x02\x05rubbish")),
        (Stage.UNMASK, lambda session: session.unmask(b"\x02\x07rubbish")),
    ):
        table = play(gather(4), stage)
        session = table.clients[table.ids[0]]
        secrets = session_secrets(session)
        shown = everything_in_the_error(lambda session=session, call=call: call(session))
        assert not any(form in shown for secret in secrets for form in spoken_forms(secret))


def test_secrets_are_overwritten_when_a_session_ends():
    for how in ("discard", "refuse", "finish"):
        table = play(gather(4), Stage.UNMASK if how == "finish" else Stage.MASK)
        owner = table.ids[0]
        session = table.clients[owner]
        held = session._held()
        buffers = [held.mask_key, held.self_secret, *held.channels.values()]
        if how == "discard":
            session.discard()
        elif how == "refuse":
            with pytest.raises(ProtocolError):
                mask(session, b"", table.vectors[owner])
        else:
            session.unmask(table.server.request_for(owner))
        assert session._secrets is None
        assert not any(any(buffer) for buffer in buffers)
        assert not held.shares
        assert not held.channels


def test_mask_keys_are_gone_as_soon_as_the_vector_is_masked():
    table = play(gather(4), Stage.CONFIRM)
    held = table.clients[table.ids[0]]._held()
    assert not any(held.mask_key)
    assert not any(held.self_secret)
    assert len(held.shares) == 3


def test_an_interrupt_ends_the_session_too():
    class Interrupted(RandomSource):
        def random_bytes(self, count: int) -> bytes:
            raise KeyboardInterrupt

    parties = gather(4)
    person = next(iter(parties.people.values()))
    session = ClientSession(
        person, parties.parameters, parties.policy, Interrupted(b"i" * 32, private=False), now=NOW
    )
    with pytest.raises(KeyboardInterrupt):
        session.advertise()
    assert session.stage is Stage.ABORTED


def test_an_identity_needs_a_whole_seed():
    with pytest.raises(ParameterError) as caught:
        Identity(b"secret seed", guard=ReplayGuard.in_memory())
    assert "secret" not in str(caught.value)


def test_keys_are_fresh_in_every_session():
    """The same identity, parameters apart from the round, and real randomness: no key is used twice."""
    parties = gather(4)
    person = next(iter(parties.people.values()))
    adverts = []
    for round_number in (1, 2):
        changed = parties.next_round(round=round_number).parameters
        adverts.append(
            ClientSession(person, changed, parties.policy, RandomSource.system(), now=NOW).advertise()
        )
    fields = [message[start : start + 32] for message in adverts for start in (34, 66, 98)]
    assert len(set(fields)) == 6


def test_a_server_session_has_no_secret_of_a_client_before_the_answers():
    table = play(gather(4), Stage.UNMASK)
    secrets = [secret for session in table.clients.values() for secret in session_secrets(session)]
    state = repr({slot: getattr(table.server, slot) for slot in vars(table.server)})
    assert not any(form in state for secret in secrets for form in spoken_forms(secret))
    assert isinstance(table.server, ServerSession)
