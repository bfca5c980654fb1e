"""Span attacks on text: tokens, positions and whole sentences whose layer inputs lie in the row space of an observed gradient.

A layer that saw b tokens has a gradient of rank b; while b is below the width, the right token at the right place
lies in that space and no other does. The same holds for a sum over clients (b counts all their tokens), for both
LoRA factors (the width of B is the rank r) and, with a wider tolerance, for an update of several SGD steps.
Decoders are extended token by token; encoders are searched as wholes.

Source: Petrov et al., "DAGER: Exact Gradient Inversion for Large Language Models", NeurIPS 2024, sections 4 and 5.
The factor B of LoRA, the significance rule and the use of every layer that sees mixed positions are our own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from scipy.stats import beta, norm
from torch import Tensor, nn

from attacks.contract import Attack, Budget, Deadline, Finding, Item, NotApplicable, PlainAttack, Prior, working_copy
from attacks.inversion.channels import Span, Spectrum, capture_inputs, execution_order, observed_channels, spectrum_of
from attacks.inversion.tokens import noise_per_entry, present_tokens, vocabulary_size
from attacks.observation import Observation

_CHUNK_ROWS = 65_536
_SMALLEST_GAP = 2.5
_CONTEXT_CHANNELS = 3
_ALARMS = 0.005
# Relative singular-value cuts, from rounding to several local steps; the first that separates clearly is used.
_TOLERANCES = (None, 3e-6, 1e-6, 1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Structure:
    """What the model does with tokens.

    Which channels see one token alone, which see it mixed with others, and whether order counts.
    """

    model: nn.Module
    vocabulary: int
    alone: tuple[Spectrum, ...]
    mixed: tuple[Spectrum, ...]
    ambient: Mapping[str, int]
    positional: bool
    causal: bool
    noise: float
    limit: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scene:
    """A structure with its row spaces cut at one tolerance."""

    structure: Structure
    alone: tuple[Span, ...]
    mixed: tuple[Span, ...]
    positions: int

    @property
    def tokens(self) -> int:
        """Return the number of distinct inputs the first layer saw, as far as its rank shows."""
        return max((span.rank for span in self.alone), default=0)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Return the ranks of all spans, which tell two scenes apart."""
        return tuple(span.rank for span in (*self.alone, *self.mixed))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Candidates:
    """Token ids that passed, per position.

    The threshold that separated them; `exact` when a wide gap did, not a tail.
    """

    ids: tuple[tuple[int, ...], ...]
    threshold: float
    gap: float
    exact: bool

    @property
    def clean(self) -> bool:
        """Say whether the gap is as wide as rounding alone leaves it."""
        return self.exact and self.gap > 1_000.0

    @property
    def certainty(self) -> float:
        """Return the attack's own confidence: near 1 for a wide gap, at most one half for an outlier test."""
        return 1.0 - 1.0 / self.gap if self.exact else 0.5 * (1.0 - 1.0 / max(self.gap, 1.0))


# --------------------------------------------------------------------------------------------------------- preparation


def study(observation: Observation, model: nn.Module) -> Structure:
    """Find the channels of an observation and, by probing the model, what each of them sees.

    Raises: NotApplicable when no layer sees tokens before they are mixed, or every such row space is full.
    """
    channels = observed_channels(observation, model)
    vocabulary = vocabulary_size(observation, model)
    probe = torch.arange(3, 9).remainder(vocabulary).unsqueeze(0)
    order = execution_order({name: model.get_submodule(name) for name in channels}, lambda: _call(model, probe))
    order = [name for name in order if _per_token(_inputs_of(model, name, probe), probe)]
    backward = {name: _sees(model, name, probe, changed=0, read=-1) for name in order}
    forward = {name: _sees(model, name, probe, changed=-1, read=0) for name in order}
    alone = [name for name in order if not backward[name] and not forward[name]]
    if not alone:
        raise NotApplicable("every observed layer sees tokens already mixed by attention, none sees them alone")
    same = _inputs_of(model, alone[0], torch.full_like(probe, 3 % vocabulary))[0]
    spectra = {name: spectrum_of(channels[name]) for name in order}
    return Structure(
        model=model,
        vocabulary=vocabulary,
        alone=tuple(spectra[name] for name in alone),
        mixed=tuple(spectra[name] for name in order if name not in alone),
        ambient=_ambient(model, alone, vocabulary),
        positional=not torch.allclose(same[0], same[-1], atol=1e-6 * float(same.abs().max())),
        causal=not any(forward.values()),
        noise=noise_per_entry(observation),
        limit=_longest(observation, model),
    )


