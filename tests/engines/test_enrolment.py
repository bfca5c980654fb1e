"""A certificate is for the holder of the key that the operator knows under a name; every file is signed."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from defenses.secagg import Identity
from ffm_secure import record_codec
from ffm_secure.engines.nvflare import enrolment
from ffm_secure.engines.nvflare.enrolment import COORDINATOR, relay_name
from ffm_secure.errors import ConfigError, FfmError, StoreError
from tests.engines.nvflare_federation import identities

NOW = datetime.datetime.now(datetime.UTC)
NAMES = ("operator", COORDINATOR, "north", "south")


@pytest.fixture(scope="module")
def people() -> dict[str, Identity]:
    return identities(NAMES)


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory, people: dict[str, Identity]) -> Path:
    """Return the folder of an operator that has approved its coordinator."""
    place = tmp_path_factory.mktemp("operator")
    enrolment.create_authority(place, "wards", now=NOW)
    quarters = place.parent / COORDINATOR
    asked = enrolment.request_coordinator(quarters, ("localhost", 7443), people[COORDINATOR].sign)
    name, approved = approve(place, asked.read_bytes(), people)
    enrolment.accept(quarters, approved, name=name, operator=people["operator"].public_key)
    return place


def approve(place: Path, asked: bytes, people: dict[str, Identity]) -> tuple[str, bytes]:
    keys = {name: people[name].public_key for name in NAMES[1:]}
    return enrolment.approve(place, asked, keys=keys, sign=people["operator"].sign, now=NOW)


def test_a_site_is_enrolled_by_one_file_each_way(
    operator: Path, people: dict[str, Identity], tmp_path: Path
) -> None:
    asked = enrolment.request_site(tmp_path, "north", people["north"].sign).read_bytes()
    assert b"PRIVATE".hex().encode() not in asked
    assert not enrolment.is_enrolled(tmp_path)
    name, approved = approve(operator, asked, people)
    endpoint = enrolment.accept(tmp_path, approved, name=name, operator=people["operator"].public_key)
    assert (endpoint.federation, endpoint.host, endpoint.port) == ("wards", "localhost", 7443)
    assert enrolment.is_enrolled(tmp_path)
    assert (tmp_path / "nvflare" / "startup" / "client.key").stat().st_mode & 0o777 == 0o600


def test_nobody_gets_a_certificate_under_anothers_name(
    operator: Path, people: dict[str, Identity], tmp_path: Path
) -> None:
    stolen = enrolment.request_site(tmp_path / "a", "north", people["south"].sign).read_bytes()
    with pytest.raises(FfmError, match="another key"):
        approve(operator, stolen, people)
    stranger = enrolment.request_site(tmp_path / "b", "west", people["south"].sign).read_bytes()
    with pytest.raises(StoreError, match="'west' is not on the roster"):
        approve(operator, stranger, people)
    greedy = enrolment.request_coordinator(tmp_path / "c", ("localhost", 1), people["north"].sign)
    with pytest.raises(FfmError, match="another key"):
        approve(operator, greedy.read_bytes(), people)


def test_a_site_asks_for_no_more_than_a_sites_certificate(
    operator: Path, people: dict[str, Identity], tmp_path: Path
) -> None:
    asked = enrolment.request_coordinator(tmp_path, ("localhost", 1), people["north"].sign)
    plain = record_codec.from_bytes(
        enrolment.Request,
        record_codec.from_bytes(enrolment._Signed, asked.read_bytes().strip(), "x").words,
        "x",
    )
    words = enrolment.Request(name="north", wanted=plain.wanted)
    greedy = enrolment._sign(words, enrolment._ASKED, people["north"].sign)
    with pytest.raises(FfmError, match="other certificates than its part"):
        approve(operator, greedy, people)


def test_every_changed_byte_of_an_approval_is_refused(
    operator: Path, people: dict[str, Identity], tmp_path: Path
) -> None:
    asked = enrolment.request_site(tmp_path, "north", people["north"].sign).read_bytes()
    _, approved = approve(operator, asked, people)
    for place in range(0, len(approved) - 1, 97):
        changed = bytearray(approved)
        changed[place] ^= 1
        with pytest.raises(FfmError):
            enrolment.accept(tmp_path, bytes(changed), name="north", operator=people["operator"].public_key)
    with pytest.raises(FfmError, match="another key"):
        enrolment.accept(tmp_path, approved, name="north", operator=people["south"].public_key)
    with pytest.raises(FfmError, match="is for north"):
        enrolment.accept(tmp_path, approved, name="south", operator=people["operator"].public_key)
    assert not enrolment.is_enrolled(tmp_path)


def test_sites_are_approved_after_the_coordinator(people: dict[str, Identity], tmp_path: Path) -> None:
    enrolment.create_authority(tmp_path / "operator", "wards", now=NOW)
    asked = enrolment.request_site(tmp_path / "north", "north", people["north"].sign).read_bytes()
    with pytest.raises(StoreError, match="coordinator's request first"):
        approve(tmp_path / "operator", asked, people)
    with pytest.raises(StoreError, match="made once"):
        enrolment.create_authority(tmp_path / "operator", "wards", now=NOW)


def test_an_address_nobody_can_use_is_refused_at_once(people: dict[str, Identity], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 problems"):
        enrolment.request_coordinator(tmp_path, ("a b", 0), people[COORDINATOR].sign)
    assert not (tmp_path / "tls").exists()


@pytest.mark.parametrize("name", ["north", "St.Mary_2", "server", "a" * 64, "Site-1"])
def test_relays_have_names_the_engine_can_use(name: str) -> None:
    relay = relay_name(name)
    assert len(relay) <= 60
    assert all(letter.isalnum() or letter == "-" for letter in relay)
    assert relay.lower() not in ("server", "server_parent", "admin")


def test_two_sites_never_share_a_relays_name() -> None:
    names = ("a.b", "a_b", "a-b", "named-ab", "site-a-b", "a" * 50, "a" * 51, "a" * 64)
    assert len({relay_name(name) for name in names}) == len(names)
