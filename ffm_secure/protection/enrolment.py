"""Give the server and every site its half of a protection. Only an engine that simulates all of them calls
this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from defenses import secagg
from defenses.random_source import RandomSource
from defenses.secagg import Identity
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
    identities: Sequence[Identity] | None = None,
) -> Enrolment:
    """Make every party's half of the protection that a run file names, with keys from the system's
    randomness.

    `identities` are the sites' own, each with its memory on disk; without them sites get fresh ones that
    forget with the process.
    """
    if config.protection.kind in ("bfv", "ckks", "secagg"):
        if identities is None:
            identities = tuple(Identity.generate(RandomSource.system()) for _ in owners)
        if config.protection.kind == "secagg":
            return _masked(config, codec, identities, binding or SessionBinding())
        return _encrypted(config, codec, identities)
    server = PlainServer(codec, compatibility.minimum_survivors(config))
    return Enrolment(server=server, sites=tuple(PlainClient(codec) for _ in owners))


def _masked(
    config: RunConfig, codec: VectorCodec, identities: Sequence[Identity], binding: SessionBinding
) -> Enrolment:
    operator = Identity.generate(RandomSource.system())
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


def _encrypted(config: RunConfig, codec: VectorCodec, identities: Sequence[Identity]) -> Enrolment:
    terms = encrypted_terms(config, codec, [identity.public_key for identity in identities])
    shared = SharedKey(terms.parameters)
    sites = tuple(EncryptedClient(terms, shared, identity) for identity in identities)
    return Enrolment(server=EncryptedServer(terms), sites=sites)
