"""What a session is about, agreed before it starts, and the least a client insists on."""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass, field
from typing import get_args

from defenses.errors import ParameterError, ProtocolError
from defenses.secagg.cohort import CohortRule, whole_roster
from defenses.secagg.graph import GraphKind, Mode, safe_threshold
from defenses.secagg.keys import Roster, labelled_hash
from defenses.secagg.ring import MODULUS_BITS

FEWEST_SURVIVORS = 3
"""With two survivors each learns the other's vector from the published sum."""
DEFERRED_MODEL = bytes(32)
"""Stands for the model of a session whose keys are set up before that model exists; it is bound when masking.
"""
HASH_BYTES = 32
_LAYOUT = struct.Struct(">16sQIBBIIIIBQ32s32s32s32s32s")
_PROPOSAL_VERSION = 2
_HASHES = ("backbone_hash", "layout_hash", "quantization_hash", "mechanism_hash", "model_hash")
_MODES = get_args(Mode)
_GRAPHS = get_args(GraphKind)


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionParameters:
    """Fix everything the parties of one session must agree on; `session_id` binds all of it into every key.

    A client builds this itself from what it received and knows, or checks a proposal against its policy: the
    hashes of the frozen backbone, of the layout of its vector, of its quantisation rule, of its mechanism
    (clip, noise, sampling) and of the model it will train. A client that was given another model has another
    session id, so nothing it sends or signs fits the others.

    run_id: 16 bytes, random, one per run. round: grows within a run. attempt: grows within a round, when a
    session of it failed. cohort: ids of those who may take part, sorted; empty for everybody on the roster.
    clients: how many those are. neighbours, threshold: edges of the graph and shares that open a secret.
    minimum_survivors: the fewest clients a sum may cover. modulus_bits, length: the ring vector. The hashes
    have 32 bytes; `DEFERRED_MODEL` as the model's lets keys be agreed on during the round before, and the
    true hash is bound when masking.

    Raises: ParameterError listing every field that cannot be.
    """

    run_id: bytes
    round: int
    mode: Mode
    graph: GraphKind
    clients: int
    neighbours: int
    threshold: int
    minimum_survivors: int
    modulus_bits: int
    length: int
    backbone_hash: bytes
    layout_hash: bytes
    quantization_hash: bytes
    mechanism_hash: bytes
    model_hash: bytes
    roster: Roster
    attempt: int = 0
    cohort: tuple[bytes, ...] = ()
    session_id: bytes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.cohort:
            object.__setattr__(self, "cohort", tuple(self.roster.members))
        problems = self._problems()
        if problems:
            raise ParameterError("; ".join(problems))
        cohort = labelled_hash("members", *self.cohort)
        object.__setattr__(
            self, "session_id", labelled_hash("session", self._fields(), self.roster.digest, cohort)
        )

    def _problems(self) -> list[str]:
        sizes = {"run_id": 16, **dict.fromkeys(_HASHES, HASH_BYTES)}
        problems = []
        for name, size in sizes.items():
            if len(getattr(self, name)) != size:
                problems.append(f"{name} has {len(getattr(self, name))} bytes: must have {size}")
        bounds = {
            "round": (0, (1 << 64) - 1),
            "attempt": (0, (1 << 32) - 1),
            "clients": (FEWEST_SURVIVORS, min(len(self.roster.members), 1 << 20)),
            "minimum_survivors": (FEWEST_SURVIVORS, self.clients),
            "threshold": (2, self.neighbours),
            "length": (1, 1 << 48),
        }
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:
                problems.append(f"{name} = {getattr(self, name)}: must be from {low} to {high}")
        problems += self._cohort_problems()
        if self.mode not in _MODES or self.graph not in _GRAPHS:
            return [
                *problems,
                f"mode = {self.mode}, graph = {self.graph}: must be one of {_MODES} and {_GRAPHS}",
            ]
        if self.modulus_bits not in MODULUS_BITS:
            problems.append(f"modulus_bits = {self.modulus_bits}: must be one of {MODULUS_BITS}")
        if self.graph == "complete" and self.neighbours != self.clients - 1:
            problems.append(f"neighbours = {self.neighbours}: in a complete graph {self.clients - 1}")
        if self.graph == "harary" and (self.neighbours % 2 or not 2 <= self.neighbours < self.clients - 1):
            problems.append(
                f"neighbours = {self.neighbours}: on a ring even and from 2 to {self.clients - 2}"
            )
        if self.mode == "active" and 2 * self.threshold <= self.neighbours:
            problems.append(
                f"threshold = {self.threshold}: in active mode more than half of {self.neighbours}"
            )
        return problems

    def _cohort_problems(self) -> list[str]:
        problems = []
        if len(self.cohort) != self.clients:
            problems.append(f"clients = {self.clients}: the cohort has {len(self.cohort)} members")
        if list(self.cohort) != sorted(set(self.cohort)):
            problems.append("cohort: list every member once, in ascending order")
        strangers = sum(member not in self.roster.members for member in self.cohort)
        if strangers:
            problems.append(f"cohort: {strangers} of its members are not on the roster")
        return problems

    def _fields(self) -> bytes:
        return _LAYOUT.pack(
            self.run_id,
            self.round,
            self.attempt,
            _MODES.index(self.mode),
            _GRAPHS.index(self.graph),
            self.clients,
            self.neighbours,
            self.threshold,
            self.minimum_survivors,
            self.modulus_bits,
            self.length,
            self.backbone_hash,
            self.layout_hash,
            self.quantization_hash,
            self.mechanism_hash,
            self.model_hash,
        )

    def to_bytes(self) -> bytes:
        """Write the parameters as a proposal, the cohort last;
        the roster travels apart, from the operator.
        """
        return bytes([_PROPOSAL_VERSION]) + self._fields() + b"".join(self.cohort)

    @classmethod
    def from_bytes(cls, data: bytes, *, roster: Roster) -> SessionParameters:
        """Read a proposal. Its hashes are the proposer's: a client's policy holds those it computed itself.

        Raises: ProtocolError when it is no valid proposal.
        """
        try:
            head = 1 + _LAYOUT.size
            if data[:1] != bytes([_PROPOSAL_VERSION]) or len(data) > head + HASH_BYTES * len(roster.members):
                raise ValueError
            run_id, number, attempt, mode, graph, n, k, t, n_min, m, d, *hashes = _LAYOUT.unpack(data[1:head])
            if len(data) != head + HASH_BYTES * n:
                raise ValueError
            cohort = tuple(data[place : place + HASH_BYTES] for place in range(head, len(data), HASH_BYTES))
            return cls(
                run_id=run_id,
                round=number,
                attempt=attempt,
                mode=_MODES[mode],
                graph=_GRAPHS[graph],
                clients=n,
                neighbours=k,
                threshold=t,
                minimum_survivors=n_min,
                modulus_bits=m,
                length=d,
                **dict(zip(_HASHES, hashes, strict=True)),
                roster=roster,
                cohort=cohort,
            )
        except (ValueError, IndexError, struct.error):
            pass
        raise ProtocolError


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientPolicy:
    """State the least a client insists on; it comes from the client, and the server can only meet it.

    operator, federation: public key of the operator whose roster is trusted, and the federation it must be
    for. run_id: the run this client joined. backbone_hash, layout_hash, quantization_hash, mechanism_hash:
    what this client computed from its own backbone, vector, rule and mechanism; never taken from a proposal
    (`hashes`). cohort_rule: who takes part in a round, computed by this client from what is public
    (`cohort`); the whole roster if nothing is said.
    minimum_survivors: the fewest clients a sum may cover. colluders: how many clients may work with the
      server.
    minimum_honest: the fewest survivors besides the colluders. modes: the protocols accepted.
    minimum_threshold, modulus_bits, maximum_length: further bounds. deferred_model: whether keys may be
    agreed on before the model is known.
    repeat_models: whether this client may answer again for a model it answered for: where each of its vectors
    carries noise drawn afresh that is paid for, or where going on after a failed round matters more than what
    a server gains that lies about the failure. security_bits: for a ring; None means 80 in active mode, where
    a server could try many rosters until one suits it, and 40 otherwise.

    Raises: ParameterError for a policy that protects nobody.
    """

    operator: bytes
    federation: str
    run_id: bytes
    backbone_hash: bytes
    layout_hash: bytes
    quantization_hash: bytes
    mechanism_hash: bytes
    cohort_rule: CohortRule = whole_roster
    minimum_survivors: int = FEWEST_SURVIVORS
    colluders: int = 0
    minimum_honest: int = FEWEST_SURVIVORS
    minimum_threshold: int = 2
    modes: frozenset[Mode] = frozenset({"active"})
    modulus_bits: frozenset[int] = frozenset(MODULUS_BITS)
    maximum_length: int = 1 << 40
    deferred_model: bool = False
    repeat_models: bool = False
    security_bits: int | None = None

    def __post_init__(self) -> None:
        if self.minimum_survivors < FEWEST_SURVIVORS or self.minimum_honest < 2 or self.colluders < 0:
            raise ParameterError(
                f"minimum_survivors = {self.minimum_survivors}, minimum_honest = {self.minimum_honest}, "
                f"colluders = {self.colluders}: must be at least {FEWEST_SURVIVORS}, 2 and 0"
            )

    def admit(self, parameters: SessionParameters, *, now: int) -> None:
        """Refuse a session weaker than this policy; `now` is in seconds since 1970.

        Raises: ParameterError naming every parameter that is too weak, with the bound.
        """
        survivors, threshold = parameters.minimum_survivors, parameters.threshold
        needed = max(self.minimum_survivors, self.colluders + self.minimum_honest)
        problems = self._foreign(parameters, now)
        if parameters.mode not in self.modes:
            problems.append(f"mode = {parameters.mode}: this client accepts {', '.join(sorted(self.modes))}")
        if survivors < needed:
            problems.append(f"minimum_survivors = {survivors}: must be at least {needed}")
        if threshold < self.minimum_threshold:
            problems.append(f"threshold = {threshold}: must be at least {self.minimum_threshold}")
        if parameters.modulus_bits not in self.modulus_bits:
            problems.append(
                f"modulus_bits = {parameters.modulus_bits}: must be one of {sorted(self.modulus_bits)}"
            )
        if parameters.length > self.maximum_length:
            problems.append(f"length = {parameters.length}: must be at most {self.maximum_length}")
        if parameters.model_hash == DEFERRED_MODEL and not self.deferred_model:
            problems.append(
                "model_hash: deferred, and this client wants to know the model before it agrees on keys"
            )
        safe = self._safe_threshold(parameters, parameters.clients)
        if safe is None:
            problems.append(f"neighbours = {parameters.neighbours}: too few for {self.colluders} colluders")
        elif threshold < safe:
            problems.append(
                f"threshold = {threshold}: must be at least {safe} against {self.colluders} colluders"
            )
        if problems:
            raise ParameterError("; ".join(problems))

    def _foreign(self, parameters: SessionParameters, now: int) -> list[str]:
        """Return what is not this client's: operator, federation, run, hashes or cohort; and a roster past
        its time.
        """
        roster, problems = parameters.roster, []
        if roster.operator != self.operator:
            problems.append("roster: not signed by the operator this client trusts")
        if roster.federation != self.federation:
            problems.append("roster: of another federation than this client joined")
        if now >= roster.expires:
            problems.append(f"roster: expired at {roster.expires}; ask the operator for a new one")
        names = ("run_id", "backbone_hash", "layout_hash", "quantization_hash", "mechanism_hash")
        for name in names:
            if getattr(self, name) != getattr(parameters, name):
                problems.append(f"{name}: not what this client computed or joined")
        expected = self.cohort_rule(roster.members, parameters.run_id, parameters.round, parameters.clients)
        if tuple(expected) != parameters.cohort:
            problems.append("cohort: not who takes part in this round by the rule this client computed")
        return problems

    def admit_cohort(self, parameters: SessionParameters, present: int) -> None:
        """Refuse to share secrets when those who showed up are too few for the graph to be safe.

        Raises: ProtocolError.
        """
        if not parameters.minimum_survivors <= present <= parameters.clients:
            raise ProtocolError
        safe = self._safe_threshold(parameters, present)
        if safe is None or parameters.threshold < safe:
            raise ProtocolError

    def _safe_threshold(self, parameters: SessionParameters, present: int) -> int | None:
        bits = self.security_bits or (80 if parameters.mode == "active" else 40)
        return _safe_threshold(
            parameters.graph,
            parameters.mode,
            present,
            parameters.neighbours,
            self.colluders,
            parameters.minimum_survivors,
            bits,
        )


@functools.lru_cache(maxsize=1024)
def _safe_threshold(
    kind: GraphKind, mode: Mode, present: int, neighbours: int, colluders: int, survivors: int, bits: int
) -> int | None:
    return safe_threshold(
        kind=kind, clients=present, neighbours=neighbours, corrupted=colluders,
        dropouts=max(0, present - survivors), mode=mode, security_bits=bits,
    )  # fmt: skip
