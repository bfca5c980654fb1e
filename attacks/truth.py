"""The private data behind an observation: read by scoring alone, never by an attack (a test enforces it)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """Hold what the client really trained on; None where a kind of data does not exist.

    `sequences` are token ids without padding, `images` is (n, channels, height, width), `facts` are token spans that
    name personal facts as (sequence index, start, stop), `members` says for each audited candidate whether it was
    used.
    """

    sequences: tuple[tuple[int, ...], ...] | None = None
    images: Tensor | None = None
    inputs: Tensor | None = None
    labels: tuple[int, ...] | None = None
    classes: int | None = None
    facts: tuple[tuple[int, int, int], ...] = ()
    members: tuple[bool, ...] | None = None
    properties: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "properties", MappingProxyType(dict(self.properties)))
