"""A site's own log: what it refused and why, in words; nothing of it is sent."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Final

from ffm_secure.storage.durable import PRIVATE_FILE

_LARGEST: Final = 1 << 20
_KEPT: Final = 5
_ROOM: Final = "ffm_secure.site"
_speaking: contextvars.ContextVar[object] = contextvars.ContextVar("speaking", default=None)


class SiteLog:
    """Write what the code of this room logs, while one session speaks, into that site's file.

    Guarantee: its owner alone can read it; it is turned over at a mebibyte, and five older ones stay.
    """

    def __init__(self, path: Path) -> None:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, PRIVATE_FILE))
        self._handler = _File(path, maxBytes=_LARGEST, backupCount=_KEPT, encoding="utf-8")
        self._refused = ""
        self._handler.setFormatter(_Lines("%(asctime)s %(levelname)s %(message)s"))
        self._handler.addFilter(lambda _: _speaking.get() is self)
        self._logger = logging.getLogger(_ROOM)
        self._logger.addHandler(self._handler)
        self._logger.setLevel(min(self._logger.level or logging.INFO, logging.INFO))

    @contextmanager
    def speaking(self) -> Iterator[None]:
        """Let what is logged within go into this log."""
        token = _speaking.set(self)
        try:
            yield
        finally:
            _speaking.reset(token)

    def note(self, words: str) -> None:
        """Write what happened."""
        self._refused = ""
        with self.speaking():
            self._logger.info(words)

    def refuse(self, words: str) -> None:
        """Write what was refused and why; the same again and again is written once."""
        if words != self._refused:
            self._refused = words
            with self.speaking():
                self._logger.warning(words)

    def close(self) -> None:
        """Let go of the file."""
        self._logger.removeHandler(self._handler)
        self._handler.close()


class _File(RotatingFileHandler):
    """A log that a full disk does not silence: what it does not take, the service's own journal gets."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Write the line where the service's output goes; if that is the same full disk, nobody hears it."""
        with contextlib.suppress(OSError):
            sys.stderr.write(f"{self.baseFilename} cannot be written; free space. {self.format(record)}\n")


class _Lines(logging.Formatter):
    """One entry is one line, in UTC; no character that a terminal obeys is in it, whoever sent it."""

    converter = staticmethod(time.gmtime)
    default_msec_format = "%s.%03dZ"

    def format(self, record: logging.LogRecord) -> str:
        line = " | ".join(super().format(record).splitlines())
        return "".join(letter if letter.isprintable() else "?" for letter in line)


def unforeseen(error: BaseException) -> str:
    """Say where an error arose; its message may hold private data and is not written."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    places = ", ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
    return f"an unforeseen {type(error).__name__} at {places}; its message may be private and is not written"
