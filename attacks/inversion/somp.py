"""Matching pursuit on text: an observed gradient as a sum of few sentences' gradients, for batches as wide as
the layer.

Once a batch holds as many tokens as the layer is wide, its row space is everything and no token stands out
for certain. The row spaces of single attention heads still rank the tokens of each place, and the gradients
of whole sentences are far from one another: a beam over ranked tokens proposes sentences, exchanges of single
tokens improve them, and orthogonal matching pursuit picks one after the other and fits all weights anew each
time.

Source: Li, Li, "SOMP: Scalable Gradient Inversion for Large Language Models via Subspace-Guided Orthogonal
Matching Pursuit", 2026. Whitened gradients, exchanges of tokens and closing passes over all picks are our
own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn

from attacks.contract import (
    Attack,
    Budget,
    Deadline,
    Finding,
    Item,
    NotApplicable,
    PlainAttack,
    Prior,
    working_copy,
)
from attacks.inversion.channels import Channel, Span, capture_inputs, observed_channels, spectrum_of
from attacks.inversion.embeddings import TextFrame, text_frame
from attacks.inversion.matching import known_or_inferred_labels
from attacks.inversion.optimise import differentiable_attention
from attacks.inversion.position import refuse_rescaled
from attacks.inversion.subspace import Structure, call, study
from attacks.inversion.text import LanguageModel
from attacks.inversion.traces import Trace, Whitened, combine, gram, inner, squared_norms, stacked, whiten
from attacks.observation import Observation

_POOL = 2_048  # tokens measured at a time
_PLACE = 192  # tokens considered at one place
_BEAMS = 64
_WIDEST = 1_024  # a channel wider than this is too dear to whiten
_CHANNELS = 12
_CONTEXT = 3  # layers that judge prefixes
_PROBES = 512
_LIKENESS = 0.7  # sentences that agree in this share of their places are one cluster
_LANGUAGE = 0.2  # weight of one nat of a language model against one of the mean logarithm of a distance
_MOST = 64  # sentences looked for where the batch size is not known
_RENEWALS = 8  # times each pick may be searched for anew
_EXPLAINED = 1e-3  # share of the gradient left over, below which the pursuit has found everything
_ROUNDED = 0.22  # deviation of a rounded number, in units of its size times the machine's epsilon
_CLASSES = 8  # more classes than this are not tried one by one


# ------------------------------------------------------------------------------------------ tokens and places


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Heads:
    """The row spaces of slices of gradients, one slice per attention head, and the model whose layers they
    belong to.
    """

    model: nn.Module
    spans: tuple[Span, ...]

    def distance(self, ids: Tensor) -> Tensor:
        """Return the mean logarithm of the distances of tokens (n, t) in their places: close to any one head
        is low.
        """
        modules = {}
        for span in self.spans:
            modules[span.channel] = self.model.get_submodule(span.channel)
        captured = capture_inputs(modules, lambda: call(self.model, ids))
        parts = []
        for span in self.spans:
            parts.append(span.distance(captured[span.channel]).clamp_min(1e-7).log())
        return torch.stack(parts).mean(0)


def heads_of(model: nn.Module, channels: Sequence[Channel], *, noise: float) -> Heads:
    """Return the spans of every slice of a head's size, leaving out those that are full or empty."""
    config = getattr(model, "config", None)
    count, width = getattr(config, "num_attention_heads", 0), getattr(config, "hidden_size", 0)
    rows = 0
    if count and width:
        rows = width // count
    spans = []
    for channel in channels:
        if rows and len(channel.gradient) % rows == 0:
            size = rows
        else:
            size = len(channel.gradient)
        for rows_of_head in torch.split(channel.gradient, size):
            head = replace(channel, gradient=rows_of_head, bias=None)
            spans.append(spectrum_of(head).span(noise=noise))
    single = tuple(replace(span, basis=span.basis.float()) for span in spans if span.informative)
    return Heads(model=model, spans=single)


