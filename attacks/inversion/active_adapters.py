"""Malicious server on adapters, LoRA and prompt pools: frozen weights are crafted so that the small update
holds the input.

Sources: Zhang et al., "PEFTLeak", 2025 (adapters); Sami et al. and others, "MineGrad", 2026 (LoRA);
"PromptMIA", 2026 (prompt pools). Own derivations: an image code written by uniform attention groups the
patches of one image, and heads that look at one place each keep the places apart in the rows of LoRA's first
factor.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attacks.contract import Attack, Budget, Finding, Item, NotApplicable, PlainAttack, Prior, working_copy
from attacks.foreign import Configuration
from attacks.inversion.active import read_imprint
from attacks.inversion.channels import capture_inputs
from attacks.inversion.optimise import image_logits
from attacks.inversion.position import assemble
from attacks.inversion.tokens import embedding_names, token_embedding
from attacks.observation import Observation

_CODE = 10.0
_SHIFT = 20.0
_PATCH_SCALE = 0.5


def first_named(model: nn.Module, pattern: str) -> str:
    """Return the name of the first module whose name matches.

    Raises: NotApplicable when there is none.
    """
    for name, _ in model.named_modules():
        if re.search(pattern, name):
            return str(name)
    raise NotApplicable(f"the model has no module like {pattern!r}")


def _linear(model: nn.Module, pattern: str) -> nn.Linear:
    module = model.get_submodule(first_named(model, pattern))
    module = getattr(module, "base_layer", module)
    assert isinstance(module, nn.Linear)
    return module


def _table(model: nn.Module, name: str) -> Tensor:
    weight = model.get_submodule(name).weight
    if not isinstance(weight, Tensor):
        raise NotApplicable(f"{name} has no single weight matrix")
    return weight


def _identity(layer: nn.Linear, *, bias: float) -> None:
    layer.weight.zero_()
    layer.weight.fill_diagonal_(1.0)
    if layer.bias is not None:
        layer.bias.fill_(bias)


def _clear(*layers: nn.Linear) -> None:
    for layer in layers:
        layer.weight.zero_()
        if layer.bias is not None:
            layer.bias.zero_()


def _plain_norms(model: nn.Module, prefix: str) -> None:
    for name, module in model.named_modules():
        if name.startswith(prefix) and isinstance(module, nn.LayerNorm):
            module.weight.fill_(1.0)
            module.bias.zero_()


# ---------------------------------------------------------------------------------------- adapters (PEFTLeak)


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """How the crafted embedding uses its width: pixels first, then one place code each, the image code, and a
    blank.
    """

    pixels: int
    places: int

    @property
    def image_code(self) -> int:
        """Return the coordinate that holds the same number for all patches of one image."""
        return self.pixels + self.places

    @property
    def blank(self) -> int:
        """Return a coordinate that is zero before the norm."""
        return self.pixels + self.places + 1


def vision_frame(model: nn.Module) -> tuple[Frame, nn.Conv2d, nn.Parameter]:
    """Return the frame of a vision transformer, its patch projection and its position embedding.

    Raises: NotApplicable when the width has no room for pixels and codes.
    """
    projection = next(
        (m for m in model.modules() if isinstance(m, nn.Conv2d) and m.stride == m.kernel_size), None
    )
    positions = next(
        (p for name, p in model.named_parameters() if re.search(r"pos", name) and p.ndim == 3), None
    )
    if projection is None or positions is None:
        raise NotApplicable(
            "the model is not a vision transformer with a patch projection and position embedding"
        )
    pixels = projection.in_channels * projection.kernel_size[0] * projection.kernel_size[1]
    frame = Frame(pixels=pixels, places=positions.shape[1])
    if frame.blank >= positions.shape[2]:
        raise NotApplicable(f"{frame.blank + 1} coordinates are needed, the width is {positions.shape[2]}")
    return frame, projection, positions


def craft_adapter_leak(model: nn.Module, public: Tensor, *, down: str, up: str) -> nn.Module:
    """Return a copy of a vision transformer whose first ReLU adapter stores patches in the bins of its
    down-projection.

    `down` and `up` name the adapter's layers, which sit behind the feed-forward layer of block 0; `public`
    are images (n, c, h, w) on which the bins are set. The down-projection's rows are shared out evenly over
    the patches.

    Assumes: a GELU between two linear feed-forward layers, and at least one more block, so that every place
    has a gradient.
    """
    crafted = copy.deepcopy(model)
    frame, projection, positions = vision_frame(crafted)
    width = positions.shape[2]
    first, second = crafted.get_submodule(down), crafted.get_submodule(up)
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    with torch.no_grad():
        projection.weight.zero_()
        projection.weight[: frame.pixels] = _PATCH_SCALE * torch.eye(frame.pixels).reshape(
            -1, *projection.weight.shape[1:]
        )
        if projection.bias is not None:
            projection.bias.zero_()
        positions.zero_()
        for place in range(frame.places):
            positions[0, place, frame.pixels + place] = _CODE
        for name, value in crafted.named_parameters():
            if "cls_token" in name:
                value.zero_()
        block = re.sub(r"\.?(attention|self_attn).*", "", first_named(crafted, r"(q_proj|query)$"))
        _plain_norms(crafted, block)
        query, key, value_layer, output = (
            _linear(crafted, pattern)
            for pattern in (
                r"(q_proj|query)$",
                r"(k_proj|key)$",
                r"(v_proj|value)$",
                r"(o_proj|attention\.output\.dense)$",
            )
        )
        _clear(query, key, value_layer, output)
        wave = torch.randn(frame.pixels, generator=torch.Generator().manual_seed(0))
        value_layer.weight[0, : frame.pixels] = wave / wave.norm()
        output.weight[frame.image_code, 0] = 10.0 * frame.places
        _identity(_linear(crafted, r"(fc1|intermediate\.dense)$"), bias=_SHIFT)
        _identity(_linear(crafted, r"(fc2|(?<!attention\.)output\.dense)$"), bias=-_SHIFT)
    inputs = capture_inputs({down: first}, lambda: image_logits(crafted, public))[down]
    _set_bins(first, second, inputs, frame, width)
    return crafted


def _set_bins(down: nn.Linear, up: nn.Linear, inputs: Tensor, frame: Frame, width: int) -> None:
    # place 0 is the class token
    if frame.places > 1:
        patches = range(1, frame.places)
    else:
        patches = range(1)
    bins = down.out_features // len(patches)
    if bins < 2:
        raise NotApplicable(f"{down.out_features} rows are too few for {len(patches)} patches")
    with torch.no_grad():
        down.weight.zero_()
        down.bias.fill_(-1e6)
        for index, place in enumerate(patches):
            row = torch.zeros(width)
            codes = inputs[:, place, frame.image_code]
            # The image code sorts; the place code is only large enough to silence the other places.
            row[frame.image_code] = (
                0.5 * inputs[:, place, frame.pixels + place].median() / (codes.max() - codes.min())
            )
            row[frame.pixels + place] = 1.0
            values = (inputs[:, place] @ row).double()
            edges = torch.quantile(values, torch.arange(bins, dtype=torch.float64) / bins)
            edges[0] -= values.max() - values.min()
            down.weight[index * bins : (index + 1) * bins] = row
            down.bias[index * bins : (index + 1) * bins] = -edges.float()
        up.weight.fill_(1e-4)
        if up.bias is not None:
            up.bias.zero_()


def _read_adapter(
    observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
) -> Finding:
    private = working_copy(model, observation)
    frame, projection, positions = vision_frame(private)
    if float(positions.detach()[0, 0, frame.pixels]) != _CODE:
        raise NotApplicable(
            "the broadcast's position embedding holds no place codes: it is not a crafted one"
        )
    name = _down_projection(observation, private, positions.shape[2])
    own, view = private.get_submodule(name), observation.gradient().tensors
    assert isinstance(own, nn.Linear)
    places = own.weight.detach()[:, frame.pixels : frame.image_code].argmax(1)
    patches: dict[int, list[tuple[float, Tensor]]] = {}
    for place in torch.unique(places[own.bias.detach() > -1e5]).tolist():
        rows = places == place
        held = read_imprint(view[f"{name}.weight"][rows], view[f"{name}.bias"][rows], cumulative=True)
        patches[place] = [_unnormed(state, frame, place) for state in held]
    patch = (int(projection.kernel_size[0]), int(projection.kernel_size[1]))
    images = _grouped(patches, projection.in_channels, patch)
    if not images:
        return Finding(reason="every bin is empty or holds a mixture", details={"channel": name})
    items = tuple(Item(kind="image", value=image.float(), confidence=0.9) for image in images)
    return Finding(items=items, confidence=0.9, details={"channel": name, "images": len(items)})


def _down_projection(observation: Observation, model: nn.Module, width: int) -> str:
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or module.in_features != width or module.bias is None:
            continue
        binned = float(module.bias.detach().min()) < -1e-3 and not bool(module.weight[:, 0].any())
        if binned and f"{name}.weight" in observation.tensors:
            return str(name)
    raise NotApplicable("no observed down-projection holds bins")


def _unnormed(state: Tensor, frame: Frame, place: int) -> tuple[float, Tensor]:
    """Undo the layer norm with the known code and blank; return the image code and the pixels (pixels,)."""
    blank, code = state[frame.blank], state[frame.pixels + place]
    spread = _CODE / (code - blank)
    mean = -blank * spread
    return float(state[frame.image_code] * spread + mean), (
        state[: frame.pixels] * spread + mean
    ) / _PATCH_SCALE


def _grouped(
    patches: dict[int, list[tuple[float, Tensor]]], channels: int, patch: tuple[int, int]
) -> list[Tensor]:
    """Put together patches that carry the same image code; images with a missing patch are left out."""
    order = sorted(patches)
    side = int(len(order) ** 0.5)
    images = []
    for code, first in patches[order[0]]:
        parts = [first]
        for place in order[1:]:
            same = [
                pixels for other, pixels in patches[place] if abs(other - code) < 1e-3 * max(1.0, abs(code))
            ]
            parts.extend(same[:1])
        pixels = torch.stack(parts)
        if len(parts) == len(order) and bool(((pixels > -0.05) & (pixels < 1.05)).all()):
            images.append(assemble(pixels, channels, patch, (side, side)))
    return images


# -------------------------------------------------------------------------------------------- LoRA (MineGrad)


def craft_lora_leak(model: nn.Module, *, skew: float = 50.0) -> nn.Module:
    """Return a copy of a post-norm encoder whose LoRA on value projections keeps tokens apart, one place per
    head.

    Head h of layer l looks at place l x heads + h alone, and LoRA's second factor connects rank h to head h
    alone: row h of the first factor's gradient is then that place's hidden state. Layers pass the embedding
    on unchanged.

    Assumes: modules named as in BERT, LoRA (lora_A, lora_B) on "value" with rank up to the number of heads,
    one example.
    """
    crafted = copy.deepcopy(model)
    names = []
    for name, _ in crafted.named_modules():
        if re.search(r"self\.value$", name):
            names.append(name)
    if not names:
        raise NotApplicable("the model has no value projections named as in BERT")
    table = _table(crafted, _position_name(crafted))
    config: Configuration = crafted.config
    heads = int(config.num_attention_heads)
    size = table.shape[1] // heads
    with torch.no_grad():
        table.zero_()
        for place in range(min(table.shape)):
            table[place, place] = _CODE
        for module in crafted.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.fill_(1.0)
                module.bias.zero_()
        for layer, name in enumerate(names):
            prefix = name.removesuffix("self.value")
            query, key = (
                _linear(crafted, re.escape(f"{prefix}self.{part}") + "$") for part in ("query", "key")
            )
            _clear(query, key)
            _quiet_layer(crafted, prefix)
            lora_b = _table(crafted, f"{name}.lora_B")
            lora_b.zero_()
            for head in range(heads):
                place = layer * heads + head
                if place < min(table.shape) and head < lora_b.shape[1]:
                    key.weight[head * size, place], query.bias[head * size] = 1.0, skew
                    lora_b[head * size : (head + 1) * size, head] = 1.0 + torch.arange(size) % 3
    return crafted


def _quiet_layer(model: nn.Module, prefix: str) -> None:
    """Let a layer pass the stream on, with an output so small that only its gradient matters."""
    output = model.get_submodule(f"{prefix}output.dense")
    assert isinstance(output, nn.Linear)
    nn.init.normal_(output.weight, std=1e-4, generator=torch.Generator().manual_seed(0))
    output.bias.zero_()
    feed_forward = model.get_submodule(f"{prefix.removesuffix('attention.')}output.dense")
    assert isinstance(feed_forward, nn.Linear)
    _clear(feed_forward)


def _position_name(model: nn.Module) -> str:
    for name in embedding_names(model):
        if "position" in name or name.endswith("wpe"):
            return str(name)
    raise NotApplicable("the model has no learned position embedding")


def _read_lora(
    observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
) -> Finding:
    private = working_copy(model, observation)
    table = _table(private, _position_name(private)).detach()
    if float(table[0, 0]) != _CODE or float(table[0, 1]) != 0.0:
        raise NotApplicable(
            "the broadcast's position embedding holds no place codes: it is not a crafted one"
        )
    factors = []
    for name in observation.tensors:
        if re.search(r"lora_A\b.*weight$", name):
            factors.append(name)
    if not factors:
        raise NotApplicable("no gradient of LoRA's first factor was observed")
    words = _table(private, token_embedding(private)).detach()
    pairs: dict[int, tuple[int, float]] = {}
    for name in factors:
        for row in observation.gradient().tensors[name].double():
            if float(row.norm()) == 0.0:
                continue
            place = int(row.abs().argmax())
            if (
                place < len(table)
                and (best := _decode(row * row[place].sign(), words, place, private)) is not None
            ):
                pairs[place] = max(pairs.get(place, best), best, key=lambda pair: pair[1])
    if not pairs:
        return Finding(reason="no row of the first factor holds one token's state")
    text = torch.full((max(pairs) + 1,), -1)
    for place, (token, _) in pairs.items():
        text[place] = token
    sure = sum(value for _, value in pairs.values()) / len(pairs)
    return Finding(
        items=(Item(kind="sequence", value=text, confidence=sure),),
        confidence=sure,
        details={"places": len(pairs), "modules": len(factors)},
    )


def _decode(row: Tensor, words: Tensor, place: int, model: nn.Module) -> tuple[int, float] | None:
    """Return the token whose embedding at this place points along the row, with the cosine away from the
    place's code.
    """
    segments = []
    for name, p in model.named_parameters():
        if "token_type_embeddings" in name:
            segments.append(p.detach())
    states = words.double() + (segments[0][0].double() if segments else 0.0)
    states[:, place] += _CODE
    states = states - states.mean(1, keepdim=True)
    rest = torch.arange(states.shape[1]) != place
    centred = row - row.mean()
    likeness = nn.functional.normalize(states[:, rest], dim=1) @ nn.functional.normalize(centred[rest], dim=0)
    value, token = likeness.max(0)
    if float(value) > 0.9:
        return (int(token), float(value))
    return None


# ----------------------------------------------------------------------------------------------- prompt pools


def craft_prompt_keys(keys: Tensor, targets: Tensor, public: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys (n, d) of a prompt pool with one slot planted per target query, and the planted slots.

    The other keys become centres of public queries (m, d), so that everyone but the targets is drawn to
    those.
    """
    if len(targets) >= len(keys):
        raise ValueError(
            f"targets has {len(targets)} rows, must be fewer than the {len(keys)} keys of the pool"
        )
    crafted = keys.clone()
    slots = torch.arange(len(targets))
    crafted[: len(targets)] = nn.functional.normalize(targets, dim=1)
    unit = nn.functional.normalize(public, dim=1)
    centres = unit[torch.linspace(0, len(unit) - 1, len(keys) - len(targets)).long()].clone()
    for _ in range(10):
        nearest = (unit @ nn.functional.normalize(centres, dim=1).T).argmax(1)
        for index in range(len(centres)):
            if bool((nearest == index).any()):
                centres[index] = unit[nearest == index].mean(0)
    crafted[len(targets) :] = nn.functional.normalize(centres, dim=1)
    return crafted, slots


