"""Who shares secrets with whom:
the complete graph, random Harary rings, and how many neighbours are enough.
"""

from __future__ import annotations

import bisect
import functools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from defenses.errors import ParameterError
from defenses.secagg.keys import derive_key

Mode = Literal["semi_honest", "active"]
GraphKind = Literal["complete", "harary"]
COMPLETE_UP_TO: dict[Mode, int] = {"semi_honest": 128, "active": 256}
_ROUNDING = 1e-14


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphParameters:
    """Say how many neighbours each client has and how many of them can open its secrets."""

    kind: GraphKind
    neighbours: int
    threshold: int


class Graph:
    """Answer who neighbours whom, by position in the sorted list of identities.

    Complete when `ring` is None; otherwise neighbours are those at most `neighbours / 2` steps away on the
    ring. With `remember`, lists of neighbours are kept once computed: for the server, who needs all of them.
    """

    __slots__ = ("_count", "_half", "_known", "_place", "_ring")

    def __init__(
        self, count: int, *, neighbours: int, ring: list[int] | None, remember: bool = False
    ) -> None:
        self._count, self._half, self._ring = count, neighbours // 2, ring
        self._known: dict[int, list[int]] | None = {} if remember else None
        self._place = [0] * count
        for place, member in enumerate(ring or ()):
            self._place[member] = place

    def neighbours(self, member: int) -> list[int]:
        """Return the neighbours of a member in ascending order, the member itself not among them."""
        if self._known is None:
            return self._compute(member)
        if member not in self._known:
            self._known[member] = self._compute(member)
        return self._known[member]

    def _compute(self, member: int) -> list[int]:
        if self._ring is None:
            return [other for other in range(self._count) if other != member]
        place = self._place[member]
        steps = (step for distance in range(1, self._half + 1) for step in (-distance, distance))
        return sorted(self._ring[(place + step) % self._count] for step in steps)

    def share_point(self, holder: int, owner: int) -> int:
        """Return the x at which the holder keeps the owner's share: its place, from 1, among the owner's
        neighbours.
        """
        if self._ring is None:
            return holder + 1 if holder < owner else holder
        return bisect.bisect_left(self.neighbours(owner), holder) + 1


def build_graph(
    kind: GraphKind, *, count: int, neighbours: int, transcript: bytes, remember: bool = False
) -> Graph:
    """Build the graph every client of a session computes for itself from the session's transcript.

    A Harary ring with more neighbours than members is the complete graph.

    Source: Bell et al. 2020 (ePrint 2020/704), section 3: a random permutation of a ring, edges to the
    nearest.
    """
    if kind == "complete" or neighbours >= count - 1:
        return Graph(count, neighbours=count - 1, ring=None, remember=remember)
    ring = _permutation(count, derive_key(transcript, salt=b"", label="graph"))
    return Graph(count, neighbours=neighbours, ring=ring, remember=remember)


def _permutation(count: int, key: bytes) -> list[int]:
    """Shuffle range(count) by Fisher-Yates on big-endian 32-bit words of AES-256-CTR, without modulo bias."""
    stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
    order = list(range(count))
    for last in range(count - 1, 0, -1):
        bound = last + 1
        limit = (1 << 32) // bound * bound
        word = limit
        while word >= limit:
            word = int.from_bytes(stream.update(bytes(4)), "big")
        other = word % bound
        order[last], order[other] = order[other], order[last]
    return order


