"""Inputs of one linear layer, read from its gradient: the bias trick and SPEAR.

For z = W x + b followed by ReLU, dW = sum_t delta_t x_t^T and db = sum_t delta_t; a neuron that only one
example activates shows that example as dW_i / db_i. SPEAR recovers a whole batch because each example leaves
about half of the neurons silent. Sources: Phong et al., 2017, and Geiping et al., "Inverting Gradients",
2020, proposition 3.1; Dimitrov et al., "SPEAR: Exact Gradient Inversion of Batches in Federated Learning",
2024, sections 3 and 4 (own derivation and code).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from attacks.contract import (
    Attack,
    Budget,
    Deadline,
    Finding,
    Item,
    NotApplicable,
    PlainAttack,
    Prior,
    working_copy,
)
from attacks.inversion.channels import Channel, numerical_rank, observed_channels
from attacks.observation import Observation

_SAMPLES_AT_ONCE = 4_096
_SAMPLES_PER_ITERATION = 1_000
# The chance of a useful sample halves with each example; beyond this the search is hopeless and only costs
# time.
_LARGEST_BATCH = 24


def first_biased(observation: Observation, model: nn.Module) -> Channel:
    """Return the first linear layer whose weight and bias gradients were both observed.

    Raises: NotApplicable when there is none.
    """
    for channel in observed_channels(observation, model).values():
        if channel.bias is not None and bool(channel.bias.any()):
            return channel
    raise NotApplicable("no linear layer with an observed bias gradient")


def bias_quotients(channel: Channel) -> tuple[Tensor, Tensor]:
    """Return dW_i / db_i for every neuron that fired, with the neuron's number."""
    if channel.bias is None:
        raise NotApplicable("the layer has no bias gradient")
    bias = channel.bias.double()
    fired = (bias.abs() > 1e-9 * bias.abs().max()).nonzero().flatten()
    return channel.gradient.double()[fired] / bias[fired, None], fired


def agreeing(candidates: Tensor, *, tolerance: float = 1e-4) -> list[tuple[Tensor, int]]:
    """Group candidates that agree to a relative tolerance.

    Return the middle of each group with its size, largest first.
    """
    left = list(range(len(candidates)))
    groups: list[tuple[Tensor, int]] = []
    while left:
        head = candidates[left[0]]
        distance = (candidates[left] - head).norm(dim=1) / head.norm().clamp_min(1e-12)
        same = []
        for index, far in zip(left, distance.tolist(), strict=True):
            if far <= tolerance:
                same.append(index)
        groups.append((candidates[same].median(dim=0).values, len(same)))
        left = [index for index in left if index not in set(same)]
    return sorted(groups, key=lambda group: -group[1])


def _readout(
    observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
) -> Finding:
    private = working_copy(model, observation)
    channel = first_biased(observation, private)
    candidates, _ = bias_quotients(channel)
    limit = int(observation.known("batch_size") or 0) * observation.contributors
    groups = agreeing(candidates)
    inside = []
    for value, size in groups:
        if _plausible(value):
            inside.append((value, size))
    # Neurons that agree saw the same single example; a lone one may be a mixture, and is kept only while
    # examples are missing.
    sure = []
    for value, size in inside:
        if size >= 2:
            sure.append((value, 1.0 - 0.5**size))
    lone = []
    for value, size in inside:
        if size == 1:
            lone.append((value, 0.3))
    if limit:
        chosen = (sure + lone)[:limit]
    else:
        chosen = sure
    if not chosen:
        return Finding(
            reason="no two neurons agree on an input",
            details={"channel": channel.name, "neurons": len(candidates)},
        )
    items = tuple(as_item(value, observation, confidence) for value, confidence in chosen)
    mean = sum(confidence for _, confidence in chosen) / len(chosen)
    return Finding(items=items, confidence=mean, details={"channel": channel.name, "sure": len(sure)})


def _plausible(value: Tensor) -> bool:
    return bool(torch.isfinite(value).all()) and float(value.abs().max()) > 0.0


def as_item(value: Tensor, observation: Observation, confidence: float) -> Item:
    """Return recovered inputs as an image when the known image shape fits, else as plain inputs."""
    shape = observation.known("image_shape")
    if shape and math.prod(shape) == value.numel():
        return Item(kind="image", value=value.reshape(tuple(shape)).float(), confidence=confidence)
    return Item(kind="inputs", value=value.float(), confidence=confidence)


# ------------------------------------------------------------------------------------------------------ SPEAR


def spear_inputs(
    gradient: Tensor,
    bias: Tensor,
    module: nn.Module,
    *,
    samples: int,
    generator: torch.Generator,
    deadline: Deadline,
) -> tuple[Tensor, Tensor, float] | None:
    """Return inputs (b, in), deltas (out, b) and their agreement with the layer, or None when b directions
    were not found.

    Sampling goes on until the recovered inputs are silent exactly where their deltas are zero, or the samples
    are used up.

    Assumes: a ReLU follows the layer, b is below both dimensions, and inputs are linearly independent.
    """
    left, singular, right = torch.linalg.svd(gradient.double(), full_matrices=False)
    rank = numerical_rank(singular, tuple(gradient.shape), dtype=gradient.dtype)
    left, right = left[:, :rank], singular[:rank, None] * right[:rank]
    if not 0 < rank <= _LARGEST_BATCH:
        return None
    best: tuple[Tensor, Tensor, float] | None = None
    silent = 0.3 * math.sqrt(torch.finfo(gradient.dtype).eps)
    search = sparse_directions(left, silent=silent, samples=samples, generator=generator, deadline=deadline)
    for directions in search:
        scale = torch.linalg.lstsq(
            left @ directions, bias.double()[:, None], driver="gelsd"
        ).solution.flatten()
        if bool((scale.abs() < 1e-12).any()):
            continue
        mixing = directions * scale
        inputs, deltas = torch.linalg.solve(mixing, right), left @ mixing
        agreement = activation_agreement(inputs, deltas, module, silent)
        if best is None or agreement > best[2]:
            best = inputs, deltas, agreement
        if agreement > 0.995:
            break
    return best