def slot_scores(update: Tensor, slots: Sequence[int] | Tensor) -> Tensor:
    """Return how far each planted slot of a pool's prompts (n, length, d) moved:
    zero when nobody chose it.
    """
    moved: Tensor = update.flatten(1).norm(dim=1)
    return moved[torch.as_tensor(slots)]


def _prompt_membership(
    observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
) -> Finding:
    if observation.broadcast is None:
        raise NotApplicable("the broadcast pool was not observed")
    queries = (prior.candidates or {}).get("queries")
    keys = next(
        (
            value
            for name, value in observation.broadcast.items()
            if re.search(r"key", name) and value.ndim == 2
        ),
        None,
    )
    prompts = next(
        (value for name, value in observation.tensors.items() if "prompt" in name and value.ndim == 3), None
    )
    if queries is None or keys is None or prompts is None:
        raise NotApplicable("a pool's keys, its prompts' update and the candidates' queries are needed")
    likeness = nn.functional.normalize(queries, dim=1) @ nn.functional.normalize(keys, dim=1).T
    value, slots = likeness.max(1)
    if not bool((value > 1 - 1e-4).all()):
        raise NotApplicable("the pool has no slot planted for every candidate")
    scores = slot_scores(prompts, slots)
    moved = float((scores > 1e-6 * scores.max().clamp_min(1e-30)).double().mean())
    return Finding(
        items=(Item(kind="scores", value=scores, confidence=0.9),), confidence=0.9, details={"moved": moved}
    )


def adapter_leak() -> Attack:
    """Return the reader of crafted adapters on vision transformers."""
    return PlainAttack(
        name="adapter_leak",
        family="active",
        attempt=_read_adapter,
        requires=("model",),
        summary="images from the bins of an adapter behind a crafted frozen vision transformer",
    )


def lora_leak() -> Attack:
    """Return the reader of crafted LoRA factors on text encoders."""
    return PlainAttack(
        name="lora_leak",
        family="active",
        attempt=_read_lora,
        requires=("model",),
        summary="one text, place by place, from LoRA factors of a crafted encoder",
    )


def prompt_membership() -> Attack:
    """Return membership through planted slots of a prompt pool."""
    return PlainAttack(
        name="prompt_membership",
        family="active",
        attempt=_prompt_membership,
        requires=("prior.candidates",),
        summary="membership of targets whose query was planted in a prompt pool",
    )
