"""Ctrl-C with patience: the first lets the round that is paid for finish, the second leaves it."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def patience() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether the run should end after this round; a second Ctrl-C interrupts at
    once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        sys.stderr.write("finishing this round, which is paid for; Ctrl-C again leaves it and what it cost\n")

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
