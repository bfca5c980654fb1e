"""What runs inside the engine's processes at a site: it sees bytes and a socket, no row, no ledger.

The classes here are named in the site's own `resources.json` and in its list of allowed classes; a job names
the executor and can name nothing else.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.fl_exception import NotAuthorized
from nvflare.apis.job_def import JobMetaKey
from nvflare.apis.job_launcher_spec import JobHandleSpec, JobReturnCode
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal
from nvflare.apis.workspace import Workspace
from nvflare.app_common.job_launcher.client_process_launcher import ClientProcessJobLauncher
from nvflare.widgets.widget import Widget

from ffm_secure.engines.nvflare import topics, worker_process
from ffm_secure.engines.nvflare.folders import SITE_SOCKET
from ffm_secure.engines.nvflare.pieces import PIECE, Shelf
from ffm_secure.transport.local_socket import Gone, Late, Words, ask, connect

_PLANNING = frozenset({"check_resources", "submit_job"})  # what the engine asks before a job's process


class RelayExecutor(Executor):  # type: ignore[misc]
    """Hand each message to the site's own service and its answer back."""

    def __init__(self) -> None:
        super().__init__()
        self._socket: Path | None = None
        self._coming, self._leaving = Shelf(), Shelf()

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Begin to answer when a job starts."""
        if event_type != EventType.START_RUN:
            return
        workspace: Workspace = fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT)
        self._socket = Path(workspace.get_root_dir()) / SITE_SOCKET
        engine = fl_ctx.get_engine()
        engine.register_aux_message_handler(topics.MESSAGE, self._message)
        engine.register_aux_message_handler(topics.PIECE, self._piece)
        engine.register_aux_message_handler(topics.MORE, self._more)
        engine.register_aux_message_handler(topics.HELLO, self._hello)

    def execute(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal
    ) -> Shareable:
        """Refuse every task: nothing is asked that way."""
        return make_reply(ReturnCode.TASK_UNKNOWN)

    def _hello(self, topic: str, request: Shareable, fl_ctx: FLContext) -> Shareable:
        """Say whether the service is there; it is asked nothing."""
        assert self._socket is not None
        try:
            connect(self._socket).close()
        except Gone:
            return make_reply(ReturnCode.SERVICE_UNAVAILABLE)
        return make_reply(ReturnCode.OK)

    def _piece(self, topic: str, request: Shareable, fl_ctx: FLContext) -> Shareable:
        """Keep a piece of a message whose last piece is to come."""
        seconds = float(request[topics.SECONDS])
        fits = self._coming.add(int(request[topics.NUMBER]), request[topics.CONTENT], seconds)
        return make_reply(ReturnCode.OK if fits else ReturnCode.EXECUTION_EXCEPTION)

    def _message(self, topic: str, request: Shareable, fl_ctx: FLContext) -> Shareable:
        """Hand a whole message to the service; answer with its answer, or the first piece of it."""
        number, seconds = int(request[topics.NUMBER]), float(request[topics.SECONDS])
        if not self._coming.add(number, request[topics.CONTENT], seconds):
            return make_reply(ReturnCode.EXECUTION_EXCEPTION)
        try:
            heading, pieces = self._ask_service(number, str(request[topics.STAGE]), seconds)
        except Late:  # a service that is slow is there
            return make_reply(ReturnCode.TIMEOUT)
        except Gone:
            return make_reply(ReturnCode.SERVICE_UNAVAILABLE)
        if not heading.get("answered"):
            return make_reply(ReturnCode.EXECUTION_EXCEPTION)
        reply = make_reply(ReturnCode.OK)
        reply[topics.LENGTH] = sum(map(len, pieces))
        reply[topics.CONTENT] = first = pieces.popleft() if pieces else b""
        if pieces:
            self._leaving.keep(number, pieces, len(first), seconds)
        return reply

    def _ask_service(self, number: int, stage: str, seconds: float) -> tuple[Words, deque[bytes]]:
        """Write a message, let go of it before its answer comes, and return that in pieces.

        Raises:
          Late, Gone: the service does not answer in time, or at all.
        """
        assert self._socket is not None
        frames = connect(self._socket)
        try:
            frames.write_pieces({"ask": "answer", "stage": stage}, self._coming.take(number))
            answer = frames.read_pieces(PIECE, seconds)
        finally:
            frames.close()
        if answer is None:
            raise Late
        return answer

    def _more(self, topic: str, request: Shareable, fl_ctx: FLContext) -> Shareable:
        """Answer with another piece of an answer."""
        piece = self._leaving.piece(int(request[topics.NUMBER]), int(request[topics.PLACE]))
        if not piece:
            return make_reply(ReturnCode.EXECUTION_EXCEPTION)
        reply = make_reply(ReturnCode.OK)
        reply[topics.CONTENT] = piece
        return reply


class SiteLauncher(ClientProcessJobLauncher):  # type: ignore[misc]
    """Start a job's process where this site allowed the run, and tell nobody how it ended.

    The engine ends a job for everybody when one site reports that its process was killed; a federation goes
    on with those who are left, so a site reports success or nothing.

    Guarantee: no process starts for a run that the site's service does not allow, nor for a job that carries
    code, whatever the server sends or leaves out: this is the last gate, and it is local.
    """

    def launch_job(self, job_meta: Mapping[str, object], fl_ctx: FLContext) -> JobHandleSpec:
        """Start the process.

        Raises:
          NotAuthorized: the run is not allowed here, or the job brings code.
        """
        workspace: Workspace = fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT)
        code = Path(workspace.get_app_custom_dir(str(job_meta.get(JobMetaKey.JOB_ID.value, ""))))
        if code.exists() or not _is_allowed(job_meta, workspace):
            raise NotAuthorized(topics.NOT_ALLOWED)
        os.environ[worker_process.RELAY] = str(os.getpid())
        return _QuietHandle(super().launch_job(job_meta, fl_ctx))

    def get_command(self, job_meta: Mapping[str, object], fl_ctx: FLContext) -> str:
        """Return the engine's command, by way of what lets the process end with this one."""
        command = str(super().get_command(job_meta, fl_ctx))
        return command.replace(worker_process.ENGINES, worker_process.__name__)


