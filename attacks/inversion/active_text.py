"""Malicious server on decoders: parameters alone are changed, and the first feed-forward layer stores token
states.

The first attention block writes a code of the sentence's first token into reserved coordinates of every
place; the rows of the first feed-forward layer are bins over one measurement of the state. Adjacent
differences of its gradient give single states; each is decoded to a token and a place, and equal codes group
them into sentences. Source: Fowl et al., "Decepticons", 2023, sections 3 and 4, in a short form: one block
holds all bins, and the code is exact rather than clustered.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from attacks.contract import Attack, Budget, Finding, Item, NotApplicable, PlainAttack, Prior, working_copy
from attacks.foreign import LibraryModel
from attacks.inversion.active import bin_edges, parallel_rows, read_imprint
from attacks.inversion.channels import capture_inputs
from attacks.observation import Observation

_RESERVED = 8  # coordinates at the end: the last marks the first place, the others hold the sentence code
_MARK = 10.0
_GAIN = 1e4
_SURE = 0.995
_STEEP, _LOUD = 300.0, 3.0  # of an encoder's bins, and of what it adds to a state


def _parts(model: nn.Module) -> tuple[nn.Embedding, nn.Embedding, Any]:
    body: LibraryModel = getattr(model, "transformer", None)
    if body is None or not hasattr(body, "wte") or not hasattr(body, "wpe"):
        raise NotApplicable("written for decoders with GPT-2's layout")
    return body.wte, body.wpe, body.h[0]


def craft_decepticon(model: nn.Module, public: Tensor, *, skew: float = 100.0, seed: int = 0) -> nn.Module:
    """Return a copy of a GPT-2 whose first block stores the states of private tokens.

    `public` are token ids (n, t) on which the bins are set.

    Assumes: at least two blocks, an activation that is linear far from zero (GELU), untied or ignored output
    rows.
    """
    crafted = copy.deepcopy(model)
    words, places, block = _parts(crafted)
    width = words.embedding_dim
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        words.weight[:, -_RESERVED:] = 0.0
        places.weight[:, -_RESERVED:] = 0.0
        places.weight[0, -1] = _MARK
        _write_code(block, width, skew, generator)
        for norm in (block.ln_1, block.ln_2):
            norm.weight.fill_(1.0)
            norm.bias.zero_()
    _store_states(crafted, block, public, width, generator)
    return crafted


def _write_code(block: LibraryModel, width: int, skew: float, generator: torch.Generator) -> None:
    """Let every place attend to the marked first place and write projections of its state into reserved
    coordinates.
    """
    fused, output = block.attn.c_attn, block.attn.c_proj
    fused.weight.zero_()
    fused.bias.zero_()
    output.weight.zero_()
    output.bias.zero_()
    size = width // block.attn.num_heads
    for start in range(0, width, size):  # every head: query is constant, key reads the mark
        fused.bias[start] = skew
        fused.weight[width - 1, width + start] = 1.0
    for index in range(_RESERVED - 1):
        code = torch.randn(width - _RESERVED, generator=generator)
        fused.weight[: width - _RESERVED, 2 * width + index] = code / code.norm()
        output.weight[index, width - _RESERVED + index] = 0.5


def _store_states(
    model: nn.Module, block: LibraryModel, public: Tensor, width: int, generator: torch.Generator
) -> None:
    first, second = block.mlp.c_fc, block.mlp.c_proj
    states = capture_inputs({"states": first}, lambda: model(input_ids=public))["states"].reshape(-1, width)
    along = torch.randn(width, generator=generator)
    along[-1] = 0.0
    along = along / along.norm()
    edges = bin_edges(states @ along, first.weight.shape[1])
    with torch.no_grad():
        first.weight.copy_((_GAIN * along)[:, None].expand_as(first.weight))
        first.bias.copy_(-_GAIN * edges)
        direction = torch.randn(width, generator=generator)
        second.weight.copy_(1e-4 / _GAIN / first.weight.shape[1] * direction.expand_as(second.weight))
        second.bias.zero_()


def _read(
    observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
) -> Finding:
    private = working_copy(model, observation)
    words, places, block = _parts(private)
    first = block.mlp.c_fc
    name = next(label for label, module in private.named_modules() if module is first)
    view = observation.gradient().tensors
    if f"{name}.weight" not in view or f"{name}.bias" not in view:
        raise NotApplicable("the first feed-forward layer was not shared")
    if not parallel_rows(first.weight.detach().T):
        raise NotApplicable("the first feed-forward layer has no parallel rows: it is not a crafted one")
    states = read_imprint(view[f"{name}.weight"].T, view[f"{name}.bias"], cumulative=True)
    tokens, where, sure, codes = _decode(states, words.weight.detach(), places.weight.detach())
    keep = sure > _SURE
    if not bool(keep.any()):
        return Finding(reason="every bin is empty or holds a mixture", details={"held": len(states)})
    tokens, where, codes = tokens[keep], where[keep], codes[keep]
    items = [
        Item(kind="placed_tokens", value=torch.stack([where, tokens], dim=1), confidence=0.95),
        Item(kind="token_set", value=torch.unique(tokens), confidence=0.95),
    ]
    for text in _sentences(tokens, where, codes):
        items.append(Item(kind="sequence", value=text, confidence=0.95))
    return Finding(
        items=tuple(items), confidence=0.95, details={"held": len(states), "decoded": int(keep.sum())}
    )


def _decode(states: Tensor, words: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return token, place, cosine and sentence code of each state, comparing what the norm does not change.

    Known coordinates are centred and compared by cosine; the reserved ones are put on the same scale first.
    """
    coordinates = words.shape[1] - _RESERVED
    ours = states[:, :coordinates].double()
    ours = ours - ours.mean(1, keepdim=True)
    best = torch.full((len(states),), -2.0, dtype=torch.float64)
    token, place = torch.zeros(len(states), dtype=torch.long), torch.zeros(len(states), dtype=torch.long)
    scale = torch.ones(len(states), dtype=torch.float64)
    for index in range(len(places)):
        table = words[:, :coordinates].double() + places[index, :coordinates].double()
        table = table - table.mean(1, keepdim=True)
        value, chosen = (nn.functional.normalize(ours, dim=1) @ nn.functional.normalize(table, dim=1).T).max(
            1
        )
        better = value > best
        best, token = torch.where(better, value, best), torch.where(better, chosen, token)
        place = torch.where(better, torch.tensor(index), place)
        scale = torch.where(better, table.norm(dim=1)[chosen] / ours.norm(dim=1).clamp_min(1e-30), scale)
    # The mean that the norm took out is the same for all coordinates: the code is read as differences.
    reserved = states[:, coordinates:-1].double()
    codes = (reserved - reserved.mean(1, keepdim=True)) * scale[:, None]
    return token, place, best, codes


