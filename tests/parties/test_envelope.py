"""A message between coordinator and site:
one byte changed, another key, another site or version, and it is refused.
"""

from __future__ import annotations

import pytest

from defenses.errors import ProtocolError
from defenses.random_source import RandomSource
from defenses.secagg import Identity
from ffm_secure.transport import envelope
from ffm_secure.transport.envelope import REFUSAL, Header, OtherVersion

COORDINATOR, SITE, OTHER = (Identity.generate(RandomSource.seeded(number)) for number in (1, 2, 3))
HEADER = Header(
    software="1.0", run=bytes(16), round=3, stage="upload", site="north", sent=10.0, deadline=70.5
)


def sealed(content: bytes = b"content") -> bytes:
    return envelope.seal(HEADER, content, COORDINATOR.sign)


def test_what_is_sealed_is_read() -> None:
    request = envelope.unseal(sealed(), COORDINATOR.public_key)
    assert (request.header, request.content) == (HEADER, b"content")
    assert envelope.header_of(sealed()).deadline == 70.5


def test_every_changed_byte_is_refused() -> None:
    message = sealed()
    for place in range(len(message)):
        changed = bytearray(message)
        changed[place] ^= 1
        with pytest.raises(ProtocolError):
            envelope.unseal(bytes(changed), COORDINATOR.public_key)
    for end in range(len(message)):
        with pytest.raises(ProtocolError):
            envelope.unseal(message[:end], COORDINATOR.public_key)


def test_another_coordinator_is_refused() -> None:
    with pytest.raises(ProtocolError):
        envelope.unseal(sealed(), OTHER.public_key)


def test_another_version_is_named() -> None:
    message = bytearray(sealed())
    message[16] = 9
    with pytest.raises(OtherVersion) as caught:
        envelope.unseal(bytes(message), COORDINATOR.public_key)
    assert caught.value.version == 9
    assert str(caught.value) == str(ProtocolError())


def test_an_answer_belongs_to_its_request_and_its_site() -> None:
    request = envelope.unseal(sealed(), COORDINATOR.public_key).digest
    answer = envelope.seal_answer(memoryview(b"numbers"), request, SITE.sign)
    assert bytes(envelope.unseal_answer(answer, request, SITE.public_key)) == b"numbers"
    another = envelope.unseal(sealed(b"other"), COORDINATOR.public_key).digest
    for asked, key in ((another, SITE.public_key), (request, OTHER.public_key)):
        with pytest.raises(ProtocolError):
            envelope.unseal_answer(answer, asked, key)
    for place in range(len(answer)):
        changed = bytearray(answer)
        changed[place] ^= 1
        with pytest.raises(ProtocolError):
            envelope.unseal_answer(bytes(changed), request, SITE.public_key)


def test_a_refusal_is_no_answer() -> None:
    with pytest.raises(ProtocolError):
        envelope.unseal_answer(REFUSAL, bytes(32), SITE.public_key)
