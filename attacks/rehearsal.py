"""Rehearse an observation: the same step of the same model on invented data, undefended, with the truth
known.

A rehearsal is the positive control of an update whose data nobody knows: an attack that fails even here
proves nothing by failing on the real one. It repeats the setting that was observed: number, lengths and
padding of records, local steps, optimiser, decay, dropout, the rounding of a cast and the entries a
sparsifier dropped. Noise is the negative control.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from attacks import nulls, steps
from attacks.copies import sharing_copy
from attacks.foreign import Configuration
from attacks.inversion.channels import end_token, ended
from attacks.observation import Observation
from attacks.truth import Truth

_LENGTH = 8
_PATCH = 4  # invented pictures are drawn at a fourth of their side and smoothed
_REPEATS = 0.2  # of the words of a text were in it before
_MOMENTUM = 0.9
_IGNORED = -100  # the label of a position that no loss counts
_HELD = 4  # changes at once: those of one round, each as large as what is trained
OPTIMISERS = ("sgd", "adam", "adamw")  # and "sgd with momentum"
# What a rehearsed change is made by, beside the broadcast and the names of what is trained.
_REHEARSED_FACTS = (
    "batch_size", "lengths", "sequence_length", "local_steps", "optimiser", "learning_rate", "weight_decay",
    "dropout",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Name the optimiser a client is told to have; `momentum` is 0 without."""

    name: str
    momentum: float = 0.0


def recipe(observation: Observation) -> Recipe | None:
    """Return the optimiser behind a delta as told, None for one that is not told or not known here."""
    stated = str(observation.known("optimiser") or "").lower()
    words = re.findall(r"[a-z]+", stated)
    if len(words) == 0 or words[0] not in OPTIMISERS or set(words[1:]) - {"with", "momentum"}:
        return None
    coefficient = observation.metadata.get("momentum")
    momentum = 0.0
    if "momentum" in words:
        momentum = _MOMENTUM
    return Recipe(name=words[0], momentum=momentum if coefficient is None else float(coefficient))


def invented_batch(
    model: nn.Module, *, lengths: Sequence[int], seed: int, like: Truth | None = None
) -> tuple[dict[str, Tensor], Truth] | None:
    """Return a batch for a Hugging Face model and the truth about it, or None where the model does not say
    what it takes.

    There are as many records as `lengths`, texts of those lengths in tokens. They are taken from `like`,
    texts or pictures of the same kind that nobody trained on, where it holds any.
    """
    generator = torch.Generator().manual_seed(seed)
    config: Configuration = getattr(model, "config", None)
    classes = int(getattr(config, "num_labels", 2) or 2)
    labels = torch.randint(max(2, classes), (len(lengths),), generator=generator)
    side, vocabulary = getattr(config, "image_size", None), getattr(config, "vocab_size", None)
    if side:
        images = _pictures(config, len(lengths), int(side), generator, like)
        truth = Truth(images=images, labels=tuple(labels.tolist()), classes=classes)
        return {"pixel_values": images, "labels": labels}, truth
    if not vocabulary:
        return None
    texts = []
    for length in lengths:
        texts.append(_text(int(vocabulary), length, generator, like))
    if end_token(model) is not None:
        texts = [ended(model, torch.tensor([text]))[0].tolist() for text in texts]
    ids, mask = _padded(texts, int(getattr(config, "pad_token_id", None) or 0))
    words = Truth(sequences=tuple(map(tuple, texts)), vocabulary=int(vocabulary))
    with torch.no_grad():
        generative = model(input_ids=ids[:1], attention_mask=mask[:1]).logits.ndim == 3
    if not bool(mask.all()):
        padded = {"attention_mask": mask}
    else:
        padded = {}
    if generative:
        return {"input_ids": ids, "labels": ids.masked_fill(mask == 0, _IGNORED), **padded}, words
    truth = Truth(
        sequences=words.sequences, labels=tuple(labels.tolist()), classes=classes, vocabulary=int(vocabulary)
    )
    return {"input_ids": ids, "labels": labels, **padded}, truth


