"""The engine's server, as the coordinator's process uses it: nodes are put on its list, runs begin and end.

What stands behind the federation's port trusts whoever reaches it, so it listens on loopback alone; sites
reach their part of it through the gate (`gate.py`).
"""

from __future__ import annotations

import contextlib
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx
from flwr.app import Metadata
from flwr.common.constant import SUPERLINK_NODE_ID, SubStatus
from flwr.common.serde import user_config_to_proto
from flwr.proto.control_pb2 import RegisterNodeRequest, StartRunRequest, StopRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node as ProtoNode
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    GetNodesRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.runtime import RuntimeHttpClient

from ffm_secure.engines.flower import wire
from ffm_secure.engines.flower.bundle import DIGEST, RUN_KEY, bundle
from ffm_secure.engines.flower.wire import BROKEN, Outgoing
from ffm_secure.engines.nvflare.certificates import ROOT
from ffm_secure.transport.local_socket import Words

_ACQUIRE: Final = "/flwr.proto.Runtime/AcquireTask"
_SECONDS: Final = 20.0  # for one call
_HERE: Final = ProtoNode(node_id=SUPERLINK_NODE_ID)


@dataclass(frozen=True, slots=True, kw_only=True)
class Presence:
    """A node that is there, and since when: one that came back is another."""

    node: int
    since: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """What has come for a message: the tree of an answer, or nothing where the engine reports an error."""

    message: str
    tree: ObjectTree | None


class SuperLink:
    """The server of this machine, by its port."""

    def __init__(self, port: int, folder: Path, secret: bytes) -> None:
        self._address, self._secret = f"https://localhost:{port}", secret
        self._context = _server_context(folder)
        self._control = ControlHttpClient(
            self._address,
            interceptors=[wire.VersionHeaders("flwr CLI")],
            verify=self._context,
            timeout=_SECONDS,
        )

    def register(self, public_key: bytes, name: str) -> None:
        """Put a node on the list of those that may connect; one that is on it stays."""
        with contextlib.suppress(httpx.HTTPError):  # what is not on the list is refused by the server itself
            self._control.RegisterNode(RegisterNodeRequest(public_key=public_key, name=name))

    def begin(self, run: str) -> EngineRun:
        """Begin a run of the engine for a run of ours, and take its server's part.

        Raises:
          What `BROKEN` names.
        """
        asked = StartRunRequest(
            fab=Fab(hash_str=DIGEST, content=bundle()),
            override_config=user_config_to_proto({RUN_KEY: run}),
        )
        number = self._control.StartRun(asked).run_id
        token = self._acquire(number)
        client = self._runtime(RuntimeTokenHttpInterceptor(token))
        client.PullTaskInput(PullTaskInputRequest())
        return EngineRun(number, client)

    def end(self, run: EngineRun) -> None:
        """End a run; whatever of it was on its way is dropped."""
        try:
            run.finish()
        except BROKEN:
            with contextlib.suppress(*BROKEN):
                self._control.StopRun(StopRunRequest(run_id=run.number))
        run.close()

    def close(self) -> None:
        """End the connection."""
        self._control.close()

    def _acquire(self, number: int) -> str:
        """Return the token of a run's task; those of runs that a killed coordinator left are let go."""
        client = self._runtime(
            SuperExecAuthHttpInterceptor(master_secret=self._secret, protected_methods=[_ACQUIRE])
        )
        try:
            while True:
                response = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
                if not response.token:
                    raise ConnectionError("the engine's server gave no task for a run that was begun")
                if response.task.run_id == number:
                    return str(response.token)
        finally:
            client.close()

    def _runtime(self, interceptor: ProtobufClientInterceptor) -> RuntimeHttpClient:
        return RuntimeHttpClient(
            self._address,
            interceptors=[wire.VersionHeaders("flwr-serverapp"), interceptor],
            verify=self._context,
            timeout=_SECONDS,
        )


class EngineRun:
    """One run of the engine, from its server's part. Safe to use from several threads."""

    def __init__(self, number: int, client: RuntimeHttpClient) -> None:
        self.number, self._client = number, client

    def alive(self) -> bool:
        """Tell the server that this part is alive; return whether the run goes on."""
        return bool(self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success)

    def present(self) -> dict[str, Presence]:
        """Return the nodes that are there, by the names they were registered under."""
        nodes = self._client.GetNodes(GetNodesRequest()).nodes
        return {
            str(node.name): Presence(node=node.node_id, since=str(node.last_activated_at)) for node in nodes
        }

    def send(self, presence: Presence, words: Words, content: bytes | memoryview, seconds: float) -> str:
        """Send a message that lives for so many seconds; return its name.

        Raises:
          What `BROKEN` names.
        """
        metadata = Metadata(
            run_id=self.number,
            message_id="",
            src_node_id=SUPERLINK_NODE_ID,
            dst_node_id=presence.node,
            reply_to_message_id="",
            group_id="",
            created_at=time.time(),
            ttl=seconds,
            message_type=wire.TYPE,
        )
        message = wire.outgoing(metadata, words, content)
        self._push(message)
        return message.name

    def answered(self, messages: Sequence[str]) -> list[Answered]:
        """Return what has come for messages; each is returned once."""
        response = self._client.PullMessages(PullAppMessagesRequest(message_ids=messages))
        answers = []
        for heading, tree in zip(response.messages_list, response.message_object_trees, strict=True):
            whole = None if heading.HasField("error") else tree
            answers.append(Answered(message=heading.metadata.reply_to_message_id, tree=whole))
        return answers

    def fetch(self, tree: ObjectTree, until: float) -> tuple[Words, bytes]:
        """Return the words and the bytes of an answer.

        Raises:
          NotWhole: it does not come whole in time.
        """

        def ask(name: str) -> PullObjectResponse:
            return self._client.PullObject(PullObjectRequest(node=_HERE, run_id=self.number, object_id=name))

        return wire.opened(wire.pull(tree, ask, until))

    def let_go(self, tree: ObjectTree) -> None:
        """Let the server forget an answer that was fetched."""
        asked = ConfirmMessageReceivedRequest(
            node=_HERE, run_id=self.number, message_object_id=tree.object_id
        )
        with contextlib.suppress(*BROKEN, RuntimeError):  # the last is what a closed connection raises
            self._client.ConfirmMessageReceived(asked)

    def finish(self) -> None:
        """Say that the server's part is done."""
        self._client.PushTaskOutput(PushTaskOutputRequest(sub_status=SubStatus.COMPLETED, details=""))

    def close(self) -> None:
        """End the connection."""
        self._client.close()

    def _push(self, message: Outgoing) -> None:
        response = self._client.PushMessages(
            PushAppMessagesRequest(messages_list=[message.heading], message_object_trees=[message.tree])
        )

        def send(name: str, part: bytes) -> bool:
            asked = PushObjectRequest(
                node=_HERE,
                run_id=self.number,
                object_id=name,
                object_content=part,
                session_id=response.session_id,
            )
            return bool(self._client.PushObject(asked).stored)

        wire.push(message, response.objects_to_push, send)


def _server_context(folder: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(folder / ROOT)
    return context
