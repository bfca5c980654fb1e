"""Discrete text search on top of gradient matching: LAMP's moves, FILM's beam, GRAB's dropout masks.

All three score real tokens by the update they would cause, plus what a language model thinks of them when
the user supplies one. Sources: Balunovic et al., "LAMP", 2022, algorithm 1; Gupta et al., "FILM", 2022,
sections 4.2 and 4.3; Feng et al., "GRAB", 2024 (dropout masks as variables, beam over orderings).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from attacks.contract import Attack, Budget, Deadline, Finding, Item, NotApplicable, PlainAttack, Prior
from attacks.inversion.embeddings import (
    COSINE,
    TRIALS,
    TextFrame,
    as_sequences,
    exchange_tokens,
    nearest_tokens,
    text_problem,
    token_misfit,
)
from attacks.inversion.optimise import (
    Problem,
    Settings,
    differentiable_attention,
    in_double,
    label_targets,
    match,
)
from attacks.observation import Observation

LanguageModel = Callable[[Tensor], Tensor]

_LANGUAGE = 0.02  # weight of one nat per token against the misfit of a random start
_MOVES = 40
_CANDIDATES = 12
_BEAMS = 16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Judge:
    """Scores tokens: the misfit of their update relative to a random start's, plus the language model's
    surprise.
    """

    problem: Problem
    frame: TextFrame
    settings: Settings
    targets: Tensor
    unit: float
    language_model: LanguageModel | None = None

    def surprise(self, tokens: Tensor) -> float:
        """Return the mean negative log-probability per token in nats, 0 without a language model."""
        if self.language_model is None or tokens.shape[1] < 2:
            return 0.0
        with torch.no_grad():
            chosen = self.language_model(tokens)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
        return float(-chosen[self.frame.mask[:, 1:].bool()].mean())

    def score(self, tokens: Tensor) -> float:
        """Return misfit plus surprise of tokens (b, t): lower is better."""
        fit = token_misfit(self.problem, self.frame, self.settings, tokens, self.targets)
        return fit / self.unit + _LANGUAGE * self.surprise(tokens)


def random_move(length: int, generator: torch.Generator, *, pinned: int = 0) -> Tensor:
    """Return a random order of `length` places: swap two, move one, move a span, or rotate a prefix.

    The first `pinned` places stay. Source: LAMP, section 4.2.
    """
    order = torch.arange(length)
    free = length - pinned
    if free < 2:
        return order
    kind = int(torch.randint(4, (1,), generator=generator))
    first, second = (pinned + int(x) for x in torch.randperm(free, generator=generator)[:2])
    if kind == 0:
        order[[first, second]] = order[[second, first]]
        return order
    if kind == 3:
        cut = max(first, second)
        return torch.cat([order[:pinned], order[cut:], order[pinned:cut]])
    if kind == 1:
        end = first + 1
    else:
        end = min(length, first + 1 + int(torch.randint(free, (1,), generator=generator)))
    span, rest = order[first:end], torch.cat([order[:first], order[end:]])
    place = pinned + int(torch.randint(len(rest) - pinned + 1, (1,), generator=generator))
    return torch.cat([rest[:place], span, rest[place:]])


def reorder(
    judge: Judge,
    tokens: Tensor,
    *,
    moves: int,
    generator: torch.Generator,
    deadline: Deadline,
    pinned: int = 0,
) -> tuple[Tensor, Tensor, float]:
    """Try random moves inside and across sentences; return the best tokens, the orders that led there, and
    the score.

    Orders are (b, t) places of the start. Guarantee: never worse than the start.
    """
    orders = torch.arange(tokens.shape[1]).expand_as(tokens).clone()
    best = judge.score(tokens)
    for _ in range(moves):
        if deadline.expired:
            break
        row = int(torch.randint(len(tokens), (1,), generator=generator))
        length = judge.frame.lengths[row]
        order = random_move(length, generator, pinned=pinned)
        trial = tokens.clone()
        trial[row, :length] = tokens[row, order]
        value = judge.score(trial)
        if value < best:
            best, tokens = value, trial
            orders = orders.clone()
            orders[row, :length] = orders[row, order]
    return tokens, orders, best


def _judge(problem: Problem, frame: TextFrame, prior: Prior, unit: float, targets: Tensor) -> Judge:
    return Judge(
        problem=problem,
        frame=frame,
        settings=COSINE,
        targets=targets,
        unit=max(unit, 1e-12),
        language_model=prior.language_model,
    )


def _lamp(
    observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
) -> Finding:
    deadline, generator = budget.start(), torch.Generator().manual_seed(seed)
    problem, frame = text_problem(observation, model, prior, seed)
    problem = in_double(problem)
    pinned = 0
    if observation.known("special_tokens"):
        pinned = 1
    rounds = 3
    best: tuple[float, Tensor] | None = None
    start, unit, first = None, None, 1.0
    with differentiable_attention(), torch.enable_grad():
        for index in range(rounds * budget.restarts):
            fresh = index % rounds == 0
            if fresh:
                start = unit = None
            solution = match(
                problem,
                COSINE,
                iterations=max(2, budget.iterations // rounds),
                generator=generator,
                deadline=deadline,
                start=start,
                unit=unit,
            )
            if index == 0:
                first = solution.start_distance
            if fresh:
                unit = solution.start_distance
            judge = _judge(problem, frame, prior, first, solution.targets)
            candidates, _ = nearest_tokens(problem.model, solution.inputs, frame, keep=_CANDIDATES)
            tokens, orders, score = reorder(
                judge,
                candidates[..., 0],
                moves=min(_MOVES, budget.iterations),
                generator=generator,
                deadline=deadline,
                pinned=pinned,
            )
            start = solution.inputs.gather(1, orders[..., None].expand_as(solution.inputs))
            if best is None or score < best[0]:
                best = score, tokens
                ordered = candidates.gather(1, orders[..., None].expand_as(candidates))
                targets = solution.targets
            if deadline.expired or score < 1e-3:
                break
        assert best is not None
        choices = torch.cat([best[1][..., None], ordered], dim=-1)
        tokens, residual = exchange_tokens(
            problem, frame, COSINE, choices, targets, deadline, trials=TRIALS * budget.iterations
        )
    return _finding(tokens, frame, residual, first, deadline, judge.surprise(tokens))


def _finding(
    tokens: Tensor, frame: TextFrame, residual: float, start: float, deadline: Deadline, surprise: float
) -> Finding:
    explained = max(0.0, min(1.0, 1.0 - residual / max(start, 1e-30)))
    details = {"token_distance": residual, "start_distance": start, "surprise": surprise}
    reason = ""
    if deadline.expired:
        reason = "stopped by its budget of steps"
    return Finding(
        items=as_sequences(tokens, frame, explained), confidence=explained, reason=reason, details=details
    )


# ------------------------------------------------------------------------------------------------------- FILM


def beam_search(
    language_model: LanguageModel, bag: Tensor, length: int, *, beams: int = _BEAMS, first: int | None = None
) -> list[tuple[Tensor, float]]:
    """Return likely sequences (length,) made of tokens of the bag, best first, with their log-probabilities.

    No pair of neighbours occurs twice in a sequence, and a token already used costs one nat each time.
    Without a known first token every token of the bag may start.
    """
    if first is not None:
        starts = [first]
    else:
        starts = bag.tolist()
    prefixes = torch.tensor(starts)[:, None]
    scores = torch.zeros(len(starts))
    for _ in range(length - 1):
        with torch.no_grad():
            follow = language_model(prefixes)[:, -1][:, bag].float()
        used = (prefixes[:, :, None] == bag[None, None, :]).sum(1)
        table = scores[:, None] + follow - used.float()
        for row, prefix in enumerate(prefixes.tolist()):
            pairs = set(pairwise(prefix))
            for column, token in enumerate(bag.tolist()):
                if (prefix[-1], token) in pairs:
                    table[row, column] = -math.inf
        scores, places = table.flatten().topk(min(beams, table.numel()))
        prefixes = torch.cat([prefixes[places // len(bag)], bag[places % len(bag)][:, None]], dim=1)
    return [(prefix, float(score)) for prefix, score in zip(prefixes, scores, strict=True)]


def cover(beams: list[tuple[Tensor, float]], bag: Tensor, count: int) -> Tensor:
    """Return `count` sequences of the beams that together use most of the bag,
    likelier ones first on ties.
    """
    left, chosen = set(bag.tolist()), []
    for _ in range(count):
        best = max(beams, key=lambda entry: (len(left & set(entry[0].tolist())), entry[1]))
        chosen.append(best[0])
        left -= set(best[0].tolist())
    return torch.stack(chosen)


def _film(
    observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
) -> Finding:
    deadline, generator = budget.start(), torch.Generator().manual_seed(seed)
    assert prior.language_model is not None
    problem, frame = text_problem(observation, model, prior, seed)
    if bool(frame.allowed.all()) or int(frame.allowed.sum()) > 0.5 * len(frame.allowed):
        raise NotApplicable("the bag of words is not known: the token embedding's rows do not show it")
    bag = frame.allowed.nonzero().flatten()
    special = observation.known("special_tokens")
    targets = _given_targets(problem)
    beams = beam_search(prior.language_model, bag, frame.length, first=int(special[0]) if special else None)
    tokens = cover(beams, bag, len(frame.lengths))
    with differentiable_attention(), torch.enable_grad():
        unit = token_misfit(
            problem, frame, COSINE, bag[torch.randint(len(bag), tokens.shape, generator=generator)], targets
        )
        judge = _judge(problem, frame, prior, unit, targets)
        if len(tokens) == 1:
            tokens = min((beam[None] for beam, _ in beams), key=judge.score)
        tokens, _, _ = reorder(
            judge,
            tokens,
            moves=budget.iterations,
            generator=generator,
            deadline=deadline,
            pinned=1 if special else 0,
        )
        choices = torch.cat([tokens[..., None], bag.expand(*tokens.shape, -1)], dim=-1)
        tokens, residual = exchange_tokens(
            problem, frame, COSINE, choices, targets, deadline, trials=TRIALS * budget.iterations
        )
    return _finding(tokens, frame, residual, unit, deadline, judge.surprise(tokens))


def _given_targets(problem: Problem) -> Tensor:
    if problem.labels is None and problem.classes:
        raise NotApplicable("the labels are neither known nor shown by the head")
    if problem.labels is None:
        return torch.zeros(problem.shape[0], 0)
    return label_targets(problem.labels, problem.classes)


# ------------------------------------------------------------------------------------------------------- GRAB


@contextmanager
def masked_dropout(model: nn.Module, masks: dict[str, Tensor]) -> Iterator[None]:
    """Multiply the output of named dropout modules by given masks. Guarantee: hooks are removed whatever
    happens.
    """

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def apply(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
            mask = masks[name]
            if mask.shape == output.shape:
                return output * mask.to(output.dtype)
            return output

        return apply

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in masks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def dropout_shapes(problem: Problem) -> dict[str, tuple[int, ...]]:
    """Return the output shape of every dropout module with a rate above zero that a forward pass calls."""
    shapes: dict[str, tuple[int, ...]] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def note(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            shapes[name] = tuple(output.shape)

        return note

    named = {
        name: module
        for name, module in problem.model.named_modules()
        if isinstance(module, nn.Dropout) and module.p > 0
    }
    handles = [module.register_forward_hook(keep(name)) for name, module in named.items()]
    try:
        with torch.no_grad():
            dummies = torch.zeros(problem.shape, dtype=problem.target[0].dtype)
            problem.loss(problem.model, dummies, _given_targets(problem))
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def with_masks(problem: Problem, shapes: dict[str, tuple[int, ...]], rates: dict[str, float]) -> Problem:
    """Return the problem whose variables are embeddings and dropout masks, as one row per sentence.

    A mask entry is sigmoid(x) / (1 - rate) and starts at its mean of one.
    """
    inner, inputs = problem.loss, math.prod(problem.shape)
    sizes = {}
    for name, shape in shapes.items():
        sizes[name] = math.prod(shape)

    def unpack(variables: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        masks, offset = {}, inputs
        for name, size in sizes.items():
            raw = variables[offset : offset + size].reshape(shapes[name])
            masks[name] = torch.sigmoid(4.0 * raw + math.log((1 - rates[name]) / rates[name])) / (
                1.0 - rates[name]
            )
            offset += size
        return variables[:inputs].reshape(problem.shape), masks

    def loss(model: nn.Module, variables: Tensor, targets: Tensor) -> Tensor:
        embeddings, masks = unpack(variables)
        with masked_dropout(model, masks):
            return inner(model, embeddings, targets)

    draw = problem.draw
    assert draw is not None

    def start(generator: torch.Generator) -> Tensor:
        first = draw(generator).flatten()
        return torch.cat([first, first.new_zeros(sum(sizes.values()))])

    return replace(problem, loss=loss, draw=start)


def _grab(
    observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
) -> Finding:
    deadline = budget.start()
    problem, frame = text_problem(observation, model, prior, seed)
    problem = in_double(problem)
    known = observation.known("dropout")
    shapes = dropout_shapes(problem)
    if not shapes or known == 0.0:
        raise NotApplicable("the client trains without dropout modules: use text_matching")
    rates = {}
    for name in shapes:
        rates[name] = float(known or cast(float, problem.model.get_submodule(name).p))
    wide = with_masks(problem, shapes, rates)
    targets = _given_targets(problem)
    wide = replace(wide, labels=problem.labels)
    best: tuple[float, Tensor, float] | None = None
    for restart in range(budget.restarts):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + restart)
        with differentiable_attention(), torch.enable_grad():
            solution = match(
                _flat_targets(wide, targets),
                COSINE,
                iterations=budget.iterations,
                generator=generator,
                deadline=deadline,
            )
        if best is None or solution.distance < best[0]:
            best = solution.distance, solution.inputs, solution.start_distance
        if deadline.expired:
            break
    assert best is not None
    embeddings = best[1][: math.prod(problem.shape)].reshape(problem.shape)
    tokens, likeness = nearest_tokens(problem.model, embeddings, frame)
    explained = max(0.0, min(1.0, 1.0 - best[0] / max(best[2], 1e-30)))
    confidence = explained * float(likeness[..., 0].mean().clamp(0.0, 1.0))
    details = {
        "distance": best[0],
        "start_distance": best[2],
        "masks": sum(math.prod(shape) for shape in shapes.values()),
    }
    items: tuple[Item, ...] = as_sequences(tokens[..., 0], frame, confidence)
    return Finding(
        items=items,
        confidence=confidence,
        reason="stopped by its budget of steps" if deadline.expired else "",
        details=details,
    )


def _flat_targets(problem: Problem, targets: Tensor) -> Problem:
    """Return the problem with its targets bound: the variables no longer have one row per sentence."""
    inner = problem.loss
    return replace(
        problem, labels=None, classes=0, loss=lambda model, variables, _: inner(model, variables, targets)
    )


def lamp() -> Attack:
    """Return LAMP: matching of embeddings alternated with discrete moves, scored with a language model if
    given.
    """
    return PlainAttack(
        name="lamp",
        family="text search",
        attempt=_lamp,
        requires=("model", "batch_size"),
        summary="text by matching embeddings and moving tokens, with any language model",
    )


def film() -> Attack:
    """Return FILM: a language model's beam over the bag of words, then reordering by the update."""
    return PlainAttack(
        name="film",
        family="text search",
        attempt=_film,
        requires=("model", "batch_size", "prior.language_model"),
        summary="sentences from the bag of words with a language model's beam, reordered by the update",
    )


def grab() -> Attack:
    """Return GRAB: the client's dropout masks are recovered together with the text."""
    return PlainAttack(
        name="grab",
        family="text search",
        attempt=_grab,
        requires=("model", "batch_size"),
        summary="text of clients that train with dropout, their masks as variables",
    )
