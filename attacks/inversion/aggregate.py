"""Blind source separation: a first linear layer's gradient is a mixture of its inputs, for one batch or a sum
of many.

dW = sum_i delta_i x_i^T holds the b inputs as linear mixtures. They are pulled apart by what natural inputs
have and mixtures lack: far-from-Gaussian values, smoothness, and being unlike each other. Source: Kariyappa
et al., "Cocktail Party Attack", 2023, section 4 (own objective and code); scale and sign follow from the bias
gradient, as in SPEAR.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attacks.contract import (
    Attack,
    Budget,
    Deadline,
    Finding,
    NotApplicable,
    PlainAttack,
    Prior,
    working_copy,
)
from attacks.inversion.channels import numerical_rank
from attacks.inversion.linear import as_item, first_biased
from attacks.inversion.priors import total_variation
from attacks.observation import Observation

_DECORRELATION = 8.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Mixture:
    """Mixtures (b, features) of b inputs, turned and scaled so that their centred versions have unit
    covariance.
    """

    whitened: Tensor


def mixture_of(gradient: Tensor, *, most: int = 0) -> Mixture:
    """Return the mixtures in a gradient (out, features), as many as its rank or as are known to exist."""
    _, singular, right = torch.linalg.svd(gradient.double(), full_matrices=False)
    rank = numerical_rank(singular, tuple(gradient.shape), dtype=gradient.dtype)
    if most:
        rank = min(rank, most)
    if rank == 0:
        raise NotApplicable("the layer's gradient is zero")
    rows = right[:rank]
    values, vectors = torch.linalg.eigh(torch.cov(rows, correction=0).reshape(rank, rank))
    return Mixture(whitened=(vectors / values.clamp_min(1e-18).sqrt()).T @ rows)


def contrast(sources: Tensor) -> Tensor:
    """Return how far from Gaussian sources (b, features) are: (E log cosh s - E log cosh g)^2, summed over
    sources.

    Source: Hyvarinen, "Fast and robust fixed-point algorithms", 1999, with unit variance; 0.3746 is E log
    cosh of a standard normal.
    """
    centred = sources - sources.mean(1, keepdim=True)
    unit = centred / centred.square().mean(1, keepdim=True).sqrt().clamp_min(1e-12)
    soft = nn.functional.softplus(-2 * unit.abs()) + unit.abs() - 0.6931471805599453
    total: Tensor = (soft.mean(1) - 0.3746).square().sum()
    return total


def likeness(sources: Tensor) -> Tensor:
    """Return the mean of exp(T |cosine|) over pairs of centred sources: large when two are alike."""
    if len(sources) < 2:
        return torch.zeros((), dtype=sources.dtype)
    unit = nn.functional.normalize(sources - sources.mean(1, keepdim=True), dim=1)
    cosines = (unit @ unit.T).abs()[~torch.eye(len(unit), dtype=torch.bool)]
    total: Tensor = torch.exp(_DECORRELATION * (cosines - 1.0)).mean()
    return total


def separate(
    mixture: Mixture,
    *,
    image_shape: tuple[int, ...] | None,
    iterations: int,
    generator: torch.Generator,
    deadline: Deadline,
    smoothness: float = 1.0,
    decorrelation: float = 1.0,
    gaussianity: float = 1.0,
) -> tuple[Tensor, float]:
    """Return unmixed sources (b, features), each up to sign and scale, and the final objective."""
    count = len(mixture.whitened)
    start, _ = torch.linalg.qr(torch.randn(count, count, generator=generator, dtype=torch.float64))

    def objective(sources: Tensor, apart: float) -> Tensor:
        total = -gaussianity * contrast(sources) / count + apart * likeness(sources)
        if image_shape:
            total = total + smoothness * total_variation(sources.reshape(count, *image_shape))
        return total

    # First as a rotation, which keeps sources uncorrelated; then freely, since real inputs are somewhat
    # correlated.
    def turned(angles: Tensor) -> Tensor:
        rotation: Tensor = torch.matrix_exp(angles - angles.T)
        return torch.matmul(rotation, start)

    angles = torch.zeros(count, count, dtype=torch.float64, requires_grad=True)
    _minimise(angles, lambda: objective(turned(angles) @ mixture.whitened, 0.0), iterations, deadline)
    free = turned(angles.detach()).contiguous().requires_grad_(True)
    value = _minimise(
        free,
        lambda: objective(nn.functional.normalize(free, dim=1) @ mixture.whitened, decorrelation),
        iterations if decorrelation else 0,
        deadline,
    )
    return nn.functional.normalize(free.detach(), dim=1) @ mixture.whitened, value


def _minimise(
    variable: Tensor, objective: Callable[[], Tensor], iterations: int, deadline: Deadline
) -> float:
    optimiser = torch.optim.LBFGS(
        [variable], lr=1.0, max_iter=20, line_search_fn="strong_wolfe", tolerance_change=0.0
    )

    def closure() -> Tensor:
        value = objective()
        variable.grad = torch.autograd.grad(value, [variable])[0].contiguous()
        return value.detach()

    last = float(objective().detach())
    for _ in range(0, iterations, 20):
        optimiser.step(closure)  # type: ignore[no-untyped-call]
        value = float(objective().detach())
        if deadline.expired or abs(last - value) < 1e-9:
            break
        last = value
    return float(objective().detach())


def rescaled(sources: Tensor, gradient: Tensor, bias: Tensor | None) -> Tensor:
    """Return sources with sign and scale from the bias gradient, or with a positive mean and unit range.

    The latter where there is no bias gradient, or the sources are so mixed still that their scales make no
    pixels.

    dW = delta (D s) with D diagonal, db = delta 1: the deltas up to D are dW s^+, and D solves one linear
    system.
    """
    if bias is not None:
        deltas = gradient.double() @ torch.linalg.pinv(sources)
        inverse = torch.linalg.lstsq(deltas, bias.double()[:, None], driver="gelsd").solution.flatten()
        if bool((inverse.abs() > 1e-9 * inverse.abs().max()).all()):
            scaled = sources / inverse[:, None]
            if float(((scaled > -0.2) & (scaled < 1.2)).double().mean()) > 0.9:
                return torch.as_tensor(scaled)
    positive = sources * torch.where(sources.mean(1, keepdim=True) < 0, -1.0, 1.0)
    low, high = positive.amin(1, keepdim=True), positive.amax(1, keepdim=True)
    return (positive - low) / (high - low).clamp_min(1e-12)


def _attempt(
    observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
) -> Finding:
    deadline = budget.start()
    private = working_copy(model, observation)
    channel = first_biased(observation, private)
    known = int(observation.known("batch_size") or 0) * observation.contributors
    mixture = mixture_of(channel.gradient, most=known)
    count, width = mixture.whitened.shape
    if count >= min(channel.gradient.shape):
        raise NotApplicable(
            f"{count} inputs or more fill the layer of {tuple(channel.gradient.shape)}: nothing to unmix"
        )
    shape = observation.known("image_shape")
    fits = bool(shape) and torch.Size(shape).numel() == width
    best: tuple[Tensor, float] | None = None
    for restart in range(budget.restarts):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + restart)
        with torch.enable_grad():
            separated = separate(
                mixture,
                image_shape=tuple(shape) if fits else None,
                iterations=budget.iterations,
                generator=generator,
                deadline=deadline,
            )
        if best is None or separated[1] < best[1]:
            best = separated
        if deadline.expired:
            break
    assert best is not None
    inputs = rescaled(best[0], channel.gradient, channel.bias)
    inside = float(((inputs > -0.1) & (inputs < 1.1)).double().mean())
    items = tuple(as_item(row, observation, inside) for row in inputs)
    return Finding(
        items=items,
        confidence=inside,
        details={"channel": channel.name, "sources": count, "objective": best[1]},
    )


def cocktail_party() -> Attack:
    """Return blind separation of the inputs of the first linear layer."""
    return PlainAttack(
        name="cocktail_party",
        family="aggregate",
        attempt=_attempt,
        requires=("model",),
        summary="inputs of a first linear layer, unmixed from a batch or a sum by independent components",
    )
