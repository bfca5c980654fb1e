"""Descent towards row spaces: soft tokens whose inputs to every observed layer come to lie in that layer's
gradient.

The span attack asks of each token whether it fits, and loses tokens whose trace noise has covered. Here a
whole sentence moves at once: the summed distance of its inputs to the row spaces of all observed layers is
differentiable, so strong places pull weak ones through attention, in both directions, and every direction of
a row space counts as much as it stands out of the noise.

Source: Kalikman et al., "TIGER: Inverting Transformer Gradients via Embedding-Subspace Distance
Optimization", 2026. Embeddings stay inside the convex hull of the vocabulary here, since free ones can stand
in for a token of another place; the weights under noise and the exchange of single tokens at the end are our
own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from attacks.contract import Attack, Budget, Deadline, Finding, Item, PlainAttack, Prior, working_copy
from attacks.copies import sharing_copy
from attacks.inversion.channels import (
    Channel,
    Spectrum,
    capture_inputs,
    numerical_rank,
    observed_channels,
    spectrum_of,
)
from attacks.inversion.embeddings import TextFrame, logits_of, text_frame
from attacks.inversion.optimise import differentiable_attention
from attacks.inversion.position import refuse_rescaled
from attacks.inversion.priors import tapped
from attacks.inversion.subspace import Structure, call, study
from attacks.inversion.traces import combine, trace
from attacks.observation import Observation

_STARTS = 8
_TOKENS = 256  # considered at one place
_CANDIDATES = 16  # tried at one place in the exchange
_RATE = 0.2
_SHARPEST = 12.0  # what logits are multiplied with at the end of a descent
_LIKENESS = 0.7  # sentences that agree in this share of their places are one
_MOST = 64  # sentences looked for where the batch size is not known
_STRANGERS = 64
_REHEARSALS = 4
_TELLING = 0.05  # how much nearer true tokens must come for a layer and place to count
# The median squared singular value of noise alone over its largest, for shapes from square to very wide:
# Marchenko, Pastur.
_MEDIAN_SHARE = 0.35


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Target:
    """The row space of one layer's gradient: right singular vectors (k, in), each with a weight in (0, 1].

    `gains` says for each place (t,) how much nearer a true token comes than a random one, as far as noise and
    the model let it: a classifier's last query sees one place, its last keys and values only mixtures of all.
    """

    channel: str
    basis: Tensor
    weights: Tensor
    gains: Tensor

    def distance(self, inputs: Tensor) -> Tensor:
        """Return the squared sine of the angle between inputs (..., in) and the space, seen through the
        weights.
        """
        along = (inputs @ self.basis.T).square() @ self.weights
        return 1.0 - along / inputs.square().sum(-1).clamp_min(1e-30)


def target_of(spectrum: Spectrum, noise: float) -> Target | None:
    """Return the row space that stands out of noise of that deviation per entry; None when it is everything
    or nothing.

    A direction with singular value s counts 1 - (edge / s)^2, where noise alone has no singular value above
    the edge.
    """
    rank = numerical_rank(spectrum.singular, spectrum.shape, dtype=spectrum.dtype)
    edge = noise * (spectrum.shape[0] ** 0.5 + spectrum.shape[1] ** 0.5)
    values = spectrum.singular[:rank]
    values, basis = values[values > edge], spectrum.right[:rank][values > edge]
    if not 0 < len(values) < spectrum.shape[1]:
        return None
    return Target(
        channel=spectrum.channel,
        basis=basis,
        weights=1.0 - (edge / values).square(),
        gains=torch.ones(1).to(basis),
    )


def noise_in(spectrum: Spectrum, declared: float) -> float:
    """Return the deviation of the noise per entry: as declared, else by the median of singular values when
    none vanishes.
    """
    rank = numerical_rank(spectrum.singular, spectrum.shape, dtype=spectrum.dtype)
    if declared or rank < len(spectrum.singular):
        return declared
    edge = float(spectrum.singular.median()) / _MEDIAN_SHARE**0.5
    return float(edge / (spectrum.shape[0] ** 0.5 + spectrum.shape[1] ** 0.5))


def targets_of(
    structure: Structure,
    channels: Mapping[str, Channel],
    frame: TextFrame,
    *,
    length: int,
    count: int | None,
    generator: torch.Generator,
) -> tuple[Target, ...]:
    """Return the row spaces in which true tokens can be told from others, as a rehearsal with random
    sentences shows.

    Without a known `count` of sentences the rank of the first layers says how many there are.
    """
    spectra = (*structure.alone, *structure.mixed)
    noises = {}
    for spectrum in spectra:
        noises[spectrum.channel] = noise_in(spectrum, structure.noise)
    targets = []
    for spectrum in spectra:
        target = target_of(spectrum, noises[spectrum.channel])
        if target is not None:
            targets.append(target)
    widest = max((len(target.weights) for target in targets), default=1)
    gains = {}
    for name in noises:
        gains[name] = torch.zeros(length, dtype=torch.float64)
    structure.model.requires_grad_(True)
    for _ in range(_REHEARSALS):
        own = _rehearse(
            structure.model,
            channels,
            frame,
            noises,
            count=count or max(1, round(widest / length)),
            length=length,
            generator=generator,
        )
        for name, gain in own.items():
            gains[name] += gain / _REHEARSALS
    telling = []
    for target in targets:
        gain = gains[target.channel]
        telling.append(replace(target, gains=gain * (gain > _TELLING)))
    return tuple(target for target in telling if bool(target.gains.any()))


def _rehearse(
    model: nn.Module,
    channels: Mapping[str, Channel],
    frame: TextFrame,
    noises: Mapping[str, float],
    *,
    count: int,
    length: int,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Return per layer and place (length,) how much nearer random sentences come to their own gradient than
    others do.

    The gradient is made as long as the observed one and gets noise of the same size.
    """
    ids = frame.allowed.nonzero().flatten()
    classes = int(getattr(getattr(model, "config", None), "num_labels", 0) or 2)
    sampled = ids[torch.randint(len(ids), (2, count, length + frame.generative), generator=generator)]
    labels = None
    if not frame.generative:
        labels = torch.randint(classes, (count,), generator=generator)
    own, others = (trace(model, list(noises), one, labels) for one in sampled)
    gains = {}
    for name, gradient in combine(own, torch.ones(count)).items():
        observed, noise = channels[name].gradient, noises[name]
        signal = (observed.double().square().sum() - noise**2 * observed.numel()).clamp_min(0.0).sqrt()
        blurred = gradient * signal / gradient.norm().clamp_min(1e-30)
        blurred = blurred + noise * torch.randn(observed.shape, generator=generator, dtype=torch.float64)
        target = target_of(
            spectrum_of(Channel(name=name, gradient=blurred.to(observed.dtype), bias=None)), noise
        )
        if target is not None:
            far, near = (target.distance(one[name][0]).mean(0)[:length] for one in (others, own))
            gains[name] = far - near
    return gains


