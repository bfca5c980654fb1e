"""Gradients of many sentences at once, never formed: the inputs of linear layers and what flows back to their
outputs.

The gradient of a linear layer is sum_t delta_t x_t^T, so inner products with the observed gradient, norms
and inner products of two sentences' gradients need x and delta alone. All are taken in a whitened space:
inputs and output gradients of random sentences have unit covariance there, so that what every sentence does
to the model (the mean input, the one direction in which a classifier's loss pulls) does not drown what tells
sentences apart.

Source: own derivation; the covariance is that of Martens and Grosse, "Optimizing Neural Networks with
Kronecker-factored Approximate Curvature", 2015, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attacks.inversion.channels import Channel, ended

Trace = Mapping[str, tuple[Tensor, Tensor]]  # per channel: inputs (n, t, in) and output gradients (n, t, out)

_RIDGE = 1e-6  # of the largest eigenvalue: single precision leaves nothing below it
_ROWS = 8_192  # tokens in one pass


def sentence_losses(model: nn.Module, ids: Tensor, labels: Tensor | None) -> Tensor:
    """Return the loss of every sentence (n,):
    of its label, or without labels the mean over its next tokens.
    """
    output = model(input_ids=ended(model, ids), attention_mask=torch.ones_like(ids))
    logits: Tensor = getattr(output, "logits", output)
    if labels is not None:
        return nn.functional.cross_entropy(logits, labels, reduction="none")
    entropy = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return entropy.mean(1)


def trace(model: nn.Module, channels: Sequence[str], ids: Tensor, labels: Tensor | None) -> Trace:
    """Return what each channel sees and gets back for sentences (n, t), each with its own loss.

    Guarantee: hooks are removed whatever happens.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, captured: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[name], outputs[name] = captured[0].detach(), output

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in channels]
    try:
        with torch.enable_grad():
            loss = sentence_losses(model, ids, labels).sum()
            back = torch.autograd.grad(loss, [outputs[name] for name in channels])
    finally:
        for handle in handles:
            handle.remove()
    return {name: (inputs[name], grad) for name, grad in zip(channels, back, strict=True)}


def inner(traces: Trace, target: Mapping[str, Tensor]) -> Tensor:
    """Return the inner product of each sentence's gradient with `target` (out,
    in per channel): shape (n,).
    """
    return torch.stack(
        [torch.einsum("nti,nti->n", back @ target[name], inputs) for name, (inputs, back) in traces.items()]
    ).sum(0)


def gram(traces: Trace) -> Tensor:
    """Return the inner products of the sentences' gradients with one another: shape (n, n)."""
    total = torch.zeros(())
    for inputs, back in traces.values():
        forward = torch.einsum("ati,bsi->abts", inputs, inputs)
        total = total + (forward * torch.einsum("ato,bso->abts", back, back)).sum((2, 3))
    return total


def squared_norms(traces: Trace) -> Tensor:
    """Return the squared norm of each sentence's gradient: the diagonal of `gram`."""
    parts = []
    for inputs, back in traces.values():
        parts.append(((inputs @ inputs.transpose(1, 2)) * (back @ back.transpose(1, 2))).sum((1, 2)))
    return torch.stack(parts).sum(0)


def combine(traces: Trace, weights: Tensor) -> dict[str, Tensor]:
    """Return the weighted sum of the sentences' gradients, per channel (out, in)."""
    return {
        name: torch.einsum("nto,nti->oi", back * weights.to(back)[:, None, None], inputs)
        for name, (inputs, back) in traces.items()
    }


def stacked(traces: Sequence[Trace]) -> Trace:
    """Return traces of different lengths as one, filled up with zeros, which change no inner product."""
    longest = max(inputs.shape[1] for one in traces for inputs, _ in one.values())

    def fill(values: list[Tensor]) -> Tensor:
        return torch.cat([nn.functional.pad(value, (0, 0, 0, longest - value.shape[1])) for value in values])

    together: dict[str, tuple[Tensor, Tensor]] = {}
    for name in traces[0]:
        inputs, backs = zip(*(one[name] for one in traces), strict=True)
        together[name] = (fill(list(inputs)), fill(list(backs)))
    return together


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Whitened:
    """The space in which gradients of sentences are compared, and the observed gradient in it.

    `sides` holds per channel the matrices that whiten inputs (in, in) and output gradients (out, out),
    `floor` the share of the target's squared length that noise is expected to have.
    """

    model: nn.Module
    sides: Mapping[str, tuple[Tensor, Tensor]]
    target: Mapping[str, Tensor]
    floor: float

    def trace(self, ids: Tensor, labels: Tensor | None) -> Trace:
        """Return the whitened trace of sentences (n, t), computed in several passes when there are many."""
        rows = max(1, _ROWS // ids.shape[1])
        parts = []
        for start in range(0, len(ids), rows):
            own = None
            if labels is not None:
                own = labels[start : start + rows]
            raw = trace(self.model, list(self.sides), ids[start : start + rows], own)
            parts.append({n: (x @ self.sides[n][0], d @ self.sides[n][1]) for n, (x, d) in raw.items()})
        if len(parts) == 1:
            return parts[0]
        return stacked(parts)


def whiten(
    model: nn.Module,
    channels: Sequence[Channel],
    ids: Tensor,
    labels: Tensor | None,
    *,
    noise: Mapping[str, float],
) -> Whitened:
    """Return the space in which random sentences `ids` (n, t) have inputs and output gradients of unit
    covariance.

    The more of a channel's gradient is noise, of deviation `noise` per entry, the less is whitened.
    """
    raw = trace(model, [channel.name for channel in channels], ids, labels)
    sides, target = {}, {}
    expected = 0.0
    for channel in channels:
        inputs, back = raw[channel.name]
        gradient = channel.gradient.to(inputs.dtype)
        share = noise[channel.name] ** 2 * gradient.numel() / float(gradient.square().sum().clamp_min(1e-30))
        ridge = min(1.0, max(_RIDGE, share))
        left, right = _root(inputs, ridge), _root(back, ridge)
        sides[channel.name] = left, right
        target[channel.name] = right @ gradient @ left
        spread = noise[channel.name] * float(left.double().norm()) * float(right.double().norm())
        expected += spread**2
    whole = sum(float(value.double().square().sum()) for value in target.values())
    return Whitened(model=model, sides=sides, target=target, floor=expected / max(whole, 1e-30))


def _root(values: Tensor, ridge: float) -> Tensor:
    """Return the inverse square root of the second moments of vectors (n, t, d)."""
    rows = values.flatten(0, 1).double()
    eigenvalues, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    floor = ridge * float(eigenvalues[-1].clamp_min(1e-30))
    root: Tensor = (vectors * (eigenvalues.clamp_min(0.0) + floor).rsqrt()) @ vectors.T
    return root.to(values.dtype)
