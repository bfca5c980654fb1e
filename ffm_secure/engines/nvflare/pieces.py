"""Large messages in pieces, so that a relay never holds one twice; how many are on their way at a time."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

PIECE: Final = 4 << 20  # bytes: the engine holds one of these several times over
ROOM: Final = 1 << 30  # bytes of large messages that a relay holds in one direction at a time
LARGEST: Final = 1 << 33  # bytes of one message


class Parcel:
    """A message that is handed out piece by piece, and is gone when the last but one has been."""

    def __init__(self, content: bytes | memoryview) -> None:
        self._content: bytes | memoryview | None = content
        self.size = len(content)
        self.last = b""

    def before_last(self) -> Iterator[bytes]:
        """Yield every piece but the last, which stays in `last`; the message itself is let go of."""
        content, self._content = memoryview(self._content or b""), None
        place = 0
        while len(content) - place > PIECE:
            yield bytes(content[place : place + PIECE])
            place += PIECE
        self.last = bytes(content[place:])


class Room:
    """Let in what fits, and whatever is alone; the others wait."""

    def __init__(self, limit: int = ROOM) -> None:
        self._limit, self._used = limit, 0
        self._changed = threading.Condition()

    def enter(self, size: int, over: threading.Event) -> None:
        """Wait until so many bytes fit, or until everything is over."""
        with self._changed:
            while self._used and self._used + size > self._limit and not over.is_set():
                self._changed.wait(0.2)
            self._used += size

    def leave(self, size: int) -> None:
        """Make room."""
        with self._changed:
            self._used -= size
            self._changed.notify_all()


@dataclass(slots=True)
class _Part:
    until: float
    pieces: deque[bytes] = field(default_factory=deque)
    size: int = 0
    place: int = 0  # where the first of them begins


@dataclass(slots=True)
class Shelf:
    """What is put together, or taken away, piece by piece, by the number of its message.

    Guarantee: what nobody asks for again is let go of after its deadline, with the next use; all that comes
    together is never more than `limit` bytes, whoever sends it.
    """

    limit: int = LARGEST
    _parts: dict[int, _Part] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, number: int, piece: bytes, seconds: float) -> bool:
        """Put a piece behind those before it; keep nothing of a message that does not fit, and say so."""
        with self._lock:
            self._forget()
            part = self._parts.setdefault(number, _Part(until=0.0))
            if sum(other.size for other in self._parts.values()) + len(piece) > self.limit:
                del self._parts[number]
                return False
            part.pieces.append(piece)
            part.size += len(piece)
            part.until = time.monotonic() + seconds
            return True

    def keep(self, number: int, pieces: deque[bytes], place: int, seconds: float) -> None:
        """Keep the pieces of a message from a place on, for `piece`; they are not copied."""
        with self._lock:
            self._forget()
            size = sum(map(len, pieces))
            self._parts[number] = _Part(
                until=time.monotonic() + seconds, pieces=pieces, size=size, place=place
            )

    def take(self, number: int) -> deque[bytes]:
        """Return the pieces that have come, and keep nothing of them."""
        with self._lock:
            self._forget()
            part = self._parts.pop(number, None)
            return deque() if part is None else part.pieces

    def piece(self, number: int, place: int) -> bytes:
        """Return the piece that begins at a place, once: it is let go of."""
        with self._lock:
            self._forget()
            part = self._parts.get(number)
            if part is None or part.place != place or not part.pieces:
                return b""
            piece = part.pieces.popleft()
            part.place += len(piece)
            part.size -= len(piece)
            if not part.pieces:
                del self._parts[number]
            return piece

    def _forget(self) -> None:
        now = time.monotonic()
        for number in [number for number, part in self._parts.items() if part.until < now]:
            del self._parts[number]
