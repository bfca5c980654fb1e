"""Every number is sent: as it is, or in a narrower field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ffm_secure.compression.base import Compression, Setting


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole(Compression):
    """Change nothing; with `compression.field_bits` the grid is as fine as that field allows."""

    kind: ClassVar[str] = "whole"
    size: int

    @property
    def length(self) -> int:  # type: ignore[override]  # follows from the size
        """Return how many numbers are sent."""
        return self.size


def build(setting: Setting) -> Whole:
    """Return the identity."""
    return Whole(size=setting.size)
