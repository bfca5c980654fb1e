"""Position embeddings give the input away: least squares for text and for standard vision transformers, and
APRIL.

The gradient of position i is the sum of the gradients that reach that place, and the gradient of a token's
row is the sum over its occurrences: so the position gradient is a 0/1 mixture of the rows of the token
gradient. In a vision transformer and a batch of one the patch projection's gradient is sum_i g_i x_i^T with
g_i standing in the position gradient: one linear solve returns the image, whatever follows. Source: own
derivation; APRIL is Lu et al., "APRIL: Finding the Achilles' Heel on Privacy for Vision Transformers", 2022,
proposition 1.
"""

from __future__ import annotations

import math
import re
from typing import cast

import torch
from scipy.special import ndtr
from torch import Tensor, nn

from attacks.contract import Attack, Budget, Finding, Item, NotApplicable, PlainAttack, Prior, working_copy
from attacks.inversion.optimisers import without_untouched
from attacks.inversion.priors import within_pixels
from attacks.inversion.tokens import (
    embedding_names,
    embedding_rows,
    noise_per_entry,
    present_tokens,
    token_embedding,
)
from attacks.observation import Observation

_SOLVED = 1e-3
_RESIDUAL_SCALE = 0.01
_RIDGE = 0.1  # of a row of length one
_COINS = 2_000  # rows of them, for what chance does
_SURE = 3.0  # deviations beyond chance at which agreement is as likely as not to be none
_MOVED = 1e-3  # of the longest position row: shorter ones hold rounding


def _rescaled(observation: Observation) -> bool:
    optimiser = str(observation.known("optimiser") or "sgd").lower()
    return observation.content == "delta" and "sgd" not in optimiser


def refuse_rescaled(observation: Observation) -> None:
    """Refuse a delta whose optimiser scales entries apart, so that it is no longer a sum of gradients.

    Raises: NotApplicable naming the optimiser.
    """
    if _rescaled(observation):
        optimiser = str(observation.known("optimiser")).lower()
        raise NotApplicable(
            f"{optimiser} rescales every entry, which breaks the linear relation between gradients"
        )


# ------------------------------------------------------------------------------------------------------- text


def placement(position_gradient: Tensor, token_gradient: Tensor) -> tuple[Tensor, float]:
    """Solve position_gradient = M token_gradient for M (positions, tokens); return M and the relative
    residual.

    Guarantee: M is 0/1 and exact when every token occurs once and there are at most as many tokens as
    dimensions.
    """
    target, rows = position_gradient.double(), token_gradient.double()
    solution = torch.linalg.lstsq(rows.T, target.T, driver="gelsd").solution.T
    residual = float((solution @ rows - target).norm() / target.norm().clamp_min(1e-300))
    return solution, residual


def likeness(positions: Tensor, rows: Tensor) -> Tensor:
    """Return how much of each position's direction (p, d) each token's (n, d) explains beside all others: (p,
    n).

    An optimiser that scales entries apart keeps their signs: a position's row still agrees with the rows of
    its tokens, with those alone, and a ridge takes out what all rows have in common.
    """
    units = nn.functional.normalize(rows.double(), dim=1)
    directions = nn.functional.normalize(positions.double(), dim=1)
    gram = units @ units.T + _RIDGE * torch.eye(len(units), dtype=units.dtype)
    solved: Tensor = torch.linalg.solve(gram, units @ directions.T).T
    return solved


def agreement(positions: Tensor, rows: Tensor) -> float:
    """Return by how many deviations tokens' rows (n, d) agree in sign with a position's (p, d) beyond chance.

    Each token's best position is held against the best of as many rows of coins. In a batch a position's sign
    is that of the sum over several tokens, so that no token agrees much, but all of them somewhat.
    """
    width = rows.shape[1]
    best = (rows.double().sign() @ positions.double().sign().T).amax(1) / width**0.5
    coins = torch.randn(_COINS, len(positions), generator=torch.Generator().manual_seed(0), dtype=best.dtype)
    chance = coins.amax(1)
    return float((best.mean() - chance.mean()) / chance.std() * len(best) ** 0.5)


def _by_signs(observation: Observation, model: nn.Module, tokens: Tensor, position_name: str) -> Finding:
    """Place tokens by the signs of their rows, where the optimiser left nothing else of the gradients.

    Rows are compared as they moved: what decay does to a row without a gradient it does not add to one with.
    """
    view = observation.gradient().tensors
    positions, rows = view[position_name], view[f"{token_embedding(model)}.weight"][tokens]
    lengths: Tensor = torch.linalg.vector_norm(_places(observation, model, position_name), dim=1)
    used = (lengths > _MOVED * lengths.max()).nonzero().flatten()
    shares = likeness(positions[used], rows)
    pairs = torch.stack([used[shares.argmax(0)] - int(used.min()), tokens], dim=1)
    placed = float(shares.amax(0).clamp(0.0, 1.0).mean())
    confidence = max(placed, float(ndtr(agreement(positions[used], rows) - _SURE)))
    items = [
        Item(kind="token_set", value=tokens, confidence=1.0),
        Item(kind="placed_tokens", value=pairs, confidence=placed),
    ]
    if len(tokens) <= len(used):  # no place needs to hold two
        items.append(Item(kind="sequence", value=tokens[shares.argmax(1)], confidence=placed))
    return Finding(
        items=tuple(items),
        confidence=confidence,
        reason="placed by signs alone, for the optimiser scales every entry",
        details={"tokens": len(tokens), "places": len(used)},
    )


