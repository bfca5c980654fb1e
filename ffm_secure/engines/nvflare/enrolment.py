"""How a site or a coordinator gets its certificates: one file to the operator, one file back, both signed."""

from __future__ import annotations

import datetime
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeVar

from defenses.errors import ProtocolError
from defenses.signatures import verify_signature
from ffm_secure import record_codec
from ffm_secure.engines.nvflare import certificates, folders
from ffm_secure.engines.nvflare.certificates import SERVER, SITE, SUBMITTER
from ffm_secure.engines.nvflare.folders import Endpoint
from ffm_secure.errors import ConfigError, FfmError, RecordError, StoreError
from ffm_secure.storage.durable import create_folder, write_atomic
from ffm_secure.record_codec import read_regular

COORDINATOR: Final = "coordinator"
SUBMITTER_NAME: Final = "coordinator@ffm-secure.invalid"
KEYS, ENGINE, AUTHORITY = "tls", "nvflare", "tls"
REQUEST: Final = "tls-request.json"
DAYS: Final = 365
_ASKED: Final = b"ffm-secure tls request 1"
_APPROVED: Final = b"ffm-secure tls approval 1"
_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9-]{1,50}")

Sign = Callable[[bytes], bytes]
T = TypeVar("T", "Request", "Approval")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One certificate that is asked for, or signed: PEM in text."""

    kind: str
    pem: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a participant sends to the operator; it holds no private key."""

    name: str  # on the roster, or `coordinator`
    wanted: tuple[Wanted, ...]
    host: str = ""  # where the coordinator listens; of nobody else
    port: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Approval:
    """What the operator sends back."""

    name: str
    federation: str
    host: str
    port: int
    root: str  # PEM
    signed: tuple[Wanted, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Signed:
    format: int = 1
    words: bytes
    signature: bytes


def relay_name(site: str) -> str:
    """Return the name of a site's relay: the engine allows fewer letters than a roster."""
    if _PLAIN_NAME.fullmatch(site):
        return f"site-{site}"
    return f"named-{hashlib.sha256(site.encode()).hexdigest()[:40]}"


def create_authority(operator: Path, federation: str, *, now: datetime.datetime) -> None:
    """Make the operator's root certificate in its folder.

    Raises:
      StoreError: there is one.
    """
    try:
        certificates.create_authority(operator / AUTHORITY, federation, now=now)
    except FileExistsError:
        raise StoreError(f"{operator / AUTHORITY}: exists; a root certificate is made once") from None


def request_site(place: Path, name: str, sign: Sign) -> Path:
    """Make a site's key and write what it sends to the operator."""
    asked = certificates.request(place / KEYS / SITE, relay_name(name))
    return _write_request(place, Request(name=name, wanted=(_as_wanted(SITE, asked),)), sign)


def endpoint_problems(host: str, port: int) -> list[str]:
    """Return what is wrong with the address at which a coordinator wants to listen."""
    problems = []
    if not re.fullmatch(r"[A-Za-z0-9.-]{1,60}", host):
        problems.append(f"--host = {host[:80]!r}: must be a name or address that every site can reach")
    if not 1 <= port <= 65_535:
        problems.append(f"--port = {port}: must be 1 to 65535")
    return problems


def request_coordinator(place: Path, endpoint: tuple[str, int], sign: Sign) -> Path:
    """Make a coordinator's keys, for its server and for itself, and write what it sends to the operator.

    Raises:
      ConfigError: host or port cannot be used.
    """
    host, port = endpoint
    problems = endpoint_problems(host, port)
    if problems:
        raise ConfigError("the coordinator's address", problems)
    names = {SERVER: host, SUBMITTER: SUBMITTER_NAME}
    wanted = tuple(
        _as_wanted(kind, certificates.request(place / KEYS / kind, name)) for kind, name in names.items()
    )
    return _write_request(place, Request(name=COORDINATOR, wanted=wanted, host=host, port=port), sign)


def renew(place: Path, sign: Sign) -> Path:
    """Make new keys for the certificates that were asked for last, and write what asks for theirs.

    The engine goes on with the old ones until `accept` has the new.

    Raises:
      StoreError: nothing was ever asked for here.
    """
    request = _own_request(place)
    names = {SITE: relay_name(request.name), SERVER: request.host, SUBMITTER: SUBMITTER_NAME}
    wanted = []
    for item in request.wanted:
        asked = certificates.request(place / KEYS / item.kind, names[item.kind], anew=True)
        wanted.append(_as_wanted(item.kind, asked))
    return _write_request(place, replace(request, wanted=tuple(wanted)), sign)


def _own_request(place: Path) -> Request:
    path = place / REQUEST
    try:
        signed = record_codec.from_bytes(_Signed, read_regular(path).strip(), str(path))
        return record_codec.from_bytes(Request, signed.words, str(path))
    except (OSError, RecordError):
        raise StoreError(f"{path}: is missing or damaged; it says which certificates are asked for") from None


def approve(
    operator: Path,
    asked: bytes,
    *,
    keys: Mapping[str, bytes],
    sign: Sign,
    now: datetime.datetime,
    days: int = DAYS,
) -> tuple[str, bytes]:
    """Sign what a participant asked for; return its name and what it is sent back.

    `keys` are the keys the operator knows, by name on the roster; the coordinator's under `coordinator`. A
    coordinator is approved first: sites are told where it listens.

    Guarantee: a certificate is signed for the holder of the key that the operator knows under that name.

    Raises:
      StoreError, FfmError: the request is not of a participant on the roster, or damaged.
    """
    request = _read_signed(Request, asked, _ASKED, lambda name: _known(keys, name))
    kinds = (SERVER, SUBMITTER) if request.name == COORDINATOR else (SITE,)
    if tuple(item.kind for item in request.wanted) != kinds:
        raise FfmError(
            f"{request.name}: the request asks for other certificates than its part in the federation"
        )
    endpoint = _endpoint(operator, request)
    names = {SERVER: endpoint.host, SUBMITTER: SUBMITTER_NAME, SITE: relay_name(request.name)}
    hosts = {SERVER: ("localhost", "127.0.0.1")}
    signed, root = [], b""
    for item in request.wanted:
        approval = certificates.approve(
            operator / AUTHORITY,
            item.pem.encode(),
            name=names[item.kind],
            kind=item.kind,
            now=now,
            hosts=hosts.get(item.kind, ()),
            days=days,
        )
        signed.append(_as_wanted(item.kind, approval.certificate))
        root = approval.root
    words = Approval(
        name=request.name,
        federation=endpoint.federation,
        host=endpoint.host,
        port=endpoint.port,
        root=root.decode(),
        signed=tuple(signed),
    )
    return request.name, _sign(words, _APPROVED, sign)


def accept(place: Path, approved: bytes, *, name: str, operator: bytes) -> Endpoint:
    """Keep what the operator sent back and write the engine's folders; return where the federation meets.

    Raises:
      FfmError: it is not the operator's, for somebody else, or for another key.
    """
    approval = _read_signed(Approval, approved, _APPROVED, lambda _: operator)
    if approval.name != name:
        raise FfmError(f"this approval is for {approval.name}; ask the operator for the one for {name}")
    endpoint = Endpoint(federation=approval.federation, host=approval.host, port=approval.port)
    root = approval.root.encode()
    for item in approval.signed:
        joined = item.pem.encode() + root
        certificates.accept(place / KEYS / item.kind, joined, certificates.digest(root))
    keys, engine = place / KEYS, place / ENGINE
    if name == COORDINATOR:
        folders.write_server_folder(engine / "server", keys / SERVER, endpoint)
        folders.write_submitter_folder(engine / "submitter", keys / SUBMITTER, endpoint, name=SUBMITTER_NAME)
    else:
        folders.write_site_folder(engine, keys / SITE, endpoint, name=relay_name(name))
    return endpoint


def is_enrolled(place: Path) -> bool:
    """Tell whether a site's or coordinator's folder has what the engine needs."""
    return (place / ENGINE / "startup").is_dir() or (place / ENGINE / "server" / "startup").is_dir()


def _as_wanted(kind: str, pem: bytes) -> Wanted:
    return Wanted(kind=kind, pem=pem.decode())


def _known(keys: Mapping[str, bytes], name: str) -> bytes:
    if name not in keys:
        raise StoreError(f"{name!r} is not on the roster; add it with: ffm-secure operator roster add")
    return keys[name]


def _endpoint(operator: Path, request: Request) -> Endpoint:
    """Return where the federation meets: what the coordinator asked for, kept for the sites."""
    path = operator / AUTHORITY / "endpoint.json"
    if request.name == COORDINATOR:
        federation = certificates.federation_of(operator / AUTHORITY)
        endpoint = Endpoint(federation=federation, host=request.host, port=request.port)
        write_atomic(path, record_codec.canonical_bytes(endpoint))
        return endpoint
    try:
        return record_codec.from_bytes(Endpoint, read_regular(path), str(path))
    except OSError:
        raise StoreError("approve the coordinator's request first: sites are told where it listens") from None


def _write_request(place: Path, request: Request, sign: Sign) -> Path:
    create_folder(place)
    write_atomic(place / REQUEST, _sign(request, _ASKED, sign))
    return place / REQUEST


def _sign(record: Request | Approval, purpose: bytes, sign: Sign) -> bytes:
    words = record_codec.canonical_bytes(record)
    return record_codec.canonical_bytes(_Signed(words=words, signature=sign(purpose + words))) + b"\n"


def _read_signed(kind: type[T], data: bytes, purpose: bytes, key_of: Callable[[str], bytes]) -> T:
    try:
        signed = record_codec.from_bytes(_Signed, data.strip(), "the file")
        record = record_codec.from_bytes(kind, signed.words, "the file")
        verify_signature(key_of(record.name), signed.signature, purpose + signed.words)
    except (RecordError, ProtocolError):
        raise FfmError(
            "the file is damaged, or signed with another key than the one that is known; ask for it again"
        ) from None
    return record
