"""Sentences of a decoder without absolute positions, token by token, where the row spaces end in a clean gap.

Rotary models see the same first layer input wherever a token stands, so a repeated word adds nothing to the
rank there, and every place may hold every token. What tells them apart are the layers behind the first
attention: their row spaces hold one direction for each distinct beginning of a sentence. While these are
fewer than the width, a true beginning fits to rounding and no other does. Keys and values of grouped heads
have fewer rows than that and are left out, as is a query, which has no gradient at a first place.

Source: Petrov et al., "DAGER: Exact Gradient Inversion for Large Language Models", NeurIPS 2024, section 5;
the choice of layers, the cut at the gap and the search over any length are our own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from attacks.contract import Deadline
from attacks.inversion.channels import Span, capture_inputs
from attacks.inversion.subspace import CHUNK_ROWS, Structure, call

WHOLE_VOCABULARY = 4_000  # tokens up to which every one of them is tried at every place
_CHANNELS = 4
_CHANNELS_NARROW = 12
_NARROW = 32  # width below which a single row space admits too many strangers
# How far a true beginning may lie outside, and how many times farther the nearest stranger: strict, then
# lenient, for a
# beginning that hardly moved the model is the farther outside the more rounding there is.
STRICT, LENIENT = (5e-4, 8.0), (5e-3, 3.0)
_STRANGE = 2e-4  # nearest that a stranger may lie
_LOW = 1e-6  # relative singular values above which a direction counts as seen, rounding included
_NEAR = 0.05
_LONGEST_RUN = 8  # repeats of the first token, which leave no trace of their own


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Contexts:
    """The row spaces of the layers that see beginnings of sentences; `count` is how many distinct ones there
    were.
    """

    structure: Structure
    spans: tuple[Span, ...]
    count: int

    def distance(self, ids: Tensor) -> Tensor:
        """Return how far the last place of each beginning (n, t) lies outside the row spaces: shape (n,)."""
        model = self.structure.model
        modules = {}
        for span in self.spans:
            modules[span.channel] = model.get_submodule(span.channel)
        rows = max(1, CHUNK_ROWS // ids.shape[1])
        parts = []
        for part in torch.split(ids, rows):
            captured = capture_inputs(modules, partial(call, model, part))
            outside = []
            for span in self.spans:
                outside.append(span.distance(captured[span.channel][:, -1]))
            parts.append(torch.stack(outside).amax(0))
        return torch.cat(parts)


def clean_contexts(structure: Structure) -> Contexts | None:
    """Return the row spaces that end in a clean gap and hold every beginning, None where there are none.

    A layer of lower rank than the others missed some beginnings, one whose rank is all its rows allow may
    have.
    """
    if structure.positional or not structure.causal or structure.noise > 0.0:
        return None
    spans = [span for spectrum in structure.mixed if (span := spectrum.clean_span()) is not None]
    if not spans:
        return None
    count = max(span.rank for span in spans)
    fullest = [span for span in spans if span.rank == count]
    narrow = min(span.shape[1] for span in fullest) < _NARROW
    chosen = tuple(fullest[: _CHANNELS_NARROW if narrow else _CHANNELS])
    return Contexts(structure=structure, spans=chosen, count=count)


def read_sentences(
    contexts: Contexts, options: Tensor, *, longest: int, rule: tuple[float, float], deadline: Deadline
) -> list[tuple[int, ...]]:
    """Extend beginnings token by token while they fit; return those that nothing extends.

    Every token is tried at the first place, which no query holds, `options` behind it. `rule` is STRICT or
    LENIENT.
    """
    finished: list[tuple[int, ...]] = []
    alive = _fitting(contexts, torch.arange(contexts.structure.vocabulary)[:, None], rule)
    while alive and len(alive[0]) < longest and not deadline.expired:
        if len(alive) > contexts.count:  # more beginnings of one length than there are of all lengths
            return []
        growing = []
        for one in alive:
            if len(set(one)) > 1 or len(one) < _LONGEST_RUN:
                growing.append(one)
        if growing:
            extended = _fitting(contexts, _extended(growing, options), rule)
        else:
            extended = []
        grown = set()
        for one in extended:
            grown.add(one[:-1])
        for one in alive:
            if one not in grown:
                finished.append(one)
        alive = extended
    return finished + alive


def _extended(beginnings: list[tuple[int, ...]], options: Tensor) -> Tensor:
    before = torch.tensor(beginnings).repeat_interleave(len(options), dim=0)
    behind = options.repeat(len(beginnings))[:, None]
    return torch.cat([before, behind], dim=1)


def _fitting(contexts: Contexts, ids: Tensor, rule: tuple[float, float]) -> list[tuple[int, ...]]:
    distances = contexts.distance(ids)
    fits = distances <= _edge(distances, *rule)
    return [tuple(row) for row in ids[fits].tolist()]


def _edge(distances: Tensor, ceiling: float, clear: float) -> float:
    """Return the distance up to which beginnings are true: the middle of the last wide gap that starts near
    rounding.
    """
    ordered = distances.double().sort().values.clamp_min(1e-9)
    low, high = ordered[:-1], ordered[1:]
    wide = ((low <= ceiling) & (high >= clear * low) & (high >= _STRANGE)).nonzero().flatten()
    if len(wide) == 0:
        if float(ordered[-1]) <= ceiling:
            return ceiling
        return -1.0
    last = int(wide[-1])
    return float((low[last] * high[last]).sqrt())


def likely_options(structure: Structure) -> Tensor:
    """Return the tokens whose own inputs lie near the row space of the first layers, cut so low that none is
    lost.
    """
    everything = torch.arange(structure.vocabulary)
    spans = []
    for spectrum in structure.alone:
        spans.append(spectrum.span(tolerance=_LOW))
    spans = [span for span in spans if span.rank < min(span.shape)]
    if not spans:
        return everything
    fullest = max(spans, key=lambda span: span.rank)
    contexts = Contexts(structure=structure, spans=(fullest,), count=fullest.rank)
    near = everything[contexts.distance(everything[:, None]) <= _NEAR]
    if len(near):
        return near
    return everything
