"""The orders at which every log-moment is kept, so that curves of different events can be added."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

ORDERS: npt.NDArray[np.floating[Any]] = np.geomspace(1e-3, 1e9, 120)
