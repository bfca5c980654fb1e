"""Prior correction at home: the shared head, shifted by how often each class occurs at this owner."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ffm_secure.errors import ModelError
from ffm_secure.lifecycle.personal import AtHome
from ffm_secure.queries.base import Rows, head_of
from ffm_secure.queries.class_offsets import offsets


def prior_at_home(home: AtHome) -> Tensor:
    """Return the shared model whose bias is raised by the logarithm of each class's share at home.

    Assumes: the shared model answers as if every class were as common as any other, which class sums and
    `lifecycle.finish = "class_offsets"` see to. A class that never occurred counts as if it had once.
    Source: Menon et al. 2021, arXiv:2007.07314, section 4, with the sign of a known prior.
    Raises:
      ModelError: no linear head with a bias is trained.
    """
    head = head_of(home.trainable)
    if head.bias is None:
        raise ModelError("personal.kind = 'prior': the head has no bias to shift; choose head or few_steps")
    counts = np.bincount(Rows(encoded=home.rows).labels(), minlength=head.classes)
    own = home.start.detach().cpu().clone()
    rare_up = offsets(own.new_tensor(counts), deviation=0.0)
    own[head.bias] -= rare_up.to(own.dtype)
    return own
