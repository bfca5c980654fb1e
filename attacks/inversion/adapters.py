"""Adapters: inputs of every biased down-projection, and tokens where the adapter sees them unmixed.

A bottleneck adapter h + U relu(D h + b) has the same gradient identity as any linear layer: dD_i / db_i is
the hidden state of a position that fires unit i alone. Where the adapter sits in front of any attention,
hidden states are matched with the vocabulary.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from attacks.contract import Attack, Budget, Finding, Item, NotApplicable, PlainAttack, Prior, working_copy
from attacks.copies import sharing_copy
from attacks.inversion.channels import Channel, capture_inputs, observed_channels, run_tokens
from attacks.inversion.linear import agreeing, bias_quotients
from attacks.inversion.tokens import embedding_names, vocabulary_size
from attacks.observation import Observation

_MATCH = 1e-3


def narrow_channels(observation: Observation, model: nn.Module) -> list[Channel]:
    """Return the observed biased layers that project down, the mark of an adapter.

    Raises: NotApplicable when there is none.
    """
    channels = []
    for channel in observed_channels(observation, model).values():
        if (
            channel.bias is not None
            and bool(channel.bias.any())
            and channel.gradient.shape[0] < channel.gradient.shape[1]
        ):
            channels.append(channel)
    if not channels:
        raise NotApplicable("no biased layer that projects down was observed")
    return channels


def decode(states: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each state (n, d) the nearest row of the table (vocabulary, d) by angle, and the sine-like
    distance.
    """
    unit = states.double() / states.double().norm(dim=1, keepdim=True).clamp_min(1e-30)
    rows = table.double() / table.double().norm(dim=1, keepdim=True).clamp_min(1e-30)
    nearest = (unit @ rows.T).argmax(1)
    return nearest, torch.linalg.vector_norm(unit - rows[nearest], dim=1)


def _attempt(
    observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
) -> Finding:
    private = working_copy(model, observation)
    channels = narrow_channels(observation, private)
    items: list[Item] = []
    tokens: set[int] = set()
    for channel in channels:
        quotients, _ = bias_quotients(channel)
        # Alone at a unit shows as agreement of several units; single units are still worth decoding against
        # the vocabulary.
        states = []
        for value, size in agreeing(quotients):
            if size >= 2:
                states.append(value)
        if states:
            items.append(Item(kind="embedding", value=torch.stack(states).float(), confidence=0.8))
        if embedding_names(private):
            tokens |= _tokens_of(private, channel, quotients, vocabulary_size(observation, private))
    if tokens:
        items.insert(0, Item(kind="token_set", value=torch.tensor(sorted(tokens)), confidence=1.0))
    confidence = 1.0
    if not tokens:
        confidence = 0.0
        if items:
            confidence = 0.8
    reason = "no unit was hit by one position alone"
    if items:
        reason = ""
    return Finding(
        items=tuple(items), confidence=confidence, reason=reason, details={"adapters": len(channels)}
    )


def _tokens_of(model: nn.Module, channel: Channel, quotients: Tensor, vocabulary: int) -> set[int]:
    module = {channel.name: model.get_submodule(channel.name)}
    token_ids: set[int] = set()
    first = torch.zeros(1, 1, dtype=torch.long)
    probe = capture_inputs(module, partial(run_tokens, model, first))
    if channel.name not in probe or probe[channel.name].ndim != 3:  # a head behind pooling, not an adapter
        return set()
    model = sharing_copy(model).double()
    module = {channel.name: model.get_submodule(channel.name)}
    longest = int(getattr(getattr(model, "config", None), "max_position_embeddings", 1) or 1)
    for place in range(min(longest, 8)):
        ids = torch.arange(vocabulary)[:, None].expand(-1, place + 1)
        captured = capture_inputs(module, partial(run_tokens, model, ids))
        nearest, distance = decode(quotients, captured[channel.name][:, -1])
        token_ids |= set(nearest[distance < _MATCH].tolist())
    return token_ids


def adapter_readout() -> Attack:
    """Return the readout of bottleneck adapters."""
    return PlainAttack(
        name="adapter_readout",
        family="linear",
        attempt=_attempt,
        requires=("model",),
        summary="hidden states, and tokens where they are unmixed, from the "
        "bias trick on bottleneck adapters",
    )
