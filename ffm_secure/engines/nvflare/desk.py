"""Where jobs are submitted: the engine's own interface for that, opened anew when the server was away."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ffm_secure.engines.nvflare.folders import write_job

if TYPE_CHECKING:
    from nvflare.fuel.flare_api.flare_api import Session

_LOG = logging.getLogger(__name__)
_LOGIN_SECONDS = 10.0
logging.getLogger("nvflare").addHandler(logging.NullHandler())  # what it says goes where logging was set up


class Desk:
    """Submit and end jobs under the coordinator's certificate. To be used from one thread."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._session: Session | None = None

    def connected(self) -> Mapping[str, float]:
        """Return when each relay that is registered last spoke to the server, in seconds since 1970."""
        session = self._open()
        if session is None:
            return {}
        try:
            clients = session.get_system_info().client_info
        except Exception:  # the engine raises what its network raises
            self._drop("could not ask who is connected")
            return {}
        return {str(item.name): float(item.last_connect_time or time.time()) for item in clients}

    def submit(self, sites: Sequence[str], run: str) -> str | None:
        """Submit a job for sites; return its name, or nothing when the server cannot be reached."""
        session = self._open()
        if session is None:
            return None
        try:
            with tempfile.TemporaryDirectory(dir=self._folder / "transfer") as folder:
                return str(session.submit_job(str(write_job(Path(folder), sites=sites, run=run))))
        except Exception:
            self._drop("could not submit a job")
            return None

    def abort(self, identifier: str) -> None:
        """End a job that never began."""
        session = self._open()
        if session is not None:
            with contextlib.suppress(Exception):
                session.abort_job(identifier)

    def close(self) -> None:
        """Log out."""
        if self._session is not None:
            with contextlib.suppress(Exception):
                self._session.close()
            self._session = None

    def _open(self) -> Session | None:
        if self._session is None:
            os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # a child becomes another program at once
            from nvflare.fuel.flare_api.flare_api import new_secure_session

            try:
                with contextlib.redirect_stdout(None):
                    self._session = new_secure_session(
                        self._name, str(self._folder), timeout=_LOGIN_SECONDS, auto_login_max_tries=1
                    )
            except Exception:
                self._drop("the server cannot be reached")
        return self._session

    def _drop(self, why: str) -> None:
        _LOG.info("%s", why, exc_info=_LOG.isEnabledFor(logging.DEBUG))
        self.close()