class _QuietHandle(JobHandleSpec):  # type: ignore[misc]
    def __init__(self, inner: JobHandleSpec) -> None:
        self._inner = inner

    def terminate(self) -> None:
        self._inner.terminate()

    def wait(self) -> None:
        self._inner.wait()

    def poll(self) -> int:
        code = self._inner.poll()
        return int(JobReturnCode.SUCCESS if code == JobReturnCode.SUCCESS else JobReturnCode.UNKNOWN)


class RunApproval(Widget):  # type: ignore[misc]
    """Say early that nobody at this site has allowed a run: then the others start without it."""

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Answer the engine's question whether a command may be executed here."""
        if event_type != EventType.AUTHORIZE_COMMAND_CHECK:
            return
        if fl_ctx.get_prop(FLContextKey.COMMAND_NAME) not in _PLANNING:
            return
        meta = fl_ctx.get_prop(FLContextKey.SECURITY_ITEMS, {}).get(FLContextKey.JOB_META) or {}
        if not _is_allowed(meta, fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT)):
            fl_ctx.set_prop(FLContextKey.AUTHORIZATION_REASON, topics.NOT_ALLOWED, sticky=False)
            fl_ctx.set_prop(FLContextKey.AUTHORIZATION_RESULT, False, sticky=False)


def _is_allowed(meta: Mapping[str, object], workspace: Workspace | None) -> bool:
    """Ask the site's service, which holds the list of allowed runs; what cannot be asked is not allowed."""
    properties = meta.get(JobMetaKey.CUSTOM_PROPS.value)
    run = properties.get("run") if isinstance(properties, Mapping) else None
    if not isinstance(run, str) or workspace is None:
        return False
    socket = Path(workspace.get_root_dir()) / SITE_SOCKET
    try:
        heading, _ = ask(socket, {"ask": "allowed", "run": run}, seconds=topics.LOCAL_SECONDS)
    except Gone:
        return False
    return heading.get("allowed") is True
