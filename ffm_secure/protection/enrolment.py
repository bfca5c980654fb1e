"""Give the server and every site its half of a protection. Only an engine that simulates all of them calls
this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from defenses import secagg
from defenses.random_source import RandomSource
from ffm_secure.config import compatibility
from ffm_secure.config.run_file import RunConfig
from ffm_secure.protection.base import ClientSide, ServerSide
from ffm_secure.protection.codec import VectorCodec
from ffm_secure.protection.encrypted import EncryptedClient, EncryptedServer, SharedKey, encrypted_terms
from ffm_secure.protection.masked import (
    MaskedClient,
    MaskedServer,
    MaskedTerms,
    SessionBinding,
    sharing_graph,
)
from ffm_secure.protection.plain import PlainClient, PlainServer


@dataclass(frozen=True, slots=True, kw_only=True)
class Enrolment:
    """The halves, handed to different parties and never kept together."""

    server: ServerSide
    sites: tuple[ClientSide, ...]


_FOREVER = (1 << 64) - 1
"""The roster of a simulation lives as long as its process."""


def enrol(
    config: RunConfig,
    codec: VectorCodec,
    owners: Sequence[str],
    binding: SessionBinding | None = None,
) -> Enrolment:
    """Make every party's half of the protection that a run file names, with keys from the system's
    randomness.
    """
    if config.protection.kind in ("bfv", "ckks"):
        return _encrypted(config, codec, owners)
    if config.protection.kind == "secagg":
        return _masked(config, codec, owners, binding or SessionBinding())
    server = PlainServer(codec, compatibility.minimum_survivors(config))
    return Enrolment(server=server, sites=tuple(PlainClient(codec) for _ in owners))


def _masked(
    config: RunConfig, codec: VectorCodec, owners: Sequence[str], binding: SessionBinding
) -> Enrolment:
    source = RandomSource.system()
    operator = secagg.Identity.generate(source)
    identities = tuple(secagg.Identity.generate(source) for _ in owners)
    terms = MaskedTerms(
        config=config,
        codec=codec,
        roster=secagg.Roster.issue(
            operator,
            [identity.public_key for identity in identities],
            federation=config.name,
            serial=0,
            expires=_FOREVER,
        ),
        graph=sharing_graph(config),
        members=tuple(identity.id for identity in identities),
        binding=binding,
    )
    sites = tuple(MaskedClient(identity, terms, operator.public_key, lambda: 0) for identity in identities)
    return Enrolment(server=MaskedServer(terms), sites=sites)


def _encrypted(config: RunConfig, codec: VectorCodec, owners: Sequence[str]) -> Enrolment:
    source = RandomSource.system()
    identities = [Ed25519PrivateKey.from_private_bytes(source.random_bytes(32)) for _ in owners]
    terms = encrypted_terms(config, codec, [key.public_key().public_bytes_raw() for key in identities])
    shared = SharedKey(terms.parameters)
    sites = tuple(EncryptedClient(terms, shared, identity) for identity in identities)
    return Enrolment(server=EncryptedServer(terms), sites=sites)
