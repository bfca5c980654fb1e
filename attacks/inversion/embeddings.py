"""Gradient matching on text: dummy embeddings stand in for the tokens, and are read back as the nearest
vocabulary rows.

The token embedding's output is replaced by the dummies, so one engine attacks any model that looks its
tokens up in a
table: encoders, decoders, and both with LoRA, adapters, prefixes or soft prompts in front. For language
models the targets are the dummies' own soft tokens. Sources: Deng et al., "TAG", 2021; Balunovic et al.,
"LAMP", 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
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
from attacks.inversion.channels import capture_inputs, end_token, ended, linear_modules, run_tokens
from attacks.inversion.matching import cohort_size, known_or_inferred_labels
from attacks.inversion.optimise import (
    Match,
    Penalty,
    Problem,
    Settings,
    cross_entropy,
    differentiable_attention,
    in_double,
    misfit,
    share_only,
    solve,
    update_of,
)
from attacks.inversion.priors import norm_distance
from attacks.inversion.tokens import embedding_names, likely_tokens, noise_per_entry, token_embedding
from attacks.observation import Observation

TAG = Settings(
    distance="squared and absolute",
    absolute=0.01,
    optimiser="adamw",
    rate=0.05,
    schedule="linear",
    warm_up=20,
)
COSINE = Settings(distance="cosine per tensor", optimiser="lbfgs", rate=1.0, line_search=True, precise=True)
WHITENED = replace(COSINE, distance="whitened")

_SHARPNESS = 30.0
_CANDIDATES = 12
TRIALS = 8  # exchanges of single tokens that one iteration of the budget buys
# A start much smaller than real embeddings commits to no token: from a full-size one most restarts end in a
# wrong one.
_START = 0.1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TextFrame:
    """Where the dummies go: lengths of the sequences, vocabulary rows, and the ids that may be decoded."""

    embedding: str
    rows: Tensor
    lengths: tuple[int, ...]
    allowed: Tensor
    placeholder: int
    padding: int
    generative: bool
    end: int | None = None

    @property
    def length(self) -> int:
        """Return the length of the longest sequence."""
        return max(self.lengths)

    @property
    def mask(self) -> Tensor:
        """Return the attention mask (sequences, length)."""
        return (torch.arange(self.length)[None, :] < torch.tensor(self.lengths)[:, None]).long()

    @property
    def ids(self) -> Tensor:
        """Return placeholder ids (sequences, length): real places hold a token that is not padding.

        The last real place holds the end token where the model's head looks for one.
        """
        ids = torch.where(self.mask.bool(), self.placeholder, self.padding)
        if self.end is not None:
            ids[torch.arange(len(ids)), torch.tensor(self.lengths) - 1] = self.end
        return ids


@contextmanager
def replaced_output(model: nn.Module, name: str, value: Tensor) -> Iterator[None]:
    """Let an embedding return `value` where its own output has that shape. Guarantee: the hooks are removed.

    Modules that share its weight count as the same embedding. In an encoder-decoder classifier the second of
    them embeds the same text for the decoder, one place later behind a start token.
    """
    weight = model.get_submodule(name).weight
    shared = []
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight is weight:
            shared.append(module)
    calls = 0

    def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        nonlocal calls
        if output.shape != value.shape:
            return output
        calls += 1
        moved = value.to(output.dtype)
        if calls == 1:
            return moved
        return torch.cat([output[:, :1], moved[:, :-1]], dim=1)

    handles = []
    for module in shared:
        handles.append(module.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def logits_of(model: nn.Module, frame: TextFrame, embeddings: Tensor) -> Tensor:
    """Return the model's logits when the tokens' embeddings are replaced."""
    with replaced_output(model, frame.embedding, embeddings):
        output = model(input_ids=frame.ids, attention_mask=frame.mask)
    logits: Tensor = getattr(output, "logits", output)
    return logits


def text_loss(frame: TextFrame) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """Return the client's loss on dummy embeddings: classification, or next-token prediction of their soft
    tokens.
    """
    unit_rows = nn.functional.normalize(frame.rows, dim=-1)
    counted = frame.mask[:, 1:].bool()

    def loss(model: nn.Module, embeddings: Tensor, targets: Tensor) -> Tensor:
        logits = logits_of(model, frame, embeddings)
        if logits.ndim == 2:
            return cross_entropy(logits, targets)
        likeness = nn.functional.normalize(embeddings, dim=-1) @ unit_rows.to(embeddings.dtype).T
        soft = torch.softmax(_SHARPNESS * likeness, dim=-1)[:, 1:]
        return cross_entropy(logits[:, :-1][counted], soft[counted])

    return loss


def text_frame(observation: Observation, model: nn.Module) -> TextFrame:
    """Return the frame of an observation: lengths as known, or as the position embedding's gradient shows
    them.

    Raises: NotApplicable when neither the lengths nor a trained position embedding tell how long the text is.
    """
    count, name = cohort_size(observation), token_embedding(model)
    rows = cast(Tensor, model.get_submodule(name).weight).detach().float()
    config = getattr(model, "config", None)
    padding = getattr(config, "pad_token_id", None) or 0
    allowed = torch.ones(len(rows), dtype=torch.bool)
    present = likely_tokens(observation, model)
    granted = observation.known("token_set")
    if granted is not None:
        present = torch.tensor(granted)
    if present is not None and 0 < len(present) < len(rows):
        allowed = torch.zeros(len(rows), dtype=torch.bool)
        allowed[present] = True
    allowed &= rows.norm(dim=1) > 0
    end = end_token(model)
    other = (padding, end)
    placeholder = next(token for token in range(len(rows)) if token not in other and bool(rows[token].any()))
    with torch.no_grad():
        pair = ended(model, torch.full((1, 2), placeholder))
        probe = model(input_ids=pair, attention_mask=torch.ones_like(pair))
    generative = getattr(probe, "logits", probe).ndim == 3
    return TextFrame(
        embedding=name,
        rows=rows,
        lengths=_lengths(observation, model, count, name),
        allowed=allowed,
        placeholder=placeholder,
        padding=padding,
        generative=generative,
        end=end,
    )


def _lengths(observation: Observation, model: nn.Module, count: int, token_name: str) -> tuple[int, ...]:
    granted = observation.known("lengths")
    if granted is not None and len(granted) == count:
        return tuple(int(length) for length in granted)
    length = observation.known("sequence_length")
    if length:
        return (int(length),) * count
    for name in embedding_names(model):
        gradient = observation.tensors.get(f"{name}.weight")
        if name != token_name and gradient is not None and len(gradient) > 2:
            norms = gradient.norm(dim=1)
            used = int((norms > 1e-9 * norms.max()).sum())
            if used < len(gradient):
                return (used,) * count
    raise NotApplicable("the text's length is neither known nor shown by a position embedding")


def text_problem(
    observation: Observation, model: nn.Module | None, prior: Prior, seed: int, *, joint: bool = False
) -> tuple[Problem, TextFrame]:
    """Return the inversion problem of a text model, with its frame.

    Raises: NotApplicable when the batch size or lengths are unknown, or nothing observed matches the model.
    """
    private = working_copy(model, observation)
    with differentiable_attention():
        frame = text_frame(observation, private)
    count = len(frame.lengths)
    labels, classes = None, 0
    if not frame.generative:
        labels = None
        if not joint:
            labels = known_or_inferred_labels(observation, private, prior, count, seed)
        with torch.no_grad():
            classes = int(
                logits_of(private, frame, torch.zeros(count, frame.length, frame.rows.shape[1])).shape[-1]
            )
    names, target, scaled = share_only(private, observation)
    # The dummies enter behind the table, so its rows carry nothing for matching beyond the tokens already
    # read off them.
    others = []
    for index, name in enumerate(names):
        if name != f"{frame.embedding}.weight":
            others.append(index)
    if not others:
        raise NotApplicable(
            "only the token embedding was shared: its rows give the tokens, matching adds nothing"
        )
    spread = float(frame.rows[frame.allowed].std())

    def draw(generator: torch.Generator) -> Tensor:
        return _START * spread * torch.randn(count, frame.length, frame.rows.shape[1], generator=generator)

    problem = Problem(
        model=private,
        names=tuple(names[index] for index in others),
        target=tuple(target[index] for index in others),
        loss=text_loss(frame),
        shape=(count, frame.length, frame.rows.shape[1]),
        classes=classes,
        labels=labels,
        scaled=scaled,
        noise=noise_per_entry(observation) / observation.contributors,
        draw=draw,
    )
    return problem, frame


def nearest_tokens(
    model: nn.Module, embeddings: Tensor, frame: TextFrame, *, keep: int = 1, chunk: int = 2_048
) -> tuple[Tensor, Tensor]:
    """Return the `keep` allowed tokens nearest to each dummy by cosine (b, t, keep), and those cosines.

    Both are compared as the first linear layer sees them: after positions were added and norms applied, which
    the dummies' own length and offset do not survive.
    """
    ids = frame.allowed.nonzero().flatten()
    name, module = next(iter(linear_modules(model).items()))
    count, length = embeddings.shape[:2]
    keep = min(keep, len(ids))
    states = capture_inputs({name: module}, lambda: logits_of(model, frame, embeddings)).get(name)
    if states is None or states.ndim != 3 or states.shape[1] < length:
        likeness = (
            nn.functional.normalize(embeddings, dim=-1)
            @ nn.functional.normalize(frame.rows[ids].to(embeddings.dtype), dim=-1).T
        )
        value, place = likeness.topk(keep, dim=-1)
        return ids[place], value
    ours = nn.functional.normalize(states[:, -length:], dim=-1)
    best, tokens = embeddings.new_empty(count, length, 0), torch.empty(count, length, 0, dtype=torch.long)
    for part in torch.split(ids, chunk):
        words = part[:, None].expand(-1, length)
        captured = capture_inputs({name: module}, partial(run_tokens, model, words))
        rows = captured[name][:, -length:]
        likeness = torch.einsum("btd,vtd->btv", ours, nn.functional.normalize(rows, dim=-1))
        best = torch.cat([best, likeness], dim=-1)
        tokens = torch.cat([tokens, part.expand(count, length, -1)], dim=-1)
        best, place = best.topk(min(keep, best.shape[-1]), dim=-1)
        tokens = tokens.gather(-1, place)
    return tokens, best


def token_misfit(
    problem: Problem, frame: TextFrame, settings: Settings, tokens: Tensor, targets: Tensor
) -> float:
    """Return how badly the update of real tokens (b, t) fits the observed one:
    0 when they are the client's.
    """
    grads, _ = update_of(problem, frame.rows[tokens], targets, keep_graph=False)
    return float(
        misfit(
            grads,
            problem.target,
            kind=settings.distance,
            scaled=problem.scaled,
            absolute=settings.absolute,
            noise=problem.noise,
        )
    )


def exchange_tokens(
    problem: Problem,
    frame: TextFrame,
    settings: Settings,
    candidates: Tensor,
    targets: Tensor,
    deadline: Deadline,
    *,
    trials: int,
    sweeps: int = 3,
) -> tuple[Tensor, float]:
    """Improve tokens one place at a time among candidates (b, t, k), judged by the update of real tokens.

    Return the tokens (b, t) and their misfit, after at most `trials` exchanges. Guarantee: never worse than
    the first candidates.
    """
    tokens = candidates[..., 0].clone()
    best = token_misfit(problem, frame, settings, tokens, targets)
    for _ in range(sweeps):
        before = best
        for row, place in frame.mask.nonzero().tolist():
            for candidate in candidates[row, place, 1:].tolist():
                if trials == 0 or deadline.expired:
                    return tokens, best
                trials -= 1
                trial = tokens.clone()
                trial[row, place] = candidate
                value = token_misfit(problem, frame, settings, trial, targets)
                if value < best:
                    best, tokens = value, trial
        if best >= before * (1 - 1e-6):
            break
    return tokens, best


def as_sequences(tokens: Tensor, frame: TextFrame, confidence: float) -> tuple[Item, ...]:
    """Return one sequence item per sentence, cut to its length."""
    return tuple(
        Item(kind="sequence", value=row[:length], confidence=confidence)
        for row, length in zip(tokens, frame.lengths, strict=True)
    )


def embedding_penalty(frame: TextFrame, settings: Settings) -> Penalty | None:
    """Return the prior that dummies are about as long as real embeddings."""
    if not settings.embedding_norm:
        return None
    wanted = float(frame.rows[frame.allowed].norm(dim=1).mean())

    def penalty(embeddings: Tensor, _: Mapping[str, Tensor]) -> Tensor:
        return settings.embedding_norm * norm_distance(embeddings, wanted) / max(wanted**2, 1e-12)

    return penalty


def scaled_rate(settings: Settings, frame: TextFrame) -> Settings:
    """Return settings whose step suits the size of this model's embeddings; L-BFGS finds its own."""
    if settings.optimiser == "lbfgs":
        return settings
    return replace(settings, rate=settings.rate * float(frame.rows[frame.allowed].std()) / 0.1)


