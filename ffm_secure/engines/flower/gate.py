"""The federation's one port at the coordinator: `python -m ffm_secure.engines.flower.gate FOLDER`.

It lets in whoever has a certificate of the operator for a site of this run, and carries what a site's node
may ask for to the engine's server behind it, and nothing else: not what begins runs, not what reads them.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import logging
import re
import socket
import ssl
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ffm_secure.engines.flower.bell import SOCKET
from ffm_secure.engines.flower.folders import SECRET, read_gate_settings
from ffm_secure.engines.nvflare.certificates import CERTIFICATE, KEY, ROOT, SITE

_LOG = logging.getLogger(__name__)
_CALLS: Final = (
    "activate-node",
    "confirm-message-received",
    "deactivate-node",
    "get-run",
    "pull-messages",
    "pull-object",
    "push-messages",
    "push-object",
    "send-node-heartbeat",
)
ALLOWED: Final = frozenset(f"/v1/fleet/{name}" for name in _CALLS)
_ACTIVATE: Final = "/v1/fleet/activate-node"
_PULL, _PUSHED = "/v1/fleet/pull-messages", "/v1/fleet/push-object"
_HELD: Final = 2.0  # seconds that a question for messages waits for one
_KEY_HEADER: Final = "flwr-public-key"
_LARGEST_HEAD, _LARGEST_BODY = 1 << 15, 8 << 20  # bytes; a piece of a message has 4 MiB
_IDLE, _ANSWER = 120.0, 60.0  # seconds
_REUSED: Final = 3.0  # seconds: the engine's server ends a connection that was idle for longer than 5
_HEADER: Final = re.compile(r"([A-Za-z0-9-]{1,80}):[ \t]*([\x20-\x7e]*)")

Register = Callable[[bytes, str], None]


class Refused(ValueError):
    """What came is no request that a site's node makes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request whose length is beyond doubt."""

    path: str
    headers: Mapping[str, str]  # by small letters
    body: bytes

    def to_bytes(self) -> bytes:
        """Return it as it goes to the engine's server: with one length, and no word on the connection."""
        dropped = ("host", "connection", "content-length", "keep-alive")
        lines = [f"POST {self.path} HTTP/1.1", "host: localhost", f"content-length: {len(self.body)}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items() if name not in dropped]
        return "\r\n".join((*lines, "", "")).encode("ascii") + self.body


async def read_request(reader: asyncio.StreamReader) -> Request | None:
    """Return the next request of a connection, or nothing where it ends.

    Raises:
      Refused: it is not allowed, or its length is in doubt.
    """
    head = await _head(reader)
    if head is None:
        return None
    first, headers = head
    method, _, rest = first.partition(" ")
    path, _, version = rest.partition(" ")
    if method != "POST" or version != "HTTP/1.1" or path not in ALLOWED:
        raise Refused("not a call of a node")
    return Request(path=path, headers=headers, body=await _body(reader, headers))


Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(slots=True)
class Upstream:
    """Connections to the engine's server, for all sites; one that was idle for long is not used again."""

    port: int
    context: ssl.SSLContext
    _idle: list[tuple[float, Streams]] = field(default_factory=list)

    async def exchange(self, request: Request) -> bytes:
        """Return the whole answer to a request.

        Raises:
          OSError, Refused, asyncio.IncompleteReadError: the server is away, or answers what is no answer.
        """
        reader, writer = await self._open()
        try:
            writer.write(request.to_bytes())
            await writer.drain()
            head = await asyncio.wait_for(_head(reader), _ANSWER)
            if head is None:
                raise ConnectionError("the engine's server ended the connection")
            first, headers = head
            body = await _body(reader, headers)
        except BaseException:
            writer.close()
            raise
        self._idle.append((_now(), (reader, writer)))
        lines = [first, *(f"{name}: {value}" for name, value in headers.items() if name != "connection")]
        return "\r\n".join((*lines, "", "")).encode("ascii") + body

    async def _open(self) -> Streams:
        """Return the connection that was used last, or a new one."""
        while self._idle:
            used, streams = self._idle.pop()
            if _now() - used < _REUSED:
                return streams
            streams[1].close()
        return await asyncio.open_connection("localhost", self.port, ssl=self.context, limit=_LARGEST_HEAD)


def _now() -> float:
    return asyncio.get_running_loop().time()


@dataclass(slots=True, kw_only=True)
class Gate:
    """Carry requests of sites to the engine's server.

    Guarantee: a request reaches the server only from the holder of a certificate that the operator signed for
    a site of this run, only with that site's key in it, and only for what a node may ask. A site's key is the
    first that its certificate brought since the gate was opened.
    """

    sites: frozenset[str]
    register: Register
    upstream: Upstream
    _keys: dict[str, bytes] = field(default_factory=dict)
    _waiting: dict[str, asyncio.Event] = field(default_factory=dict)
    _coordinators: set[asyncio.StreamWriter] = field(default_factory=set)

    async def hear(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Hear from the coordinator's process to whom it has sent something (`bell.py`)."""
        self._coordinators.add(writer)
        try:
            while line := await reader.readline():
                self._something_for(line.decode("utf-8", "replace").strip()).set()
        except (OSError, ValueError):
            pass
        finally:
            self._coordinators.discard(writer)
            writer.close()

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection until it ends."""
        name = _certified(writer)
        try:
            while (request := await asyncio.wait_for(read_request(reader), _IDLE)) is not None:
                writer.write(await self._answer(name, request))
                await writer.drain()
        except Refused:
            writer.write(_plain(400, "bad request"))
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError):
            pass
        finally:
            with contextlib.suppress(OSError):
                writer.close()

    async def _answer(self, name: str, request: Request) -> bytes:
        key = _public_key(request)
        if name not in self.sites or key is None or self._keys.setdefault(name, key) != key:
            _LOG.warning("refused: %s", name or "a certificate without a name")
            return _plain(403, "this certificate is for no site of this run, or its node has another key")
        try:
            return await self._carry(name, key, request)
        except (OSError, ValueError, asyncio.IncompleteReadError, TimeoutError) as error:
            _LOG.info("the engine's server is away: %s", type(error).__name__)
            return _plain(503, "the coordinator's server is away")

    async def _carry(self, name: str, key: bytes, request: Request) -> bytes:
        if request.path == _ACTIVATE:
            await asyncio.to_thread(self.register, key, name)
        if request.path == _PULL and not await self._is_something_for(name):
            return _NOTHING
        answer = await self.upstream.exchange(request)
        if request.path == _PULL and not answer.endswith(b"\r\n\r\n"):
            self._something_for(name).set()  # there may be more
        if request.path == _PUSHED:
            for coordinator in self._coordinators:
                coordinator.write(b"\n")
        return answer

    async def _is_something_for(self, name: str) -> bool:
        """Wait a while for a word of the coordinator's process; without one of those, ask the server."""
        event = self._something_for(name)
        try:
            await asyncio.wait_for(event.wait(), _HELD)
        except TimeoutError:
            return not self._coordinators
        event.clear()
        return True

    def _something_for(self, name: str) -> asyncio.Event:
        return self._waiting.setdefault(name, asyncio.Event())


def server_context(folder: Path) -> ssl.SSLContext:
    """Return how the gate listens: nobody without a certificate of the operator speaks to it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(folder / ROOT)
    context.load_cert_chain(folder / CERTIFICATE, folder / KEY)
    return context


def _certified(writer: asyncio.StreamWriter) -> str:
    """Return the name in a site's certificate; nothing for a certificate of another kind."""
    certificate = writer.get_extra_info("peercert") or {}
    words = {key: value for part in certificate.get("subject", ()) for key, value in part}
    return str(words.get("commonName", "")) if words.get("unstructuredName") == SITE else ""


def _public_key(request: Request) -> bytes | None:
    try:
        return base64.b64decode(request.headers[_KEY_HEADER], validate=True)
    except (KeyError, ValueError):
        return None


async def _head(reader: asyncio.StreamReader) -> tuple[str, Mapping[str, str]] | None:
    """Return the first line and the headers; a header that comes twice is refused."""
    try:
        block = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
        return None
    first, *lines = block[:-4].decode("latin-1").split("\r\n")
    headers: dict[str, str] = {}
    for line in lines:
        match = _HEADER.fullmatch(line)
        if match is None or match[1].lower() in headers:
            raise Refused("a header is malformed, or comes twice")
        headers[match[1].lower()] = match[2].strip()
    return first, headers


async def _body(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> bytes:
    """Return the body, whose length is said once and in digits."""
    length = headers.get("content-length", "")
    if "transfer-encoding" in headers or not re.fullmatch(r"[0-9]{1,8}", length):
        raise Refused("the length is not said")
    if int(length) > _LARGEST_BODY:
        raise Refused("the body is too large")
    return await asyncio.wait_for(reader.readexactly(int(length)), _ANSWER)


def _plain(status: int, words: str) -> bytes:
    head = f"HTTP/1.1 {status} Refused\r\ncontent-type: text/plain\r\ncontent-length: {len(words)}\r\n\r\n"
    return (head + words).encode("ascii")


_NOTHING: Final = b"HTTP/1.1 200 OK\r\ncontent-type: application/protobuf\r\ncontent-length: 0\r\n\r\n"
"""An answer that names no message: in the engine's form it is empty."""


async def serve(folder: Path) -> None:
    """Listen until the process ends."""
    from ffm_secure.engines.flower.superlink import SuperLink

    settings = read_gate_settings(folder)
    link = SuperLink(settings.inner, folder, (folder / SECRET).read_bytes())
    inside = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    inside.load_verify_locations(folder / ROOT)
    gate = Gate(
        sites=frozenset(settings.sites),
        register=link.register,
        upstream=Upstream(settings.inner, inside),
    )
    server = await asyncio.start_server(
        gate.talk, None, settings.port, ssl=server_context(folder), limit=_LARGEST_HEAD
    )
    bell = await asyncio.start_unix_server(gate.hear, sock=_own_socket(folder / SOCKET))
    async with server, bell:
        await server.serve_forever()


def _own_socket(path: Path) -> socket.socket:
    """Return a socket at which this user alone can speak; one that a killed gate left is replaced."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    path.chmod(0o600)
    return listener


def main() -> int:
    """Run the gate until it is ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the coordinator's folder of the engine, named flower")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    asyncio.run(serve(parser.parse_args().folder.resolve()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
