"""Malicious server on image and plain networks: broadcasts crafted so that the honest answer holds the
inputs.

Each `craft_*` function returns a modified copy of a model, to be broadcast instead of the honest one; each
attack reads the answer, alone or as a sum over clients. Crafting needs public examples at most, never the
client's data.
Sources: Fowl et al., "Robbing the Fed", 2022 (imprint); Boenisch et al., "When the Curious Abandon Honesty",
2023 (trap weights); Wen et al., "Fishing for User Data", 2022; Zhao et al., "LOKI", 2024; Pasquini et al.,
"Eluding Secure Aggregation", 2022 (gradient suppression).
"""

from __future__ import annotations

import copy
import math
from typing import Literal

import torch
from torch import Tensor, nn

from attacks.contract import Attack, Budget, Finding, NotApplicable, PlainAttack, Prior, working_copy
from attacks.inversion.channels import capture_inputs, linear_modules, observed_channels
from attacks.inversion.linear import agreeing, as_item, bias_quotients, first_biased
from attacks.inversion.matching import MODERN, invert_images
from attacks.observation import Knowledge, Observation

_DEAD = -1e6


class ImprintBlock(nn.Module):
    """Two linear layers in front of a model: every bin that an input's measurement passes leaves the input in
    its row.

    "cumulative" bins fire for all inputs above their edge (ReLU), "sparse" bins only for inputs inside
    (Hardtanh). The block passes its input on, shifted by one constant per example, so that the model behind
    still learns.
    """

    def __init__(
        self, features: int, bins: int, *, kind: Literal["cumulative", "sparse"] = "cumulative"
    ) -> None:
        super().__init__()
        self.rows = nn.Linear(features, bins)
        self.activation: nn.Module = nn.ReLU() if kind == "cumulative" else nn.Hardtanh(0.0, 1.0)
        self.spread = nn.Linear(bins, features)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the inputs plus what the bins spread."""
        flat = inputs.flatten(1)
        shifted: Tensor = flat + self.spread(self.activation(self.rows(flat)))
        return shifted.reshape(inputs.shape)


class Imprinted(nn.Module):
    """A model with an imprint block in front:
    a changed architecture, as the broadcast of a malicious server.
    """

    def __init__(self, block: ImprintBlock, model: nn.Module) -> None:
        super().__init__()
        self.imprint, self.model = block, model

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the model's output on the block's output."""
        output: Tensor = self.model(self.imprint(inputs))
        return output


def measurement(
    features: int, kind: Literal["mean", "random", "cosine"], *, seed: int = 0, frequency: int = 32
) -> Tensor:
    """Return the direction that sorts inputs into bins: brightness, a random one, or one cosine wave."""
    if kind == "mean":
        return torch.full((features,), 1.0 / features)
    if kind == "random":
        direction = torch.randn(features, generator=torch.Generator().manual_seed(seed))
        return nn.functional.normalize(direction, dim=0)
    wave = torch.cos(math.pi * (torch.arange(features) + 0.5) * frequency / features)
    return nn.functional.normalize(wave, dim=0)


def bin_edges(values: Tensor, bins: int) -> Tensor:
    """Return the quantiles 0 to 1 - 1/bins of public measurements, widened at the low end so that nothing
    falls below.
    """
    edges = torch.quantile(values.double(), torch.arange(bins, dtype=torch.float64) / bins)
    edges[0] = edges[0] - (values.max() - values.min()).double()
    return edges


def craft_imprint(
    model: nn.Module,
    public: Tensor,
    *,
    bins: int,
    kind: Literal["cumulative", "sparse"] = "cumulative",
    direction: Tensor | None = None,
    share: tuple[int, int] = (0, 1),
    scale: float = 1e-2,
) -> Imprinted:
    """Return the model behind an imprint block whose bins hold equal shares of public inputs (n, ...).

    `share` = (client, clients) wakes only that client's own run of bins, the rest is dead: sent to each
    client with its own number, the sum of all answers keeps clients apart (LOKI). With (0, 1) all bins are
    awake.
    """
    flat = public.flatten(1)
    if direction is None:
        along = measurement(flat.shape[1], "mean")
    else:
        along = direction
    edges = bin_edges(flat @ along, bins)
    client, clients = share
    block = ImprintBlock(flat.shape[1], bins * clients, kind=kind)
    own = slice(client * bins, (client + 1) * bins)
    with torch.no_grad():
        block.rows.weight.copy_(along.expand_as(block.rows.weight))
        block.rows.bias.fill_(_DEAD)
        block.rows.bias[own] = -edges.float()
        if kind == "sparse":
            top = edges[-1:] + 2 * ((flat @ along).max().double() - edges[-1]).clamp_min(1e-6)
            widths = torch.diff(edges, append=top).clamp_min(1e-9)
            block.rows.weight[own] = along / widths[:, None].float()
            block.rows.bias[own] = (-edges / widths).float()
        block.spread.weight.fill_(scale / bins)
        block.spread.bias.zero_()
    return Imprinted(block, copy.deepcopy(model)).eval()