def place_tokens(heads: Heads, frame: TextFrame, deadline: Deadline) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tokens that fit each place best, best first, and how far each of them is from the heads'
    spans.
    """
    ids = frame.allowed.nonzero().flatten()
    tables: list[Tensor] = []
    for part in torch.split(ids, _POOL):
        if not tables or not deadline.expired:
            tables.append(heads.distance(part[:, None].expand(-1, frame.length)))
    table = torch.cat(tables)
    orders = []
    for place in range(frame.length):
        orders.append(table[:, place].argsort()[:_PLACE])
    return [ids[order] for order in orders], [table[order, place] for place, order in enumerate(orders)]


def output_layer(model: nn.Module) -> str | None:
    """Return the name of the layer that predicts tokens, None where the model has none."""
    getter = getattr(model, "get_output_embeddings", None)
    head = None
    if getter is not None:
        head = getter()
    return next((name for name, module in model.named_modules() if module is head and head is not None), None)


def last_tokens(observation: Observation, model: nn.Module) -> Tensor | None:
    """Return the tokens whose rows of a language model's head moved most: a sentence's last token is only
    predicted.

    None where the head was not trained.
    """
    head = output_layer(model)
    weight = None
    if head is not None:
        weight = getattr(model.get_submodule(head), "weight", None)
    for (
        name,
        own,
    ) in model.named_parameters():  # a head tied to the token embedding goes by the embedding's name
        if own is weight and name in observation.tensors:
            norms: Tensor = torch.linalg.vector_norm(observation.tensors[name], dim=1)
            return norms.argsort(descending=True)[:_PLACE]
    return None


def propose(
    heads: Heads,
    options: list[Tensor],
    distances: list[Tensor],
    language_model: LanguageModel | None,
    deadline: Deadline,
) -> Tensor:
    """Return sentences (n, t) whose every place fits: a beam in which no token ends more than a few prefixes.

    `heads` are those of layers that see prefixes; without any, places are judged alone.
    """
    quota = max(2, _BEAMS // 16)
    prefixes, scores = options[0][:_BEAMS, None], distances[0][:_BEAMS]
    for place in range(1, len(options)):
        width = max(8, 2_048 // len(prefixes))
        tokens, far = options[place][:width], distances[place][:width]
        extended = torch.cat(
            [prefixes.repeat_interleave(len(tokens), 0), tokens.repeat(len(prefixes))[:, None]], dim=1
        )
        total = scores.repeat_interleave(len(tokens)) + far.repeat(len(prefixes))
        if heads.spans and not deadline.expired:
            total = total + heads.distance(extended)[:, -1]
        if language_model is not None:
            with torch.no_grad():
                follow = language_model(prefixes)[:, -1][:, tokens].float()
            total = total - _LANGUAGE * follow.flatten()
        order = total.argsort()
        ends, parents = extended[order, -1].tolist(), (order // len(tokens)).tolist()
        survivors = order[_within_quota(ends, parents, quota)[:_BEAMS]]
        prefixes, scores = extended[survivors], total[survivors]
    return prefixes


def _within_quota(ends: list[int], parents: list[int], quota: int) -> list[int]:
    """Return the places, in order, at which neither the last token nor the prefix came up `quota` times
    before.
    """
    counts: dict[tuple[str, int], int] = {}
    admitted = []
    for index, keys in enumerate(zip(ends, parents, strict=True)):
        named = [("end", keys[0]), ("parent", keys[1])]
        if all(counts.get(key, 0) < quota for key in named):
            admitted.append(index)
            for key in named:
                counts[key] = counts.get(key, 0) + 1
    return admitted


# ---------------------------------------------------------------------------------------------------- pursuit


@dataclass(slots=True, kw_only=True, eq=False)
class Pursuit:
    """The sentences picked so far, with what they leave of the observed gradient unexplained."""

    space: Whitened
    options: list[Tensor]
    deadline: Deadline
    exchanges: int
    generator: torch.Generator
    ids: list[Tensor] = field(default_factory=list)
    labels: list[Tensor | None] = field(default_factory=list)
    traces: list[Trace] = field(default_factory=list)
    weights: Tensor = field(default_factory=lambda: torch.zeros(0))
    left: dict[str, Tensor] = field(default_factory=dict)
    share: float = 1.0

    @property
    def stopped(self) -> bool:
        """Say whether the budget is used up."""
        return self.exchanges <= 0 or self.deadline.expired

    @property
    def explained(self) -> bool:
        """Say whether no more is left than noise and rounding leave; noise that outweighs the rest never says
        so.
        """
        return self.share <= max(_EXPLAINED, min(0.5, 1.05 * self.space.floor))

    def likeness(self, ids: Tensor, labels: Tensor | None, target: dict[str, Tensor]) -> Tensor:
        """Return how much of `target` each sentence explains by itself, as a projection: shape (n,)."""
        traces = self.space.trace(ids, labels)
        return inner(traces, target) / squared_norms(traces).clamp_min(1e-30).sqrt()

    def exchange(
        self, ids: Tensor, labels: Tensor | None, target: dict[str, Tensor], *, sweeps: int
    ) -> tuple[Tensor, Tensor]:
        """Change one token of each sentence (n, t) at a time to the one that explains most; return them and
        how much.
        """
        best = self.likeness(ids, labels, target)
        rows = torch.arange(len(ids))
        for _ in range(sweeps):
            before = best.clone()
            for place in torch.randperm(ids.shape[1], generator=self.generator).tolist():
                if self.stopped:
                    return ids, best
                self.exchanges -= 1
                tokens = self.options[place]
                variants = ids[:, None].repeat(1, len(tokens), 1)
                variants[:, :, place] = tokens
                own = None
                if labels is not None:
                    own = labels.repeat_interleave(len(tokens))
                values = self.likeness(variants.flatten(0, 1), own, target).reshape(len(ids), -1)
                top = values.argmax(1)
                better = values[rows, top] > best
                ids = torch.where(better[:, None], variants[rows, top], ids)
                best = torch.where(better, values[rows, top], best)
            if bool((best <= before * (1 + 1e-6)).all()):
                break
        return ids, best

    def add(self, ids: Tensor, label: Tensor | None) -> None:
        """Pick a sentence (1, t) and fit all weights anew."""
        self.ids.append(ids)
        self.labels.append(label)
        self.traces.append(self.space.trace(ids, label))
        self.refit()

    def refit(self) -> None:
        """Fit the weights of all picks to the observed gradient by least squares."""
        if not self.ids:
            self.weights, self.left, self.share = torch.zeros(0), dict(self.space.target), 1.0
            return
        traces, target = stacked(self.traces), self.space.target
        system, wanted = gram(traces).double(), inner(traces, target).double()
        self.weights = torch.linalg.lstsq(system, wanted[:, None], driver="gelsd").solution[:, 0]
        whole = combine(traces, self.weights)
        self.left = {name: value - whole[name] for name, value in target.items()}
        self.share = _energy(self.left) / max(_energy(target), 1e-30)

    def revise(self, index: int) -> bool:
        """Exchange tokens of one pick against what the others leave unexplained; say whether it changed."""
        own = combine(self.traces[index], self.weights[index : index + 1])
        target = {}
        for name, value in self.left.items():
            target[name] = value + own[name]
        ids, _ = self.exchange(self.ids[index], self.labels[index], target, sweeps=1)
        if torch.equal(ids, self.ids[index]):
            return False
        previous = self.ids[index], self.traces[index], self.share
        self.ids[index], self.traces[index] = ids, self.space.trace(ids, self.labels[index])
        self.refit()
        if self.share < previous[2]:
            return True
        self.ids[index], self.traces[index] = previous[0], previous[1]
        self.refit()
        return False

    def drop(self, index: int) -> None:
        """Take one pick back and fit the weights of the others anew."""
        del self.ids[index], self.labels[index], self.traces[index]
        self.refit()


def _energy(tensors: Mapping[str, Tensor]) -> float:
    return sum(float(value.double().square().sum()) for value in tensors.values())


def pick_next(
    pursuit: Pursuit, proposals: Tensor, lengths: Sequence[int], labels: Sequence[int] | None, *, starts: int
) -> None:
    """Pick the sentence that explains most of what is left, after exchanges from one proposal of each of a
    few clusters.
    """
    target = pursuit.left
    best: tuple[float, Tensor, Tensor | None] | None = None
    for length in lengths:
        samples = []
        for options in pursuit.options:
            samples.append(options[torch.randint(len(options), (starts,), generator=pursuit.generator)])
        ids = torch.cat([proposals[:, :length], torch.stack(samples[:length], dim=1)])
        repeated = None
        if labels is not None:
            repeated = torch.tensor(labels).repeat_interleave(len(ids))
        if labels is not None:
            ids = ids.repeat(len(labels), 1)
        values = pursuit.likeness(ids, repeated, target)
        whole = _energy(target) - float(values.max()) ** 2 <= _EXPLAINED * _energy(pursuit.space.target)
        chosen = _clusters(ids, values.argsort(descending=True).tolist(), starts)
        own = None
        if repeated is not None:
            own = repeated[chosen]
        # A proposal that explains all that is left needs no better one: the usual case of a single sentence.
        sentences, values = pursuit.exchange(ids[chosen], own, target, sweeps=0 if whole else 4)
        top = int(values.argmax())
        if best is None or float(values[top]) > best[0]:
            best = float(values[top]), sentences[top : top + 1], None if own is None else own[top : top + 1]
    assert best is not None
    pursuit.add(best[1], best[2])


def _clusters(ids: Tensor, order: list[int], most: int) -> list[int]:
    """Return the first of each cluster of alike sentences, in the given order."""
    leaders: list[int] = []
    for index in order:
        if all(float((ids[index] == ids[other]).double().mean()) < _LIKENESS for other in leaders):
            leaders.append(index)
        if len(leaders) == most:
            break
    return leaders


# ------------------------------------------------------------------------------------------------- the attack


def _attempt(
    observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
) -> Finding:
    deadline = budget.start()
    refuse_rescaled(observation)
    private = working_copy(model, observation)
    known = observation.known("batch_size")
    if known:
        sized = observation
    else:
        sized = observation.replace_tensors(observation.tensors, batch_size=_MOST)
    structure = study(observation, private)
    if not structure.causal:
        raise NotApplicable(
            "positions see each other both ways, so no sentence can be built from the left: use tiger"
        )
    with differentiable_attention():
        frame = text_frame(sized, private)
        frame.allowed[frame.padding] = False
        labels = _labels(observation, private, prior, frame, seed)
        channels = observed_channels(observation, private)
        alone, mixed = (
            heads_of(
                structure.light, [channels[spectrum.channel] for spectrum in spectra], noise=structure.noise
            )
            for spectra in (structure.alone, structure.mixed[:_CONTEXT])
        )
        if not alone.spans:
            return Finding(
                reason="the row spaces of all heads are full or empty, so no token fits a place better"
            )
        options, distances = place_tokens(alone, frame, deadline)
        last = None
        if frame.generative:
            last = last_tokens(observation, private)
        if last is not None:
            options[-1], distances[-1] = last, torch.zeros(len(last))
        proposals = propose(mixed, options, distances, prior.language_model, deadline)
        pursuit = _pursuit(
            observation,
            structure,
            channels,
            options=options,
            labels=labels,
            budget=budget,
            deadline=deadline,
            seed=seed,
        )
        _run(pursuit, proposals, frame, labels, budget, estimated=not known)
    return _finding(pursuit)


def _labels(
    observation: Observation, model: nn.Module, prior: Prior, frame: TextFrame, seed: int
) -> Sequence[int] | None:
    """Return the labels that sentences can have; None for a language model, whose labels are its tokens."""
    if frame.generative:
        return None
    inferred = known_or_inferred_labels(observation, model, prior, len(frame.lengths), seed)
    if inferred is not None:
        return sorted(set(inferred.tolist()))
    classes = int(getattr(getattr(model, "config", None), "num_labels", 0))
    if not 0 < classes <= _CLASSES:
        raise NotApplicable("the labels are neither known nor shown by the head")
    return range(classes)


def _rounding(observation: Observation, model: nn.Module, name: str) -> float:
    """Return what the subtraction of rounded weights leaves on each entry of a delta, in units of the
    gradient.
    """
    if observation.content == "gradient":
        return 0.0
    rate, steps = (float(observation.known(fact) or 1.0) for fact in ("learning_rate", "local_steps"))
    weight = cast(Tensor, model.get_submodule(name).weight).detach()
    size = float(weight.square().mean().sqrt())
    scale = 1.0
    if observation.gradient().scaled:
        scale = rate * steps
    return float(_ROUNDED * torch.finfo(torch.float32).eps * size * observation.contributors**0.5 / scale)


def _pursuit(
    observation: Observation,
    structure: Structure,
    channels: Mapping[str, Channel],
    *,
    options: list[Tensor],
    labels: Sequence[int] | None,
    budget: Budget,
    deadline: Deadline,
    seed: int,
) -> Pursuit:
    """Return a pursuit that has picked nothing yet, in the space in which random sentences of the options are
    white.
    """
    generator = torch.Generator().manual_seed(seed)
    names = []
    for spectrum in (*structure.alone, *structure.mixed):
        names.append(spectrum.channel)
    # A head as tall as the vocabulary tells of predicted tokens alone, and would drown the rest.
    hidden = []
    for name in names:
        if name != output_layer(structure.light):
            hidden.append(name)
    narrow = [name for name in hidden if max(channels[name].gradient.shape) <= _WIDEST] or names[:1]
    draws = []
    for each in options:
        draws.append(each[torch.randint(len(each), (_PROBES,), generator=generator)])
    model = structure.light.requires_grad_(True)
    own = None
    if labels is not None:
        own = torch.tensor(labels)[torch.arange(_PROBES) % len(labels)]
    wanted = []
    for name in narrow[:_CHANNELS]:
        wanted.append(channels[name])
    noise = {}
    for channel in wanted:
        noise[channel.name] = max(structure.noise, _rounding(observation, model, channel.name))
    space = whiten(model, wanted, torch.stack(draws, dim=1), own, noise=noise)
    return Pursuit(
        space=space,
        options=options,
        deadline=deadline,
        exchanges=budget.iterations,
        generator=generator,
        left=dict(space.target),
    )


def _run(
    pursuit: Pursuit,
    proposals: Tensor,
    frame: TextFrame,
    labels: Sequence[int] | None,
    budget: Budget,
    *,
    estimated: bool,
) -> None:
    """Pick as many sentences as the batch has, or while each explains its part, then revise them in turn."""
    lengths, first = list(frame.lengths), 0.0
    while lengths and not pursuit.explained and not (pursuit.ids and pursuit.stopped):
        before = pursuit.share
        pick_next(pursuit, proposals, sorted(set(lengths)), labels, starts=1 + budget.restarts)
        lengths.remove(pursuit.ids[-1].shape[1])
        gain = before - pursuit.share
        first = max(first, gain)
        if estimated and gain < 0.25 * first:
            pursuit.drop(len(pursuit.ids) - 1)
            break
    _revise_all(pursuit)
    for _ in range(_RENEWALS * len(pursuit.ids)):
        if pursuit.stopped or pursuit.explained:
            break
        _renew(pursuit, labels, starts=1 + budget.restarts)


def _revise_all(pursuit: Pursuit) -> None:
    changed = True
    while changed and not pursuit.explained and not pursuit.stopped:
        changed = sum(pursuit.revise(index) for index in range(len(pursuit.ids))) > 0


def _renew(pursuit: Pursuit, labels: Sequence[int] | None, *, starts: int) -> None:
    """Take back one pick by chance, search for it anew from random sentences, and keep what explains more."""
    index = int(torch.randint(len(pursuit.ids), (1,), generator=pursuit.generator))
    ids, label, share = pursuit.ids[index], pursuit.labels[index], pursuit.share
    pursuit.drop(index)
    pick_next(pursuit, ids[:0], [ids.shape[1]], labels, starts=starts)
    if pursuit.share < share:
        _revise_all(pursuit)
    else:
        pursuit.drop(len(pursuit.ids) - 1)
        pursuit.add(ids, label)


def _finding(pursuit: Pursuit) -> Finding:
    confidence = (1.0 if pursuit.explained else 0.5) * (1.0 - pursuit.share)
    typical = float(pursuit.weights.median())
    items = []
    for ids, weight in zip(pursuit.ids, pursuit.weights.tolist(), strict=True):
        if weight > 0 and math.isfinite(weight):  # a client adds sentences up, it takes none away
            sure = confidence * min(1.0, weight / max(typical, 1e-30))
            items.append(Item(kind="sequence", value=ids[0], confidence=sure))
    reason = "stopped by its budget of steps"
    if not pursuit.deadline.expired:
        reason = "no sentence explains anything"
        if items:
            reason = ""
    details: dict[str, float | int | str] = {"picks": len(pursuit.ids), "unexplained": pursuit.share}
    return Finding(items=tuple(items), confidence=confidence, reason=reason, details=details)


def somp() -> Attack:
    """Return subspace-guided orthogonal matching pursuit over the gradients of sentences."""
    return PlainAttack(
        name="somp",
        family="text search",
        attempt=_attempt,
        requires=("model",),
        summary="sentences of batches as wide as the layer, by matching pursuit "
        "over the gradients of candidates",
    )
