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

    For points 1..M without the missing set D the Lagrange weight at zero is (-1)^(i-1) C(M, i) * prod_{d
    missing} (d - i) / d: integers and one inversion for all of them, instead of one each.
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
    shares: Mapping[int, bytes], *, threshold: int, accept: Callable[[bytes], bool], source: RandomSource
) -> tuple[bytes, tuple[int, ...]]:
    """Find the secret that `accept` recognises, and the points of the shares that are wrong.

    Guarantee: with m shares, up to (m - threshold) / 2 wrong ones are corrected and named, all of them and
    nobody else. With more, random subsets are tried, and nobody is named: whoever deals or answers could then
    have anybody named.
    Raises: ProtocolError when no secret found is accepted.
    Source: Reed and Solomon 1960; Massey 1969 (doi:10.1109/TIT.1969.1054260) for the decoder.
    """
    points = sorted(shares)
    if len(points) < threshold:
        raise ProtocolError
    if _consistent(shares, threshold=threshold, source=source):
        return _accepted(shares, points[:threshold], accept), ()
    try:
        wrong = wrong_points(shares, threshold=threshold)
    except ProtocolError:
        return _guess(shares, threshold=threshold, accept=accept, source=source), ()
    right = [point for point in points if point not in wrong]
    return _accepted(shares, right[:threshold], accept), wrong


def _accepted(shares: Mapping[int, bytes], points: Sequence[int], accept: Callable[[bytes], bool]) -> bytes:
    secret = combine({point: shares[point] for point in points})
    if not accept(secret):
        raise ProtocolError
    return secret


def _guess(
    shares: Mapping[int, bytes], *, threshold: int, accept: Callable[[bytes], bool], source: RandomSource
) -> bytes:
    """Try random subsets of `threshold` shares."""
    points = sorted(shares)
    for _ in range(_ATTEMPTS):
        order = source.permutation(len(points))[:threshold]
        try:
            return _accepted(shares, [points[int(index)] for index in order], accept)
        except ProtocolError:
            continue
    raise ProtocolError


def _checks(shares: Mapping[int, bytes]) -> list[tuple[int, int]]:
    """Return x_i and v_i f(x_i) for every share f(x_i), with weights v_i that vanish on polynomials of low
    degree.

    For any polynomial h of degree below m - 1 the weights v_i = prod_{j != i} 1 / (x_i - x_j) give sum(v_i
    h(x_i)) = 0. They are the Lagrange weights at zero times x_i, up to one factor for all.
    """
    points = tuple(sorted(shares))
    if not points or points[0] < 1 or any(len(share) != SHARE_BYTES for share in shares.values()):
        raise ProtocolError
    weights, _ = _weights(points)
    checks: list[tuple[int, int]] = []
    for x, weight in zip(points, weights, strict=True):
        checks.append((x, weight * x % PRIME * int.from_bytes(shares[x], "big") % PRIME))
    return checks


def _consistent(shares: Mapping[int, bytes], *, threshold: int, source: RandomSource) -> bool:
    """Say whether all shares lie on one polynomial of degree below `threshold`.

    One random check for all: f times (x - a)^(m - threshold - 1) has degree below m - 1, and its weighted sum
    is a polynomial in a that vanishes everywhere only if every check does. It misses an error with
    probability below m / 2^256.
    """
    spare = len(shares) - threshold
    if spare == 0:
        return True
    at = source.below(PRIME)
    total = sum(scaled * pow(x - at, spare - 1, PRIME) for x, scaled in _checks(shares))
    return total % PRIME == 0


def wrong_points(shares: Mapping[int, bytes], *, threshold: int) -> tuple[int, ...]:
    """Find the shares off the one polynomial of degree below `threshold` that passes through all but a few.

    Guarantee: with m shares of which at most (m - threshold) / 2 are wrong, exactly those are returned.
    Raises: ProtocolError when no polynomial passes that close.
    """
    spare = len(shares) - threshold
    terms = _checks(shares)
    syndromes = []
    for _ in range(spare):
        syndromes.append(sum(scaled for _, scaled in terms) % PRIME)
        terms = [(x, scaled * x % PRIME) for x, scaled in terms]
    locator = _shortest_recurrence(syndromes)
    count = len(locator) - 1
    wrong = tuple(x for x, _ in terms if _evaluate(locator, x) == 0)
    if count > spare // 2 or len(wrong) != count:
        raise ProtocolError
    return wrong


def liars_needed(shares: Mapping[int, bytes], *, threshold: int) -> int:
    """Return how many holders at least must have answered wrongly if the dealer of a secret nobody accepts
    was honest.
    """
    spare = len(shares) - threshold
    try:
        return spare - len(wrong_points(shares, threshold=threshold)) + 1
    except ProtocolError:
        return spare // 2 + 1


def _evaluate(coefficients: Sequence[int], x: int) -> int:
    """Evaluate a polynomial given from its highest coefficient down."""
    value = 0
    for coefficient in coefficients:
        value = (value * x + coefficient) % PRIME
    return value


def _shortest_recurrence(sequence: Sequence[int]) -> list[int]:
    """Return (1, c_1, ..., c_L) of least L with s_j + c_1 s_(j-1) + ... + c_L s_(j-L) = 0 modulo the prime.

    Source: Massey 1969, algorithm of Berlekamp and Massey.
    """
    current, previous = [1], [1]
    length, gap, last = 0, 1, 1
    for index, value in enumerate(sequence):
        terms = zip(current[1 : length + 1], reversed(sequence[index - length : index]))
        discrepancy = (value + sum(factor * earlier for factor, earlier in terms)) % PRIME
        if discrepancy == 0:
            gap += 1
            continue
        factor = discrepancy * pow(last, -1, PRIME) % PRIME
        shifted = [0] * gap + [coefficient * factor % PRIME for coefficient in previous]
        size = max(len(current), len(shifted))
        padded, shifted = current + [0] * (size - len(current)), shifted + [0] * (size - len(shifted))
        following = [(one - other) % PRIME for one, other in zip(padded, shifted, strict=True)]
        if 2 * length <= index:
            length, previous, last, gap = index + 1 - length, current, discrepancy, 1
        else:
            gap += 1
        current = following
    return (current + [0] * (length + 1))[: length + 1]
