"""A run whose sites keep what left them, and whose coordinator's every byte is noted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ffm_secure.site.site_file import SelfAudit
from ffm_secure.transport.courier import Lost, Reply
from tests.parties.helpers import Direct, Federation, found, notes_run, open_all, run


class Overheard(Direct):
    """Note what every site answers, as the server gets it."""

    def __init__(self, sessions: Direct) -> None:
        super().__init__(sessions.sessions)
        self.answers: dict[tuple[str, int], list[bytes]] = {}

    def send(self, stage: str, messages: Mapping[int, bytes]) -> Iterator[Reply]:
        for reply in super().send(stage, messages):
            if not isinstance(reply.content, Lost):
                self.answers.setdefault((stage, reply.site), []).append(bytes(reply.content))
            yield reply


def recorded_run(place: Path, **sections: Any) -> tuple[Federation, Overheard]:
    federation = found(place, notes_run(**sections), record=SelfAudit(rounds=2))
    overheard = Overheard(open_all(federation))
    try:
        run(federation, overheard)
    finally:
        overheard.close()
    return federation, overheard