def _text(
    observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
) -> Finding:
    private = working_copy(model, observation)
    token_name = f"{token_embedding(private)}.weight"
    position_name = _position_embedding(observation, private)
    tokens = present_tokens(observation, private)
    if tokens is None or len(tokens) == len(observation.tensors[token_name]):
        raise NotApplicable("the rows of the token embedding do not tell which tokens were present")
    if _rescaled(observation):
        return _by_signs(observation, private, tokens, position_name)
    rows, positions = (
        embedding_rows(observation, private)[tokens],
        _places(observation, private, position_name),
    )
    width = rows.shape[1]
    used = (positions.norm(dim=1) > 1e-9 * positions.norm(dim=1).max()).nonzero().flatten()
    offset = int(used.min())
    table, residual = placement(positions[used], rows)
    places = (table > 0.5).nonzero()
    pairs = torch.stack([used[places[:, 0]] - offset, tokens[places[:, 1]]], dim=1)
    roundness = 1.0 - min(1.0, 2.0 * float((table - (table > 0.5).double()).abs().amax()))
    fits = 0.3
    if len(tokens) <= width:
        fits = 1.0
    confidence = fits * max(roundness, 0.5 * max(0.0, 1.0 - residual))
    items = [
        Item(kind="token_set", value=tokens, confidence=1.0),
        Item(kind="placed_tokens", value=pairs, confidence=confidence),
    ]
    if bool(((table > 0.5).sum(1) <= 1).all()):
        best = torch.where(table.amax(1) > 0.1, tokens[table.argmax(1)], torch.tensor(-1))
        items.append(Item(kind="sequence", value=best, confidence=confidence))
    details = {"tokens": len(tokens), "width": width, "residual": residual, "roundness": roundness}
    return Finding(items=tuple(items), confidence=confidence, details=details)


def _places(observation: Observation, model: nn.Module, name: str) -> Tensor:
    """Return the rows of the position embedding in gradient orientation, less what its optimiser does to
    every row.
    """
    view = observation.gradient()
    if observation.content == "gradient" or noise_per_entry(observation) > 0.0:
        return view.tensors[name].double()
    table = model.get_parameter(name).detach()
    return view.factor * without_untouched(observation, name, table, dense=False)


def _position_embedding(observation: Observation, model: nn.Module) -> str:
    for name in embedding_names(model):
        full = f"{name}.weight"
        if re.search(r"(position|wpe)", name) and full in observation.tensors:
            return full
    raise NotApplicable("no trained absolute position embedding was observed (rotary positions, or frozen)")


# ----------------------------------------------------------------------------------------------------- images


def solve_patches(position_gradient: Tensor, patch_gradient: Tensor) -> tuple[Tensor, float]:
    """Solve patch_gradient (d, pixels) = position_gradient^T (d, patches) X for the patches X.

    Return X and the residual.
    """
    mixing, target = position_gradient.double().T, patch_gradient.double()
    patches = torch.linalg.lstsq(mixing, target, driver="gelsd").solution
    residual = float((mixing @ patches - target).norm() / target.norm().clamp_min(1e-300))
    return patches, residual


