"""The gate of the second engine: who gets through with which certificate, and what they may ask for."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime
import io
import socket
import ssl
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ffm_secure.engines.flower import gate
from ffm_secure.engines.flower.bundle import DIGEST, bundle
from ffm_secure.engines.flower.gate import Gate, Upstream, server_context
from ffm_secure.engines.nvflare import certificates
from ffm_secure.engines.nvflare.certificates import CERTIFICATE, KEY, ROOT, SERVER, SITE

NORTH, SOUTH, COORDINATOR = "site-north", "site-south", "localhost"
PUSH = "/v1/fleet/push-object"


@dataclass(slots=True, kw_only=True)
class Standing:
    """A gate that is open, and what has come through it."""

    place: Path
    port: int
    carried: list[tuple[str, bytes]] = field(default_factory=list)
    registered: list[tuple[bytes, str]] = field(default_factory=list)

    def ask(self, name: str, request: bytes) -> tuple[int, bytes]:
        """Return the status and the body of what the gate answers to the holder of a certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.place / name / ROOT)
        context.load_cert_chain(self.place / name / CERTIFICATE, self.place / name / KEY)
        with (
            socket.create_connection(("127.0.0.1", self.port), 10.0) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as connection,
            connection.makefile("rb") as answer,
        ):
            connection.sendall(request)
            status = int(answer.readline().split()[1])
            length = 0
            while (line := answer.readline().strip()) != b"":
                header, _, value = line.partition(b":")
                length = int(value) if header == b"content-length" else length
            return status, answer.read(length)


def request(path: str, body: bytes = b"", key: bytes = b"key of north", method: str = "POST") -> bytes:
    lines = (
        f"{method} {path} HTTP/1.1",
        "Host: localhost",
        f"flwr-public-key: {base64.b64encode(key).decode()}",
        f"Content-Length: {len(body)}",
        "",
        "",
    )
    return "\r\n".join(lines).encode() + body


def certify(place: Path, name: str, kind: str) -> None:
    now = datetime.datetime.now(datetime.UTC)
    asked = certificates.request(place / name, name)
    approval = certificates.approve(place / "operator", asked, name=name, kind=kind, now=now)
    certificates.accept(place / name, approval.joined(), certificates.digest(approval.root))


async def answer_reversed(
    standing: Standing, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Stand for the engine's server: answer with the body backwards."""
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = int(head.split("content-length: ")[1].split("\r\n")[0])
            body = await reader.readexactly(length)
            standing.carried.append((head.split()[1], body))
            writer.write(f"HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n".encode() + body[::-1])


async def stand(standing: Standing, opened: threading.Event, over: asyncio.Event) -> None:
    folder = standing.place / COORDINATOR
    inner_context = server_context(folder)
    inner_context.verify_mode = ssl.CERT_NONE
    inner = await asyncio.start_server(
        lambda reader, writer: answer_reversed(standing, reader, writer), "127.0.0.1", 0, ssl=inner_context
    )
    inside = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    inside.load_verify_locations(folder / ROOT)
    port = inner.sockets[0].getsockname()[1]
    gate_of_north = Gate(
        sites=frozenset({NORTH, "site-west"}),
        register=lambda key, name: standing.registered.append((key, name)),
        upstream=Upstream(port, inside),
    )
    outer = await asyncio.start_server(
        gate_of_north.talk, "127.0.0.1", 0, ssl=server_context(folder), limit=1 << 15
    )
    standing.port = outer.sockets[0].getsockname()[1]
    opened.set()
    await over.wait()
    outer.close()
    inner.close()


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standing]:
    place = tmp_path_factory.mktemp("gate")
    now = datetime.datetime.now(datetime.UTC)
    certificates.create_authority(place / "operator", "wards", now=now)
    for name, kind in ((COORDINATOR, SERVER), (NORTH, SITE), (SOUTH, SITE)):
        certify(place, name, kind)
    standing, opened = Standing(place=place, port=0), threading.Event()
    loop, over = asyncio.new_event_loop(), asyncio.Event()
    running = threading.Thread(target=loop.run_until_complete, args=(stand(standing, opened, over),))
    running.start()
    assert opened.wait(10.0)
    yield standing
    loop.call_soon_threadsafe(over.set)
    running.join(10.0)
    loop.close()


