"""What the engine's processes read in the folder of a site or a coordinator; written anew at every start.

The keys and certificates are those of the enrolment, which is one for all engines. A site's relay has one key
more, by which the engine's server knows its node; it is made here and stays here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from ffm_secure.engines.nvflare import enrolment
from ffm_secure.engines.nvflare.certificates import CERTIFICATE, KEY, ROOT, SERVER, SITE
from ffm_secure.engines.nvflare.reach import address_of
from ffm_secure.engines.nvflare.relay import name_of
from ffm_secure.errors import StoreError
from ffm_secure.storage.durable import create_folder, write_atomic

ENGINE: Final = "flower"
SETTINGS, NODE_KEY, NODE_NUMBER, SECRET = "settings.json", "node.pem", "node.txt", "tasks.secret"
GATE, SUPERLINK = "gate", "superlink"
SITE_SOCKET = "site.sock"


@dataclass(frozen=True, slots=True, kw_only=True)
class RelaySettings:
    """Where a site's relay connects to, and the name its certificate is for."""

    host: str
    port: int
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GateSettings:
    """Which port the coordinator's gate opens, what stands behind it, and whom it lets in."""

    port: int
    inner: int  # the port of the engine's server, on loopback alone
    sites: tuple[str, ...]  # by the names in their certificates


def write_relay_folder(place: Path) -> Path:
    """Write what a site's relay reads; return its folder.

    Raises:
      StoreError: the site was not enrolled.
    """
    enrolled, folder = place / enrolment.ENGINE, place / ENGINE
    host, port = address_of(enrolled / "startup" / "fed_client.json")
    create_folder(folder)
    _copy_keys(place / enrolment.KEYS / SITE, folder)
    if not (folder / NODE_KEY).exists():
        write_atomic(folder / NODE_KEY, _new_node_key())
    words = {"host": host, "port": port, "name": name_of(enrolled)}
    _write_settings(folder, words)
    return folder


def write_gate_folder(place: Path, *, inner: int, sites: Sequence[str], secret: bytes) -> Path:
    """Write what a coordinator's gate and server read; return the folder of the engine."""
    folder = place / ENGINE
    _, port = address_of(place / enrolment.ENGINE / "server" / "startup" / "fed_server.json")
    for part in (folder, folder / GATE, folder / SUPERLINK):
        create_folder(part)
    _copy_keys(place / enrolment.KEYS / SERVER, folder)
    write_atomic(folder / SECRET, secret)
    _write_settings(folder, {"port": port, "inner": inner, "sites": list(sites)})
    return folder


def read_relay_settings(folder: Path) -> RelaySettings:
    """Return what `write_relay_folder` wrote."""
    words = _read_settings(folder)
    return RelaySettings(host=str(words["host"]), port=int(str(words["port"])), name=str(words["name"]))


def read_gate_settings(folder: Path) -> GateSettings:
    """Return what `write_gate_folder` wrote."""
    words = _read_settings(folder)
    sites = words["sites"]
    assert isinstance(sites, list)
    return GateSettings(port=int(str(words["port"])), inner=int(str(words["inner"])), sites=tuple(sites))


def _copy_keys(source: Path, target: Path) -> None:
    for name in (KEY, CERTIFICATE, ROOT):
        try:
            content = (source / name).read_bytes()
        except OSError:
            raise StoreError(
                f"{source / name}: is missing; enrol with the operator's approval first"
            ) from None
        write_atomic(target / name, content)


def _new_node_key() -> bytes:
    return ec.generate_private_key(ec.SECP384R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _write_settings(folder: Path, words: Mapping[str, object]) -> None:
    write_atomic(folder / SETTINGS, json.dumps(words, indent=2).encode())


def _read_settings(folder: Path) -> Mapping[str, object]:
    try:
        words = json.loads((folder / SETTINGS).read_bytes())
    except (OSError, ValueError):
        raise StoreError(
            f"{folder / SETTINGS}: is missing or damaged; start the site or coordinator again"
        ) from None
    assert isinstance(words, dict)
    return words