def assemble(patches: Tensor, channels: int, patch: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Lay patches (n, channels x height x width), in reading order, out as one image."""
    rows, columns = grid
    blocks = patches.reshape(rows, columns, channels, *patch)
    return blocks.permute(2, 0, 3, 1, 4).reshape(channels, rows * patch[0], columns * patch[1])


def _patch_projection(observation: Observation, model: nn.Module) -> tuple[str, nn.Conv2d]:
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.Conv2d)
            and module.stride == module.kernel_size
            and f"{name}.weight" in observation.tensors
        ):
            return name, module
    raise NotApplicable("no patch projection (a convolution whose stride is its kernel) was observed")


def _patch_positions(observation: Observation) -> Tensor:
    view = observation.gradient().tensors
    for name, tensor in view.items():
        if re.search(r"pos", name) and tensor.ndim in (2, 3) and tensor.shape[-2] > 1:
            return tensor.reshape(-1, tensor.shape[-1])
    raise NotApplicable("no trained position embedding was observed")


def _grid(observation: Observation, model: nn.Module, places: int, patch: tuple[int, int]) -> tuple[int, int]:
    shape = observation.known("image_shape")
    if shape:
        return int(shape[-2]) // patch[0], int(shape[-1]) // patch[1]
    side = math.isqrt(places)
    if side * side not in (places, places - 1, places - 2):
        raise NotApplicable(f"{places} positions are not a square grid, and the image shape is not known")
    return side, side


def _vision(
    observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
) -> Finding:
    refuse_rescaled(observation)
    private = working_copy(model, observation)
    name, module = _patch_projection(observation, private)
    positions = _patch_positions(observation)
    patch = (int(module.kernel_size[0]), int(module.kernel_size[1]))
    grid = _grid(observation, private, len(positions), patch)
    count = grid[0] * grid[1]
    weight = observation.gradient().tensors[f"{name}.weight"].flatten(1)
    if count > weight.shape[0]:
        raise NotApplicable(
            f"{count} patches exceed the width {weight.shape[0]}: the system has no single solution"
        )
    patches, residual = solve_patches(positions[-count:], weight)
    image = assemble(patches, module.in_channels, patch, grid)
    if residual <= _SOLVED:
        confidence, reason = 1.0, ""
    else:
        image = within_pixels(image, prior)
        confidence = math.exp(-residual / _RESIDUAL_SCALE)
        reason = "the solve leaves a residual: more than one image, noise, or an unusual embedding"
    item = Item(kind="image", value=image.float(), confidence=confidence)
    return Finding(
        items=(item,), confidence=confidence, reason=reason, details={"residual": residual, "patches": count}
    )


# ------------------------------------------------------------------------------------------------------ APRIL


def _april(
    observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
) -> Finding:
    refuse_rescaled(observation)
    private = working_copy(model, observation)
    _, module = _patch_projection(observation, private)
    view = observation.gradient().tensors
    position_gradient = _patch_positions(observation).double()
    right = torch.zeros(position_gradient.shape[1], position_gradient.shape[1], dtype=torch.float64)
    for layer in _first_attention(private):
        if f"{layer}.weight" not in view:
            raise NotApplicable(f"the gradient of {layer} was not observed")
        weight = cast(Tensor, private.get_submodule(layer).weight)
        right += weight.detach().double().T @ view[f"{layer}.weight"].double()
    hidden = torch.linalg.lstsq(position_gradient.T, right, driver="gelsd").solution
    residual = float((position_gradient.T @ hidden - right).norm() / right.norm().clamp_min(1e-300))
    patch = (int(module.kernel_size[0]), int(module.kernel_size[1]))
    grid = _grid(observation, private, len(position_gradient), patch)
    embedded = (hidden - _own_positions(private, hidden.shape).double())[-grid[0] * grid[1] :]
    projection = module.weight.detach().double().flatten(1)
    offset = projection.new_zeros(())
    if module.bias is not None:
        offset = module.bias.detach().double()
    patches = torch.linalg.lstsq(projection, (embedded - offset).T, driver="gelsd").solution.T
    image = assemble(patches, module.in_channels, patch, grid)
    if residual <= _SOLVED:
        confidence = 1.0
    else:
        image = within_pixels(image, prior)
        confidence = math.exp(-residual / _RESIDUAL_SCALE)
    item = Item(kind="image", value=image.float(), confidence=confidence)
    return Finding(items=(item,), confidence=confidence, details={"residual": residual})


def _first_attention(model: nn.Module) -> tuple[str, str, str]:
    roles = {"query": r"(query|q_proj|q)$", "key": r"(key|k_proj|k)$", "value": r"(value|v_proj|v)$"}
    candidates = {}
    for role, pattern in roles.items():
        candidates[role] = next(
            (
                name
                for name, module in model.named_modules()
                if isinstance(module, nn.Linear) and re.search(pattern, name)
            ),
            None,
        )
    if None in candidates.values():
        raise NotApplicable("the first attention block has no separate query, key and value layers")
    return str(candidates["query"]), str(candidates["key"]), str(candidates["value"])


def _own_positions(model: nn.Module, shape: torch.Size) -> Tensor:
    for name, value in model.named_parameters():
        if re.search(r"pos", name) and value.ndim in (2, 3) and value.shape[-2:] == shape:
            return value.detach().reshape(-1, value.shape[-1])
    raise NotApplicable("the model has no position embedding of the observed shape")


def position_text() -> Attack:
    """Return the least-squares attack on token and position embeddings."""
    return PlainAttack(
        name="position_text",
        family="least squares",
        attempt=_text,
        requires=("model",),
        summary="tokens with their places, from the gradients of token and position embeddings",
    )


def position_vision() -> Attack:
    """Return the least-squares attack on a standard vision transformer."""
    return PlainAttack(
        name="position_vision",
        family="least squares",
        attempt=_vision,
        requires=("model",),
        summary="one image, from the gradients of position embedding and patch "
        "projection of any vision transformer",
    )


def april() -> Attack:
    """Return APRIL's closed form, exact only without residual and normalisation in the first block."""
    return PlainAttack(
        name="april",
        family="least squares",
        attempt=_april,
        requires=("model",),
        summary="one image, from the first attention block; kept to show what it misses on a standard block",
    )