def test_what_a_site_may_ask_is_carried_whole(standing: Standing) -> None:
    body = bytes(range(256)) * 20_000  # more than a piece of a message
    assert standing.ask(NORTH, request(PUSH, body)) == (200, body[::-1])
    assert standing.carried[-1] == (PUSH, body)


def test_a_node_is_put_on_the_list_under_the_name_of_its_certificate(standing: Standing) -> None:
    assert standing.ask(NORTH, request("/v1/fleet/activate-node"))[0] == 200
    assert standing.registered[-1] == (b"key of north", NORTH)


@pytest.mark.parametrize(
    "hostile",
    [
        request("/v1/control/start-run"),
        request("/v1/runtime/get-nodes"),
        request("/v1/fleet/get-fab"),
        request("/v1/fleet/register-node"),
        request("/v1/fleet/../control/start-run"),
        request("/v1/fleet/push-object?x=/v1/control/start-run"),
        request("/v1/fleet/push-object/"),
        request(PUSH, method="GET"),
        request(PUSH).replace(b"Content-Length: 0", b"Content-Length: 0\r\nContent-Length: 5"),
        request(PUSH).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked"),
        request(PUSH).replace(b"Content-Length: 0", b"Content-Length: +5"),
        request(PUSH).replace(b"Content-Length: 0", b"Content-Length: 99999999"),
        request(PUSH).replace(b"Host: localhost", b"Host: localhost\n x: y"),
        request(PUSH).replace(b"HTTP/1.1", b"HTTP/1.0"),
    ],
)
def test_nothing_else_reaches_the_server(standing: Standing, hostile: bytes) -> None:
    before = len(standing.carried)
    assert standing.ask(NORTH, hostile)[0] == 400
    assert len(standing.carried) == before


def test_a_certificate_that_is_for_no_site_of_the_run_is_refused(standing: Standing) -> None:
    before = len(standing.carried)
    for name in (SOUTH, COORDINATOR):
        status, words = standing.ask(name, request(PUSH))
        assert status == 403
        assert b"for no site of this run" in words
    assert len(standing.carried) == before


def test_another_key_under_the_same_certificate_is_refused(standing: Standing) -> None:
    assert standing.ask(NORTH, request(PUSH))[0] == 200
    assert standing.ask(NORTH, request(PUSH, key=b"another"))[0] == 403
    assert standing.ask(NORTH, request(PUSH).replace(b"flwr-public-key: ", b"flwr-public-key: !"))[0] == 403
    assert standing.ask(NORTH, request(PUSH))[0] == 200


def test_nobody_without_a_certificate_of_the_operator_is_heard(standing: Standing, tmp_path: Path) -> None:
    now = datetime.datetime.now(datetime.UTC)
    certificates.create_authority(tmp_path / "operator", "others", now=now)
    certify(tmp_path, NORTH, SITE)
    (tmp_path / NORTH / ROOT).write_bytes((standing.place / NORTH / ROOT).read_bytes())
    before = len(standing.carried)
    stranger = Standing(place=tmp_path, port=standing.port)
    with pytest.raises((ssl.SSLError, ConnectionError, IndexError)):
        stranger.ask(NORTH, request(PUSH))
    assert len(standing.carried) == before


def test_the_calls_of_a_node_are_named_one_by_one() -> None:
    assert "/v1/fleet/get-fab" not in gate.ALLOWED
    assert all(path.startswith("/v1/fleet/") for path in gate.ALLOWED)


def test_the_bundle_is_the_same_on_every_machine() -> None:
    assert DIGEST == "2c81aa72043796692f31e96095544c3a405b96a41a58fac3f4447b581bd5adc1"
    with zipfile.ZipFile(io.BytesIO(bundle())) as archive:
        assert archive.namelist() == ["pyproject.toml"]