def craft_loki(
    model: nn.Module, public: Tensor, *, bins: int, clients: int, direction: Tensor | None = None
) -> tuple[Imprinted, ...]:
    """Return one broadcast per client, each with its own run of bins awake."""
    return tuple(
        craft_imprint(model, public, bins=bins, kind="sparse", direction=direction, share=(client, clients))
        for client in range(clients)
    )


def read_imprint(weight: Tensor, bias: Tensor, *, cumulative: bool, tolerance: float = 1e-5) -> Tensor:
    """Return the inputs (n, features) that bins hold: quotients of neighbouring differences, or of the rows
    themselves.

    A bin with several inputs yields their mixture; an empty one is left out.
    """
    rows, offsets = weight.double(), bias.double()
    if cumulative:
        rows = torch.cat([rows[:-1] - rows[1:], rows[-1:]])
        offsets = torch.cat([offsets[:-1] - offsets[1:], offsets[-1:]])
    held = offsets.abs() > tolerance * offsets.abs().max().clamp_min(1e-300)
    return rows[held] / offsets[held, None]


def _imprint(
    observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
) -> Finding:
    private = working_copy(model, observation)
    for name, channel in observed_channels(observation, private).items():
        weight = private.get_submodule(name).weight
        if (
            channel.bias is None
            or not isinstance(weight, Tensor)
            or len(weight) < 4
            or not parallel_rows(weight)
        ):
            continue
        lengths = weight.detach().norm(dim=1)
        spread = float(lengths.std() / lengths.mean())
        readout = read_imprint(channel.gradient, channel.bias, cumulative=spread < 1e-4)
        readout = _in_range(readout, prior)
        if not len(readout):
            return Finding(reason="every bin is empty or holds a mixture", details={"channel": name})
        items = tuple(as_item(value, observation, 0.9) for value in readout)
        return Finding(
            items=items, confidence=0.9, details={"channel": name, "bins": len(weight), "held": len(readout)}
        )
    raise NotApplicable("no layer of the broadcast has parallel rows: it is not an imprint block")


def parallel_rows(weight: Tensor, *, tolerance: float = 1e-4) -> bool:
    """Say whether all rows of a matrix point the same way."""
    unit = nn.functional.normalize(weight.detach().double(), dim=1)
    return bool(((unit @ unit[0]) > 1 - tolerance).all())


def _in_range(images: Tensor, prior: Prior) -> Tensor:
    """Drop what cannot be pixels; mixtures of several inputs stay inside the range and are kept."""
    if prior.image_mean is None or prior.image_std is None:
        low = torch.tensor(0.0)
        high = torch.tensor(1.0)
    else:
        low = (-prior.image_mean / prior.image_std).min()
        high = ((1 - prior.image_mean) / prior.image_std).max()
    slack = 0.05 * (high - low)
    inside = (images >= low - slack).all(1) & (images <= high + slack).all(1) & torch.isfinite(images).all(1)
    return images[inside]


# ----------------------------------------------------------------------------------------------- trap weights


def craft_trap(
    model: nn.Module, public: Tensor, *, share: float = 0.01, layer: str | None = None, seed: int = 0
) -> nn.Module:
    """Return a copy whose first linear layer fires for few inputs, so that single inputs stand alone on a
    neuron.

    Half of each row (random places) is -|g|, the other half the same draws, permuted and scaled; each
    neuron's scale is set so that it fires for `share` of the public inputs (n, ...) that reach the layer.
    """
    crafted = copy.deepcopy(model)
    name = layer or next(iter(linear_modules(crafted)))
    module = crafted.get_submodule(name)
    assert isinstance(module, nn.Linear)
    reached = capture_inputs({name: module}, lambda: crafted(public))[name].reshape(-1, module.in_features)
    generator = torch.Generator().manual_seed(seed)
    half = module.in_features // 2
    with torch.no_grad():
        module.weight.zero_()
        for row in module.weight:
            places = torch.randperm(module.in_features, generator=generator)
            magnitudes = torch.randn(half, generator=generator).abs()
            gain, loss = magnitudes[torch.randperm(half, generator=generator)], magnitudes
            up, down = reached[:, places[half : 2 * half]] @ gain, reached[:, places[:half]] @ loss
            scale = 1.0 / torch.quantile(up / down.clamp_min(1e-9), 1.0 - share)
            row[places[:half]], row[places[half : 2 * half]] = -loss, scale * gain
        if module.bias is not None:
            module.bias.zero_()
    return crafted


