"""How a coordinator's message travels to a site and back: signed, about one stage of one round, with a
deadline; a refusal says nothing.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from defenses.errors import ProtocolError
from defenses.signatures import SIGNATURE_BYTES, verify_signature
from ffm_secure import record_codec
from ffm_secure.errors import RecordError

WIRE: Final = 1
"""Version of everything in this file; the two ends refuse each other's message where it differs."""
REFUSAL: Final = b"\x00"
"""All that is sent by a party that refuses, whatever the reason."""
ANSWER: Final = b"\x01"
_MAGIC: Final = b"ffm-secure wire "
_HEAD: Final = struct.Struct("<16sII")  # magic, version, bytes of the header
_LARGEST_HEADER: Final = 1 << 16
_REQUEST: Final = b"ffm-secure request 1"
_REPLY: Final = b"ffm-secure reply 1"

Sign = Callable[[bytes], bytes]


class OtherVersion(ProtocolError):
    """The message is of another version of the wire."""

    def __init__(self, version: int) -> None:
        super().__init__()
        self.version = version


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Say what a message is about; all of it is under the coordinator's signature."""

    software: str  # the coordinator's release
    run: bytes
    round: int  # 0 before the first
    stage: str
    site: str  # whom it is for
    sent: float  # seconds since 1970, by the coordinator's clock; grows from message to message
    deadline: float  # seconds since 1970: an answer that comes later is none


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A message as it came: who signed it was checked."""

    header: Header
    content: bytes
    digest: bytes  # of the whole message: the same bytes again are the same request


def seal(header: Header, content: bytes, sign: Sign) -> bytes:
    """Put a header, the coordinator's signature over both, and the content into one message."""
    words = record_codec.canonical_bytes(header)
    signature = sign(_REQUEST + words + hashlib.sha256(content).digest())
    return _HEAD.pack(_MAGIC, WIRE, len(words)) + words + signature + content


def unseal(message: bytes, coordinator: bytes) -> Request:
    """Read a message that the holder of a public key signed.

    Raises:
      OtherVersion: it is of another version of the wire.
      ProtocolError: it is malformed, or signed by somebody else.
    """
    header, words, start = _read(message)
    signature, content = message[start : start + SIGNATURE_BYTES], message[start + SIGNATURE_BYTES :]
    verify_signature(coordinator, signature, _REQUEST + words + hashlib.sha256(content).digest())
    return Request(header=header, content=content, digest=digest_of(message))


def header_of(message: bytes) -> Header:
    """Return the header of a message without checking its signature: for engines, which wait by its deadline.

    Raises:
      ProtocolError: it is no message.
    """
    return _read(message)[0]


def _read(message: bytes) -> tuple[Header, bytes, int]:
    if len(message) < _HEAD.size:
        raise ProtocolError
    magic, version, length = _HEAD.unpack_from(message)
    if magic != _MAGIC or length > _LARGEST_HEADER:
        raise ProtocolError
    if version != WIRE:
        raise OtherVersion(version)
    start = _HEAD.size + length
    if len(message) < start + SIGNATURE_BYTES:
        raise ProtocolError
    words = bytes(message[_HEAD.size : start])
    try:
        return record_codec.from_bytes(Header, words, "the header of a message"), words, start
    except RecordError:
        raise ProtocolError from None


def seal_answer(content: bytes | memoryview, request: bytes, sign: Sign) -> bytes:
    """Answer the request of a digest: the site's signature over both, then the content."""
    signature = sign(_REPLY + request + hashlib.sha256(content).digest())
    return b"".join((ANSWER, signature, content))


def unseal_answer(answer: bytes | memoryview, request: bytes, site: bytes) -> memoryview:
    """Return the content of a site's answer to the request of a digest.

    Raises:
      ProtocolError: the site refused, or the answer is none of its own to this request.
    """
    view = memoryview(answer)
    start = 1 + SIGNATURE_BYTES
    if len(view) < start or bytes(view[:1]) != ANSWER:
        raise ProtocolError
    content = view[start:]
    verify_signature(site, bytes(view[1:start]), _REPLY + request + hashlib.sha256(content).digest())
    return content


def digest_of(message: bytes) -> bytes:
    """Return the digest by which an answer names the message it answers."""
    return hashlib.sha256(message).digest()
