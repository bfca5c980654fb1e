"""What is sent of an update: a public linear map before every bound, noise and mask, undone after the sum.

A kind of its own is one file with a function that builds it from a `Setting`, and one line in
`registry.COMPRESSIONS`.
"""

from __future__ import annotations

from torch import Tensor

from ffm_secure.compression.base import Compression, PublicState, Setting
from ffm_secure.config.run_file import RunConfig
from ffm_secure.errors import PlanRefused
from ffm_secure.registry import COMPRESSIONS
from ffm_secure.strategies.base import Strategy


def build(config: RunConfig, strategy: Strategy, trained: int) -> Compression:
    """Return the compression of a run for what its strategy sends of `trained` numbers.

    Raises:
      PlanRefused: the kind reads how far the model has moved, and the strategy sends something else.
    """
    kind, size = config.compression.kind, strategy.size(trained)
    setting = Setting(config=config.compression, seed=config.seed, size=size)
    compression: Compression = COMPRESSIONS.load(kind)(setting)
    same = type(strategy).message is Strategy.message and size == trained
    if compression.follows and not same:
        raise PlanRefused(
            [
                f"compression.kind = '{kind}' with federation.strategy.kind = "
                f"'{config.federation.strategy.kind}': its messages are no changes of the broadcast numbers; "
                "use projection, rotation or bits"
            ]
        )
    return compression


def first_vector(compression: Compression, vector: Tensor) -> Tensor:
    """Return what a run has to remember of the vector it begins with: nothing where nobody reads it."""
    if compression.follows:
        return vector.detach().cpu().float().clone()
    return vector.new_zeros(0).cpu()


__all__ = ["Compression", "PublicState", "Setting", "build", "first_vector"]
