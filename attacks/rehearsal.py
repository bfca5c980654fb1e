"""Rehearse an observation: the same step of the same model on invented data, undefended, with the truth known.

A rehearsal is the positive control of an update whose data nobody knows: an attack that fails even here proves nothing
by failing on the real one. Noise of the same size is the negative control.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attacks.inversion.channels import ended
from attacks.observation import Observation
from attacks.truth import Truth

_LENGTH = 8
_PATCH = 4  # invented pictures are drawn at a fourth of their side and smoothed


def invented_batch(
    model: nn.Module, *, count: int, length: int, seed: int
) -> tuple[dict[str, Tensor], Truth] | None:
    """Return a batch for a Hugging Face model and the truth about it, or None where the model does not say what it takes."""
    generator = torch.Generator().manual_seed(seed)
    config: Any = getattr(model, "config", None)
    labels = torch.randint(max(2, int(getattr(config, "num_labels", 2) or 2)), (count,), generator=generator)
    classes = int(getattr(config, "num_labels", 2) or 2)
    side, vocabulary = getattr(config, "image_size", None), getattr(config, "vocab_size", None)
    if side:
        channels = int(getattr(config, "num_channels", 3))
        coarse = torch.rand(
            count, channels, -(-int(side) // _PATCH), -(-int(side) // _PATCH), generator=generator
        )
        images = nn.functional.interpolate(coarse, size=(int(side), int(side)), mode="bilinear")
        truth = Truth(images=images, labels=tuple(labels.tolist()), classes=classes)
        return {"pixel_values": images, "labels": labels}, truth
    if not vocabulary:
        return None
    ids = torch.randint(min(10, vocabulary // 2), int(vocabulary), (count, length), generator=generator)
    ids = ended(model, ids)
    sequences = tuple(tuple(row) for row in ids.tolist())
    with torch.no_grad():
        generative = model(input_ids=ids[:1], attention_mask=torch.ones_like(ids[:1])).logits.ndim == 3
    if generative:
        return {"input_ids": ids, "labels": ids}, Truth(sequences=sequences, vocabulary=int(vocabulary))
    return {"input_ids": ids, "labels": labels}, Truth(
        sequences=sequences, labels=tuple(labels.tolist()), classes=classes, vocabulary=int(vocabulary)
    )


def rehearse(observation: Observation, model: nn.Module, *, seed: int) -> tuple[Observation, Truth] | None:
    """Return what would have been observed, had the client trained on invented data without any defence.

    Batch size, length, local steps and optimiser are those of the observation, as far as known. None when the model
    takes no batch that can be invented, or does not train the observed tensors.
    """
    client = copy.deepcopy(model).eval().requires_grad_(False)
    own = dict(client.named_parameters()) | dict(client.named_buffers())
    with torch.no_grad():
        for name, value in (observation.broadcast or {}).items():
            if name in own and own[name].shape == value.shape:
                own[name].copy_(value)
    trained = {name: value for name, value in client.named_parameters() if name in observation.tensors}
    # A difference of two state dicts also names tied weights a second time, and buffers, which no gradient moves.
    kept, buffers = client.state_dict(keep_vars=True), {name for name, _ in client.named_buffers()}
    own_again = {name for name, value in kept.items() if any(value is other for other in trained.values())}
    if not trained or set(observation.tensors) - set(trained) - own_again - buffers:
        return None
    count = int(observation.known("batch_size") or 1) * observation.contributors
    lengths = observation.known("lengths") or (observation.known("sequence_length") or _LENGTH,)
    steps = int(observation.known("local_steps") or 1) if observation.content == "delta" else 1
    try:
        drawn = [
            invented_batch(client, count=count, length=max(lengths), seed=seed + step)
            for step in range(steps)
        ]
        batches = [batch for batch in drawn if batch is not None]
        if not batches:
            return None
        tensors = _trained(client, trained, [batch for batch, _ in batches], observation)
    except (ValueError, RuntimeError, TypeError, IndexError, AttributeError):  # a model of another make
        return None
    truths = [truth for _, truth in batches]
    labels = tuple(label for truth in truths for label in truth.labels or ())
    whole = Truth(
        sequences=tuple(row for truth in truths for row in truth.sequences or ()) or None,
        images=None
        if truths[0].images is None
        else torch.cat([t.images for t in truths if t.images is not None]),
        labels=labels or None,
        classes=truths[0].classes,
        vocabulary=truths[0].vocabulary,
    )
    return _undefended(observation, tensors), whole


def guessed(observation: Observation, truth: Truth) -> bool:
    """Say whether a rehearsal had to guess how much data stands behind the update, so that it may be easier than the update."""
    length = observation.known("lengths") or observation.known("sequence_length")
    return observation.known("batch_size") is None or (truth.images is None and length is None)


def _trained(
    client: nn.Module,
    trained: Mapping[str, Tensor],
    batches: list[dict[str, Tensor]],
    observation: Observation,
) -> dict[str, Tensor]:
    parameters = [value.requires_grad_(True) for value in trained.values()]
    before = {name: value.detach().clone() for name, value in trained.items()}
    with torch.enable_grad():
        if observation.content == "gradient":
            grads = torch.autograd.grad(client(**batches[0]).loss, parameters, allow_unused=True)
            found = {
                name: torch.zeros_like(value) if grad is None else grad
                for (name, value), grad in zip(trained.items(), grads, strict=True)
            }
        else:
            optimiser = _optimiser(parameters, observation)
            for batch in batches:
                optimiser.zero_grad()
                client(**batch).loss.backward()
                optimiser.step()
            found = {name: value.detach() - before[name] for name, value in trained.items()}
    return {name: value.detach() * observation.contributors for name, value in found.items()}


def _optimiser(parameters: list[Tensor], observation: Observation) -> torch.optim.Optimizer:
    kind = str(observation.known("optimiser") or "sgd").lower()
    rate, decay = (
        float(observation.known("learning_rate") or 0.01),
        float(observation.known("weight_decay") or 0.0),
    )
    if kind == "sgd":
        return torch.optim.SGD(parameters, lr=rate, weight_decay=decay)
    if kind == "adam":
        return torch.optim.Adam(parameters, lr=rate, weight_decay=decay)
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)


def _undefended(observation: Observation, tensors: Mapping[str, Tensor]) -> Observation:
    gone = ("noise_multiplier", "noise_deviation", "clip_norm", "point")
    metadata = {name: value for name, value in observation.metadata.items() if name not in gone}
    granted = {name: getattr(observation.knowledge, name) for name in observation.knowledge.granted()}
    for name in ("labels", "label_counts", "token_set", *gone):
        granted.pop(name, None)
    return Observation(
        kind=observation.kind,
        tensors=tensors,
        round=observation.round,
        observer=observation.observer,
        contributors=observation.contributors,
        metadata=metadata,
        broadcast=observation.broadcast,
        knowledge=type(observation.knowledge)(**granted),
    )


def noise_only(observation: Observation, *, seed: int) -> Observation:
    """Return the observation with every tensor replaced by noise of the same length: nobody's data."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, tensor in observation.tensors.items():
        noise = torch.randn(tensor.shape, generator=generator)
        size = float(tensor.double().norm()) / max(float(noise.double().norm()), 1e-30)
        tensors[name] = (noise * size).to(tensor.dtype)
    return observation.replace_tensors(tensors)
