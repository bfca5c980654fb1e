"""Keys stay where they are made; the operator signs a name for a key; what was changed is refused."""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path

import pytest

from ffm_secure.engines.nvflare import certificates
from ffm_secure.errors import FfmError

NOW = datetime.datetime.now(datetime.UTC)


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("operator")
    return folder, certificates.create_authority(folder, "wards", now=NOW)


def enrolled(folder: Path, operator: tuple[Path, str], name: str, kind: str) -> Path:
    asked = certificates.request(folder, name)
    approval = certificates.approve(operator[0], asked, name=name, kind=kind, now=NOW, hosts=("localhost",))
    certificates.accept(folder, approval.joined(), operator[1])
    return folder


def test_what_is_sent_holds_no_key_and_the_key_is_its_owners_alone(
    operator: tuple[Path, str], tmp_path: Path
) -> None:
    asked = certificates.request(tmp_path, "north")
    assert b"PRIVATE" not in asked
    assert (tmp_path / "key.pem").stat().st_mode & 0o777 == 0o600
    assert (operator[0] / "key.pem").stat().st_mode & 0o777 == 0o600
    key = (tmp_path / "key.pem").read_bytes()
    certificates.request(tmp_path, "north")
    assert (tmp_path / "key.pem").read_bytes() == key


def test_two_that_the_operator_signed_speak_and_others_do_not(
    operator: tuple[Path, str], tmp_path: Path
) -> None:
    server = enrolled(tmp_path / "server", operator, "localhost", certificates.SERVER)
    site = enrolled(tmp_path / "site", operator, "north", certificates.SITE)
    assert handshake(server, site) == "north"
    other = tmp_path / "other operator"
    stranger = (other, certificates.create_authority(other, "wards", now=NOW))
    intruder = enrolled(tmp_path / "intruder", stranger, "north", certificates.SITE)
    with pytest.raises(ssl.SSLError):
        handshake(server, intruder)


def handshake(server: Path, site: Path) -> str:
    """Let two participants authenticate each other; return the name the server reads."""
    listening, speaking = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    listening.verify_mode = ssl.CERT_REQUIRED
    for context, folder in ((listening, server), (speaking, site)):
        context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
        context.load_verify_locations(folder / "root.pem")
    to_server, to_site = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = listening.wrap_bio(to_server, to_site, server_side=True)
    theirs = speaking.wrap_bio(to_site, to_server, server_hostname="localhost")
    for _ in range(6):
        for end in (theirs, ours):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    peer = ours.getpeercert()
    assert peer is not None
    names = {name: value for pairs in peer["subject"] for name, value in pairs}
    return str(names["commonName"])


def test_a_request_for_another_name_or_changed_on_its_way_is_not_signed(
    operator: tuple[Path, str], tmp_path: Path
) -> None:
    asked = certificates.request(tmp_path, "north")
    for damaged in (asked.replace(b"A", b"B", 3), b"", b"no request"):
        with pytest.raises(FfmError, match=r"ask for the file again|changed on its way"):
            certificates.approve(operator[0], damaged, name="north", kind=certificates.SITE, now=NOW)
    with pytest.raises(FfmError, match="asks for another name"):
        certificates.approve(operator[0], asked, name="south", kind=certificates.SITE, now=NOW)


def test_an_approval_for_another_key_or_of_another_operator_is_not_kept(
    operator: tuple[Path, str], tmp_path: Path
) -> None:
    north = certificates.request(tmp_path / "north", "north")
    certificates.request(tmp_path / "south", "south")
    approval = certificates.approve(operator[0], north, name="north", kind=certificates.SITE, now=NOW)
    with pytest.raises(FfmError, match="another key"):
        certificates.accept(tmp_path / "south", approval.joined(), operator[1])
    with pytest.raises(FfmError, match="another operator"):
        certificates.accept(tmp_path / "north", approval.joined(), "0" * 64)
    with pytest.raises(FfmError, match="no approval"):
        certificates.accept(tmp_path / "north", approval.certificate, operator[1])
    other = tmp_path / "other"
    certificates.create_authority(other, "wards", now=NOW)
    forged = certificates.approve(other, north, name="north", kind=certificates.SITE, now=NOW)
    with pytest.raises(FfmError, match="not signed by the operator"):
        certificates.accept(tmp_path / "north", forged.certificate + approval.root, operator[1])
    assert not (tmp_path / "north" / "certificate.pem").exists()


def test_a_second_authority_in_the_same_folder_is_refused(operator: tuple[Path, str]) -> None:
    with pytest.raises(FileExistsError):
        certificates.create_authority(operator[0], "wards", now=NOW)
