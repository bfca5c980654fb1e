"""Names for values that come from libraries without a usable type: the whole list, with the reason of each.

`Any` stands alone nowhere else in `defenses`; `tests/test_architecture.py` holds this.
"""

from __future__ import annotations

from typing import Any, TypeAlias

AutogradContext: TypeAlias = Any  # torch hands it to forward and backward; what it holds is set by us
LibraryLayer: TypeAlias = Any  # a layer known by its class name: nn.Module types no attribute of it
LibraryObject: TypeAlias = Any  # ciphertexts, contexts and keys of compiled libraries that ship no types
LazyName: TypeAlias = Any  # what a package loads when somebody asks for it by name
