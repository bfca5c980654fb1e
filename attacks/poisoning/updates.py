"""What a malicious client sends instead of what it learned.

Every attack is a function of the client's own honest update [d] and of the honest updates of all malicious
clients together [k, d], which is all that colluding clients can know of a round.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import NormalDist

import torch
from torch import Tensor

UpdateAttack = Callable[[Tensor, Tensor], Tensor]


def sign_flip(own: Tensor, known: Tensor, *, factor: float = 1.0) -> Tensor:
    """Send the opposite of what was learned, `factor` times as long.

    Source: Li et al. 2019, arXiv:1811.03761 (there as reversed gradients).
    """
    return -factor * own


def scaling(own: Tensor, known: Tensor, *, factor: float) -> Tensor:
    """Send what was learned, `factor` times as long: by itself it counts for more, with a backdoor it
    replaces the model.

    Source: Bagdasaryan et al. 2020, arXiv:1807.00459, section 4.2.
    """
    return factor * own


def little_is_enough(own: Tensor, known: Tensor, *, deviations: float) -> Tensor:
    """Send the mean of honest updates, moved in every coordinate by a few of their standard deviations.

    Source: Baruch et al. 2019, arXiv:1902.06156, Algorithm 3.
    """
    if len(known) < 2:
        return known.mean(dim=0) - deviations * known.abs().mean(dim=0)
    return known.mean(dim=0) - deviations * known.std(dim=0)


def hidden_deviations(clients: int, attackers: int) -> float:
    """Return how many standard deviations are hidden among the honest: still nearer to the mean than enough
    of them.

    >>> round(hidden_deviations(50, 24), 2)
    1.43
    """
    supporters = clients // 2 + 1 - attackers
    honest = max(1, clients - attackers)
    share = min(max((honest - supporters) / honest, 0.5), 1.0 - 1e-6)
    return NormalDist().inv_cdf(share)


def inner_product(own: Tensor, known: Tensor, *, factor: float = 0.5) -> Tensor:
    """Send the mean of honest updates against its direction, small enough to look like one of them.

    Source: Xie et al. 2020, arXiv:1903.03936.
    """
    return -factor * known.mean(dim=0)


def update_attack(name: str, *, clients: int, attackers: int, factor: float = 10.0) -> UpdateAttack:
    """Return an attack by name, with the strength its paper would choose against so many clients.

    Raises: KeyError naming the known attacks.
    """
    known: dict[str, UpdateAttack] = {
        "sign_flip": partial(sign_flip, factor=factor),
        "scaling": partial(scaling, factor=factor),
        "little_is_enough": partial(
            little_is_enough, deviations=hidden_deviations(clients, max(1, attackers))
        ),
        "inner_product": partial(inner_product, factor=0.5),
    }
    if name not in known:
        raise KeyError(f"no poisoned update named {name!r}; known: {', '.join(sorted(known))}")
    return known[name]


def stacked(updates: list[Tensor]) -> Tensor:
    """Return updates [d] as the [k, d] an attack is given."""
    return torch.stack(updates)
