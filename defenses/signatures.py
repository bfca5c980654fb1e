"""Check Ed25519 signatures, and the public keys they are checked against."""

from __future__ import annotations

from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from defenses.errors import ProtocolError

PUBLIC_KEY_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64
_PRIME: Final = 2**255 - 19
_ORDER_EIGHT: Final = 2707385501144840649318225287225658788936804267575313519463743609750303402022
_SMALL_ORDER: Final = frozenset({0, 1, _PRIME - 1, _ORDER_EIGHT, _PRIME - _ORDER_EIGHT})
"""The y of every point whose order divides eight."""


def is_sound_key(public_key: bytes) -> bool:
    """Say whether bytes can be somebody's Ed25519 public key: canonical, and of a point that is not of small
    order.

    Under a key of small order one signature fits many messages, so whoever has it on a roster can deny or be
    anybody.
    """
    if not isinstance(public_key, bytes) or len(public_key) != PUBLIC_KEY_BYTES:
        return False
    height = int.from_bytes(public_key, "little") & ((1 << 255) - 1)
    return height < _PRIME and height not in _SMALL_ORDER


def verify_signature(public_key: bytes, signature: bytes, message: bytes) -> None:
    """Check an Ed25519 signature.

    Raises: ProtocolError when it does not verify, or nobody should be using that key.
    """
    try:
        if is_sound_key(public_key):
            Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
            return
    except (InvalidSignature, ValueError):
        pass
    raise ProtocolError
