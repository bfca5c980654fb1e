"""One party's own half of a protection, made from its own keys and the operator's roster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from defenses.secagg import Identity
from ffm_secure.config import compatibility
from ffm_secure.config.run_file import RunConfig
from ffm_secure.protection.base import ClientSide, ServerSide
from ffm_secure.protection.codec import VectorCodec
from ffm_secure.protection.encrypted import encrypted_terms
from ffm_secure.protection.masked import (
    MaskedClient,
    MaskedServer,
    MaskedTerms,
    SessionBinding,
    sharing_graph,
)
from ffm_secure.protection.plain import PlainClient, PlainServer
from ffm_secure.protection.run_key import KeyedClient, KeyedServer
from ffm_secure.transport.roster import FederationRoster


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What both halves of a run's protection are made from; all of it is public."""

    config: RunConfig
    codec: VectorCodec
    roster: FederationRoster
    binding: SessionBinding | None  # none where the protection binds sessions to nothing

    def masked(self) -> MaskedTerms:
        """Return the terms of secure aggregation."""
        return MaskedTerms(
            config=self.config,
            codec=self.codec,
            roster=self.roster.sessions,
            graph=sharing_graph(self.config),
            members=tuple(_identities(self.roster)),
            binding=self.binding or SessionBinding(),
        )


def _identities(roster: FederationRoster) -> list[bytes]:
    names = {key: identity for identity, key in roster.sessions.members.items()}
    return [names[key] for key in roster.keys]


def server_half(terms: Terms) -> ServerSide:
    """Return the server's half."""
    config = terms.config
    if config.protection.kind == "secagg":
        return MaskedServer(terms.masked())
    if config.protection.kind in ("bfv", "ckks"):
        return KeyedServer(encrypted_terms(config, terms.codec, terms.roster.keys))
    return PlainServer(terms.codec, compatibility.minimum_survivors(config))


def site_half(terms: Terms, identity: Identity, clock: Callable[[], float]) -> ClientSide:
    """Return a site's half; `clock` gives seconds since 1970."""
    config = terms.config
    if config.protection.kind == "secagg":
        operator = terms.roster.sessions.operator
        return MaskedClient(identity, terms.masked(), operator, lambda: int(clock()))
    if config.protection.kind in ("bfv", "ckks"):
        return KeyedClient(encrypted_terms(config, terms.codec, terms.roster.keys), identity)
    return PlainClient(terms.codec)
