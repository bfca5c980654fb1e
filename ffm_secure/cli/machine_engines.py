"""The engines between machines, by name; each is imported when it is asked for."""

from __future__ import annotations

import importlib
from types import ModuleType

from ffm_secure.errors import ConfigError, FfmError

_ENROLMENT = "ffm_secure.engines.nvflare.enrolment"  # one for all engines: its certificates are ours
_ENGINES = {
    "nvflare": ("ffm_secure.engines.nvflare.running", _ENROLMENT),
    "flower": ("ffm_secure.engines.flower.running", _ENROLMENT),
}
_INSTALL = {
    "nvflare": "install it with: pip install 'ffm-secure[nvflare]'",
    "flower": "install it, in an environment of its own, with: pip install 'ffm-secure[flower]'",
}


def running(name: str) -> ModuleType:
    """Return what starts an engine: `serve_site` and `open_courier`.

    Raises:
      ConfigError: there is no engine of that name.
      FfmError: it is not installed.
    """
    return _load(name, 0)


def enrolment(name: str = "nvflare") -> ModuleType:
    """Return what asks for, signs and keeps an engine's certificates."""
    return _load(name, 1)


def _load(name: str, place: int) -> ModuleType:
    if name not in _ENGINES:
        raise ConfigError("--engine", [f"--engine = {name[:40]!r}: must be one of {', '.join(_ENGINES)}"])
    try:
        return importlib.import_module(_ENGINES[name][place])
    except ModuleNotFoundError as error:
        raise FfmError(f"the engine {name} needs {error.name}; {_INSTALL[name]}") from None
