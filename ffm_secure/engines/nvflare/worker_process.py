"""A job's process at a site, which ends with the relay that started it.

`python -m ffm_secure.engines.nvflare.worker_process` runs the engine's own. That one looks for its parent
once it has loaded everything: where the relay is killed before, it would stay for good.
"""

from __future__ import annotations

import os
import runpy
import threading
import time
from typing import Final

ENGINES: Final = "nvflare.private.fed.app.client.worker_process"
RELAY: Final = "FFM_SECURE_RELAY"
"""The setting that holds the number of the relay's process."""
_LOOK_EVERY: Final = 1.0  # seconds


def end_with(parent: int) -> None:
    """End this process, at once, when it has another parent than this: a process that is left gets one."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_EVERY)
        os._exit(1)

    threading.Thread(target=watch, name="relay", daemon=True).start()


def main() -> None:
    """Be the engine's process."""
    end_with(int(os.environ.pop(RELAY)))
    runpy.run_module(ENGINES, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
