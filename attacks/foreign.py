"""Names for values that come from outside without a usable type: the whole list, with the reason of each.

`Any` stands alone nowhere else in `attacks`; `tests/test_architecture.py` holds this.
"""

from __future__ import annotations

from typing import Any, TypeAlias

AutogradContext: TypeAlias = Any  # torch hands it to forward and backward; what it holds is set by us
Configuration: TypeAlias = Any  # of a transformers model: its attributes are those of one architecture
LibraryModel: TypeAlias = Any  # nn.Module types every attribute as a tensor or a module; these hold both
Tokenizer: TypeAlias = Any  # slow and fast ones share no base class with the calls we make
ModelOutput: TypeAlias = Any  # every architecture returns a class of its own
Unknown: TypeAlias = Any  # what a call of torch takes and returns, where calls are only counted
StatedFact: TypeAlias = Any  # a fact somebody stated in a file; `attacks.facts` says what it has to be
