"""Span attacks on text: tokens, positions and whole sentences whose layer inputs lie in the row space of an
observed gradient.

A layer that saw b tokens has a gradient of rank b; while b is below the width, the right token at the right
place lies in that space and no other does. The same holds for a sum over clients (b counts all their tokens),
for both LoRA factors (the width of B is the rank r) and, with a wider tolerance, for an update of several SGD
steps. Decoders are extended token by token; encoders are searched as wholes.

Source: Petrov et al., "DAGER: Exact Gradient Inversion for Large Language Models", NeurIPS 2024, sections 4
and 5. The factor B of LoRA, the significance rule and the use of every layer that sees mixed positions are
our own.
"""

from __future__ import annotations

import math
from collections import Counter
from functools import partial

import torch
from torch import Tensor, nn

from attacks.contract import Attack, Budget, Deadline, Finding, Item, PlainAttack, Prior, working_copy
from attacks.copies import sharing_copy
from attacks.inversion.channels import capture_inputs
from attacks.inversion.last_tokens import with_last_tokens
from attacks.inversion.prefixes import (
    LENIENT,
    STRICT,
    WHOLE_VOCABULARY,
    Contexts,
    clean_contexts,
    likely_options,
    read_sentences,
)
from attacks.inversion.subspace import (
    CHUNK_ROWS,
    Candidates,
    Scene,
    call,
    cut,
    find_candidates,
    joint_distance,
    ladder,
    study,
    tail,
    token_pool,
)
from attacks.inversion.tokens import likely_tokens
from attacks.observation import Observation

# -------------------------------------------------------------------------------------------------- sentences


def search_decoder(
    scene: Scene, candidates: Candidates, *, width: int, deadline: Deadline
) -> list[tuple[int, ...]]:
    """Extend prefixes token by token, keeping those whose last position fits the span of a layer that sees
    the prefix.

    When the threshold is loose, only the best prefix of each token and the best token of each prefix are
    kept.
    """
    alive: list[tuple[int, ...]] = [()]
    finished: list[tuple[int, ...]] = []
    threshold = context_threshold(scene, candidates)
    for options in candidates.ids:
        if deadline.expired or not options or not alive:
            break
        longer = []
        for prefix in alive:
            for token in options:
                longer.append((*prefix, token))
        table = _context_distance(scene, torch.tensor(longer))[:, -1].reshape(len(alive), len(options))
        fits = table <= threshold
        if not candidates.clean:
            fits &= (table == table.amin(0)) | (table == table.amin(1, keepdim=True))
        order = table.flatten().argsort()[:width].tolist()
        extended = []
        for index in order:
            if bool(fits.flatten()[index]):
                extended.append(longer[index])
        grown = set()
        for prefix in extended:
            grown.add(prefix[:-1])
        for prefix in alive:
            if prefix and prefix not in grown:
                finished.append(prefix)
        alive = extended
    return finished + [prefix for prefix in alive if prefix]


def with_own_trace(
    model: nn.Module, channel: str, sentences: list[tuple[int, ...]]
) -> tuple[list[tuple[int, ...]], int]:
    """Drop the sentences whose every layer input is explained by the others, those with the fewest inputs of
    their own first.

    Return those that stay, and how many distinct inputs they have. Without absolute positions a doubled first
    token looks like the token itself, and a prefix leaves no trace of its own.
    """
    traces = {}
    for one in dict.fromkeys(sentences):
        traces[one] = _trace(model, channel, one)
    uses = Counter(row for trace in traces.values() for row in trace)
    for sentence in sorted(traces, key=lambda entry: (len(traces[entry]), -len(entry))):
        if all(uses[row] > 1 for row in traces[sentence]):
            uses.subtract(traces.pop(sentence))
    return list(traces), sum(count > 0 for count in uses.values())


def _trace(model: nn.Module, channel: str, sentence: tuple[int, ...]) -> set[tuple[int, ...]]:
    """Return the distinct inputs of a layer under one sentence, rounded."""
    module = {channel: model.get_submodule(channel)}
    inputs = capture_inputs(module, lambda: call(model, torch.tensor([sentence])))[channel][0]
    unit = inputs / inputs.norm(dim=-1, keepdim=True)
    return {tuple(row) for row in (unit * 1e5).round().long().tolist()}


