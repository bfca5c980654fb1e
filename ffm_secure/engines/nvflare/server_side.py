"""What runs inside the engine's process at the coordinator: bytes from its socket to the sites and back."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from nvflare.apis.client import Client
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.apis.workspace import Workspace

from ffm_secure.engines.nvflare import topics
from ffm_secure.engines.nvflare.folders import COURIER_SOCKET
from ffm_secure.engines.nvflare.pieces import LARGEST, Parcel, Room
from ffm_secure.transport.local_socket import Frames, Gone, Words, connect

_LOOK_EVERY = 0.25  # seconds between looks at whether the job was ended
_ALIVE_EVERY = 2.0  # seconds between words with a site that is busy
_SILENCES = 3  # so many unanswered words, and a site that is busy counts as gone


class RelayController(Controller):  # type: ignore[misc]
    """Carry what comes from the coordinator's process to the sites, each in a thread, and the answers back.

    The job lasts as long as the coordinator's process keeps its connection: when that ends, so does the job.
    """

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Do nothing yet."""

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """Do nothing more."""

    def process_result_of_unknown_task(
        self, client: Client, task_name: str, client_task_id: str, result: Shareable, fl_ctx: FLContext
    ) -> None:
        """Ignore what was not asked."""

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Relay until the coordinator's process goes or the job is ended."""
        workspace: Workspace = fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT)
        try:
            frames = connect(Path(workspace.get_root_dir()) / COURIER_SOCKET)
            relay = _Relay(fl_ctx.get_engine(), frames)
            relay.announce(fl_ctx.get_job_id())
            relay.run(abort_signal)
        except Gone:
            self.log_info(fl_ctx, "the coordinator's process has gone; this job ends")