def _trap(
    observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
) -> Finding:
    private = working_copy(model, observation)
    channel = first_biased(observation, private)
    images = _in_range(bias_quotients(channel)[0], prior)
    groups = agreeing(images)
    if not groups:
        return Finding(reason="no neuron holds a valid input", details={"channel": channel.name})
    # A trap neuron may hold one input alone, so lone candidates are reported too, with less confidence.
    limit = int(observation.known("batch_size") or 0) * observation.contributors or len(groups)
    chosen = []
    for value, size in groups[: max(limit, 1) * 2]:
        chosen.append((value, 1.0 - 0.5**size))
    items = tuple(as_item(value, observation, sure) for value, sure in chosen)
    return Finding(
        items=items,
        confidence=max(sure for _, sure in chosen),
        details={"channel": channel.name, "candidates": len(groups)},
    )


# ---------------------------------------------------------------------------------------------------- fishing


def head_name(model: nn.Module) -> str:
    """Return the name of the last linear layer."""
    names = []
    for name, module in linear_modules(model).items():
        if isinstance(module, nn.Linear):
            names.append(name)
    if not names:
        raise NotApplicable("the model has no linear head")
    return names[-1]


def craft_fishing(model: nn.Module, label: int, *, offset: float = 1e3) -> nn.Module:
    """Return a copy whose loss sends gradients to the body only for examples of one class.

    All other rows of the head are zero with a large bias: their examples are already right up to a constant,
    and only the target's row is connected to the features.
    """
    crafted = copy.deepcopy(model)
    head = crafted.get_submodule(head_name(crafted))
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        others = torch.arange(len(head.weight)) != label
        head.weight[others] = 0.0
        if head.bias is not None:
            head.bias[others] = offset
            head.bias[label] = 0.0
    return crafted


def craft_feature_fishing(
    model: nn.Module,
    label: int,
    *,
    feature: int,
    threshold: float,
    sharpness: float = 1e3,
    offset: float = 1e3,
) -> nn.Module:
    """Return a copy that keeps only those examples of one class whose penultimate feature lies above a
    threshold.

    Bisecting the threshold over rounds isolates one example among several of the same class.

    Assumes: every example behind the answer carries that label; others below the threshold would answer too.
    """
    crafted = craft_fishing(model, label, offset=offset)
    head = crafted.get_submodule(head_name(crafted))
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.weight[label] = 0.0
        head.weight[label, feature] = -sharpness
        head.bias[label] = offset + sharpness * threshold
    return crafted


def _fish(
    observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
) -> Finding:
    private = working_copy(model, observation)
    head = private.get_submodule(head_name(private))
    assert isinstance(head, nn.Linear)
    connected = (head.weight.abs().sum(1) > 0).nonzero().flatten()
    if len(connected) != 1:
        raise NotApplicable(
            "the broadcast's head connects more than one class: it is not a fishing broadcast"
        )
    body = next(
        (
            channel
            for channel in observed_channels(observation, private).values()
            if channel.name != head_name(private)
        ),
        None,
    )
    if body is not None and body.bias is not None and _first_layer(private) == body.name:
        singular = torch.linalg.svdvals(body.gradient.double())
        if float(singular[1]) <= 1e-4 * float(singular[0]):
            quotients = agreeing(bias_quotients(body)[0], tolerance=1e-3)
            return Finding(
                items=(as_item(quotients[0][0], observation, 1.0),),
                confidence=1.0,
                details={"class": int(connected[0]), "channel": body.name},
            )
    return _fish_by_matching(observation, private, prior, budget, seed, int(connected[0]))


def _first_layer(model: nn.Module) -> str:
    return str(
        next(
            name
            for name, module in model.named_modules()
            if any(True for _ in module.parameters(recurse=False))
        )
    )


