"""The orders at which every log-moment is kept, so that curves of different events can be added."""

from __future__ import annotations


import numpy as np
import numpy.typing as npt

ORDERS: npt.NDArray[np.float64] = np.geomspace(1e-3, 1e9, 120)
