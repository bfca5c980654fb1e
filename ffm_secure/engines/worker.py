"""Several sites in one process behind one relay: how a simulation outgrows a machine."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from defenses.errors import ProtocolError
from ffm_secure.agreed.loaded_model import LoadedModel, PublicFacts, load_model
from ffm_secure.config.federated import run_digest
from ffm_secure.config.run_file import RunConfig
from ffm_secure.errors import ConfigError
from ffm_secure.site.service import open_session
from ffm_secure.site.session import SiteSession
from ffm_secure.trainable import replicate
from ffm_secure.transport.envelope import REFUSAL, header_of

_KEPT: Final = 1  # models: a worker's sites take part in one run at a time


class SharedModels:
    """Load the model of a run once for every site of a process.

    Guarantee: each call returns tensors of its own for all that is trained, at their start; what is frozen is
    held once. Safe to call from several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loaded: dict[tuple[str, PublicFacts, Path | None], LoadedModel] = {}

    def load(self, config: RunConfig, base: Path, facts: PublicFacts) -> LoadedModel:
        """Return the model of a run; `base` is where the paths of a site's run file begin."""
        beside = base / Path(config.model.name).expanduser()
        key = (run_digest(config), facts, beside.resolve() if beside.exists() else None)
        with self._lock:
            if key not in self._loaded:
                while len(self._loaded) >= _KEPT:
                    self._loaded.popitem()
                self._loaded[key] = load_model(config, base, facts)
            loaded = self._loaded[key]
            return replace(loaded, trainable=replicate(loaded.trainable))


class Worker:
    """Answer for several sites, one after another; a message names its site.

    Guarantee: each site has its own folder, key, ledger, memory and policy, as in a process of its own, and
    refuses for itself. What this process protects is the sites from the coordinator, not from each other: it
    is for simulated sites, and for rows of one owner.
    """

    def __init__(self, sessions: Sequence[SiteSession]) -> None:
        self._sessions: Mapping[str, SiteSession] = {session.name: session for session in sessions}
        self._lock = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """Return the sites; the relay of the first carries for all."""
        return tuple(self._sessions)

    def prepare(self) -> None:
        """Load rows and models before anybody asks.

        Raises:
          FfmError: what is wrong with one, and what to do.
        """
        for session in self._sessions.values():
            session.prepare()

    def handle(self, stage: str, message: bytes) -> bytes:
        """Let the site that a message is for answer it; its signature is for that site to check."""
        try:
            session = self._sessions[header_of(message).site]
        except (ProtocolError, KeyError):
            return REFUSAL
        with self._lock:
            return session.handle(stage, message)

    def allows(self, run: str) -> bool:
        """Tell whether one of the sites has allowed a run; the others refuse it for themselves."""
        return any(session.allows(run) for session in self._sessions.values())

    def close(self) -> None:
        """Let go of every folder."""
        for session in self._sessions.values():
            session.close()


def open_worker(folders: Sequence[Path]) -> Worker:
    """Open the folders of several sites, and answer for them from now on.

    Raises:
      ConfigError, StoreError: what is wrong with one, and who must do what.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError("site start", ["a folder is named twice; one process serves a site once"])
    models = SharedModels()
    with contextlib.ExitStack() as opened:
        sessions = []
        for folder in folders:
            session = open_session(folder, load=models.load)
            opened.callback(session.close)
            sessions.append(session)
        opened.pop_all()
    return Worker(sessions)