def weighed(targets: Sequence[Target], inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the mean distance of places (n, t, in) over layers, weighed by what each can tell:
    shape (n, t).
    """
    parts = torch.stack(
        [one.gains * one.distance(inputs[one.channel][:, : len(one.gains)]) for one in targets]
    )
    total: Tensor = parts.sum(0) / torch.stack([one.gains for one in targets]).sum().clamp_min(1e-30)
    return total * parts.shape[-1]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Descent:
    """What a sentence is judged by: the mean distance of its inputs to the targets, and the tokens each place
    can hold.
    """

    model: nn.Module
    frame: TextFrame
    targets: tuple[Target, ...]
    rows: Tensor
    options: Tensor  # (t, k) ids, those that fit their place best first
    fits: Tensor  # (t, k) distances of their own

    def distance(self, embeddings: Tensor) -> Tensor:
        """Return the mean distance of sentences (n, t, d) over all layers and places: shape (n,)."""
        frame = replace(self.frame, lengths=(embeddings.shape[1],) * len(embeddings))
        with tapped(self.model, tuple(target.channel for target in self.targets)) as taps:
            logits_of(self.model, frame, embeddings)
        return weighed(self.targets, taps).mean(1)

    def of_tokens(self, ids: Tensor) -> Tensor:
        """Return the distance of sentences of real tokens (n, t)."""
        return torch.cat(
            [token_distances(self.model, self.targets, part).mean(1) for part in torch.split(ids, 256)]
        )


def token_distances(model: nn.Module, targets: Sequence[Target], ids: Tensor) -> Tensor:
    """Return the weighed distance of every place of sentences of real tokens (n, t)."""
    modules = {}
    for target in targets:
        modules[target.channel] = model.get_submodule(target.channel)
    captured = capture_inputs(modules, lambda: call(model, ids))
    return weighed(targets, captured)


def prepare(
    structure: Structure, frame: TextFrame, targets: tuple[Target, ...], length: int, deadline: Deadline
) -> Descent:
    """Return the descent for one length, each place open to the tokens that fit it best by themselves."""
    ids = frame.allowed.nonzero().flatten()
    alone = set()
    for spectrum in structure.alone:
        alone.add(spectrum.channel)
    first = []
    for target in targets:
        if target.channel in alone:
            first.append(target)
    tables: list[Tensor] = []
    for part in torch.split(ids, 512):
        if not first or (tables and deadline.expired):
            break
        tables.append(token_distances(structure.model, first, part[:, None].expand(-1, length)))
    if tables:
        table = torch.cat(tables)
    else:
        table = torch.zeros(len(ids), length, dtype=torch.float64)
    fits, order = table.T.sort(dim=1, stable=True)
    return Descent(
        model=structure.model,
        frame=frame,
        targets=targets,
        rows=cast(Tensor, structure.model.get_submodule(frame.embedding).weight).detach(),
        options=ids[order[:, :_TOKENS]],
        fits=fits[:, :_TOKENS],
    )


def descend(
    descent: Descent, *, starts: int, iterations: int, generator: torch.Generator, deadline: Deadline
) -> tuple[Tensor, Tensor]:
    """Move soft sentences from several starts; return the tokens they end in (n, t) and how far those are.

    The first start weighs tokens by their own distances, the others shuffle these weights with noise.
    """
    spread = float(descent.fits.std().clamp_min(1e-12))
    prior = -descent.fits / spread
    jitter = torch.randn(starts, *prior.shape, generator=generator, dtype=prior.dtype)
    jitter[0] = 0.0
    logits = (prior + 2.0 * jitter).requires_grad_(True)
    words = descent.rows[descent.options]
    optimiser = torch.optim.Adam([logits], lr=_RATE)
    for step in range(iterations):
        if deadline.expired:
            break
        sharp = _SHARPEST ** (step / max(1, iterations - 1))
        with torch.enable_grad():
            soft = torch.einsum("ntk,tkd->ntd", torch.softmax(sharp * logits, dim=-1), words)
            logits.grad = torch.autograd.grad(descent.distance(soft).sum(), logits)[0]
        optimiser.step()
    places = torch.arange(descent.options.shape[0])
    order = logits.detach().argsort(dim=-1, descending=True)[..., :_CANDIDATES]
    candidates = descent.options[places[None, :, None], order]
    return exchange(descent, candidates, deadline=deadline)


def exchange(
    descent: Descent, candidates: Tensor, *, deadline: Deadline, sweeps: int = 4
) -> tuple[Tensor, Tensor]:
    """Change one token at a time among candidates (n, t, k), the first being the start, while that brings it
    nearer.
    """
    ids = candidates[..., 0].clone()
    best, rows = descent.of_tokens(ids), torch.arange(len(ids))
    for _ in range(sweeps):
        before = best.clone()
        for place in range(ids.shape[1]):
            if deadline.expired:
                return ids, best
            variants = ids[:, None].repeat(1, candidates.shape[2], 1)
            variants[:, :, place] = candidates[:, place]
            values = descent.of_tokens(variants.flatten(0, 1)).reshape(len(ids), -1)
            top = values.argmin(1)
            nearer = values[rows, top] < best
            ids = torch.where(nearer[:, None], variants[rows, top], ids)
            best = torch.where(nearer, values[rows, top], best)
        if bool((best >= before * (1 - 1e-6)).all()):
            break
    return ids, best


# ------------------------------------------------------------------------------------------------- the attack


def _attempt(
    observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
) -> Finding:
    deadline, generator = budget.start(), torch.Generator().manual_seed(seed)
    refuse_rescaled(observation)
    known = observation.known("batch_size")
    private = working_copy(model, observation)
    structure = study(observation, sharing_copy(private).double(), light=private)
    channels = observed_channels(observation, structure.model)
    details: dict[str, float | int | str] = {"noise": structure.noise}
    solutions: list[tuple[float, Tensor]] = []
    strangers = 0.0
    with differentiable_attention():
        frame = _frame(observation, structure, known)
        lengths = sorted(set(frame.lengths))
        for length in lengths:
            # What a language model reads last gets no gradient: it is only predicted.
            if frame.generative:
                visible = length - 1
            else:
                visible = length
            targets = targets_of(
                structure,
                channels,
                frame,
                length=visible,
                count=known and len(frame.lengths),
                generator=generator,
            )
            if not targets:
                continue
            descent = prepare(structure, frame, targets, visible, deadline)
            strangers = max(strangers, _of_strangers(descent, generator))
            details["layers"] = len(targets)
            for _ in range(budget.restarts):
                ids, far = descend(
                    descent,
                    starts=_STARTS,
                    iterations=max(1, budget.iterations // (4 * len(lengths))),
                    generator=generator,
                    deadline=deadline,
                )
                solutions += list(zip(far.tolist(), ids, strict=True))
    if not solutions:
        return Finding(
            reason="no layer tells a true token from others: too many tokens, or noise", details=details
        )
    worst = None
    if not known:
        worst = 0.5 * (min(far for far, _ in solutions) + strangers)
    chosen = distinct(
        solutions,
        most=len(frame.lengths),
        worst=worst,
    )
    return _finding(chosen, strangers, deadline, details)


def _frame(observation: Observation, structure: Structure, known: int | None) -> TextFrame:
    """Return the frame; noise hides rows of the embedding, so under noise any token of the vocabulary may be
    there.
    """
    if known:
        sized = observation
    else:
        sized = observation.replace_tensors(observation.tensors, batch_size=_MOST)
    frame = text_frame(sized, structure.model)
    if structure.noise and observation.known("token_set") is None:
        frame.allowed[:] = frame.rows.norm(dim=1) > 0
    frame.allowed[frame.padding] = False
    return frame


def _of_strangers(descent: Descent, generator: torch.Generator) -> float:
    """Return the mean distance of sentences of random tokens."""
    ids = descent.frame.allowed.nonzero().flatten()
    length = descent.options.shape[0]
    strangers = ids[torch.randint(len(ids), (_STRANGERS, length), generator=generator)]
    return float(descent.of_tokens(strangers).mean())


def distinct(
    solutions: list[tuple[float, Tensor]], *, most: int, worst: float | None
) -> list[tuple[float, Tensor]]:
    """Return the nearest sentences, one of each cluster of alike ones, none farther than `worst`."""
    chosen: list[tuple[float, Tensor]] = []
    for far, ids in sorted(solutions, key=lambda entry: entry[0]):
        if len(chosen) == most or (worst is not None and far > worst):
            break
        alike = []
        for _, other in chosen:
            alike.append(float((ids == other).double().mean()) if len(ids) == len(other) else 0.0)
        if max(alike, default=0.0) < _LIKENESS:
            chosen.append((far, ids))
    return chosen


def _finding(
    solutions: list[tuple[float, Tensor]],
    strangers: float,
    deadline: Deadline,
    details: dict[str, float | int | str],
) -> Finding:
    """Return the sentences; how sure each is, is the share of the way from random sentences to the row
    spaces.
    """
    sure = []
    for far, _ in solutions:
        sure.append(max(0.0, min(1.0, 1.0 - far / max(strangers, 1e-30))))
    items = tuple(
        Item(kind="sequence", value=ids, confidence=part)
        for part, (_, ids) in zip(sure, solutions, strict=True)
    )
    facts = details | {"distance": solutions[0][0] if solutions else strangers, "strangers": strangers}
    reason = "stopped by its budget of steps"
    if not deadline.expired:
        reason = "no sentence is near the row spaces"
        if items:
            reason = ""
    return Finding(items=items, confidence=sum(sure) / max(1, len(sure)), reason=reason, details=facts)


def tiger() -> Attack:
    """Return the descent of soft sentences towards the row spaces of all observed layers."""
    return PlainAttack(
        name="tiger",
        family="matching",
        attempt=_attempt,
        requires=("model",),
        summary="text by descent of soft tokens towards the row spaces of all layers, through mild noise, "
        "both ways of attention",
    )
