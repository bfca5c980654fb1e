"""Row spaces as a test for tokens: which layers see a token alone, which see it in context, and who stands
out.

The model is probed, not parsed: a layer sees a token alone when changing any other token leaves its input as
it was. Works on any model that takes `input_ids`, and on every linear layer whose gradient was observed, LoRA
factors included.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from scipy.stats import beta, norm
from torch import Tensor, nn

from attacks.contract import Deadline, NotApplicable
from attacks.copies import sharing_copy
from attacks.inversion.channels import (
    Span,
    Spectrum,
    capture_inputs,
    execution_order,
    observed_channels,
    run_tokens,
    spectrum_of,
)
from attacks.inversion.tokens import noise_per_entry, vocabulary_size
from attacks.observation import Observation

CHUNK_ROWS = 65_536
_SCREEN_ROWS = 16_384  # small enough for the cache
_NEAR = 0.05  # nearer than this, a distance is measured again in double precision
_SMALLEST_GAP = 2.5
_CONTEXT_CHANNELS = 3
_MIXED_STUDIED = 8
_ALARMS = 0.005
_UNMOVED = 1e-9
# Relative singular-value cuts, from rounding to several local steps; the first that separates clearly is
# used.
_TOLERANCES = (None, 3e-6, 1e-6, 3e-7, 1e-7, 1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Structure:
    """What the model does with tokens.

    Which channels see one token alone, which see it mixed with others, and whether order counts. `light` is
    the model in single precision, to screen whole vocabularies with. `feeds` names for every channel the
    first one that is fed the same.
    """

    model: nn.Module
    light: nn.Module
    vocabulary: int
    alone: tuple[Spectrum, ...]
    mixed: tuple[Spectrum, ...]
    ambient: Mapping[str, int]
    positional: bool
    causal: bool
    noise: float
    limit: int
    feeds: Mapping[str, str]


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
        if self.exact:
            return 1.0 - 1.0 / self.gap
        return 0.5 * (1.0 - 1.0 / max(self.gap, 1.0))


# ------------------------------------------------------------------------------------------------ preparation


def study(
    observation: Observation, model: nn.Module, *, light: nn.Module | None = None, context: bool = True
) -> Structure:
    """Find the channels of an observation and, by probing the model, what each of them sees.

    Without `context` the layers that see tokens mixed are left out: enough for tokens, not for sentences.
    `light` is the model before it was brought to double precision, where the caller still has it.

    Raises: NotApplicable when no layer sees tokens before they are mixed, or every such row space is full.
    """
    channels = observed_channels(observation, model)
    vocabulary = vocabulary_size(observation, model)
    probe = torch.arange(3, 9).remainder(vocabulary).unsqueeze(0)
    order = execution_order(
        {name: model.get_submodule(name) for name in channels}, lambda: call(model, probe)
    )
    order, backward, forward = _probe(sharing_copy(model).double(), order, probe)
    alone = []
    for name in order:
        if not backward[name] and not forward[name]:
            alone.append(name)
    if not alone:
        raise NotApplicable(
            "every observed layer sees tokens already mixed by attention, none sees them alone"
        )
    same = _inputs_of(model, alone[0], torch.full_like(probe, 3 % vocabulary))[0]
    mixed = [name for name in order if name not in alone][: _MIXED_STUDIED if context else 0]
    spectra = {}
    for name in (*alone, *mixed):
        spectra[name] = spectrum_of(channels[name])
    noise = noise_per_entry(observation)
    return Structure(
        model=model,
        light=sharing_copy(light or model).float(),
        vocabulary=vocabulary,
        alone=tuple(spectra[name] for name in alone),
        mixed=tuple(spectra[name] for name in mixed),
        ambient=_ambient(model, alone, vocabulary) if _any_rank(spectra, alone, noise) else {},
        positional=not torch.allclose(same[0], same[-1], atol=1e-6 * float(same.abs().max())),
        causal=not any(forward.values()),
        noise=noise,
        limit=_longest(observation, model),
        feeds=_feeds(model, (*alone, *mixed), probe),
    )


def _any_rank(spectra: Mapping[str, Spectrum], names: Sequence[str], noise: float) -> bool:
    """Say whether any channel holds a direction above the edge of the noise, at the lowest of all cuts."""
    lowest = min(tolerance for tolerance in _TOLERANCES if tolerance is not None)
    return any(spectra[name].span(tolerance=lowest, noise=noise).rank > 0 for name in names)


def _feeds(model: nn.Module, names: Sequence[str], probe: Tensor) -> dict[str, str]:
    """Return for every channel the first one that is fed the same: a pass that looks at it can stop there."""
    captured = capture_inputs({name: model.get_submodule(name) for name in names}, lambda: call(model, probe))
    feeds: dict[str, str] = {}
    for name in names:
        same = (one for one in (*feeds.values(), name) if torch.equal(captured[one], captured[name]))
        feeds[name] = next(same)
    return feeds


def cut(structure: Structure, tolerance: float | None) -> Scene:
    """Cut the row spaces at a tolerance and keep the channels that can tell.

    Neither empty nor full, and missing no token.
    """
    alone = []
    for spectrum in structure.alone:
        alone.append(spectrum.span(tolerance=tolerance, noise=structure.noise))
    informative = []
    for span in alone:
        if 0 < span.rank < structure.ambient[span.channel]:
            informative.append(span)
    tokens = max((span.rank for span in informative), default=0)
    mixed = []
    for spectrum in structure.mixed:
        mixed.append(spectrum.span(tolerance=tolerance, noise=structure.noise))
    # A channel of lower rank than its neighbours missed some tokens: a last layer's query sees one position
    # only.
    context = []
    for span in mixed:
        if span.informative and span.rank >= tokens - (tolerance is not None) * tokens // 8:
            context.append(span)
    return Scene(
        structure=structure,
        alone=tuple(span for span in informative if span.rank == tokens),
        mixed=tuple(context[:_CONTEXT_CHANNELS]),
        positions=max(1, min(structure.limit, tokens)),
    )


def _ambient(model: nn.Module, names: list[str], vocabulary: int) -> dict[str, int]:
    """Return the dimension of the space each layer's inputs can fill: a LayerNorm in front takes one away."""
    modules = {}
    for name in names:
        modules[name] = model.get_submodule(name)
    captured = capture_inputs(modules, lambda: call(model, torch.zeros(1, 1, dtype=torch.long)))
    widest = max(value.shape[-1] for value in captured.values())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (2 * widest // 4 + 1, 4), generator=generator)
    captured = capture_inputs(modules, lambda: call(model, ids))
    return {
        name: int(torch.linalg.matrix_rank(value.flatten(0, 1), rtol=1e-9))
        for name, value in captured.items()
    }


def ladder(structure: Structure) -> Iterator[Scene]:
    """Yield the scenes of all tolerances that differ and can tell something."""
    visited: set[tuple[int, ...]] = set()
    for tolerance in _TOLERANCES:
        scene = cut(structure, tolerance)
        if scene.alone and scene.ranks not in visited:
            visited.add(scene.ranks)
            yield scene


def _longest(observation: Observation, model: nn.Module) -> int:
    lengths = observation.known("lengths")
    limits = [
        getattr(getattr(model, "config", None), "max_position_embeddings", None),
        observation.known("sequence_length"),
        max(lengths) if lengths else None,
    ]
    return min([int(limit) for limit in limits if limit], default=1_000_000)


def call(model: nn.Module, ids: Tensor) -> object:
    """Run a model on probe tokens (n, t)."""
    return run_tokens(model, ids)


def _inputs_of(model: nn.Module, name: str, ids: Tensor) -> Tensor:
    return capture_inputs({name: model.get_submodule(name)}, lambda: call(model, ids))[name]


def _per_token(captured: Tensor, probe: Tensor) -> bool:
    return captured.ndim == 3 and captured.shape[:2] == probe.shape


def _probe(
    model: nn.Module, names: list[str], probe: Tensor
) -> tuple[list[str], dict[str, bool], dict[str, bool]]:
    """Return the channels that work per token, and whether each lets the last position see the first, and the
    reverse.
    """
    modules = {}
    for name in names:
        modules[name] = model.get_submodule(name)
    base = capture_inputs(modules, lambda: call(model, probe))
    per_token = []
    for name in names:
        if name in base and _per_token(base[name], probe):
            per_token.append(name)
    differences: list[dict[str, bool]] = []
    for changed, read in ((0, -1), (-1, 0)):
        other = probe.clone()
        other[0, changed] = probe[0, 2]
        after = capture_inputs(modules, partial(call, model, other))
        differences.append(
            {name: _differs(base[name][0, read], after[name][0, read], base[name]) for name in per_token}
        )
    return per_token, differences[0], differences[1]


def _differs(before: Tensor, after: Tensor, scale: Tensor) -> bool:
    """Say whether an input changed by more than rounding of double precision.

    In a trained model a later layer may move by as little as 1e-5 of its scale when another token changes.
    """
    return float((before - after).abs().max()) > _UNMOVED * float(scale[0].abs().max())


# --------------------------------------------------------------------------------------- tokens and positions


def token_distances(scene: Scene, tokens: Tensor) -> Tensor:
    """Return the distance of every token at every position to the first layer's span: shape (tokens,
    positions).

    A sequence that repeats one token gives that token's input at every position in one pass. Everything is
    screened in single precision; tokens that come near are measured again in double precision.
    """
    positions = 1
    if scene.structure.positional:
        positions = scene.positions
    ids = tokens[:, None].expand(-1, positions)
    rows = max(1, _SCREEN_ROWS // positions)
    screened = torch.cat([_screened(scene, ids[start : start + rows]) for start in range(0, len(ids), rows)])
    near = (screened < _NEAR).any(1).nonzero().flatten()
    rows = max(1, CHUNK_ROWS // positions)
    for start in range(0, len(near), rows):
        part = near[start : start + rows]
        screened[part] = joint_distance(scene, scene.alone, ids[part])
    return screened


def _screened(scene: Scene, ids: Tensor) -> Tensor:
    """Return joint distances from the length of each projection alone: right to about 1e-3 where they are not
    small.
    """
    captured = _inputs_of_spans(scene.structure, scene.structure.light, scene.alone, ids)
    outside = []
    for span, inputs in zip(scene.alone, captured, strict=True):
        inside = torch.linalg.vector_norm(inputs @ span.basis.to(inputs.dtype).T, dim=-1)
        whole = torch.linalg.vector_norm(inputs, dim=-1).clamp_min(1e-30)
        outside.append((1.0 - (inside / whole).square()).clamp_min(0.0))
    return torch.stack(outside).amax(0).sqrt().double()


def separate(distances: Tensor, *, most: int, codimension: int, rank: int) -> tuple[float, float] | None:
    """Find the threshold between members and strangers: the last wide relative gap among the `most` smallest
    distances.

    Returns the threshold and the gap's ratio, or None when the gap is narrow or random directions would come
    as close. The squared distance of a random direction follows a Beta(codimension / 2, rank / 2) law; the
    threshold admits fewer than 0.005 of them.
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
    """Return the distance below which fewer than 0.005 strangers are expected, judged by the bulk; None when
    the bulk cannot tell.

    The smaller of two bounds: the logit of the squared distance is normal with the bulk's median and median
    absolute deviation; the squared distance follows the law of random directions, scaled to the bulk's
    median.
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
    structure: Structure,
    tokens: Tensor,
    *,
    deadline: Deadline,
    allowed: Tensor | None = None,
    outliers: bool = True,
) -> tuple[Scene, Candidates] | None:
    """Return the tokens that fit each position with the cut that shows them best, or None when none stands
    out.

    All of `tokens` are measured, since strangers are what members stand out from; only `allowed` ones are
    returned.

    Raises: NotApplicable when every row space is full or empty at every cut.
    """
    best: tuple[Scene, Candidates] | None = None
    fallback: tuple[Scene, Candidates] | None = None
    visited: set[tuple[int, ...]] = set()
    for scene in ladder(structure):
        if visited and deadline.expired:
            break
        visited.add(scene.ranks)
        distances = token_distances(scene, tokens)
        codimension = structure.ambient[scene.alone[0].channel] - scene.tokens
        # A token at two places and another at one of them put the fourth corner of the parallelogram into the
        # span too.
        most = 2 * scene.tokens + 8
        separated = separate(distances, most=most, codimension=codimension, rank=scene.tokens)
        if separated is not None:
            best = _better(
                best,
                (
                    scene,
                    _passed(scene, tokens, distances, threshold=separated[0], gap=separated[1], exact=True),
                ),
            )
            if separated[1] > 1_000.0:
                break
        elif best is None and outliers:
            fallback = _better(fallback, _outliers(scene, tokens, distances, codimension))
    if not visited:
        widths = max(spectrum.shape[1] for spectrum in structure.alone)
        raise NotApplicable(
            f"the row spaces of the first layer say nothing (width {widths}): as many tokens, or an update "
            "that is not low rank"
        )
    chosen = best or fallback
    if chosen is None or allowed is None:
        return chosen
    return (chosen[0], _only(chosen[1], set(allowed.tolist())))


def _only(candidates: Candidates, allowed: set[int]) -> Candidates:
    ids = tuple(tuple(token for token in options if token in allowed) for options in candidates.ids)
    return replace(candidates, ids=ids)


def token_pool(vocabulary: int, present: Tensor | None) -> Tensor:
    """Return the tokens to measure.

    All of a small vocabulary, else those known to be present and a thousand others.
    """
    if present is None or vocabulary <= 4_000:
        return torch.arange(vocabulary)
    generator = torch.Generator().manual_seed(0)
    pool = torch.cat([present, torch.randint(vocabulary, (1_000,), generator=generator)])
    return torch.tensor(sorted(set(pool.tolist())))


def _outliers(
    scene: Scene, tokens: Tensor, distances: Tensor, codimension: int
) -> tuple[Scene, Candidates] | None:
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
        ids=ids if scene.structure.positional else ids * scene.positions,
        threshold=threshold,
        gap=gap,
        exact=exact,
    )


def joint_distance(scene: Scene, spans: tuple[Span, ...], ids: Tensor) -> Tensor:
    """Return the largest distance over some spans, per sequence and position."""
    captured = _inputs_of_spans(scene.structure, scene.structure.model, spans, ids)
    distances = [span.distance(inputs) for span, inputs in zip(spans, captured, strict=True)]
    return torch.stack(distances).amax(0)


def _inputs_of_spans(
    structure: Structure, model: nn.Module, spans: Sequence[Span], ids: Tensor
) -> list[Tensor]:
    """Return what the channel of each span is fed under sequences (n, t)."""
    feeds = [structure.feeds[span.channel] for span in spans]
    captured = capture_inputs({name: model.get_submodule(name) for name in feeds}, lambda: call(model, ids))
    return [captured[name] for name in feeds]
