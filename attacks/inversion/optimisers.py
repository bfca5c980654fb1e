"""What an optimiser does to rows that got no gradient, so that the rows that did stand out.

Decay moves every row. Under plain SGD, under momentum and under AdamW it multiplies a row without gradient
by one number, whatever the rates and the schedule: that number shows itself as the most frequent ratio of a
row's change to the row. Adam's own decay passes through its moments and is simulated, with the optimiser
itself on gradients of zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attacks.observation import Observation

_QUIET = 1e-3  # of the largest row's length: rows shorter than that hold rounding alone
_DECAYS = (
    1e-4,
    1e-3,
    1e-2,
    1e-1,
)  # tried for Adam's own decay where it is not known: steps hardly depend on it
_SAMPLE = 256  # rows on which they are told apart


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSteps:
    """The steps of one client: a kind of optimiser, the rate of every step, and what else moves untouched
    rows.
    """

    kind: str
    rates: tuple[float, ...]
    weight_decay: float | None
    momentum: float = 0.0
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)

    def optimiser(self, weight: Tensor) -> torch.optim.Optimizer:
        """Return the optimiser for one tensor."""
        rate, decay = self.rates[0], self.weight_decay or 0.0
        if self.kind == "adamw":
            return torch.optim.AdamW([weight], lr=rate, weight_decay=decay, betas=self.betas)
        if self.kind == "adam":
            return torch.optim.Adam([weight], lr=rate, weight_decay=decay, betas=self.betas)
        momentum = self.momentum
        return torch.optim.SGD(
            [weight], lr=rate, weight_decay=decay, momentum=momentum, nesterov=self.nesterov and momentum > 0
        )


def optimiser_kind(observation: Observation) -> str | None:
    """Return "sgd", "adam" or "adamw" as the client's optimiser is known,
    None where it is not or is another.
    """
    stated = str(observation.known("optimiser") or "").lower().replace("-", "").replace("_", "")
    if "adamw" in stated:
        return "adamw"
    if stated == "adam":
        return "adam"
    if "sgd" in stated or "momentum" in stated:
        return "sgd"
    return None


def local_steps(observation: Observation) -> LocalSteps | None:
    """Return the client's steps as far as they are known, None without optimiser or rate.

    A stated "momentum" that is not named counts as 0.9, the usual value.
    """
    kind, rate = optimiser_kind(observation), observation.known("learning_rate")
    if kind is None or not rate:
        return None
    count = int(observation.known("local_steps") or 1)
    momentum = observation.known("momentum")
    if momentum is None:
        momentum = 0.0
        if "momentum" in str(observation.known("optimiser")).lower():
            momentum = 0.9
    decay = observation.known("weight_decay")
    return LocalSteps(
        kind=kind,
        rates=tuple(scheduled(float(rate), count, str(observation.known("schedule") or "constant"))),
        weight_decay=None if decay is None and kind == "adam" else float(decay or 0.0),
        momentum=float(momentum),
        nesterov=bool(observation.known("nesterov")),
    )


def scheduled(rate: float, count: int, schedule: str) -> Iterator[float]:
    """Yield the rate of every local step: constant, or falling to zero on a line or half a cosine."""
    for step in range(count):
        share = step / count
        if schedule == "linear":
            yield rate * (1.0 - share)
        elif schedule == "cosine":
            yield rate * 0.5 * (1.0 + math.cos(math.pi * share))
        else:
            yield rate


def untouched(weight: Tensor, steps: LocalSteps) -> Tensor:
    """Return how far a tensor moves under the steps when its gradient is zero throughout."""
    moved = weight.detach().clone().requires_grad_(True)
    optimiser = steps.optimiser(moved)
    for rate in steps.rates:
        for group in optimiser.param_groups:
            group["lr"] = rate
        moved.grad = torch.zeros_like(moved)
        optimiser.step()
    return moved.detach() - weight.detach()


def common_ratio(change: Tensor, weight: Tensor) -> float:
    """Return the median over the rows of change to weight: what a linear optimiser did to rows without
    gradient.
    """
    lengths = weight.double().square().sum(1)
    held = lengths > 0
    ratios = (change.double() * weight.double()).sum(1)[held] / lengths[held]
    if len(ratios):
        return float(ratios.median())
    return 0.0


def without_untouched(observation: Observation, name: str, weight: Tensor, *, dense: bool) -> Tensor:
    """Return an observed change of a table (rows, width) less what its rows do without any gradient.

    Of what could have moved them (nothing, the steps as far as they are known, one common ratio) the one is
    taken that leaves most rows at rest. `dense` says that every row gets a gradient, as beside a tied head:
    then only known steps are taken out, for no row shows the ratio.
    """
    change = observation.tensors[name].double()
    steps = local_steps(observation)
    informative = None
    if steps is not None and steps.weight_decay is None:
        steps = replace(steps, weight_decay=_likely_decay(change / observation.contributors, weight, steps))
    if steps is not None and steps.weight_decay:
        informative = change - observation.contributors * untouched(weight.float(), steps).double()
    if dense:
        if informative is None:
            return change
        return informative
    ratio = common_ratio(change, weight)
    options = [change, *([] if informative is None else [informative]), change - ratio * weight.double()]
    return max(options, key=_at_rest)


def _likely_decay(change: Tensor, weight: Tensor, steps: LocalSteps) -> float:
    """Return the decay under which a sample of the rows moved as it did."""
    places = torch.linspace(0, len(weight) - 1, min(_SAMPLE, len(weight))).long()

    def misfit(decay: float) -> float:
        path = untouched(weight[places].float(), replace(steps, weight_decay=decay))
        left: Tensor = torch.linalg.vector_norm(change[places] - path.double(), dim=1)
        return float(left.median())

    return min(_DECAYS, key=misfit)


def _at_rest(change: Tensor) -> tuple[float, float]:
    """Return the share of rows that hold but rounding, and for want of them how short the middle one is."""
    lengths: Tensor = torch.linalg.vector_norm(change, dim=1)
    longest = float(lengths.max())
    if longest == 0.0:
        return 1.0, 0.0
    share = float((lengths <= _QUIET * longest).double().mean())
    return round(share, 2), -float(lengths.median()) / longest
