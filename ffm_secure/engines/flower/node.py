"""A site's connection to the engine's server: mutual TLS, and a key of its own by which its node is known."""

from __future__ import annotations

import contextlib
import ssl
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Final

import httpx
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Metadata
from flwr.common.constant import HEARTBEAT_MIN_INTERVAL
from flwr.common.serde import message_from_proto, run_from_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node as ProtoNode
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from ffm_secure.engines.flower import wire
from ffm_secure.engines.flower.bundle import DIGEST, RUN_KEY
from ffm_secure.engines.flower.folders import NODE_KEY, NODE_NUMBER, read_relay_settings
from ffm_secure.engines.flower.wire import BROKEN, NotWhole
from ffm_secure.engines.nvflare.certificates import CERTIFICATE, KEY, ROOT
from ffm_secure.errors import StoreError
from ffm_secure.storage.durable import write_atomic
from ffm_secure.transport.local_socket import Words

_CLOCKS: Final = 5.0  # seconds that a site's clock may be ahead before the engine's server refuses it
_SECONDS: Final = 20.0  # for one call


@dataclass(frozen=True, slots=True, kw_only=True)
class Announced:
    """A message whose objects are to be fetched."""

    metadata: Metadata
    tree: ObjectTree


class Node:
    """One site's node of the engine, known to its server by a key.

    Guarantee: a node that was left behind by a process that died is put down before it is put up again, so
    that nobody waits for its heartbeat to expire.
    """

    def __init__(self, folder: Path) -> None:
        settings = read_relay_settings(folder)
        key = _node_key(folder / NODE_KEY)
        self.place = f"{settings.host}:{settings.port}"
        self._number_file = folder / NODE_NUMBER
        self._public = public_key_to_bytes(key.public_key())
        self._client = FleetHttpClient(
            f"https://{self.place}",
            interceptors=[
                wire.VersionHeaders("SuperNode"),
                NodeAuthHttpInterceptor(key, key.public_key()),
            ],
            verify=client_context(folder),
            timeout=_SECONDS,
        )
        self._node: ProtoNode | None = None

    @property
    def is_active(self) -> bool:
        """Tell whether the server counts on this node."""
        return self._node is not None

    def activate(self) -> None:
        """Be there.

        Raises:
          What `BROKEN` names.
        """
        asked = ActivateNodeRequest(public_key=self._public, heartbeat_interval=HEARTBEAT_MIN_INTERVAL)
        try:
            response = self._client.ActivateNode(asked)
        except httpx.HTTPStatusError:
            self._put_down(self._last_number())
            response = self._client.ActivateNode(asked)
        self._node = ProtoNode(node_id=response.node_id)
        write_atomic(self._number_file, str(response.node_id).encode())

    def deactivate(self) -> None:
        """Be there no more."""
        node, self._node = self._node, None
        if node is not None:
            self._put_down(node.node_id)

    def forget(self) -> None:
        """Take the connection for lost; nothing is sent."""
        self._node = None

    def heartbeat(self) -> bool:
        """Tell the server that this node is alive; return whether the server knows it."""
        asked = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_MIN_INTERVAL)
        return bool(self._client.SendNodeHeartbeat(asked).success)

    def receive(self) -> Announced | None:
        """Return the next message, or nothing; its objects are fetched by `fetch`."""
        response = self._client.PullMessages(PullMessagesRequest(node=self._node))
        if not response.messages_list:
            return None
        metadata = _metadata(response.messages_list[0])
        return Announced(metadata=metadata, tree=response.message_object_trees[0])

    def fetch(self, announced: Announced) -> tuple[Words, bytes]:
        """Return the words and the bytes of a message.

        Raises:
          NotWhole: it does not come whole within its time.
        """
        run, node = announced.metadata.run_id, self._node

        def ask(name: str) -> PullObjectResponse:
            return self._client.PullObject(PullObjectRequest(node=node, run_id=run, object_id=name))

        return wire.opened(wire.pull(announced.tree, ask, time.time() + announced.metadata.ttl))

    def let_go(self, announced: Announced) -> None:
        """Let the server forget a message that was fetched."""
        metadata = announced.metadata
        asked = ConfirmMessageReceivedRequest(
            node=self._node, run_id=metadata.run_id, message_object_id=metadata.message_id
        )
        self._client.ConfirmMessageReceived(asked)

    def answer(self, announced: Announced, words: Words, content: bytes | memoryview) -> None:
        """Send the answer to a message.

        Raises:
          NotWhole: the server takes no answer any more.
        """
        asked, node = announced.metadata, self._node
        now = time.time()
        left = asked.created_at + asked.ttl - now
        if left <= 0 or node is None:
            raise NotWhole("the answer is late")
        metadata = Metadata(
            run_id=asked.run_id,
            message_id="",
            src_node_id=asked.dst_node_id,
            dst_node_id=asked.src_node_id,
            reply_to_message_id=asked.message_id,
            group_id=asked.group_id,
            created_at=now,
            ttl=left,
            message_type=asked.message_type,
        )
        message = wire.outgoing(metadata, words, content)
        response = self._client.PushMessages(
            PushMessagesRequest(
                node=node, messages_list=[message.heading], message_object_trees=[message.tree]
            )
        )

        def send(name: str, part: bytes) -> bool:
            asked_for = PushObjectRequest(
                node=node,
                run_id=asked.run_id,
                object_id=name,
                object_content=part,
                session_id=response.session_id,
            )
            return bool(self._client.PushObject(asked_for).stored)

        wire.push(message, response.objects_to_push, send)

    def run_of(self, number: int) -> str:
        """Return the digest of the run that a run of the engine carries, or nothing where it brings code."""
        asked = GetRunRequest(node=self._node, run_id=number)
        run = run_from_proto(self._client.GetRun(asked).run)
        return str(run.override_config.get(RUN_KEY, "")) if run.fab_hash == DIGEST else ""

    def close(self) -> None:
        """Be there no more, and end the connection."""
        with contextlib.suppress(*BROKEN):
            self.deactivate()
        self._client.close()

    def _put_down(self, number: int) -> None:
        with contextlib.suppress(*BROKEN):
            self._client.DeactivateNode(DeactivateNodeRequest(node_id=number))

    def _last_number(self) -> int:
        try:
            return int(self._number_file.read_text())
        except (OSError, ValueError):
            return 0


