"""The door of a site's own service: the relay hands messages in, and asks whether a run is allowed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from ffm_secure.engines.nvflare.folders import SITE_SOCKET
from ffm_secure.transport.local_socket import Answering, Words

_LOG = logging.getLogger(__name__)
Handle = Callable[[str, bytes], bytes | memoryview]
Allows = Callable[[str], bool]


def serve(folder: Path, handle: Handle, allows: Allows) -> Answering:
    """Answer the relay of a site's engine folder until the door is closed.

    `handle` answers a message of a stage; `allows` says whether a run, by its digest, was allowed here.
    Guarantee: why a message was refused is in the site's own log; what is sent says only that it was.
    """

    def answer(words: Words, content: bytes) -> tuple[Words, bytes | memoryview]:
        if words.get("ask") == "allowed":
            return {"allowed": _is_allowed(allows, str(words.get("run")))}, b""
        try:
            return {"answered": True}, handle(str(words.get("stage")), content)
        except Exception as error:  # nothing a site's code raises may reach the wire
            _LOG.warning("a message of stage %r was refused: %s", words.get("stage"), type(error).__name__)
            return {"answered": False}, b""

    return Answering(folder / SITE_SOCKET, answer)


def _is_allowed(allows: Allows, run: str) -> bool:
    try:
        return allows(run)
    except Exception as error:
        _LOG.warning("whether a run is allowed could not be read: %s", type(error).__name__)
        return False
