"""What a session is about, agreed before it starts, and the least a client insists on."""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass, field
from typing import get_args

from defenses.errors import ParameterError, ProtocolError
from defenses.secagg.graph import GraphKind, Mode, safe_threshold
from defenses.secagg.keys import Roster, labelled_hash
from defenses.secagg.ring import MODULUS_BITS

FEWEST_SURVIVORS = 3
"""With two survivors each learns the other's vector from the published sum."""
DEFERRED_MODEL = bytes(32)
"""Stands for the model of a session whose keys are set up before that model exists; it is bound when masking."""
_LAYOUT = struct.Struct(">16sQBBIIIIBQ32s32s32s")
_PROPOSAL_VERSION = 1
_MODES = get_args(Mode)
_GRAPHS = get_args(GraphKind)


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionParameters:
    """Fix everything the parties of one session must agree on; `session_id` binds all of it into every key.

    A client builds this itself from what it received and knows: the hash of the model it will train, of the layout of
    its vector and of its quantisation rule. A client that was given another model has another session id, so nothing
    it sends or signs fits the others.

    run_id: 16 bytes, random, one per run. round: grows within a run. clients: the most that may take part.
    neighbours, threshold: edges of the graph and shares that open a secret. minimum_survivors: the fewest clients a
    sum may cover. modulus_bits, length: the ring vector. The three hashes have 32 bytes; `DEFERRED_MODEL` as the model's
    lets keys be agreed on during the round before, and the true hash is bound when masking.

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
    layout_hash: bytes
    quantization_hash: bytes
    model_hash: bytes
    roster: Roster
    session_id: bytes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        problems = self._problems()
        if problems:
            raise ParameterError("; ".join(problems))
        object.__setattr__(self, "session_id", labelled_hash("session", self._fields(), self.roster.digest))

    def _problems(self) -> list[str]:
        sizes = {"run_id": 16, "layout_hash": 32, "quantization_hash": 32, "model_hash": 32}
        problems = [
            f"{name} has {len(getattr(self, name))} bytes: must have {size}"
            for name, size in sizes.items()
            if len(getattr(self, name)) != size
        ]
        bounds = {
            "round": (0, (1 << 64) - 1),
            "clients": (FEWEST_SURVIVORS, min(len(self.roster.members), 1 << 20)),
            "minimum_survivors": (FEWEST_SURVIVORS, self.clients),
            "threshold": (2, self.neighbours),
            "length": (1, 1 << 48),
        }
        problems += [
            f"{name} = {getattr(self, name)}: must be from {low} to {high}"
            for name, (low, high) in bounds.items()
            if not low <= getattr(self, name) <= high
        ]
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

    def _fields(self) -> bytes:
        return _LAYOUT.pack(
            self.run_id, self.round, _MODES.index(self.mode), _GRAPHS.index(self.graph), self.clients, self.neighbours,
            self.threshold, self.minimum_survivors, self.modulus_bits, self.length, self.layout_hash,
            self.quantization_hash, self.model_hash,
        )  # fmt: skip

    def to_bytes(self) -> bytes:
        """Write the parameters as a proposal; the roster travels apart, from the operator."""
        return bytes([_PROPOSAL_VERSION]) + self._fields()

    @classmethod
    def from_bytes(cls, data: bytes, *, roster: Roster) -> SessionParameters:
        """Read a proposal; check its hashes against your own model, layout and quantisation before using it.

        Raises: ProtocolError when it is no valid proposal.
        """
        try:
            if data[:1] != bytes([_PROPOSAL_VERSION]):
                raise ValueError
            run_id, number, mode, graph, n, k, t, n_min, m, d, layout, grid, model = _LAYOUT.unpack(data[1:])
            return cls(
                run_id=run_id, round=number, mode=_MODES[mode], graph=_GRAPHS[graph], clients=n, neighbours=k,
                threshold=t, minimum_survivors=n_min, modulus_bits=m, length=d, layout_hash=layout,
                quantization_hash=grid, model_hash=model, roster=roster,
            )  # fmt: skip
        except (ValueError, IndexError, struct.error):
            pass
        raise ProtocolError


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientPolicy:
    """State the least a client insists on; it comes from the client, and the server can only meet it.

    operator: public key of the operator whose roster is trusted. minimum_survivors: the fewest clients a sum may
    cover. colluders: how many clients may work with the server. minimum_honest: the fewest survivors besides the
    colluders. modes: the protocols accepted. minimum_threshold, modulus_bits, maximum_length: further bounds.
    quantization_hash, run_id: this client's own rule and run, when it knows them before the session. deferred_model:
    whether keys may be agreed on before the model is known. security_bits: for a ring; None means 80 in active mode,
    where a server could try many rosters until one suits it, and 40 otherwise.

    Raises: ParameterError for a policy that protects nobody.
    """

    operator: bytes
    minimum_survivors: int = FEWEST_SURVIVORS
    colluders: int = 0
    minimum_honest: int = FEWEST_SURVIVORS
    minimum_threshold: int = 2
    modes: frozenset[Mode] = frozenset({"active"})
    modulus_bits: frozenset[int] = frozenset(MODULUS_BITS)
    maximum_length: int = 1 << 40
    quantization_hash: bytes | None = None
    run_id: bytes | None = None
    deferred_model: bool = False
    security_bits: int | None = None

    def __post_init__(self) -> None:
        if self.minimum_survivors < FEWEST_SURVIVORS or self.minimum_honest < 2 or self.colluders < 0:
            raise ParameterError(
                f"minimum_survivors = {self.minimum_survivors}, minimum_honest = {self.minimum_honest}, colluders = "
                f"{self.colluders}: must be at least {FEWEST_SURVIVORS}, 2 and 0"
            )

    def admit(self, parameters: SessionParameters) -> None:
        """Refuse a session weaker than this policy.

        Raises: ParameterError naming every parameter that is too weak, with the bound.
        """
        survivors, threshold = parameters.minimum_survivors, parameters.threshold
        needed = max(self.minimum_survivors, self.colluders + self.minimum_honest)
        problems = []
        if parameters.roster.operator != self.operator:
            problems.append("roster: not signed by the operator this client trusts")
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
        if self.quantization_hash not in (None, parameters.quantization_hash):
            problems.append("quantization_hash: not the rule this client uses")
        if parameters.model_hash == DEFERRED_MODEL and not self.deferred_model:
            problems.append(
                "model_hash: deferred, and this client wants to know the model before it agrees on keys"
            )
        if self.run_id not in (None, parameters.run_id):
            problems.append("run_id: not the run this client joined")
        safe = self._safe_threshold(parameters, parameters.clients)
        if safe is None:
            problems.append(f"neighbours = {parameters.neighbours}: too few for {self.colluders} colluders")
        elif threshold < safe:
            problems.append(
                f"threshold = {threshold}: must be at least {safe} against {self.colluders} colluders"
            )
        if problems:
            raise ParameterError("; ".join(problems))

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
        return _safe_threshold(parameters.graph, parameters.mode, present, parameters.neighbours, self.colluders,
                               parameters.minimum_survivors, bits)  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _safe_threshold(
    kind: GraphKind, mode: Mode, present: int, neighbours: int, colluders: int, survivors: int, bits: int
) -> int | None:
    return safe_threshold(
        kind=kind, clients=present, neighbours=neighbours, corrupted=colluders,
        dropouts=max(0, present - survivors), mode=mode, security_bits=bits,
    )  # fmt: skip
