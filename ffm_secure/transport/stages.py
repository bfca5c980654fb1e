"""The stages of a round that every protection shares, and how a plan travels with the model it names."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

from defenses.errors import ProtocolError

if TYPE_CHECKING:
    from torch import Tensor

JOIN = "join"
"""Between machines: a run is proposed; a site's signed word comes back."""
PLAN = "plan"
"""The plan and the broadcast go out; an `Acceptance` comes back."""
BEGIN = "begin"
"""Enough sites accepted: each pays now; an `Acceptance` comes back."""
FINISH = "finish"
"""The round is over; a `Receipt` comes back."""
EVALUATE = "evaluate"
"""Each site evaluates its own model on public rows; an `Evaluation` comes back."""
OPENED, CLOSED = b"\x01", b"\x00"
"""What `FINISH` says: the sum was opened, or stayed closed."""

_LENGTH = struct.Struct("<I")
_LONGEST_ACCEPTANCE = 1024


def encode_vector(vector: Tensor) -> bytes:
    """Write a global vector [d] as raw little-endian float32 numbers."""
    return vector.detach().cpu().float().contiguous().numpy().astype("<f4", copy=False).tobytes()


def join_plan(plan: bytes, broadcast: bytes) -> bytes:
    """Put a plan's bytes and the broadcast model into one message."""
    return _LENGTH.pack(len(plan)) + plan + broadcast


def split_plan(message: bytes) -> tuple[bytes, bytes]:
    """Take a message of `join_plan` apart.

    Raises:
      ProtocolError: it is none.
    """
    if len(message) < _LENGTH.size:
        raise ProtocolError
    (length,) = _LENGTH.unpack_from(message)
    start = _LENGTH.size + length
    if start > len(message):
        raise ProtocolError
    return message[_LENGTH.size : start], message[start:]


def join_acceptances(acceptances: Sequence[bytes], plan: bytes) -> bytes:
    """Put the signed words of all who take part before a message of `join_plan`."""
    parts = [_LENGTH.pack(len(acceptances))]
    for item in acceptances:
        parts += [_LENGTH.pack(len(item)), item]
    return b"".join((*parts, plan))


def split_acceptances(message: bytes) -> tuple[list[bytes], bytes]:
    """Take a message of `join_acceptances` apart.

    Raises:
      ProtocolError: it is none.
    """
    if len(message) < _LENGTH.size:
        raise ProtocolError
    (count,) = _LENGTH.unpack_from(message)
    start, acceptances = _LENGTH.size, []
    for _ in range(count):
        item, _ = split_plan(message[start : start + _LENGTH.size + _LONGEST_ACCEPTANCE])
        acceptances.append(item)
        start += _LENGTH.size + len(item)
    return acceptances, message[start:]
