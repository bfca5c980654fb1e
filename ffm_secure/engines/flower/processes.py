"""Start the engine's long-lived processes: the coordinator's server and gate, a site's relay."""

from __future__ import annotations

import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from ffm_secure.engines.flower.folders import GATE, SECRET, SUPERLINK, read_gate_settings
from ffm_secure.engines.nvflare.certificates import CERTIFICATE, KEY, ROOT
from ffm_secure.engines.nvflare.processes import Process

_SERVER: Final = "from flwr.superlink.cli import flower_superlink; flower_superlink()"


def start_server(folder: Path) -> Process:
    """Start the engine's server of a coordinator's engine folder, on loopback alone and in memory."""
    port = str(read_gate_settings(folder).inner)
    command = (
        *(sys.executable, "-c", _SERVER, "--host", "127.0.0.1", "--port", port),
        *("--ssl-ca-certfile", str(folder / ROOT), "--ssl-certfile", str(folder / CERTIFICATE)),
        *("--ssl-keyfile", str(folder / KEY), "--enable-supernode-auth", "--isolation", "process"),
        *("--superexec-auth-secret-file", str(folder / SECRET), "--disable-runtime-dependency-installation"),
    )
    return Process(command, folder / SUPERLINK, settings=quiet(folder / SUPERLINK))


def start_gate(folder: Path) -> Process:
    """Start the gate of a coordinator's engine folder, on the federation's port."""
    command = (sys.executable, "-m", "ffm_secure.engines.flower.gate", str(folder))
    return Process(command, folder / GATE, settings=quiet(folder / GATE))


def start_relay(folder: Path) -> Process:
    """Start the relay of a site's engine folder."""
    command = (sys.executable, "-m", "ffm_secure.engines.flower.relay", str(folder))
    return Process(command, folder, settings=quiet(folder))


def quiet(home: Path) -> Mapping[str, str]:
    """Return the settings under which the engine asks nobody outside, and writes into its own folder."""
    return {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_LOG_LEVEL": "WARNING",
        "FLWR_HOME": str(home),
    }


def free_port() -> int:
    """Return a port of this machine that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
