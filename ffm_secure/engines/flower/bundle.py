"""The app bundle that stands for a run: it holds no code, and every site knows it by its digest.

The engine wants a bundle with every run. Nothing of ours unpacks it, at no machine: what answers at a site is
installed there. A site refuses a run whose bundle has another digest.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from typing import Final

RUN_KEY: Final = "run"
_WORDS: Final = f"""\
[project]
name = "relay"
version = "1.0.0"
description = "carries bytes between installed relays; holds no code"

[tool.flwr.app]
publisher = "ffm-secure"

[tool.flwr.app.components]
serverapp = "nothing:here"
clientapp = "nothing:here"

[tool.flwr.app.config]
{RUN_KEY} = ""
"""
_MADE: Final = (2024, 1, 1, 0, 0, 0)
_PLAIN_FILE: Final = 0o100600 << 16


def bundle() -> bytes:
    """Return the bundle: the same bytes on every machine, so that its digest can be compared."""
    entry = zipfile.ZipInfo("pyproject.toml", date_time=_MADE)
    entry.compress_type, entry.create_system, entry.external_attr = zipfile.ZIP_STORED, 3, _PLAIN_FILE
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(entry, _WORDS)
    return buffer.getvalue()


DIGEST: Final = hashlib.sha256(bundle()).hexdigest()