class _Relay:
    """The threads of one job."""

    def __init__(self, engine: object, frames: Frames) -> None:
        self._engine, self._frames = engine, frames
        self._over = threading.Event()
        self._sending, self._fetching = Room(), Room()

    def announce(self, job: str) -> None:
        """Say which job this is and begin to greet the sites that are in it."""
        names = [str(client.name) for client in self._engine.get_clients()]  # type: ignore[attr-defined]
        self._frames.write({"say": "job", "job": job, "process": os.getpid(), "sites": names})
        for name in names:
            self._start(self._greet, name)

    def run(self, abort_signal: Signal) -> None:
        """Carry messages until the connection ends."""
        try:
            while not abort_signal.triggered:
                asked = self._frames.read(_LOOK_EVERY)
                if asked is not None:
                    words, parcel = asked[0], Parcel(asked[1])
                    del asked
                    self._sending.enter(parcel.size, self._over)  # while it waits, the coordinator does
                    self._start(self._carry, words, parcel)
                    del parcel
        finally:
            self._over.set()
            self._frames.close()

    def _start(self, work: object, *arguments: object) -> None:
        threading.Thread(target=self._until_over, args=(work, *arguments), daemon=True).start()

    def _until_over(self, work: object, *arguments: object) -> None:
        try:
            work(*arguments)  # type: ignore[operator]
        except Gone:
            self._over.set()

    def _greet(self, name: str) -> None:
        """Ask a site for a word until it answers, then say that it has joined.

        A relay that has waited for its service and falls silent itself is lost: it comes back in another job.
        """
        waits, heard = False, time.monotonic()
        while not self._over.is_set():
            code = self._hello(name, 1.0)
            if code == ReturnCode.OK:
                self._frames.write({"say": "joined", "site": name})
                return
            if code == ReturnCode.SERVICE_UNAVAILABLE:
                heard = time.monotonic()
                if not waits:
                    self._frames.write({"say": "waits", "site": name})
                waits = True
            elif waits and time.monotonic() - heard > _SILENCES * _ALIVE_EVERY:
                self._frames.write({"say": "lost", "site": name})
                waits = False
            self._over.wait(0.2)

    def _carry(self, words: Words, parcel: Parcel) -> None:
        """Bring a message to its site, piece by piece, and the answer back."""
        name, number = str(words["site"]), int(str(words["number"]))
        stage, deadline = str(words["stage"]), float(str(words["deadline"]))
        try:
            code = self._deliver(name, number, parcel, deadline)
        finally:
            self._sending.leave(parcel.size)
        reply = None
        if code == ReturnCode.OK:
            request = Shareable()
            request[topics.STAGE], request[topics.NUMBER] = stage, number
            request[topics.CONTENT] = parcel.last
            code, reply = self._exchange(name, topics.MESSAGE, request, deadline)
        if code != ReturnCode.OK or reply is None:
            self._report(name, number, code, None)
            return
        length = int(reply[topics.LENGTH])
        if not 0 <= length <= LARGEST:
            self._report(name, number, ReturnCode.EXECUTION_EXCEPTION, None)
            return
        self._fetching.enter(length, self._over)
        try:
            code, answer = self._fetch(name, number, reply, deadline)
            del reply
            self._report(name, number, code, answer)
        finally:
            self._fetching.leave(length)

    def _deliver(self, name: str, number: int, parcel: Parcel, deadline: float) -> str:
        """Send every piece of a message but its last."""
        for piece in parcel.before_last():
            request = Shareable()
            request[topics.NUMBER], request[topics.CONTENT] = number, piece
            code, _ = self._exchange(name, topics.PIECE, request, deadline)
            if code != ReturnCode.OK:
                return code
        return str(ReturnCode.OK)

    def _fetch(
        self, name: str, number: int, first: Shareable, deadline: float
    ) -> tuple[str, deque[bytes] | None]:
        """Return every piece of an answer whose first piece has come."""
        length, pieces = int(first[topics.LENGTH]), deque((first[topics.CONTENT],))
        place = len(pieces[0])
        while place < length:
            request = Shareable()
            request[topics.NUMBER], request[topics.PLACE] = number, place
            code, reply = self._exchange(name, topics.MORE, request, deadline)
            if code != ReturnCode.OK or reply is None:
                return code, None
            piece = reply[topics.CONTENT]
            if not piece:
                return str(ReturnCode.EXECUTION_EXCEPTION), None
            pieces.append(piece)
            place += len(piece)
        return str(ReturnCode.OK), pieces if place == length else None

    def _report(self, name: str, number: int, code: str, answer: deque[bytes] | None) -> None:
        """Tell the coordinator's process what came of a message."""
        away = _AWAY.get(code, "")
        answered = code == ReturnCode.OK and answer is not None
        heading = {"say": "answer", "number": number, "site": name, "answered": answered, "away": away}
        self._frames.write_pieces(heading, answer if answered and answer is not None else deque())
        if away:
            self._start(self._greet, name)

    def _exchange(
        self, name: str, topic: str, request: Shareable, deadline: float
    ) -> tuple[str, Shareable | None]:
        """Wait for one answer until the deadline, and no longer than the site is alive."""
        seconds = deadline - time.time()
        if seconds <= 0:
            return ReturnCode.TIMEOUT, None
        request[topics.SECONDS] = seconds
        arrived: queue.SimpleQueue[Shareable | None] = queue.SimpleQueue()
        waiting = threading.Thread(
            target=lambda: arrived.put(self._ask(name, topic, request, seconds)), daemon=True
        )
        waiting.start()
        silences = 0
        while not self._over.is_set():
            try:
                reply = arrived.get(timeout=_ALIVE_EVERY)
                if reply is None:
                    return ReturnCode.COMMUNICATION_ERROR, None
                return str(reply.get_return_code()), reply
            except queue.Empty:
                alive = self._hello(name, topics.HELLO_SECONDS) in _ALIVE
                silences = 0 if alive else silences + 1
                if silences >= _SILENCES:
                    break
        return ReturnCode.COMMUNICATION_ERROR, None

    def _hello(self, name: str, seconds: float) -> str:
        reply = self._ask(name, topics.HELLO, Shareable(), seconds)
        return ReturnCode.COMMUNICATION_ERROR if reply is None else str(reply.get_return_code())

    def _ask(self, name: str, topic: str, request: Shareable, seconds: float) -> Shareable | None:
        engine = self._engine
        with engine.new_context() as fl_ctx:  # type: ignore[attr-defined]
            replies = engine.send_aux_request(  # type: ignore[attr-defined]
                targets=[name], topic=topic, request=request, timeout=seconds, fl_ctx=fl_ctx, optional=True
            )
        reply = (replies or {}).get(name)
        return reply if isinstance(reply, Shareable) else None


_ALIVE = frozenset({ReturnCode.OK, ReturnCode.SERVICE_UNAVAILABLE})
_AWAY: Mapping[str, str] = {
    ReturnCode.SERVICE_UNAVAILABLE: "waits",  # the relay is there: this job reaches the site again by itself
    ReturnCode.COMMUNICATION_ERROR: "lost",
    ReturnCode.TOPIC_UNKNOWN: "lost",
}