def _sentences(tokens: Tensor, where: Tensor, codes: Tensor, *, tolerance: float = 1e-2) -> list[Tensor]:
    """Group states with equal codes;
    return one row of ids per sentence, -1 where a place was not recovered.
    """
    left = list(range(len(tokens)))
    texts = []
    while left:
        head = codes[left[0]]
        same = []
        for index in left:
            if float((codes[index] - head).norm()) <= tolerance * max(1.0, float(head.norm())):
                same.append(index)
        text = torch.full((int(where[same].max()) + 1,), -1)
        text[where[same]] = tokens[same]
        texts.append(text)
        left = [index for index in left if index not in same]
    return texts


def decepticon() -> Attack:
    """Return the reader of crafted decoders."""
    return PlainAttack(
        name="decepticon",
        family="active",
        attempt=_read,
        requires=("model",),
        summary="sentences from a decoder whose first block a malicious server crafted",
    )


# --------------------------------------------------------------------------------------------------- encoders


def _encoder_parts(model: nn.Module) -> tuple[LibraryModel, LibraryModel]:
    """Return the embeddings and the first layer of an encoder with BERT's layout."""
    for module in model.modules():
        embeddings: LibraryModel = getattr(module, "embeddings", None)
        layers: LibraryModel = getattr(module, "encoder", None)
        if hasattr(embeddings, "word_embeddings") and hasattr(layers, "layer"):
            return embeddings, layers.layer[0]
    raise NotApplicable("written for encoders with BERT's layout")