def _distinct(scene: Scene, sentences: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Keep the best-fitting sentences,
    dropping any that agrees in 70 % of its places with one already kept.
    """
    means = {}
    for sentence in sentences:
        means[sentence] = float(_context_distance(scene, torch.tensor([sentence])).mean())
    distinct: list[tuple[int, ...]] = []
    for sentence in sorted(means, key=lambda entry: (-len(entry), means[entry])):
        agreements = []
        for other in distinct:
            agreements.append(sum(a == b for a, b in zip(sentence, other, strict=False)) / len(sentence))
        if max(agreements, default=0.0) < 0.7:
            distinct.append(sentence)
    return distinct


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
    return (
        tail(_context_distance(scene, strangers), codimension=codimension, rank=rank) or candidates.threshold
    )


def search_encoder(
    scene: Scene,
    candidates: Candidates,
    *,
    lengths: tuple[int, ...],
    budget: Budget,
    deadline: Deadline,
    seed: int,
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
        if not options or not all(options) or deadline.expired:  # noise can leave no place with a candidate
            continue
        starts = 4 * budget.restarts * max(map(len, options))
        if _product(options) <= 250 * budget.iterations:
            sentences = _enumerate(scene, options, threshold, deadline)
        else:
            sentences = _descend(scene, options, threshold, starts, deadline, generator)
        for sentence in sentences:
            fresh = set(enumerate(sentence)) & uncovered
            if fresh or not scene.structure.positional:
                accepted.append(sentence)
                uncovered -= fresh
    return accepted


def _enumerate(
    scene: Scene, options: tuple[tuple[int, ...], ...], threshold: float, deadline: Deadline
) -> list[tuple[int, ...]]:
    grids = torch.cartesian_prod(*[torch.tensor(entry) for entry in options]).reshape(-1, len(options))
    sentences: list[tuple[float, tuple[int, ...]]] = []
    for start in range(0, len(grids), 4_096):
        if deadline.expired:
            break
        part = grids[start : start + 4_096]
        fits = _context_distance(scene, part).amax(1)
        for row in (fits <= threshold).nonzero().flatten().tolist():
            sentences.append((float(fits[row]), tuple(part[row].tolist())))
    return [sentence for _, sentence in sorted(sentences)]


def _descend(
    scene: Scene,
    options: tuple[tuple[int, ...], ...],
    threshold: float,
    starts: int,
    deadline: Deadline,
    generator: torch.Generator,
) -> list[tuple[int, ...]]:
    """Change one token at a time to the one with the smallest mean distance, from several random starts.

    Every start holds on to a token that no sentence found so far has at its place, so that none is overlooked
    by chance.
    """
    scores: dict[tuple[int, ...], float] = {}
    missing = [(place, token) for place, entry in enumerate(options) for token in entry]
    for _ in range(starts):
        if deadline.expired or not missing:
            break
        position, token = missing[int(torch.randint(len(missing), (1,), generator=generator))]
        start = []
        for entry in options:
            start.append(entry[int(torch.randint(len(entry), (1,), generator=generator))])
        now, best = (*start[:position], token, *start[position + 1 :]), math.inf
        for _ in range(6):
            before = best
            for place in torch.randperm(len(options), generator=generator).tolist():
                if place == position:
                    continue
                variants = [(*now[:place], token, *now[place + 1 :]) for token in options[place]]
                means = _context_distance(scene, torch.tensor(variants)).mean(1)
                best, now = float(means.min()), variants[int(means.argmin())]
            if best >= before:
                break
        if float(_context_distance(scene, torch.tensor([now])).max()) <= threshold:
            scores[now] = best
            if scene.structure.positional:
                missing = [pair for pair in missing if now[pair[0]] != pair[1]]
    return sorted(scores, key=lambda sentence: scores[sentence])


def _context_distance(scene: Scene, ids: Tensor) -> Tensor:
    rows = max(1, CHUNK_ROWS // ids.shape[1])
    return torch.cat(
        [joint_distance(scene, scene.mixed, ids[start : start + rows]) for start in range(0, len(ids), rows)]
    )


def _product(options: tuple[tuple[int, ...], ...]) -> float:
    total = 1.0
    for entry in options:
        total *= len(entry)
    return total


# ------------------------------------------------------------------------------------------------- the attack


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
    private = working_copy(model, observation)
    structure = study(observation, sharing_copy(private).double(), light=private)
    contexts = clean_contexts(structure)
    if contexts is not None and structure.vocabulary <= WHOLE_VOCABULARY:
        whole = _read_whole(observation, contexts, deadline=deadline)
        if whole is not None:
            return whole
    tokens = likely_tokens(observation, structure.model)
    candidate_tokens = find_candidates(
        structure,
        token_pool(structure.vocabulary, tokens),
        deadline=deadline,
        allowed=tokens,
        outliers=outliers,
    )
    if candidate_tokens is None:
        return Finding(
            reason="no token stands out: too many tokens for the width, noise, or an optimiser that rescales",
            details=_facts(cut(structure, None)),
        )
    scene, candidates = candidate_tokens
    certainty = min(1.0, max(0.0, candidates.certainty))
    known = sorted({token for options in candidates.ids for token in options})
    items = [Item(kind="token_set", value=torch.tensor(known), confidence=certainty)]
    sentences = _sentences(observation, scene, candidates, budget, deadline, seed)
    if structure.causal and candidates.clean:
        sentences = list(with_last_tokens(observation, structure.model, sentences) or sentences)
    for sentence in sentences:
        items.append(Item(kind="sequence", value=torch.tensor(sentence), confidence=certainty))
    return Finding(
        items=tuple(items),
        confidence=certainty,
        reason="stopped by its budget of steps" if deadline.expired else "",
        details=_facts(scene) | {"threshold": candidates.threshold, "gap": candidates.gap},
    )


def _read_whole(observation: Observation, contexts: Contexts, *, deadline: Deadline) -> Finding | None:
    """Return the sentences whose beginnings are exactly those the row spaces hold, or None when some are
    missing.
    """
    structure = contexts.structure
    sentences = _complete(contexts, likely_options(structure), deadline=deadline)
    sentences = sentences or _complete(contexts, torch.arange(structure.vocabulary), deadline=deadline)
    if not sentences:
        return None
    sentences = list(with_last_tokens(observation, structure.model, sentences) or sentences)
    known = sorted({token for sentence in sentences for token in sentence})
    items = [Item(kind="token_set", value=torch.tensor(known), confidence=1.0)]
    for one in sentences:
        items.append(Item(kind="sequence", value=torch.tensor(one), confidence=1.0))
    details = _facts(cut(structure, None)) | {
        "contexts": contexts.count,
        "channels_mixed": ", ".join(span.channel for span in contexts.spans),
    }
    return Finding(items=tuple(items), confidence=1.0, details=details)


def _complete(contexts: Contexts, options: Tensor, *, deadline: Deadline) -> list[tuple[int, ...]]:
    """Return the sentences behind all beginnings, or none when they are more or fewer than the row spaces
    hold.
    """
    structure, channel = contexts.structure, contexts.spans[0].channel
    for rule in (STRICT, LENIENT):
        read = read_sentences(contexts, options, longest=structure.limit, rule=rule, deadline=deadline)
        sentences, traces = with_own_trace(structure.model, channel, read)
        if traces == contexts.count:
            return sentences
    return []


def _sentences(
    observation: Observation,
    scene: Scene,
    candidates: Candidates,
    budget: Budget,
    deadline: Deadline,
    seed: int,
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
    if lengths:
        known = tuple(sorted(set(lengths)))
    else:
        known = _possible_lengths(observation, candidates, filled)
    return search_encoder(scene, candidates, lengths=known, budget=budget, deadline=deadline, seed=seed)


def _decode(scene: Scene, candidates: Candidates, *, width: int, deadline: Deadline) -> list[tuple[int, ...]]:
    """Search with the cut that found the tokens, and when that was not clean with every other cut.

    Keep the fullest cover.
    """
    if candidates.clean:
        sentences = search_decoder(scene, candidates, width=width, deadline=deadline)
        return with_own_trace(scene.structure.model, scene.mixed[0].channel, sentences)[0]
    pairs = set()
    for place, options in enumerate(candidates.ids):
        for token in options:
            pairs.add((place, token))
    best: list[tuple[int, ...]] = []
    score = (-1.0, 0.0)
    for other in (scene, *ladder(scene.structure)):
        if not other.mixed or deadline.expired:
            continue
        sentences = _distinct(other, search_decoder(other, candidates, width=width, deadline=deadline))
        covered = len({pair for sentence in sentences for pair in enumerate(sentence)} & pairs) / max(
            1, len(pairs)
        )
        if (covered, -float(len(sentences))) > score:
            best, score = sentences, (covered, -float(len(sentences)))
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
        summary="tokens, positions and sentences from the row spaces of the first layers, "
        "full or LoRA, one client or a sum",
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
