"""The key of an encrypted run goes from site to site past a server that learns nothing of it."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pytest

pytest.importorskip("tenseal", reason="the extra 'he' is not installed")

from defenses.errors import ProtocolError
from defenses.random_source import RandomSource
from defenses.secagg import Identity, ring
from defenses.secagg.masks import RingVector
from ffm_secure.protection.base import UPLOAD
from ffm_secure.protection.codec import real_codec
from ffm_secure.protection.encrypted import EncryptedTerms, encrypted_terms
from ffm_secure.protection.run_key import OFFER, UNWRAP, WRAP, KeyedClient, KeyedClientRound, KeyedServer
from ffm_secure.records import RoundPlan
from tests.parties.helpers import notes_run

SITES = 4


def terms_for(kind: str, identities: list[Identity]) -> EncryptedTerms:
    config = notes_run(protection={"kind": kind, "threshold": 3, "value_bits": 12})
    codec = real_codec(size=5, clients=SITES, value_bits=12, bound=1.0, max_weight=1, carries_loss=False)
    return encrypted_terms(config, codec, [identity.public_key for identity in identities])


def plan(number: int) -> RoundPlan:
    return RoundPlan(
        run_id=bytes(16),
        round=number,
        cohort=tuple(range(SITES)),
        fingerprint="0" * 64,
        mechanism="0" * 64,
    )


def play(
    terms: EncryptedTerms, sites: list[KeyedClient], number: int, side: KeyedServer | None = None
) -> tuple[RingVector | None, dict[int, str], list[bytes]]:
    """Play one round; return the opened sum, who was lost where, and every byte the server saw."""
    server = (side or KeyedServer(terms)).open_round(plan(number))
    rounds = [site.join(plan(number)) for site in sites]
    lost: dict[int, str] = {}
    carried: list[bytes] = []
    bits = terms.codec.modulus_bits
    for stage in server.stages:
        try:
            going_out = server.messages(stage)
        except ProtocolError:
            break
        for site, message in going_out.items():
            if site in lost:
                continue
            carried.append(message)
            try:
                if stage == UPLOAD:
                    own = ring.frame(ring.from_signed(np.arange(5) + site, bits), weight=1, modulus_bits=bits)
                    name = bytes([number, site]) * 16
                    answer = bytes(rounds[site].seal(message, own, update=name))
                else:
                    answer = rounds[site].respond(stage, message)
                carried.append(answer)
                server.receive(stage, site, answer)
            except ProtocolError:
                lost[site] = stage
    return server.open_sum(lost).ring_sum, lost, carried


def expected(terms: EncryptedTerms, survivors: Collection[int]) -> list[int]:
    values = sum((np.arange(5) + site for site in survivors), np.zeros(5, dtype=np.int64))
    return [len(survivors), len(survivors), *values.tolist()]


def values_of(terms: EncryptedTerms, total: RingVector | None) -> list[int]:
    assert total is not None
    return [int(value) for value in ring.signed(total, terms.codec.modulus_bits)]


@pytest.fixture
def identities() -> list[Identity]:
    return [Identity.generate(RandomSource.system()) for _ in range(SITES)]


@pytest.mark.parametrize("kind", ["bfv", "ckks"])
def test_everybody_gets_the_key_once_and_a_new_process_gets_it_again(
    kind: str, identities: list[Identity]
) -> None:
    terms = terms_for(kind, identities)
    sites = [KeyedClient(terms, identity) for identity in identities]
    total, lost, _ = play(terms, sites, 1)
    assert (values_of(terms, total), lost) == (expected(terms, range(SITES)), {})
    sites[2] = KeyedClient(terms, identities[2])
    total, lost, carried = play(terms, sites, 2)
    assert (values_of(terms, total), lost) == (expected(terms, range(SITES)), {})
    assert sum(message == b"\x01" for message in carried) == SITES - 1, "three had the key already"


def test_a_burnt_key_is_never_taken_again(identities: list[Identity]) -> None:
    terms = terms_for("bfv", identities)
    sites = [KeyedClient(terms, identity) for identity in identities]
    play(terms, sites, 1)
    sites[0].key.holder(bytes(16)).burn()
    total, lost, _ = play(terms, sites, 2)
    assert lost == {0: UNWRAP}
    assert values_of(terms, total) == expected(terms, (1, 2, 3))


class Miser(KeyedClient):
    """Say that one has the key, and hand on what is none."""

    handed_on = b""

    def join(self, plan: RoundPlan) -> KeyedClientRound:
        own, handed_on = super().join(plan), self.handed_on

        class Round(KeyedClientRound):
            def respond(self, stage: str, message: bytes) -> bytes:
                if stage == WRAP:
                    return handed_on
                return b"\x01" if stage == OFFER else own.respond(stage, message)

        return Round(plan, self._terms, self.key)


@pytest.mark.parametrize("handed_on", [b"", (SITES - 1) * b"\x02\x00\x00\x00no"], ids=["none", "no key"])
def test_one_that_hands_on_no_key_costs_a_round_and_no_run(
    handed_on: bytes, identities: list[Identity]
) -> None:
    """The first who said it had the key was asked again in every round, and none was ever opened."""
    terms = terms_for("bfv", identities)
    miser = Miser(terms, identities[0])
    miser.handed_on = handed_on
    sites: list[KeyedClient] = [miser, *(KeyedClient(terms, identity) for identity in identities[1:])]
    server = KeyedServer(terms)
    total, lost, _ = play(terms, sites, 1, server)
    assert total is None
    assert len(lost) == SITES
    total, lost, _ = play(terms, sites, 2, server)
    assert values_of(terms, total) == expected(terms, (1, 2, 3))
    assert lost == {0: UPLOAD}


def test_who_is_not_on_the_roster_gets_and_gives_no_key(identities: list[Identity]) -> None:
    terms = terms_for("bfv", identities)
    strangers = [Identity.generate(RandomSource.system()) for _ in range(SITES)]
    foreign = terms_for("bfv", strangers)
    own = KeyedClient(terms, identities[0]).join(plan(1))
    stranger = KeyedClient(foreign, strangers[0]).join(plan(1))
    offer = stranger.respond(OFFER, b"")[1:]
    with pytest.raises(ProtocolError):
        own.respond(WRAP, len(offer).to_bytes(4, "little") + offer)
    wanted = own.respond(OFFER, b"")
    if wanted != b"\x01":
        with pytest.raises(ProtocolError):
            own.respond(UNWRAP, strangers[0].public_key + bytes(300))


def test_the_server_is_shown_no_key(identities: list[Identity]) -> None:
    terms = terms_for("bfv", identities)
    sites = [KeyedClient(terms, identity) for identity in identities]
    _, _, carried = play(terms, sites, 1)
    secret = sites[0].key.holder(bytes(16))
    assert not any(secret._root in message for message in carried)