def craft_encoder_bins(model: nn.Module, public: Tensor, *, seed: int = 0) -> nn.Module:
    """Return a copy of a BERT whose first block stores the states of private tokens, each in a bin.

    The first attention adds nothing, so that a state is the token and its place alone. `public` are token ids
    (n, t) on which the bins are set.

    Assumes: an activation that is linear far from zero (GELU), absolute positions. Source: own, after Fowl et
    al., "Decepticons", 2022.
    """
    crafted = copy.deepcopy(model)
    embeddings, layer = _encoder_parts(crafted)
    generator = torch.Generator().manual_seed(seed)
    first, second = layer.intermediate.dense, layer.output.dense
    with torch.no_grad():
        for norm in (embeddings.LayerNorm, layer.attention.output.LayerNorm):
            norm.weight.fill_(1.0)
            norm.bias.zero_()
        layer.attention.output.dense.weight.zero_()
        layer.attention.output.dense.bias.zero_()
        width = first.weight.shape[1]
        states = capture_inputs({"states": first}, lambda: crafted(input_ids=public))["states"]
        along = nn.functional.normalize(torch.randn(width, generator=generator), dim=0)
        edges = bin_edges(states.reshape(-1, width) @ along, len(first.weight))
        first.weight.copy_((_STEEP * along).expand_as(first.weight))
        first.bias.copy_(-_STEEP * edges)
        direction = torch.randn(len(second.weight), generator=generator)
        # Loud enough for the answer to outlive the rounding of a sum, and of weights this large.
        second.weight.copy_(
            (_LOUD / _STEEP / len(first.weight) * direction)[:, None].expand_as(second.weight)
        )
        second.bias.zero_()
    return crafted


def _read_encoder(
    observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
) -> Finding:
    private = working_copy(model, observation)
    embeddings, layer = _encoder_parts(private)
    first = layer.intermediate.dense
    name = next(label for label, module in private.named_modules() if module is first)
    if not parallel_rows(first.weight.detach()):
        raise NotApplicable("the first feed-forward layer has no parallel rows: it is not a crafted one")
    view = observation.gradient().tensors
    if f"{name}.weight" not in view or f"{name}.bias" not in view:
        raise NotApplicable("the first feed-forward layer was not shared")
    states = read_imprint(view[f"{name}.weight"], view[f"{name}.bias"], cumulative=True)
    tokens, where, sure = _decode_plain(states, embeddings)
    clear = sure > _SURE
    if not bool(clear.any()):
        return Finding(reason="every bin is empty or holds a mixture", details={"held": len(states)})
    pairs = torch.unique(torch.stack([where[clear], tokens[clear]], dim=1), dim=0)
    items = [
        Item(kind="placed_tokens", value=pairs, confidence=0.95),
        Item(kind="token_set", value=torch.unique(pairs[:, 1]), confidence=0.95),
    ]
    if len(torch.unique(pairs[:, 0])) == len(pairs):  # one text
        text = torch.full((int(pairs[:, 0].max()) + 1,), -1)
        text[pairs[:, 0]] = pairs[:, 1]
        items.append(Item(kind="sequence", value=text, confidence=0.95))
    return Finding(
        items=tuple(items), confidence=0.95, details={"held": len(states), "decoded": int(clear.sum())}
    )


def _decode_plain(states: Tensor, embeddings: LibraryModel) -> tuple[Tensor, Tensor, Tensor]:
    """Return token, place and cosine of each state (n, d), which a norm without gain has centred."""
    words, places = embeddings.word_embeddings.weight.detach(), embeddings.position_embeddings.weight.detach()
    segment = embeddings.token_type_embeddings.weight.detach()[0]
    ours = states.double() - states.double().mean(1, keepdim=True)
    ours = nn.functional.normalize(ours, dim=1)
    best = torch.full((len(states),), -2.0, dtype=torch.float64)
    token, place = torch.zeros(len(states), dtype=torch.long), torch.zeros(len(states), dtype=torch.long)
    for index, own in enumerate(places):
        table = (words + own + segment).double()
        table = nn.functional.normalize(table - table.mean(1, keepdim=True), dim=1)
        value, chosen = (ours @ table.T).max(1)
        better = value > best
        best, token = torch.where(better, value, best), torch.where(better, chosen, token)
        place = torch.where(better, torch.tensor(index), place)
    return token, place, best


def encoder_bins() -> Attack:
    """Return the reader of crafted encoders."""
    return PlainAttack(
        name="encoder_bins",
        family="active",
        attempt=_read_encoder,
        requires=("model",),
        summary="tokens with their places from an encoder whose first block a malicious server crafted",
    )