def sparse_directions(
    left: Tensor, *, silent: float, samples: int, generator: torch.Generator, deadline: Deadline
) -> Iterator[Tensor]:
    """Yield ever better bases (b, b) of directions q for which left @ q has unexpectedly many zeros.

    A random choice of b - 1 rows that one example leaves silent has that example's direction as its null
    vector.
    """
    rank = left.shape[1]
    if rank == 1:
        yield torch.ones(1, 1, dtype=left.dtype)
        return
    alive = left[left.norm(dim=1) > 1e-7 * left.norm(dim=1).max()]
    needed = rank - 1 + max(3, len(alive) // 10)
    directions = torch.empty(0, rank, dtype=left.dtype)
    weights = torch.ones(_SAMPLES_AT_ONCE, len(alive))
    for _ in range(0, samples, _SAMPLES_AT_ONCE):
        if deadline.expired or len(alive) < rank:
            break
        picked = torch.multinomial(weights, rank - 1, generator=generator)
        null = _null_vectors(alive[picked])
        values = (null @ alive.T).abs()
        zeros = (values <= silent * values.amax(1, keepdim=True)).sum(1)
        directions = _distinct_directions(torch.cat([directions, null[zeros >= needed]]))
        if len(directions) >= rank:
            order = ((directions @ alive.T).abs() <= silent).sum(1).argsort(descending=True, stable=True)
            directions = directions[order[: 8 * rank]]
            chosen = _sparsest_basis(directions)
            if chosen is not None:
                yield chosen


def _null_vectors(stack: Tensor) -> Tensor:
    """Return a unit vector orthogonal to the b - 1 rows of each matrix in a stack (n, b - 1, b)."""
    complete: Tensor = torch.linalg.qr(stack.transpose(1, 2), mode="complete")[0]
    return complete[:, :, -1]


def _distinct_directions(vectors: Tensor) -> Tensor:
    if len(vectors) < 2:
        return vectors
    parallel = (vectors @ vectors.T).abs() > 1 - 1e-6
    first = parallel.int().argmax(dim=1) == torch.arange(len(vectors))
    return vectors[first]


def _sparsest_basis(ordered: Tensor) -> Tensor | None:
    basis: list[Tensor] = []
    for vector in ordered:
        if float(torch.linalg.svdvals(torch.stack([*basis, vector]))[-1]) > 1e-4:
            basis.append(vector)
        if len(basis) == ordered.shape[1]:
            return torch.stack(basis, dim=1)
    return None


def activation_agreement(inputs: Tensor, deltas: Tensor, module: nn.Module, silent: float) -> float:
    """Return the share of (neuron, example) pairs where the recovered input is silent exactly where its delta
    is zero.
    """
    with torch.no_grad():
        fires = copy.deepcopy(module).double()(inputs) > 0
    moved = (deltas.abs() > silent * deltas.abs().amax(0, keepdim=True)).T
    return float((fires == moved).double().mean())


def _spear(
    observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
) -> Finding:
    private = working_copy(model, observation)
    channel = first_biased(observation, private)
    if channel.bias is None:
        raise NotApplicable("the layer has no bias gradient")
    if not any(isinstance(module, nn.ReLU) for module in private.modules()):
        raise NotApplicable("SPEAR needs a ReLU after the layer, the model has none")
    deadline = budget.start()
    generator = torch.Generator().manual_seed(seed)
    samples = budget.iterations * _SAMPLES_PER_ITERATION
    module = private.get_submodule(channel.name)
    recovered = spear_inputs(
        channel.gradient, channel.bias, module, samples=samples, generator=generator, deadline=deadline
    )
    if recovered is None:
        reason = "too few sparse directions: no ReLU, or too many examples"
        if deadline.expired:
            reason = "stopped by its budget of steps"
        return Finding(reason=reason, details={"channel": channel.name})
    inputs, _, agreement = recovered
    confidence = max(0.0, 2.0 * agreement - 1.0)
    items = tuple(as_item(row, observation, confidence) for row in inputs)
    return Finding(
        items=items,
        confidence=confidence,
        details={"channel": channel.name, "batch": len(inputs), "agreement": agreement},
    )


def linear_readout() -> Attack:
    """Return the bias trick on the first linear layer, adapters included."""
    return PlainAttack(
        name="linear_readout",
        family="linear",
        attempt=_readout,
        requires=("model",),
        summary="inputs of the first biased linear layer, for examples that some neuron sees alone",
    )


def spear() -> Attack:
    """Return SPEAR on the first linear layer."""
    return PlainAttack(
        name="spear",
        family="linear",
        attempt=_spear,
        requires=("model",),
        summary="all inputs of a ReLU layer from its gradient, exact for small batches",
    )
