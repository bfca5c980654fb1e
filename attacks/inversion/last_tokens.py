"""The last token of every sentence: no layer reads it, but it is a target, and the head's rows hold it.

With every other token known, what the client's loss does to the head is known but for the last targets v_s.
The head's gradient is w sum_t (p_t - e_target) h_t^T, so the part that is left over is -w sum_s e_{v_s} h_s^T
with known h_s. Tied to the embedding, the same holds up to what flows back to the input rows, which
candidates are then tried for.

Source: own derivation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attacks.observation import Observation

Sentence = tuple[int, ...]

_CANDIDATES = 4  # tokens tried for each sentence where head and embedding are one tensor
_LEFT = 0.05  # share of the left-over that the right tokens may not explain
_SWEEPS = 3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Head:
    """The head's weight, what was observed of it, and what its module sees."""

    model: nn.Module
    module: nn.Module
    weight: nn.Parameter
    seen: Tensor


def with_last_tokens(
    observation: Observation, model: nn.Module, sentences: Sequence[Sentence]
) -> tuple[Sentence, ...] | None:
    """Return the sentences with their last tokens, or None where the head does not tell them.

    `model` is a private copy in double precision and `sentences` all that stands behind the update, up to
    their last tokens.

    Guarantee: what is returned explains the head's gradient to a twentieth of what the last tokens do to it.
    """
    head = _observed_head(observation, model)
    if head is None or not sentences:
        return None
    with torch.enable_grad():
        known, states = _without_last_targets(head, sentences)
        weight = _weight(head.seen, known, sentences)
        if weight is None:
            return None
        left = (known - head.seen / weight).detach()  # sum over the sentences of what their last target does
        return _explained(head, sentences, left, states)


def _observed_head(observation: Observation, model: nn.Module) -> _Head | None:
    getter = getattr(model, "get_output_embeddings", None)
    module = None
    if getter is not None:
        module = getter()
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Module) or not isinstance(weight, nn.Parameter):
        return None
    if observation.content == "delta" and int(observation.known("local_steps") or 0) != 1:
        return None
    tensors = observation.gradient().tensors
    name = next((name for name, value in model.named_parameters() if value is weight), "")
    if name not in tensors:
        return None
    weight.requires_grad_(True)
    return _Head(model=model, module=module, weight=weight, seen=tensors[name].double())


def _logits(head: _Head, sentence: Sentence) -> tuple[Tensor, Tensor]:
    """Return the logits (t, v) of a sentence and the states (t, d) the head saw."""
    states: list[Tensor] = []
    handle = head.module.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    try:
        output = head.model(input_ids=torch.tensor([sentence]))
    finally:
        handle.remove()
    logits: Tensor = output.logits[0]
    return logits, states[0][0]


def _without_last_targets(head: _Head, sentences: Sequence[Sentence]) -> tuple[Tensor, Tensor]:
    """Return the gradient of the sum of all losses but for the last targets' logits, and the last states (s,
    d).
    """
    total = torch.zeros_like(head.weight)
    states = []
    for sentence in sentences:
        logits, hidden = _logits(head, sentence)
        targets = torch.tensor(sentence[1:])
        loss = logits.logsumexp(-1).sum() - logits[:-1].gather(1, targets[:, None]).sum()
        total += torch.autograd.grad(loss, head.weight)[0]
        states.append(hidden[-1].detach())
    return total, torch.stack(states)


def _weight(observed: Tensor, known: Tensor, sentences: Sequence[Sentence]) -> float | None:
    """Return what every target's loss counts for, from the rows of tokens that are neither read nor a known
    target.
    """
    absent = torch.ones(len(observed), dtype=torch.bool)
    absent[sorted({token for sentence in sentences for token in sentence})] = False
    rows = known[absent]
    lengths = rows.square().sum(1)
    if not bool((lengths > 0).any()):
        return None
    ratios = (observed[absent] * rows).sum(1)[lengths > 0] / lengths[lengths > 0]
    weight = float(ratios.median())  # the last tokens of few sentences do not move it
    if weight > 0.0:
        return weight
    return None


def _explained(
    head: _Head, sentences: Sequence[Sentence], left: Tensor, states: Tensor
) -> tuple[Sentence, ...] | None:
    shares = left @ torch.linalg.pinv(states)  # (v, s): near one where a token ends a sentence
    candidates = shares.topk(min(_CANDIDATES, len(shares)), dim=0).indices.T.tolist()
    effects = []
    for sentence, tokens in zip(sentences, candidates, strict=True):
        effects.append({token: _effect(head, sentence, token) for token in tokens})
    chosen = []
    for tokens in candidates:
        chosen.append(tokens[0])
    rest = left - torch.stack([effects[place][token] for place, token in enumerate(chosen)]).sum(0)
    for _ in range(_SWEEPS):
        for place, tokens in enumerate(candidates):
            without = rest + effects[place][chosen[place]]
            chosen[place] = min(tokens, key=lambda token: float((without - effects[place][token]).norm()))
            rest = without - effects[place][chosen[place]]
    if float(rest.norm()) > _LEFT * float(left.norm()):
        return None
    return tuple((*sentence, token) for sentence, token in zip(sentences, chosen, strict=True))


def _effect(head: _Head, sentence: Sentence, token: int) -> Tensor:
    """Return the gradient of the logit of a sentence's last target."""
    logits, _ = _logits(head, sentence)
    return torch.autograd.grad(logits[-1, token], head.weight)[0].detach()