def cut(structure: Structure, tolerance: float | None) -> Scene:
    """Cut the row spaces at a tolerance and keep the channels that can tell.

    Neither empty nor full, and missing no token.
    """
    alone = [spectrum.span(tolerance=tolerance, noise=structure.noise) for spectrum in structure.alone]
    informative = [span for span in alone if 0 < span.rank < structure.ambient[span.channel]]
    tokens = max((span.rank for span in informative), default=0)
    mixed = [spectrum.span(tolerance=tolerance, noise=structure.noise) for spectrum in structure.mixed]
    # A channel of lower rank than its neighbours missed some tokens: a last layer's query sees one position only.
    context = [
        span for span in mixed if span.informative and span.rank >= tokens - (tolerance is not None) * tokens // 8
    ]
    return Scene(
        structure=structure,
        alone=tuple(span for span in informative if span.rank == tokens),
        mixed=tuple(context[:_CONTEXT_CHANNELS]),
        positions=max(1, min(structure.limit, tokens)),
    )


def _ambient(model: nn.Module, names: list[str], vocabulary: int) -> dict[str, int]:
    """Return the dimension of the space each layer's inputs can fill: a LayerNorm in front takes one away."""
    modules = {name: model.get_submodule(name) for name in names}
    captured = capture_inputs(modules, lambda: _call(model, torch.zeros(1, 1, dtype=torch.long)))
    widest = max(value.shape[-1] for value in captured.values())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (2 * widest // 4 + 1, 4), generator=generator)
    captured = capture_inputs(modules, lambda: _call(model, ids))
    return {name: int(torch.linalg.matrix_rank(value.flatten(0, 1), rtol=1e-9)) for name, value in captured.items()}


def ladder(structure: Structure) -> Iterator[Scene]:
    """Yield the scenes of all tolerances that differ and can tell something."""
    seen: set[tuple[int, ...]] = set()
    for tolerance in _TOLERANCES:
        scene = cut(structure, tolerance)
        if scene.alone and scene.ranks not in seen:
            seen.add(scene.ranks)
            yield scene


def _longest(observation: Observation, model: nn.Module) -> int:
    lengths = observation.known("lengths")
    limits = [
        getattr(getattr(model, "config", None), "max_position_embeddings", None),
        observation.known("sequence_length"),
        max(lengths) if lengths else None,
    ]
    return min([int(limit) for limit in limits if limit], default=1_000_000)


def _call(model: nn.Module, ids: Tensor) -> object:
    return model(input_ids=ids)


def _inputs_of(model: nn.Module, name: str, ids: Tensor) -> Tensor:
    return capture_inputs({name: model.get_submodule(name)}, lambda: _call(model, ids))[name]


def _per_token(captured: Tensor, probe: Tensor) -> bool:
    return captured.ndim == 3 and captured.shape[:2] == probe.shape


def _sees(model: nn.Module, name: str, probe: Tensor, *, changed: int, read: int) -> bool:
    other = probe.clone()
    other[0, changed] = probe[0, 2]
    before, after = _inputs_of(model, name, probe)[0, read], _inputs_of(model, name, other)[0, read]
    return not torch.allclose(before, after, rtol=1e-5, atol=1e-6 * float(before.abs().max()))


# -------------------------------------------------------------------------------------------------- tokens and positions


def token_distances(scene: Scene, tokens: Tensor) -> Tensor:
    """Return the distance of every token at every position to the first layer's span: shape (tokens, positions).

    A sequence that repeats one token gives that token's input at every position in one pass.
    """
    positions = scene.positions if scene.structure.positional else 1
    rows = max(1, _CHUNK_ROWS // positions)
    parts = [
        _joint_distance(scene, scene.alone, tokens[start : start + rows, None].expand(-1, positions))
        for start in range(0, len(tokens), rows)
    ]
    return torch.cat(parts)


def separate(distances: Tensor, *, most: int, codimension: int, rank: int) -> tuple[float, float] | None:
    """Find the threshold between members and strangers: the last wide relative gap among the `most` smallest distances.

    Returns the threshold and the gap's ratio, or None when the gap is narrow or random directions would come as
    close. The squared distance of a random direction follows a Beta(codimension / 2, rank / 2) law; the threshold
    admits fewer than 0.005 of them.
    """
    ordered = distances.flatten().double().sort().values[: most + 1].clamp_min(1e-12)
    if len(ordered) < 2 or codimension < 1:
        return None
    low, high = ordered[:-1], ordered[1:]
    safe = math.sqrt(float(beta.ppf(_ALARMS / distances.numel(), codimension / 2, max(rank, 1) / 2)))
    wide = ((high / low >= _SMALLEST_GAP) & (low < safe)).nonzero().flatten()
    if len(wide) == 0:
        return None
    place = int(wide[-1])
    return min(safe, float((low[place] * high[place]).sqrt())), float(high[place] / low[place])


def tail(distances: Tensor, *, codimension: int, rank: int) -> float | None:
    """Return the distance below which fewer than 0.005 strangers are expected, judged by the bulk; None when the bulk cannot tell.

    The smaller of two bounds: the logit of the squared distance is normal with the bulk's median and median
    absolute deviation; the squared distance follows the law of random directions, scaled to the bulk's median.
    """
    squared = distances.flatten().double().square().clamp(1e-15, 1 - 1e-15)
    logits = torch.log(squared / (1 - squared))
    centre = float(logits.median())
    if centre < -8.0 or len(logits) < 50 or codimension < 1:
        return None
    spread = 1.4826 * float((logits - centre).abs().median())
    chance = _ALARMS / len(logits)
    normal = 1.0 / (1.0 + math.exp(-(centre + spread * float(norm.ppf(chance)))))
    law = beta(codimension / 2, max(rank, 1) / 2)
    random = float(law.ppf(chance)) * float(squared.median()) / max(float(law.median()), 1e-12)
    return math.sqrt(min(normal, random))


def find_candidates(
    structure: Structure, tokens: Tensor, *, allowed: Tensor | None = None, outliers: bool = True
) -> tuple[Scene, Candidates] | None:
    """Return the tokens that fit each position with the cut that shows them best, or None when none stands out.

    All of `tokens` are measured, since strangers are what members stand out from; only `allowed` ones are returned.

    Raises: NotApplicable when every row space is full or empty at every cut.
    """
    best: tuple[Scene, Candidates] | None = None
    fallback: tuple[Scene, Candidates] | None = None
    seen: set[tuple[int, ...]] = set()
    for scene in ladder(structure):
        seen.add(scene.ranks)
        distances = token_distances(scene, tokens)
        codimension = structure.ambient[scene.alone[0].channel] - scene.tokens
        found = separate(distances, most=scene.tokens, codimension=codimension, rank=scene.tokens)
        if found is not None:
            best = _better(
                best, (scene, _passed(scene, tokens, distances, threshold=found[0], gap=found[1], exact=True))
            )
            if found[1] > 1_000.0:
                break
        elif best is None and outliers:
            fallback = _better(fallback, _outliers(scene, tokens, distances, codimension))
    if not seen:
        widths = max(spectrum.shape[1] for spectrum in structure.alone)
        raise NotApplicable(
            f"the row spaces of the first layer say nothing (width {widths}): as many tokens, or an update that is not low rank"
        )
    chosen = best or fallback
    return chosen if chosen is None or allowed is None else (chosen[0], _only(chosen[1], set(allowed.tolist())))


def _only(candidates: Candidates, allowed: set[int]) -> Candidates:
    ids = tuple(tuple(token for token in options if token in allowed) for options in candidates.ids)
    return replace(candidates, ids=ids)


def _pool(vocabulary: int, present: Tensor | None) -> Tensor:
    """Return the tokens to measure.

    All of a small vocabulary, else those known to be present and a thousand others.
    """
    if present is None or vocabulary <= 4_000:
        return torch.arange(vocabulary)
    generator = torch.Generator().manual_seed(0)
    pool = torch.cat([present, torch.randint(vocabulary, (1_000,), generator=generator)])
    return torch.tensor(sorted(set(pool.tolist())))


def _outliers(scene: Scene, tokens: Tensor, distances: Tensor, codimension: int) -> tuple[Scene, Candidates] | None:
    threshold = tail(distances, codimension=codimension, rank=scene.tokens)
    if threshold is None or not bool((distances <= threshold).any()):
        return None
    gap = float(distances.median() / distances.min().clamp_min(1e-12))
    return scene, _passed(scene, tokens, distances, threshold=threshold, gap=gap, exact=False)


def _better(
    first: tuple[Scene, Candidates] | None, second: tuple[Scene, Candidates] | None
) -> tuple[Scene, Candidates] | None:
    """Return the one that shows more tokens, by a wider gap where they agree."""
    if first is None or second is None:
        return first or second
    return max(first, second, key=lambda entry: (sum(map(len, entry[1].ids)), entry[1].gap))


def _passed(
    scene: Scene, tokens: Tensor, distances: Tensor, *, threshold: float, gap: float, exact: bool
) -> Candidates:
    passed = distances <= threshold
    ids = tuple(tuple(tokens[passed[:, place]].tolist()) for place in range(passed.shape[1]))
    return Candidates(
        ids=ids if scene.structure.positional else ids * scene.positions, threshold=threshold, gap=gap, exact=exact
    )


def _joint_distance(scene: Scene, spans: tuple[Span, ...], ids: Tensor) -> Tensor:
    """Return the largest distance over some spans, per sequence and position."""
    modules = {span.channel: scene.structure.model.get_submodule(span.channel) for span in spans}
    captured = capture_inputs(modules, lambda: _call(scene.structure.model, ids))
    return torch.stack([span.distance(captured[span.channel]) for span in spans]).amax(0)


# ------------------------------------------------------------------------------------------------------------- sentences


def search_decoder(scene: Scene, candidates: Candidates, *, width: int, deadline: Deadline) -> list[tuple[int, ...]]:
    """Extend prefixes token by token, keeping those whose last position fits the span of a layer that sees the prefix.

    When the threshold is loose, only the best prefix of each token and the best token of each prefix are kept.
    """
    alive: list[tuple[int, ...]] = [()]
    finished: list[tuple[int, ...]] = []
    threshold = context_threshold(scene, candidates)
    for options in candidates.ids:
        if deadline.expired or not options or not alive:
            break
        tried = [(*prefix, token) for prefix in alive for token in options]
        table = _context_distance(scene, torch.tensor(tried))[:, -1].reshape(len(alive), len(options))
        fits = table <= threshold
        if not candidates.clean:
            fits &= (table == table.amin(0)) | (table == table.amin(1, keepdim=True))
        order = table.flatten().argsort()[:width].tolist()
        extended = [tried[index] for index in order if bool(fits.flatten()[index])]
        grown = {prefix[:-1] for prefix in extended}
        finished += [prefix for prefix in alive if prefix and prefix not in grown]
        alive = extended
    return finished + [prefix for prefix in alive if prefix]


def with_own_trace(scene: Scene, sentences: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Drop the sentences whose every layer input is explained by the others, those with the fewest inputs of their own first.

    Without absolute positions a doubled first token looks like the token itself, and a prefix leaves no trace of
    its own.
    """
    module = {scene.mixed[0].channel: scene.structure.model.get_submodule(scene.mixed[0].channel)}
    kept: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for sentence in dict.fromkeys(sentences):
        ids = torch.tensor([sentence])
        inputs = capture_inputs(module, lambda ids=ids: _call(scene.structure.model, ids))[scene.mixed[0].channel][0]  # type: ignore[misc]
        unit = inputs / inputs.norm(dim=-1, keepdim=True)
        kept[sentence] = {tuple(row) for row in (unit * 1e5).round().long().tolist()}
    for sentence in sorted(kept, key=lambda entry: (len(kept[entry]), -len(entry))):
        others = set().union(*(trace for other, trace in kept.items() if other != sentence))
        if kept[sentence] <= others:
            del kept[sentence]
    return list(kept)


def _distinct(scene: Scene, sentences: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Keep the best-fitting sentences, dropping any that agrees in 70 % of its places with one already kept."""
    means = {sentence: float(_context_distance(scene, torch.tensor([sentence])).mean()) for sentence in sentences}
    kept: list[tuple[int, ...]] = []
    for sentence in sorted(means, key=lambda entry: (-len(entry), means[entry])):
        agreements = [sum(a == b for a, b in zip(sentence, other, strict=False)) / len(sentence) for other in kept]
        if max(agreements, default=0.0) < 0.7:
            kept.append(sentence)
    return kept


def context_threshold(scene: Scene, candidates: Candidates) -> float:
    """Return the largest distance accepted in context.

    That of the tokens, or the tail of random sentences when that is loose.
    """
    if candidates.clean:
        return candidates.threshold
    generator = torch.Generator().manual_seed(0)
    length = max(2, min(scene.positions, 8))
    strangers = torch.randint(scene.structure.vocabulary, (64, length), generator=generator)
    first = scene.mixed[0]
    codimension, rank = first.shape[1] - first.rank, first.rank
    return tail(_context_distance(scene, strangers), codimension=codimension, rank=rank) or candidates.threshold


def search_encoder(
    scene: Scene, candidates: Candidates, *, lengths: tuple[int, ...], budget: Budget, deadline: Deadline, seed: int
) -> list[tuple[int, ...]]:
    """Find whole sentences whose every position fits.

    Enumerates when few combinations exist, else descends from random starts.
    """
    accepted: list[tuple[int, ...]] = []
    uncovered = {(place, token) for place, options in enumerate(candidates.ids) for token in options}
    generator = torch.Generator().manual_seed(seed)
    threshold = context_threshold(scene, candidates)
    for length in lengths:
        options = candidates.ids[:length]
        if not all(options) or deadline.expired:
            continue
        starts = 4 * budget.restarts * max(map(len, options))
        found = (
            _enumerate(scene, options, threshold, deadline)
            if _product(options) <= 250 * budget.iterations
            else _descend(scene, options, threshold, starts, deadline, generator)
        )
        for sentence in found:
            fresh = set(enumerate(sentence)) & uncovered
            if fresh or not scene.structure.positional:
                accepted.append(sentence)
                uncovered -= fresh
    return accepted


def _enumerate(
    scene: Scene, options: tuple[tuple[int, ...], ...], threshold: float, deadline: Deadline
) -> list[tuple[int, ...]]:
    grids = torch.cartesian_prod(*[torch.tensor(entry) for entry in options]).reshape(-1, len(options))
    found: list[tuple[float, tuple[int, ...]]] = []
    for start in range(0, len(grids), 4_096):
        if deadline.expired:
            break
        part = grids[start : start + 4_096]
        fits = _context_distance(scene, part).amax(1)
        found += [
            (float(fits[row]), tuple(part[row].tolist())) for row in (fits <= threshold).nonzero().flatten().tolist()
        ]
    return [sentence for _, sentence in sorted(found)]


def _descend(
    scene: Scene,
    options: tuple[tuple[int, ...], ...],
    threshold: float,
    starts: int,
    deadline: Deadline,
    generator: torch.Generator,
) -> list[tuple[int, ...]]:
    """Change one token at a time to the one with the smallest mean distance, from several random starts."""
    found: dict[tuple[int, ...], float] = {}
    for _ in range(starts):
        if deadline.expired:
            break
        now = tuple(entry[int(torch.randint(len(entry), (1,), generator=generator))] for entry in options)
        best = math.inf
        for _ in range(6):
            before = best
            for place in torch.randperm(len(options), generator=generator).tolist():
                tried = [(*now[:place], token, *now[place + 1 :]) for token in options[place]]
                means = _context_distance(scene, torch.tensor(tried)).mean(1)
                best, now = float(means.min()), tried[int(means.argmin())]
            if best >= before:
                break
        if float(_context_distance(scene, torch.tensor([now])).max()) <= threshold:
            found[now] = best
    return sorted(found, key=lambda sentence: found[sentence])


def _context_distance(scene: Scene, ids: Tensor) -> Tensor:
    rows = max(1, _CHUNK_ROWS // ids.shape[1])
    return torch.cat(
        [_joint_distance(scene, scene.mixed, ids[start : start + rows]) for start in range(0, len(ids), rows)]
    )


def _product(options: tuple[tuple[int, ...], ...]) -> float:
    total = 1.0
    for entry in options:
        total *= len(entry)
    return total


# ------------------------------------------------------------------------------------------------------------ the attack


def _attempt(
    observation: Observation,
    model: nn.Module | None,
    prior: Prior,
    budget: Budget,
    seed: int,
    *,
    outliers: bool,
) -> Finding:
    deadline = budget.start()
    structure = study(observation, working_copy(model, observation).double())
    tokens = present_tokens(observation, structure.model)
    found = find_candidates(structure, _pool(structure.vocabulary, tokens), allowed=tokens, outliers=outliers)
    if found is None:
        return Finding(
            reason="no token stands out: too many tokens for the width, noise, or an optimiser that rescales",
            details=_facts(cut(structure, None)),
        )
    scene, candidates = found
    certainty = min(1.0, max(0.0, candidates.certainty))
    known = sorted({token for options in candidates.ids for token in options})
    items = [Item(kind="token_set", value=torch.tensor(known), confidence=certainty)]
    sentences = _sentences(observation, scene, candidates, budget, deadline, seed)
    items += [Item(kind="sequence", value=torch.tensor(sentence), confidence=certainty) for sentence in sentences]
    return Finding(
        items=tuple(items),
        confidence=certainty,
        reason="stopped by the clock" if deadline.expired else "",
        details=_facts(scene) | {"threshold": candidates.threshold, "gap": candidates.gap},
    )


def _sentences(
    observation: Observation, scene: Scene, candidates: Candidates, budget: Budget, deadline: Deadline, seed: int
) -> list[tuple[int, ...]]:
    if scene.structure.positional and all(len(options) <= 1 for options in candidates.ids):
        only = tuple(options[0] for options in candidates.ids if options)
        return [only]
    if not scene.mixed:
        return []
    if scene.structure.causal:
        return _decode(scene, candidates, width=max(64, budget.iterations // 4), deadline=deadline)
    lengths = observation.known("lengths")
    filled = next((place for place, options in enumerate(candidates.ids) if not options), len(candidates.ids))
    known = tuple(sorted(set(lengths))) if lengths else _possible_lengths(observation, candidates, filled)
    return search_encoder(scene, candidates, lengths=known, budget=budget, deadline=deadline, seed=seed)


def _decode(scene: Scene, candidates: Candidates, *, width: int, deadline: Deadline) -> list[tuple[int, ...]]:
    """Search with the cut that found the tokens, and when that was not clean with every other cut.

    Keep the fullest cover.
    """
    if candidates.clean:
        return with_own_trace(scene, search_decoder(scene, candidates, width=width, deadline=deadline))
    pairs = {(place, token) for place, options in enumerate(candidates.ids) for token in options}
    best: list[tuple[int, ...]] = []
    score = (-1.0, 0.0)
    for other in (scene, *ladder(scene.structure)):
        if not other.mixed or deadline.expired:
            continue
        found = _distinct(other, search_decoder(other, candidates, width=width, deadline=deadline))
        covered = len({pair for sentence in found for pair in enumerate(sentence)} & pairs) / max(1, len(pairs))
        if (covered, -float(len(found))) > score:
            best, score = found, (covered, -float(len(found)))
    return best


def _possible_lengths(observation: Observation, candidates: Candidates, filled: int) -> tuple[int, ...]:
    special = observation.known("special_tokens")
    if not special:
        return (filled,)
    return tuple(place + 1 for place in range(filled) if special[-1] in candidates.ids[place])


def _facts(scene: Scene) -> dict[str, float | int | str]:
    return {
        "rank": scene.tokens,
        "width": scene.alone[0].shape[1] if scene.alone else 0,
        "channels_alone": ", ".join(span.channel for span in scene.alone),
        "channels_mixed": ", ".join(span.channel for span in scene.mixed),
    }


def span() -> Attack:
    """Return the span attack: exact where a wide gap shows, else the tokens that are outliers of the bulk."""
    return PlainAttack(
        name="span",
        family="span",
        attempt=partial(_attempt, outliers=True),
        requires=("model",),
        summary="tokens, positions and sentences from the row spaces of the first layers, full or LoRA, one client or a sum",
    )


def span_exact() -> Attack:
    """Return the span attack with the exact rule alone, as published: all or nothing."""
    return PlainAttack(
        name="span_exact",
        family="span",
        attempt=partial(_attempt, outliers=False),
        requires=("model",),
        summary="as span, accepting only tokens that a wide gap separates from all others",
    )