def client_context(folder: Path) -> ssl.SSLContext:
    """Return how a party of the federation connects: with its certificate, to the operator's alone."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(folder / ROOT)
    context.load_cert_chain(folder / CERTIFICATE, folder / KEY)
    return context


def reason(error: BaseException) -> str:
    """Say why a call failed, for the people of a site."""
    if not isinstance(error, httpx.HTTPStatusError):
        return f"cannot be reached ({type(error).__name__}); it can while a run is under way"
    response = error.response
    ahead = _ahead(response)
    if abs(ahead) > _CLOCKS:
        way = "ahead of" if ahead > 0 else "behind"
        return f"refuses: this machine's clock is {abs(ahead):.0f} s {way} the coordinator's"
    if response.status_code == httpx.codes.FORBIDDEN:
        return "refuses this site's certificate: this run is not for it, or its operator is another"
    return f"refuses ({response.status_code}): {response.text[:200]}"


def _ahead(response: httpx.Response) -> float:
    """Return by how many seconds this machine's clock is ahead of the other's, by its answer."""
    try:
        return time.time() - parsedate_to_datetime(response.headers["date"]).timestamp()
    except (KeyError, ValueError, TypeError):
        return 0.0


def _metadata(heading: ProtoMessage) -> Metadata:
    return message_from_proto(heading).metadata


def _node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError):
        raise StoreError(f"{path}: is missing or damaged; start the site again, which makes a key") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise StoreError(f"{path}: is no key of a node; remove it and start the site again")
    return key
