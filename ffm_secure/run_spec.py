"""What everybody agrees on before the first round: the server and every site hold the same;
no data is in it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from ffm_secure.config import compatibility
from ffm_secure.config.run_file import RunConfig
from ffm_secure.lifecycle.base import Algorithm
from ffm_secure.privacy.mechanism import Mechanism
from ffm_secure.protection.codec import VectorCodec
from ffm_secure.strategies import Strategy

Layout = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """Bind the run file to what follows from it.

    Guarantee: a function of the run file, the backbone and public sizes: each party computes it for itself
    and compares digests; nothing in it is a row, a ledger or a key.
    """

    config: RunConfig
    owners: tuple[str, ...]  # name of every site, by index
    public_client_size: int  # declared or public number of examples of one client
    layout: Layout  # name and shape of every trained tensor, in the order of the vector
    algorithm: Algorithm
    strategy: Strategy
    mechanism: Mechanism
    codec: VectorCodec
    schedule: tuple[tuple[int, ...], ...]  # the cohort of every private round
    device: str

    @property
    def has_dp_guarantee(self) -> bool:
        """Tell whether the run guarantees anything: a privacy unit, and noise that nobody can replay."""
        return self.config.privacy.unit != "none" and self.config.privacy.noise == "system"

    @property
    def minimum_survivors(self) -> int:
        """Return the fewest clients whose sum may be opened."""
        return compatibility.minimum_survivors(self.config)

    @property
    def layout_digest(self) -> str:
        """Return the hash of names, shapes and codec of what is sent."""
        return hashlib.sha256(repr(self.layout).encode() + self.codec.digest()).hexdigest()

    @property
    def mechanism_digest(self) -> str:
        """Return the hash of everything that decides epsilon."""
        return self.mechanism.digest()