def _fish_by_matching(
    observation: Observation, private: nn.Module, prior: Prior, budget: Budget, seed: int, label: int
) -> Finding:
    """Match the body's gradient with a single image of the fished class; the head's own rows see every
    example.
    """
    head = head_name(private)
    body = {}
    for name, tensor in observation.tensors.items():
        if not name.startswith(head):
            body[name] = tensor
    if not body:
        raise NotApplicable("only the head was shared: fishing leaves no trace there")
    facts = {}
    for key, value in observation.metadata.items():
        if key != "summand":
            facts[key] = value
    knowledge = Knowledge(labels=(label,), image_shape=observation.known("image_shape"))
    single = Observation(
        kind=observation.content, tensors=body, metadata={**facts, "batch_size": 1}, knowledge=knowledge
    )
    return invert_images(single, private, prior, budget, seed, settings=MODERN)


# --------------------------------------------------------------------------------------- gradient suppression


def craft_suppression(model: nn.Module, *, layer: str | None = None) -> nn.Module:
    """Return a copy whose named linear layer (default the first) never fires under ReLU: all gradients up to
    it are zero.

    Sent to every client but the target, it strips everyone else from those tensors of the sum.
    """
    crafted = copy.deepcopy(model)
    module = crafted.get_submodule(layer or next(iter(linear_modules(crafted))))
    assert isinstance(module, nn.Linear)
    with torch.no_grad():
        module.weight.zero_()
        module.bias.fill_(-1.0)
    return crafted


def unsummed(observation: Observation, names: tuple[str, ...], *, suppressed: int) -> Observation:
    """Return the target's own gradient out of a sum in which all `suppressed` other clients had it at zero.

    Raises: NotApplicable when the sum does not hold exactly one more client than were suppressed.
    """
    if observation.kind != "sum" or observation.contributors != suppressed + 1:
        raise NotApplicable(
            f"{observation.contributors} contributors, {suppressed} suppressed: not exactly one is left"
        )
    facts = {}
    for key, value in observation.metadata.items():
        if key not in ("summand", "point"):
            facts[key] = value
    return Observation(
        kind=observation.content,
        tensors={name: observation.tensors[name] for name in names},
        round=observation.round,
        observer=observation.observer,
        metadata=facts,
        broadcast=observation.broadcast,
        knowledge=observation.knowledge,
    )


def _suppressed(
    observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
) -> Finding:
    """Read a sum of which the server knows that one client alone was awake, up to its first linear layer."""
    private = working_copy(model, observation)
    channel = first_biased(observation, private)
    others = observation.contributors - 1
    names = (f"{channel.name}.weight", f"{channel.name}.bias")
    alone = unsummed(observation, names, suppressed=others)
    groups = []
    for value, size in agreeing(bias_quotients(first_biased(alone, private))[0]):
        if size >= 2:
            groups.append((value, size))
    limit = int(observation.known("batch_size") or len(groups))
    items = tuple(as_item(value, observation, 1.0 - 0.5**size) for value, size in groups[:limit])
    if not items:
        return Finding(reason="no two neurons agree on an input", details={"channel": channel.name})
    return Finding(
        items=items, confidence=items[0].confidence, details={"channel": channel.name, "silenced": others}
    )


def imprint() -> Attack:
    """Return the reader of imprint blocks, cumulative, sparse and per client."""
    return PlainAttack(
        name="imprint",
        family="active",
        attempt=_imprint,
        requires=("model",),
        summary="inputs from the bins of an imprint block in a malicious broadcast",
    )


def trap_weights() -> Attack:
    """Return the reader of trap weights."""
    return PlainAttack(
        name="trap_weights",
        family="active",
        attempt=_trap,
        requires=("model",),
        summary="inputs from neurons that a malicious broadcast made rare",
    )


def fishing() -> Attack:
    """Return the reader of class and feature fishing."""
    return PlainAttack(
        name="fishing",
        family="active",
        attempt=_fish,
        requires=("model",),
        summary="one example singled out by a malicious classification head",
    )


def model_inconsistency() -> Attack:
    """Return the reader of sums in which all clients but one were silenced."""
    return PlainAttack(
        name="model_inconsistency",
        family="active",
        attempt=_suppressed,
        requires=("model",),
        summary="one client's inputs out of a sum, the others silenced by a different broadcast",
    )
