"""Share a 32-byte secret among x = 1..k so that any `threshold` shares give it back and fewer say nothing."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence

from defenses.errors import ParameterError, ProtocolError
from defenses.random_source import RandomSource

PRIME = 2**256 + 297
"""The smallest prime above 2^256, so that every 32-byte string is a field element."""
SHARE_BYTES = 33
SECRET_BYTES = 32
_ATTEMPTS = 64


def split(secret: bytes, *, threshold: int, shares: int, source: RandomSource) -> list[bytes]:
    """Deal a 32-byte secret; share i of the list belongs to x = i + 1.

    Guarantee: any `threshold - 1` shares are independent of the secret.
    Raises: ParameterError unless 2 <= threshold <= shares.
    Source: Shamir, How to share a secret (1979).
    """
    if len(secret) != SECRET_BYTES:
        raise ParameterError(f"a shared secret has {SECRET_BYTES} bytes, not {len(secret)}")
    if not 2 <= threshold <= shares:
        raise ParameterError(f"threshold = {threshold}: must be between 2 and the number of shares, {shares}")
    coefficients = [source.below(PRIME) for _ in range(threshold - 1)]
    return evaluate(secret, coefficients, shares=shares)


def evaluate(secret: bytes, coefficients: Sequence[int], *, shares: int) -> list[bytes]:
    """Evaluate secret + a_1 x + a_2 x^2 + ... modulo the prime at x = 1..shares."""
    constant = int.from_bytes(secret, "big")
    falling = [*reversed(coefficients), constant]
    dealt = []
    for x in range(1, shares + 1):
        value = 0
        for coefficient in falling:
            value = (value * x + coefficient) % PRIME
        dealt.append(value.to_bytes(SHARE_BYTES, "big"))
    return dealt


@functools.lru_cache(maxsize=512)
def _weights(points: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """Return integer weights w_i and one divisor D with f(0) = sum(w_i f(x_i)) / D for the sorted points.

    For points 1..M without the missing set D the Lagrange weight at zero is
    (-1)^(i-1) C(M, i) * prod_{d missing} (d - i) / d: integers and one inversion for all of them, instead of one each.
    """
    largest, present = points[-1], set(points)
    missing = [x for x in range(1, largest) if x not in present]
    divisor = math.prod(missing) % PRIME
    weights = []
    for point in points:
        weight = math.comb(largest, point) * math.prod(absent - point for absent in missing)
        weights.append((weight if point % 2 else -weight) % PRIME)
    return tuple(weights), pow(divisor, -1, PRIME)


def combine(shares: Mapping[int, bytes]) -> bytes:
    """Interpolate the secret from exactly the given shares, keyed by x.

    Raises: ProtocolError for malformed shares and for a result that is no 32-byte string.
    """
    points = tuple(sorted(shares))
    if not points or points[0] < 1 or any(len(share) != SHARE_BYTES for share in shares.values()):
        raise ProtocolError
    weights, inverse = _weights(points)
    total = sum(weight * int.from_bytes(shares[x], "big") for x, weight in zip(points, weights, strict=True))
    value = total * inverse % PRIME
    if value >> (8 * SECRET_BYTES):
        raise ProtocolError
    return value.to_bytes(SECRET_BYTES, "big")


def recover(
    shares: Mapping[int, bytes],
    *,
    threshold: int,
    accept: Callable[[bytes], bool],
    source: RandomSource,
    preferred: Sequence[int] = (),
) -> tuple[bytes, tuple[int, ...]]:
    """Find the secret that `accept` recognises and the points that gave it, even when some of the shares are wrong.

    The first `threshold` shares usually do, then the preferred points. Otherwise random subsets are tried, which
    finds the secret while wrong shares are few; a dealer who dealt inconsistently cannot be helped.

    Raises: ProtocolError when no subset tried gives an accepted secret.
    """
    points = sorted(shares)
    if len(points) < threshold:
        raise ProtocolError
    for attempt in range(_ATTEMPTS if len(points) > threshold else 1):
        if attempt < 2:
            order = (
                points
                if attempt == 0
                else [*preferred, *(point for point in points if point not in preferred)]
            )
        else:
            order = [points[int(index)] for index in source.permutation(len(points))]
        chosen = tuple(order[:threshold])
        try:
            secret = combine({point: shares[point] for point in chosen})
        except ProtocolError:
            continue
        if accept(secret):
            return secret, chosen
    raise ProtocolError
