"""What a client in training mode gives away in its running statistics: the means and variances of its own
batches.

A batch normalisation in training mode moves its buffers to (1 - m) old + m batch, with m the public
momentum. The change of the buffers over one step is therefore the batch's statistics, to rounding; over
several, their average, later steps counting more. Behind a first convolution the mean over all places is
linear in the mean colour of the pictures.

Source: own derivation; the statistics as a prior are those of Yin et al., "See through Gradients", 2021,
equation 9.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attacks.contract import Attack, Budget, Finding, Item, NotApplicable, PlainAttack, Prior, working_copy
from attacks.observation import Observation

_FREE = 100.0  # how much freer a colour is than the deviations at the borders

_Norm = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Statistics:
    """The mean and the unbiased variance per channel of what a normalisation saw, averaged over steps and
    clients.
    """

    mean: Tensor
    variance: Tensor


def client_statistics(observation: Observation, model: nn.Module) -> dict[str, Statistics]:
    """Return the statistics of the client's batches by the name of the normalisation, in the model's order.

    `model` holds the broadcast weights and buffers. Empty where no buffer moved: the client did not train in
    training mode, or its buffers were not sent.
    """
    if observation.content != "delta":
        return {}
    steps = int(observation.known("local_steps") or 1)
    read = {}
    for name, module in model.named_modules():
        if not isinstance(module, _Norm) or not module.momentum:
            continue
        statistics = []
        for kind in ("running_mean", "running_var"):
            statistics.append(
                _average(observation, f"{name}.{kind}", getattr(module, kind), float(module.momentum), steps)
            )
        if statistics[0] is not None and statistics[1] is not None:
            read[name] = Statistics(mean=statistics[0], variance=statistics[1])
    return read


def _average(
    observation: Observation, name: str, old: Tensor | None, momentum: float, steps: int
) -> Tensor | None:
    change = observation.tensors.get(name)
    if change is None or old is None or not bool(change.any()):
        return None
    forgotten = 1.0 - (1.0 - momentum) ** steps
    return change.double() / (observation.contributors * forgotten) + old.double()


def with_client_statistics(observation: Observation, model: nn.Module) -> nn.Module:
    """Put the client's own statistics into the buffers of a private copy, where they were observed; return
    the copy.
    """
    for name, statistics in client_statistics(observation, model).items():
        module = model.get_submodule(name)
        assert isinstance(module, _Norm)
        if module.running_mean is not None and module.running_var is not None:
            with torch.no_grad():
                module.running_mean.copy_(statistics.mean)
                module.running_var.copy_(statistics.variance.clamp_min(0.0))
    return model


def mean_colour(
    model: nn.Module, statistics: Mapping[str, Statistics], shape: tuple[int, ...]
) -> Tensor | None:
    """Return the mean colour (channels,) of the client's pictures, or None where no first convolution is
    normalised.
    """
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    name = next(iter(statistics), None)
    if first is None or name is None or len(shape) != 3 or first.in_channels != shape[0]:
        return None
    if len(statistics[name].mean) != first.out_channels:
        return None
    with torch.no_grad():
        nothing = torch.zeros(1, *shape, dtype=first.weight.dtype)
        offset = first(nothing).double().mean(dim=(0, 2, 3))
        ones = torch.eye(shape[0], dtype=first.weight.dtype)[:, :, None, None].expand(-1, -1, *shape[1:])
        answers = first(ones).double().mean(dim=(2, 3)) - offset  # (channels, out)
    # A picture's borders make each tap of the kernel see a little more or less of it: the least such
    # deviations that explain
    # the means are solved along with the colour, which costs next to nothing in the norm that is kept small.
    deviations = first.weight.detach().double().flatten(1)
    system = torch.cat([_FREE * answers.T, deviations], dim=1)
    solved = torch.linalg.lstsq(system, (statistics[name].mean - offset)[:, None], driver="gelsd")
    colour: Tensor = _FREE * solved.solution[: shape[0], 0]
    return colour


def _attempt(
    observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
) -> Finding:
    private = working_copy(model, observation)
    statistics = client_statistics(observation, private)
    if not statistics:
        raise NotApplicable("no running statistic of a batch normalisation moved in the update")
    items = []
    for one in statistics.values():
        items.append(Item(kind="embedding", value=one.mean, confidence=1.0))
    shape = observation.known("image_shape")
    colour = None
    if shape:
        colour = mean_colour(private, statistics, tuple(shape))
    details: dict[str, float | int | str] = {"normalisations": len(statistics)}
    if colour is not None and shape:
        picture = colour.float()[:, None, None].expand(*shape)
        items.insert(0, Item(kind="image", value=picture, confidence=0.5))
        details |= {f"colour_{channel}": float(value) for channel, value in enumerate(colour)}
    return Finding(items=tuple(items), confidence=1.0, details=details)


def batch_statistics() -> Attack:
    """Return the reading of a client's batch statistics from the buffers of its update."""
    return PlainAttack(
        name="batch_statistics",
        family="linear",
        attempt=_attempt,
        requires=("model",),
        summary="means of every normalised layer and the mean colour, from the running statistics of a "
        "client in training mode",
    )