def text_finding(
    solution: Match,
    problem: Problem,
    frame: TextFrame,
    settings: Settings,
    deadline: Deadline,
    *,
    trials: int,
) -> Finding:
    """Return recovered sequences: the nearest tokens, exchanged while that makes the update fit better."""
    candidates, likeness = nearest_tokens(problem.model, solution.inputs, frame, keep=_CANDIDATES)
    tokens, residual = exchange_tokens(
        problem, frame, settings, candidates, solution.targets, deadline, trials=trials
    )
    explained = max(0.0, 1.0 - residual / max(solution.start_distance, 1e-30))
    details: dict[str, float | int | str] = {
        "distance": solution.distance,
        "start_distance": solution.start_distance,
        "token_distance": residual,
        "iterations": solution.iterations,
        "tensors": len(problem.names),
        "likeness": float(likeness[..., 0].mean()),
    }
    reason = ""
    if solution.stopped:
        reason = "stopped by its budget of steps"
    return Finding(
        items=as_sequences(tokens, frame, explained), confidence=explained, reason=reason, details=details
    )


def invert_text(
    observation: Observation,
    model: nn.Module | None,
    prior: Prior,
    budget: Budget,
    seed: int,
    *,
    settings: Settings,
) -> Finding:
    """Match the observed update with dummy embeddings under the given settings."""
    deadline = budget.start()
    problem, frame = text_problem(observation, model, prior, seed, joint=settings.joint)
    if settings.precise:
        problem = in_double(problem)
    settings = scaled_rate(settings, frame)
    with differentiable_attention(), torch.enable_grad():
        solution = solve(problem, settings, budget, seed, penalty=embedding_penalty(frame, settings))
        return text_finding(solution, problem, frame, settings, deadline, trials=TRIALS * budget.iterations)


def _preset(name: str, settings: Settings, summary: str) -> Attack:
    def attempt(
        observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
    ) -> Finding:
        return invert_text(observation, model, prior, budget, seed, settings=settings)

    return PlainAttack(
        name=name, family="matching", attempt=attempt, requires=("model", "batch_size"), summary=summary
    )


def tag() -> Attack:
    """Return TAG: squared plus absolute distance on embeddings."""
    return _preset("tag", TAG, "text by matching gradients of embeddings, squared and absolute distance")


def text_matching() -> Attack:
    """Return cosine matching per tensor on embeddings:
    the strongest choice for LoRA and prompt-only updates.
    """
    return _preset(
        "text_matching", COSINE, "text by cosine matching of embeddings, whatever part of the model is shared"
    )


def text_matching_whitened() -> Attack:
    """Return matching on embeddings with each tensor weighed by its own size plus the noise."""
    return _preset(
        "text_matching_whitened", WHITENED, "text by matching of embeddings, tensors weighed against noise"
    )
