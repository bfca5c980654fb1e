"""What natural inputs look like: penalties that steer gradient matching towards images and embeddings worth
believing.

Every function returns one scalar that is small for a plausible input. None reads anything about the client.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from attacks.contract import Prior


def pixel_box(prior: Prior) -> tuple[Tensor, Tensor]:
    """Return the lowest and highest value a pixel can take in the model's units."""
    if prior.image_mean is None or prior.image_std is None:
        return torch.zeros(1), torch.ones(1)
    mean, deviation = prior.image_mean.reshape(-1, 1, 1).float(), prior.image_std.reshape(-1, 1, 1).float()
    return -mean / deviation, (1.0 - mean) / deviation


def within_pixels(image: Tensor, prior: Prior) -> Tensor:
    """Return the image with every value that no pixel can take moved to the nearest that one can."""
    low, high = (bound.to(image.dtype) for bound in pixel_box(prior))
    return torch.maximum(torch.minimum(image, high), low)


def total_variation(images: Tensor, *, opponents: bool = False) -> Tensor:
    """Return the mean absolute difference of neighbouring pixels of images (n, c, h, w).

    With `opponents`, differences between colour channels are smoothed as well, which removes coloured
    speckle.
    """
    views = [images]
    if opponents and images.shape[1] == 3:
        red, green, blue = images.unbind(1)
        views.append(torch.stack([red - green, red - blue, green - blue], dim=1))
    return torch.stack([_neighbours(view) for view in views]).sum()


def _neighbours(images: Tensor) -> Tensor:
    across = (images[..., 1:] - images[..., :-1]).abs().mean()
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().mean()
    return across + down


def patch_seams(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """Return the mean absolute jump across patch borders. Source: Hatamizadeh et al., "GradViT", 2022,
    section 3.4.
    """
    height, width = patch
    jumps = []
    if images.shape[-2] > height:
        jumps.append((images[..., height::height, :] - images[..., height - 1 : -1 : height, :]).abs().mean())
    if images.shape[-1] > width:
        jumps.append((images[..., width::width] - images[..., width - 1 : -1 : width]).abs().mean())
    if jumps:
        return torch.stack(jumps).sum()
    return images.new_zeros(())


def group_distance(images: Tensor, consensus: Tensor) -> Tensor:
    """Return how far images lie from the consensus of several restarts.

    Source: Yin et al., "See through Gradients", 2021, equation 11, without the registration step.
    """
    return (images - consensus).square().mean()


def norm_distance(embeddings: Tensor, wanted: float) -> Tensor:
    """Return how far the mean norm of embeddings (b, t, d) is from the norm of real ones. Source: LAMP,
    section 4.1.
    """
    length: Tensor = embeddings.norm(dim=-1).mean()
    return (length - wanted).square()


def batch_statistics_distance(taps: Mapping[str, Tensor], model: nn.Module, *, first: float = 10.0) -> Tensor:
    """Return the distance between the dummies' channel statistics and each batch norm's running statistics.

    The first layer counts `first` times. Source: Yin et al., "See through Gradients", 2021, equation 9.
    """
    total, weight = torch.zeros(()), first
    for name, value in taps.items():
        module = model.get_submodule(name)
        if (
            not isinstance(module, nn.BatchNorm2d)
            or module.running_mean is None
            or module.running_var is None
        ):
            continue
        mean = value.mean(dim=(0, 2, 3))
        variance = value.var(dim=(0, 2, 3), unbiased=False)
        total = total + weight * (
            (mean - module.running_mean).norm() + (variance - module.running_var).norm()
        )
        weight = 1.0
    return total


def class_features(weight: Tensor, bias: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return dW_c / db_c of each label's row (n, features), and which labels have a usable row.

    The last layer's gradient gives the penultimate features of an example whose label no other example
    shares, up to the small probabilities of the others. Source: the bias trick of Geiping et al., 2020,
    proposition 3.1, at the head.
    """
    divisor = bias[labels]
    usable = divisor < 0  # only a present class is pulled below zero
    safe = torch.where(divisor.abs() < 1e-12, torch.full_like(divisor, 1e-12), divisor)
    return weight[labels] / safe[:, None], usable


def feature_distance(features: Tensor, wanted: Tensor, usable: Tensor) -> Tensor:
    """Return the relative squared distance of the dummies' features to those the head's gradient shows."""
    scale = wanted[usable].square().mean().clamp_min(1e-12)
    return (features[usable] - wanted[usable]).square().mean() / scale


@contextmanager
def tapped(model: nn.Module, names: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    """Collect the inputs of named modules during forward passes, with their graphs.

    Guarantee: hooks are removed whatever happens.
    """
    taps: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            taps[name] = inputs[0]

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    try:
        yield taps
    finally:
        for handle in handles:
            handle.remove()