def threshold_above(*, neighbours: int, corrupted: int, mode: Mode) -> int:
    """Return the smallest safe threshold when at most `corrupted` neighbours of a client collude with the
    server.

    To open one client the server needs `threshold` shares of its mask secret and as many of its key.
    Corrupted neighbours give both kinds and honest ones one kind, so an active server is stopped by 2t > k +
    c and one that follows the protocol by t > c. No share is dealt to oneself; it would cost one more.
    """
    return max(2, corrupted + 1 if mode == "semi_honest" else (neighbours + corrupted) // 2 + 1)


def safe_threshold(
    *,
    kind: GraphKind,
    clients: int,
    neighbours: int,
    corrupted: int,
    dropouts: int,
    mode: Mode,
    security_bits: int,
) -> int | None:
    """Return the smallest threshold that keeps every honest client's secrets, or None when no threshold does.

    On a ring the corrupted neighbours of a client are random: their number is bounded by a quantile that
    fails for any client with probability at most 2^-(security_bits + 1), and the honest survivors must stay
    connected except with as much probability again. A server that follows the protocol loses clients at
    random; an active one chooses them after the ring is known, as far as every client still sees `threshold`
    neighbours.
    """
    if kind == "complete" or neighbours >= clients - 1:
        return threshold_above(neighbours=clients - 1, corrupted=corrupted, mode=mode)
    limit = -(security_bits + 1) * math.log(2)
    if _log_disconnected(clients, neighbours, bad=corrupted + dropouts) >= limit:
        return None
    tail = 2.0 ** -(security_bits + 1) / clients
    worst = _upper_quantile(clients, min(corrupted, clients), neighbours, tail)
    lowest = threshold_above(neighbours=neighbours, corrupted=worst, mode=mode)
    if mode == "semi_honest":
        return lowest

    def connected(threshold: int) -> bool:
        return _log_cut(clients, neighbours, threshold, corrupted=corrupted, dropouts=dropouts) < limit

    first = bisect.bisect_left(range(lowest, neighbours + 1), True, key=connected)
    return lowest + first if lowest + first <= neighbours else None


@functools.lru_cache(maxsize=256)
def find_graph_parameters(
    clients: int,
    *,
    corrupted: float,
    dropouts: float,
    mode: Mode,
    security_bits: int = 40,
    correctness_bits: int = 30,
    prefer_complete: bool = True,
) -> GraphParameters:
    """Find the fewest neighbours and the smallest threshold for fractions of corrupted and lost clients.

    The complete graph is used up to 128 clients (256 against an active server) and wherever no ring is
    enough. With `prefer_complete` off, a ring is looked for at any size.

    Guarantee: the secrets of honest clients stay closed but for probability 2^-security_bits; with at most
    the stated fraction lost, everybody can be opened but for probability 2^-correctness_bits.
    Assumes: the graph is drawn after the corrupted clients are chosen. A server that can try many rosters
    offline grinds against it: use security_bits = 80 for a ring in active mode.
    Raises: ParameterError when nothing fits.
    Source: Bell et al. 2020, section 4: hypergeometric tails and a union bound over pairs of gaps on the
    ring; against an active server the gaps are bounded as in decision 0036.
    """
    if clients < 3:
        raise ParameterError(f"clients = {clients}: a sum over fewer than 3 hides nobody; invite at least 3")
    if not (0 <= corrupted < 1 and 0 <= dropouts < 1):
        raise ParameterError(f"corrupted = {corrupted}, dropouts = {dropouts}: fractions lie in [0, 1)")
    colluders, lost = (
        math.floor((corrupted + _ROUNDING) * clients),
        math.floor((dropouts + _ROUNDING) * clients),
    )
    if not (prefer_complete and clients <= COMPLETE_UP_TO[mode]):
        survivors = math.ceil((1 - dropouts - _ROUNDING) * clients)
        for neighbours in range(2, clients - 1, 2):
            threshold = safe_threshold(
                kind="harary",
                clients=clients,
                neighbours=neighbours,
                corrupted=colluders,
                dropouts=lost,
                mode=mode,
                security_bits=security_bits,
            )
            available = _lower_quantile(clients, survivors, neighbours, 2.0**-correctness_bits / clients)
            if threshold is not None and threshold <= available:
                return GraphParameters(kind="harary", neighbours=neighbours, threshold=threshold)
    threshold = threshold_above(neighbours=clients - 1, corrupted=colluders, mode=mode)
    if threshold > clients - 1 - lost:
        raise ParameterError(
            f"{clients} clients with {colluders} corrupted and {lost} lost: a threshold of {threshold} "
            f"exceeds the {clients - 1 - lost} neighbours that remain; expect fewer of either"
        )
    return GraphParameters(kind="complete", neighbours=clients - 1, threshold=threshold)


def _log_disconnected(clients: int, neighbours: int, *, bad: int) -> float:
    """Bound the log-probability that removing `bad` random members cuts the ring.

    A cut needs neighbours/2 bad members in a row at two places; there are n (n - k - 1) / 2 pairs of places,
    and each is all bad with probability C(n - k, bad - k) / C(n, bad).
    """
    if neighbours > bad:
        return -math.inf
    places = math.log(clients) + math.log(clients - neighbours - 1) - math.log(2)
    return places + _log_choose(clients - neighbours, bad - neighbours) - _log_choose(clients, bad)


@functools.lru_cache(maxsize=4096)
def _log_cut(clients: int, neighbours: int, threshold: int, *, corrupted: int, dropouts: int) -> float:
    """Bound the log-probability that some choice of lost clients cuts the honest survivors of a ring in two.

    A cut has two gaps, in which neighbours/2 members in a row beside an honest survivor are corrupted or
    lost. That survivor goes on only if at most `neighbours - threshold` of its neighbours are lost, so each
    of the two windows holds at least threshold - neighbours/2 corrupted members; and both together, all but
    `dropouts`. Where the corrupted sit is random, whatever the server chooses afterwards. There are n (n - k
    - 1) / 2 pairs of windows.
    """
    half = neighbours // 2
    fewest = max(0, threshold - (neighbours - half))
    ways = np.array([_log_choose(half, inside) for inside in range(fewest, half + 1)])
    scale = float(ways.max())
    pairs = np.convolve(np.exp(ways - scale), np.exp(ways - scale))  # by how many corrupted beyond 2 * fewest
    terms = []
    for together, weight in enumerate(pairs.tolist(), start=2 * fewest):
        if weight and neighbours - dropouts <= together <= corrupted:
            terms.append(
                2 * scale + math.log(weight) + _log_choose(clients - neighbours, corrupted - together)
            )
    largest = max(terms, default=-math.inf)
    if largest == -math.inf:
        return -math.inf
    total = largest + math.log(math.fsum(math.exp(term - largest) for term in terms))
    places = math.log(clients) + math.log(clients - neighbours - 1) - math.log(2)
    return places + total - _log_choose(clients, corrupted)


def _log_choose(total: int, chosen: int) -> float:
    if not 0 <= chosen <= total:
        return -math.inf
    return math.lgamma(total + 1) - math.lgamma(chosen + 1) - math.lgamma(total - chosen + 1)


def _mass(population: int, marked: int, draws: int, hits: int) -> float:
    """Return the hypergeometric probability of `hits` marked members among the draws."""
    ways = _log_choose(marked, hits) + _log_choose(population - marked, draws - hits)
    return math.exp(ways - _log_choose(population, draws))


@functools.lru_cache(maxsize=65536)
def _upper_quantile(population: int, marked: int, draws: int, tail: float) -> int:
    """Return the smallest x with P(X > x) <= tail."""
    above = 0.0
    for hits in range(min(draws, marked), -1, -1):
        above += _mass(population, marked, draws, hits)
        if above > tail:
            return hits
    return 0


@functools.lru_cache(maxsize=65536)
def _lower_quantile(population: int, marked: int, draws: int, tail: float) -> int:
    """Return the largest x with P(X < x) < tail."""
    below = 0.0
    for hits in range(draws + 1):
        below += _mass(population, marked, draws, hits)
        if below >= tail:
            return hits
    return draws
