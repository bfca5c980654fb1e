"""Signed envelopes (DSSE): a payload, its type, and Ed25519 signatures over both."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from defenses.errors import ProtocolError
from defenses.secagg import Identity
from defenses.signatures import verify_signature
from ffm_secure.certificate.statement import canonical, parse_object
from ffm_secure.errors import RecordError, StoreError
from ffm_secure.record_codec import Plain

PAYLOAD_TYPE = "application/vnd.in-toto+json"
LARGEST = 64 << 20  # bytes; a certificate of 1,000 owners and 1,000 rounds takes a few MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """Hold one signature and the name of the key that made it."""

    key_id: str
    value: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """Hold a payload with its signatures, in the order of their keys' names.

    Source: DSSE v1.0, protocol and envelope.
    """

    payload: bytes
    signatures: tuple[Signature, ...] = ()

    def signed_by(self, key: Identity) -> Envelope:
        """Return the envelope with one more signature; a second one of the same key changes nothing."""
        name = key_id(key.public_key)
        others = [signature for signature in self.signatures if signature.key_id != name]
        own = Signature(key_id=name, value=key.sign(signed_bytes(self.payload)))
        return replace(self, signatures=tuple(sorted([*others, own], key=lambda one: one.key_id)))

    def verifies(self, public_key: bytes) -> bool:
        """Tell whether a valid signature of this key is there."""
        return self.valid([public_key])[0]

    def valid(self, public_keys: Sequence[bytes]) -> tuple[bool, ...]:
        """Tell of each key whether a valid signature of it is there."""
        values = {signature.key_id: signature.value for signature in self.signatures}
        message = signed_bytes(self.payload)
        answers = []
        for public_key in public_keys:
            value = values.get(key_id(public_key))
            answers.append(value is not None and _valid(public_key, value, message))
        return tuple(answers)

    def to_bytes(self) -> bytes:
        """Return the canonical bytes of the file."""
        signatures: list[Plain] = []
        for signature in self.signatures:
            signatures.append({"keyid": signature.key_id, "sig": _encoded(signature.value)})
        whole = {
            "payload": _encoded(self.payload),
            "payloadType": PAYLOAD_TYPE,
            "signatures": signatures,
        }
        return canonical(whole) + b"\n"

    @classmethod
    def from_bytes(cls, content: bytes) -> Envelope:
        """Read an envelope; anything but its own canonical bytes is refused.

        Raises:
          RecordError: the content is no envelope, or not in its canonical form.
        """
        if len(content) > LARGEST:
            raise RecordError(f"certificate: has {len(content):,} bytes, more than {LARGEST:,}")
        whole = parse_object(content, "certificate")
        if set(whole) != {"payload", "payloadType", "signatures"} or whole["payloadType"] != PAYLOAD_TYPE:
            raise RecordError("certificate: is no signed envelope of an in-toto statement")
        envelope = cls(payload=_decoded(whole["payload"]), signatures=_signatures(whole["signatures"]))
        if envelope.to_bytes() != content:
            raise RecordError("certificate: is not in its canonical form")
        return envelope


def read_file(path: Path) -> bytes:
    """Read a certificate or a part of one; of a file larger than any, no more than shows it.

    Raises:
      StoreError: it is no file, or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise StoreError(f"{path}: is no file")
            return file.read(LARGEST + 1)
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from None


def signed_bytes(payload: bytes) -> bytes:
    """Return what is signed: type and payload, each with its length (DSSE's pre-authentication encoding).

    >>> signed_bytes(b"{}")
    b'DSSEv1 28 application/vnd.in-toto+json 2 {}'
    """
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)


def key_id(public_key: bytes) -> str:
    """Return the name of a key: the SHA-256 of its raw public bytes, in hexadecimal."""
    return hashlib.sha256(public_key).hexdigest()


def _valid(public_key: bytes, signature: bytes, message: bytes) -> bool:
    try:
        verify_signature(public_key, signature, message)
    except ProtocolError:
        return False
    return True


def _signatures(value: Plain) -> tuple[Signature, ...]:
    if not isinstance(value, list):
        raise RecordError("certificate: signatures must be a list")
    signatures = []
    for entry in value:
        if not isinstance(entry, dict) or set(entry) != {"keyid", "sig"}:
            raise RecordError("certificate: a signature holds keyid and sig, nothing else")
        signatures.append(Signature(key_id=str(entry["keyid"]), value=_decoded(entry["sig"])))
    names = [signature.key_id for signature in signatures]
    if names != sorted(set(names)):
        raise RecordError("certificate: signatures must be sorted by keyid, one of each key")
    return tuple(signatures)


def _encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _decoded(value: Plain) -> bytes:
    try:
        return base64.b64decode(str(value), validate=True)
    except (binascii.Error, ValueError):
        raise RecordError("certificate: holds text that is no base64") from None
