"""Frames between two processes of one party on one machine, over a socket in its folder."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from ffm_secure.errors import StoreError

Words = Mapping[str, str | int | float | bool | list[str]]
"""The header of a frame: inert words and numbers."""
Answer = Callable[[Words, bytes], tuple[Words, bytes | memoryview]]

_HEAD = struct.Struct("<4sIQ")  # magic and version, bytes of the header, bytes of the content
_MAGIC = b"ffm1"
_LARGEST_HEADER = 1 << 20
_LARGEST_CONTENT = 1 << 33
_LONGEST_PATH = 100  # the system's limit is 108


class Gone(ConnectionError):
    """The other process has gone, does not exist, or does not speak this protocol."""


class Late(Gone):
    """The other process is there, and has not answered in time."""


class Frames:
    """One connection: frames in, frames out.

    Guarantee: `write` may be called from several threads; a frame is never mixed with another.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._writing = threading.Lock()

    def write(self, words: Words, content: bytes | bytearray | memoryview = b"") -> None:
        """Send one frame.

        Raises:
          Gone: nobody reads.
        """
        header = json.dumps(words).encode()
        with self._writing:
            try:
                self._connection.sendall(_HEAD.pack(_MAGIC, len(header), len(content)) + header)
                if len(content):
                    self._connection.sendall(content)
            except OSError:
                raise Gone from None

    def write_pieces(self, words: Words, pieces: deque[bytes]) -> None:
        """Send one frame whose content comes in pieces; each is let go of when it was sent.

        Raises:
          Gone: nobody reads.
        """
        header, size = json.dumps(words).encode(), sum(map(len, pieces))
        with self._writing:
            try:
                self._connection.sendall(_HEAD.pack(_MAGIC, len(header), size) + header)
                while pieces:
                    self._connection.sendall(pieces.popleft())
            except OSError:
                raise Gone from None

    def read(self, seconds: float | None = None) -> tuple[Words, bytes] | None:
        """Return the next frame, or nothing when none begins within `seconds`.

        Raises:
          Gone: the connection has ended, or what comes is no frame.
        """
        try:
            begun = self._begin(seconds)
            return None if begun is None else (begun[0], self._exactly(begun[1]))
        except (OSError, ValueError):
            raise Gone from None

    def read_pieces(self, size: int, seconds: float | None = None) -> tuple[Words, deque[bytes]] | None:
        """Return the next frame as `read` does, its content in pieces of `size` bytes and a last one."""
        try:
            begun = self._begin(seconds)
            if begun is None:
                return None
            words, left = begun
            pieces: deque[bytes] = deque()
            while left:
                pieces.append(self._exactly(min(size, left)))
                left -= len(pieces[-1])
            return words, pieces
        except (OSError, ValueError):
            raise Gone from None

    def _begin(self, seconds: float | None) -> tuple[Words, int] | None:
        """Return the header of the next frame and the bytes of its content."""
        if seconds is not None and not select.select([self._connection], [], [], max(0.0, seconds))[0]:
            return None
        magic, header, content = _HEAD.unpack(self._exactly(_HEAD.size))
        if magic != _MAGIC or header > _LARGEST_HEADER or content > _LARGEST_CONTENT:
            raise Gone
        return json.loads(self._exactly(header)), content

    def close(self) -> None:
        """End the connection; whoever waits at either end is woken."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _exactly(self, size: int) -> bytes:
        """Read so many bytes; the system fills them in place, so that a large frame exists once."""
        content = self._connection.recv(size, socket.MSG_WAITALL) if size else b""
        if len(content) == size:
            return content
        buffer = bytearray(content)
        while len(buffer) < size:
            piece = self._connection.recv(size - len(buffer), socket.MSG_WAITALL)
            if not piece:
                raise Gone
            buffer += piece
        return bytes(buffer)


class Door:
    """A socket in a private folder at which one process of a party waits for another.

    Guarantee: only this user can connect; a socket that a killed process left behind is replaced.

    Raises:
      StoreError: another process waits there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._closing = False
        _require_nobody(path)
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with _reachable(path) as name:
            self._listener.bind(name)
        path.chmod(0o600)
        self._listener.listen(64)

    def accept(self, seconds: float | None = None) -> Frames | None:
        """Return the next connection, or nothing when none comes within `seconds` or the door has closed."""
        try:
            if seconds is not None and not select.select([self._listener], [], [], max(0.0, seconds))[0]:
                return None
            connection, _ = self._listener.accept()
        except (OSError, ValueError):
            return None
        return Frames(connection)

    @property
    def closed(self) -> bool:
        """Tell whether the door was closed."""
        return self._closing

    def close(self) -> None:
        """Accept nobody any more and take the socket away."""
        self._closing = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._path.unlink(missing_ok=True)


def _require_nobody(path: Path) -> None:
    try:
        connect(path).close()
    except Gone:
        return
    raise StoreError(f"{path}: another process serves this folder; stop that one first")


def connect(path: Path) -> Frames:
    """Connect to the process behind a door.

    Raises:
      Gone: there is none.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _reachable(path) as name:
            connection.connect(name)
    except OSError:
        connection.close()
        raise Gone from None
    return Frames(connection)


def ask(path: Path, words: Words, content: bytes = b"", *, seconds: float) -> tuple[Words, bytes]:
    """Ask the process behind a door one thing.

    Raises:
      Late: it does not answer in time.
      Gone: it does not exist, or ends.
    """
    frames = connect(path)
    try:
        frames.write(words, content)
        answer = frames.read(seconds)
    finally:
        frames.close()
    if answer is None:
        raise Late
    return answer


class Answering:
    """Answer whoever comes to a door, each in a thread of its own.

    Guarantee: what `answer` raises ends that connection alone.
    """

    def __init__(self, path: Path, answer: Answer) -> None:
        self._door, self._answer = Door(path), answer
        self._open: set[Frames] = set()
        self._lock = threading.Lock()
        self._waiting = threading.Thread(target=self._wait, daemon=True)
        self._waiting.start()

    def close(self) -> None:
        """Accept nobody any more and end every connection."""
        self._door.close()
        with self._lock:
            remaining = tuple(self._open)
        for frames in remaining:
            frames.close()
        self._waiting.join(5)

    def _wait(self) -> None:
        while not self._door.closed:
            frames = self._door.accept(0.5)
            if frames is None:
                continue
            with self._lock:
                self._open.add(frames)
            threading.Thread(target=self._talk, args=(frames,), daemon=True).start()

    def _talk(self, frames: Frames) -> None:
        try:
            while (asked := frames.read()) is not None:
                frames.write(*self._answer(*asked))
        except Gone:
            pass
        finally:
            frames.close()
            with self._lock:
                self._open.discard(frames)


@contextlib.contextmanager
def _reachable(path: Path) -> Iterator[str]:
    """Name a socket in few enough characters, whatever the length of its path."""
    if len(os.fsencode(path)) <= _LONGEST_PATH:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def wait_until(condition: Callable[[], bool], seconds: float, step: float = 0.05) -> bool:
    """Wait until something holds; tell whether it does."""
    closes = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > closes:
            return False
        time.sleep(step)
    return True