def _pictures(
    config: Configuration, count: int, side: int, generator: torch.Generator, like: Truth | None
) -> Tensor:
    channels = int(getattr(config, "num_channels", 3))
    if like is not None and like.images is not None and like.images.shape[1:] == (channels, side, side):
        return like.images[torch.randint(len(like.images), (count,), generator=generator)].float()
    coarse = torch.rand(count, channels, -(-side // _PATCH), -(-side // _PATCH), generator=generator)
    return nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")


def _text(vocabulary: int, length: int, generator: torch.Generator, like: Truth | None) -> list[int]:
    texts = []
    for text in like.sequences or () if like is not None else ():
        if len(text) >= length:
            texts.append(text)
    if texts:
        return list(texts[int(torch.randint(len(texts), (1,), generator=generator))])[:length]
    ids = torch.randint(min(10, vocabulary // 2), vocabulary, (length,), generator=generator).tolist()
    for place in range(1, length):
        if float(torch.rand(1, generator=generator)) < _REPEATS:
            ids[place] = ids[int(torch.randint(place, (1,), generator=generator))]
    return list(ids)


def _padded(texts: Sequence[Sequence[int]], padding: int) -> tuple[Tensor, Tensor]:
    longest = max(map(len, texts))
    ids = torch.tensor([[*text, *[padding] * (longest - len(text))] for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    return ids, mask


def unlike(observation: Observation, truth: Truth) -> str:
    """Say in what a rehearsal had to guess the setting, so that it may be easier than the update; nothing
    where it did not.
    """
    length = observation.known("lengths") or observation.known("sequence_length")
    if observation.known("batch_size") is None or (truth.images is None and length is None):
        return (
            "the rehearsal's size is a guess: state batch_size, and lengths or "
            "sequence_length of texts, in knowledge"
        )
    if observation.content == "delta" and recipe(observation) is None:
        return "the rehearsal's optimiser is a guess: state optimiser in knowledge"
    return ""


def cannot_rehearse(observation: Observation) -> str:
    """Say why no control can stand for an observation: its optimiser is named, but not known here."""
    stated = observation.known("optimiser")
    if observation.content == "gradient" or stated is None or recipe(observation) is not None:
        return ""
    return f"no control: the optimiser {str(stated)!r} cannot be rehearsed, only {', '.join(OPTIMISERS)}"


def rehearse(
    observation: Observation, model: nn.Module, *, seed: int, like: Truth | None = None
) -> tuple[Observation, Truth] | None:
    """Return what would have been observed, had the client trained on invented data without any defence.

    The setting is that of the observation, as far as known; records are taken from `like` where it is given.
    None when the model takes no batch that can be invented, does not train the observed tensors, or the
    optimiser is not known here.
    """
    return Rehearsals(model=model, like=like).of(observation, seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Setting:
    """Hold all that a rehearsed change depends on, beside the model and the records it is made of."""

    seed: int
    content: str
    contributors: int
    names: tuple[str, ...]
    broadcast: bytes
    facts: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Change:
    """Hold what invented data changed, undefended, and the truth about them."""

    tensors: dict[str, Tensor]
    truth: Truth


@dataclass(frozen=True, slots=True, kw_only=True)
class _Made:
    """Hold a change, None where none could be made, and the steps it took."""

    change: _Change | None
    cost: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsals:
    """Rehearse observations of one model; those of the same setting share what training on invented data
    cost.

    Observers of one round see the same broadcast and the same local steps, so one rehearsal serves them all:
    only the rounding and the zeros of what each of them saw are put on it anew. `like` holds records of the
    same kind that nobody trained on. Assumes: nobody changes the model in between.
    """

    model: nn.Module
    like: Truth | None = None
    _made: dict[_Setting, _Made] = field(default_factory=dict)

    def of(self, observation: Observation, seed: int) -> tuple[Observation, Truth] | None:
        """Return what `rehearse` says of an observation."""
        change = self._once(observation, seed).change
        if change is None:
            return None
        tensors = {}
        for name, value in change.tensors.items():
            tensors[name] = _like_observed(value, observation.tensors[name])
        return _undefended(observation, tensors), change.truth

    def cost(self, observation: Observation) -> float:
        """Return the steps that a rehearsal of an observation takes, whether or not it was made before."""
        return self._once(observation, 0).cost

    def _once(self, observation: Observation, seed: int) -> _Made:
        if cannot_rehearse(observation):
            return _Made(change=None, cost=0.0)
        setting = _setting(observation, seed)
        if setting not in self._made:
            if len(self._made) >= _HELD:
                del self._made[next(iter(self._made))]
            began = steps.so_far()
            change = _change(observation, self.model, seed, self.like)
            self._made[setting] = _Made(change=change, cost=steps.so_far() - began)
        return self._made[setting]


def _setting(observation: Observation, seed: int) -> _Setting:
    facts = []
    for name in _REHEARSED_FACTS:
        facts.append(repr(observation.known(name)))
    facts.append(repr(observation.metadata.get("momentum")))
    return _Setting(
        seed=seed,
        content=observation.content,
        contributors=observation.contributors,
        names=tuple(sorted(observation.tensors)),
        broadcast=_digest(observation.broadcast or {}),
        facts=tuple(facts),
    )


def _digest(tensors: Mapping[str, Tensor]) -> bytes:
    """Return what tells tensors with their names from all others."""
    digest = hashlib.blake2b()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()


def _change(observation: Observation, model: nn.Module, seed: int, like: Truth | None) -> _Change | None:
    """Train on invented data as all contributors did; None where that cannot be."""
    client = _broadcast(observation, model)
    trained = {}
    for name, value in client.named_parameters():
        if name in observation.tensors:
            trained[name] = value
    # A difference of two state dicts also names tied weights a second time, and buffers, which no gradient
    # moves.
    everything = client.state_dict(keep_vars=True)
    buffers = set()
    for name, _ in client.named_buffers():
        buffers.add(name)
    again = set()
    for name, value in everything.items():
        if any(value is other for other in trained.values()):
            again.add(name)
    if not trained or set(observation.tensors) - set(trained) - again - buffers:
        return None
    count = 1
    if observation.content == "delta":
        count = int(observation.known("local_steps") or 1)
    total = {}
    for name, value in trained.items():
        total[name] = torch.zeros_like(value)
    truths = []
    try:
        for contributor in range(observation.contributors):
            batches = []
            for step in range(count):
                batches.append(
                    invented_batch(
                        client,
                        lengths=_lengths(observation),
                        seed=seed + 10_007 * step + 101 * contributor,
                        like=like,
                    )
                )
            usable = []
            for batch in batches:
                if batch is not None:
                    usable.append(batch)
            if not usable:
                return None
            own = _trained(client, trained, [batch for batch, _ in usable], observation)
            for name, change in own.items():
                total[name] += change
            for _, truth in usable:
                truths.append(truth)
    except (ValueError, RuntimeError, TypeError, IndexError, AttributeError):  # a model of another make
        return None
    return _Change(tensors=total, truth=_together(truths))


def _broadcast(observation: Observation, model: nn.Module) -> nn.Module:
    """Return a copy of the model as it was broadcast, in the mode the client is told to train in."""
    dropout = float(observation.known("dropout") or 0.0)
    moving = {*observation.tensors, *(observation.broadcast or {})}
    client = sharing_copy(model, own=moving).requires_grad_(False).train(dropout > 0)
    for module in client.modules() if dropout else ():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    own = dict(client.named_parameters()) | dict(client.named_buffers())
    with torch.no_grad():
        for name, value in (observation.broadcast or {}).items():
            if name in own and own[name].shape == value.shape:
                own[name].copy_(value)
    return client


def _lengths(observation: Observation) -> tuple[int, ...]:
    """Return the length of each record of one contributor's batch."""
    count = int(observation.known("batch_size") or 1)
    lengths = observation.known("lengths") or (observation.known("sequence_length") or _LENGTH,)
    return tuple(int(lengths[place % len(lengths)]) for place in range(count))


def _together(truths: Sequence[Truth]) -> Truth:
    labels = tuple(label for truth in truths for label in truth.labels or ())
    images = []
    for truth in truths:
        if truth.images is not None:
            images.append(truth.images)
    return Truth(
        sequences=tuple(row for truth in truths for row in truth.sequences or ()) or None,
        images=torch.cat(images) if images else None,
        labels=labels or None,
        classes=truths[0].classes,
        vocabulary=truths[0].vocabulary,
    )


def _trained(
    client: nn.Module,
    trained: Mapping[str, Tensor],
    batches: list[dict[str, Tensor]],
    observation: Observation,
) -> dict[str, Tensor]:
    """Return the gradient of one contributor's batch or the change of its local steps; the client is as
    broadcast again.
    """
    parameters = []
    for value in trained.values():
        parameters.append(value.requires_grad_(True))
    before = {}
    for name, value in trained.items():
        before[name] = value.detach().clone()
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # dropout masks
        if observation.content == "gradient":
            slopes = torch.autograd.grad(client(**batches[0]).loss, parameters, allow_unused=True)
            pairs = zip(trained.items(), slopes, strict=True)
            gradients = {}
            for (name, value), slope in pairs:
                gradients[name] = torch.zeros_like(value) if slope is None else slope.detach()
            return gradients
        optimiser = _optimiser(parameters, observation)
        for batch in batches:
            optimiser.zero_grad()
            client(**batch).loss.backward()
            optimiser.step()
    change = {}
    for name, value in trained.items():
        change[name] = value.detach() - before[name]
    with torch.no_grad():
        for name, value in trained.items():
            value.copy_(before[name])
            value.grad = None
    return change


def _optimiser(parameters: list[Tensor], observation: Observation) -> torch.optim.Optimizer:
    chosen = recipe(observation) or Recipe(name="sgd")
    rate = float(observation.known("learning_rate") or 0.01)
    decay = float(observation.known("weight_decay") or 0.0)
    if chosen.name == "sgd":
        return torch.optim.SGD(parameters, lr=rate, weight_decay=decay, momentum=chosen.momentum)
    if chosen.name == "adam":
        return torch.optim.Adam(parameters, lr=rate, weight_decay=decay)
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)


def _like_observed(rehearsed: Tensor, observed: Tensor) -> Tensor:
    """Return a rehearsed tensor as sparse within its rows and as coarse as the observed one."""
    rows, moving = nulls.inside_rows(observed), nulls.inside_rows(rehearsed)
    if rows.numel() and moving.numel():
        share, own = float((rows != 0).double().mean()), float((moving != 0).double().mean())
        if share < own - 0.01:
            # Small entries go first: that is what a sparsifier does.
            count = max(1, int(share * moving.numel()))
            edge = moving.abs().flatten().kthvalue(moving.numel() - count + 1).values
            rehearsed = torch.where(rehearsed.abs() >= edge, rehearsed, torch.zeros_like(rehearsed))
    return rehearsed.to(nulls.coarseness(observed)).to(observed.dtype)


def _undefended(observation: Observation, tensors: Mapping[str, Tensor]) -> Observation:
    gone = ("noise_multiplier", "noise_deviation", "clip_norm", "point")
    metadata = {}
    for name, value in observation.metadata.items():
        if name not in gone:
            metadata[name] = value
    granted = {}
    for name in observation.knowledge.granted():
        granted[name] = getattr(observation.knowledge, name)
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
