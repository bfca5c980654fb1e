"""Names for values that come from outside without a usable type: the whole list, with the reason of each.

`Any` stands alone nowhere else; `tests/test_architecture.py` holds this. A value of these kinds is read at
the edge and turned into a type of ours at once.
"""

from __future__ import annotations

from typing import Any, TypeAlias

Configuration: TypeAlias = Any  # of a transformers model: its attributes are those of one architecture
ModelTokenizer: TypeAlias = Any  # slow, fast and multimodal ones share no base class with the calls we make
LibraryModel: TypeAlias = Any  # nn.Module types every attribute as a tensor or a module; these hold both
ModelOutput: TypeAlias = Any  # every architecture returns a class of its own
LibraryObject: TypeAlias = Any  # of a package that ships no types, or that may be absent
JsonValue: TypeAlias = Any  # of a file of somebody else, until it is checked
Cells: TypeAlias = Any  # a column: list of str, bytes, dict or None, or an array with one row per example
Value: TypeAlias = Any  # of a field whose type is known at run time alone, read by its annotation
LazyName: TypeAlias = Any  # what a package loads when somebody asks for it by name
