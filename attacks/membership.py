"""Membership: was this candidate part of what was observed? Scores for updates and for released models.

Candidates come in `prior.candidates`: {"images", "labels"} or {"token_ids"[, "labels"]}. Every attack
returns one score per candidate, higher for members; `attacks.metrics` turns scores and truth into AUC and
rates at low false- positive rates. Sources: matched filter, Pyrgelis-style and Nasr et al., "Adversary
Instantiation", 2021; projection residual, ProjRes, 2026; LiRA, Carlini et al., 2022, section 5 (offline
variant); RMIA, Zarifzadeh et al., 2024, equation 4 (offline).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from attacks.contract import Attack, Budget, Finding, Item, NotApplicable, PlainAttack, Prior, working_copy
from attacks.inversion.channels import capture_inputs, observed_channels, spectrum_of
from attacks.inversion.tokens import noise_per_entry
from attacks.observation import Observation

Batch = Mapping[str, Tensor]

_ROUNDING = 1e-5


def batch_size(batch: Batch) -> int:
    """Return the number of examples in a batch of candidates."""
    return len(next(iter(batch.values())))


def one(batch: Batch, index: int) -> dict[str, Tensor]:
    """Return one example as a batch of one."""
    return {name: value[index : index + 1] for name, value in batch.items()}


def logits_and_targets(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return logits (n, classes) and targets (n,) for images or text classification, (n x t, vocabulary) for
    language models.

    Raises: NotApplicable when the batch holds neither images nor token ids, or labels are missing.
    """
    if "images" in batch:
        if "labels" not in batch:
            raise NotApplicable("image candidates need labels")
        output = model(batch["images"].to(next(model.parameters()).dtype))
        return getattr(output, "logits", output), batch["labels"]
    if "token_ids" not in batch:
        raise NotApplicable("candidates need 'images' or 'token_ids'")
    logits = model(input_ids=batch["token_ids"]).logits
    if "labels" in batch:
        return logits, batch["labels"]
    return logits[:, :-1].flatten(0, 1), batch["token_ids"][:, 1:].flatten()


def candidate_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross-entropy of a batch."""
    logits, targets = logits_and_targets(model, batch)
    return nn.functional.cross_entropy(logits, targets)


def confidences(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean log-probability of the right answer per example: shape (n,)."""
    with torch.no_grad():
        logits, targets = logits_and_targets(model, batch)
        chosen = torch.log_softmax(logits.double(), dim=-1).gather(1, targets[:, None]).flatten()
    return chosen.reshape(batch_size(batch), -1).mean(1)


def example_gradients(model: nn.Module, batch: Batch, names: tuple[str, ...]) -> Tensor:
    """Return one flat gradient per example over the named parameters: shape (n, parameters)."""
    parameters = dict(model.named_parameters())
    wanted = []
    for name in names:
        wanted.append(parameters[name].requires_grad_(True))
    rows = []
    for index in range(batch_size(batch)):
        with torch.enable_grad():
            grads = torch.autograd.grad(candidate_loss(model, one(batch, index)), wanted, allow_unused=True)
        parts = []
        for parameter, gradient in zip(wanted, grads, strict=True):
            parts.append((torch.zeros_like(parameter) if gradient is None else gradient).flatten())
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def _candidates(prior: Prior) -> Batch:
    if not prior.candidates:
        raise NotApplicable("no candidates to test: set prior.candidates")
    return prior.candidates


def _scored(scores: Tensor, confidence: float, **details: float | int | str) -> Finding:
    return Finding(
        items=(Item(kind="scores", value=scores, confidence=confidence),),
        confidence=confidence,
        details=details,
    )


def _matched(
    observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
) -> Finding:
    private, candidates = working_copy(model, observation), _candidates(prior)
    own = dict(private.named_parameters())
    view = observation.gradient().tensors
    names = tuple(name for name in view if name in own and own[name].shape == view[name].shape)
    if not names:
        raise NotApplicable("no observed tensor has the name and shape of a parameter")
    update = torch.cat([view[name].flatten() for name in names]).double()
    gradients = example_gradients(private, candidates, names).double()
    expected = torch.zeros_like(update)
    if prior.examples:
        expected = example_gradients(private, prior.examples, names).double().mean(0)
    centred = gradients - expected
    scale = update.new_zeros(())
    if bool(expected.any()):
        scale = update @ expected / expected.square().sum()
    scores = centred @ (update - scale * expected) / centred.norm(dim=1).clamp_min(1e-30)
    return _scored(scores, _spread(scores), parameters=len(update))


def _spread(scores: Tensor) -> float:
    """Return how clearly the scores fall into two groups:
    the share of variance between the best two groups.
    """
    ordered = scores.double().sort().values
    if len(ordered) < 4 or float(ordered.var()) == 0.0:
        return 0.0
    total = float((ordered - ordered.mean()).square().sum())
    within = []
    for cut in range(1, len(ordered)):
        within.append(
            float(
                (ordered[:cut] - ordered[:cut].mean()).square().sum()
                + (ordered[cut:] - ordered[cut:].mean()).square().sum()
            )
        )
    return 1.0 - min(within) / total


def _residual(
    observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
) -> Finding:
    private, candidates = working_copy(model, observation).double(), _candidates(prior)
    noise = noise_per_entry(observation)
    spans = []
    for channel in observed_channels(observation, private).values():
        spans.append(spectrum_of(channel).span(noise=noise))
    spans = [span for span in spans if span.informative]
    if not spans:
        raise NotApplicable(
            "every observed row space is full or empty: too many tokens, noise, or a foreign optimiser"
        )
    most = max(span.rank for span in spans)
    spans = [span for span in spans if span.rank == most][:4]
    modules = {}
    for span in spans:
        modules[span.channel] = private.get_submodule(span.channel)
    scores = []
    for index in range(batch_size(candidates)):
        example = one(candidates, index)
        captured = capture_inputs(modules, partial(logits_and_targets, private, example))
        distances = []
        for span in spans:
            if span.channel in captured:
                distances.append(span.distance(captured[span.channel].reshape(-1, span.shape[1])))
        # The mean over all but the last place: a causal model's last token leaves no trace.
        means = []
        for entry in distances:
            means.append(entry[:-1].mean() if len(entry) > 1 else entry.mean())
        scores.append(-torch.stack(means).mean())
    table = torch.stack(scores)
    if float(-table.min()) < _ROUNDING:
        return Finding(
            reason="every candidate lies in the row spaces: they are full, or all candidates are members"
        )
    return _scored(table, _spread(table), rank=most, channels=len(spans))


def _lira(
    observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
) -> Finding:
    target, reference = _target_and_reference(observation, model, prior)
    if len(reference) > 1:
        spread = reference.std(dim=0, unbiased=True)
    else:
        spread = torch.ones(reference.shape[1])
    pooled = spread.mean().clamp_min(1e-6)
    scores = (target - reference.mean(0)) / (0.5 * spread + 0.5 * pooled)
    return _scored(scores, _spread(scores), references=len(reference))


def _rmia(
    observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
) -> Finding:
    if not prior.examples:
        raise NotApplicable("RMIA compares with a population: set prior.examples")
    target, reference = _target_and_reference(observation, model, prior)
    private = working_copy(model, observation)
    population = confidences(private, prior.examples)
    own = torch.stack([confidences(other.eval(), prior.examples) for other in prior.reference_models or ()])
    ratio = target - _log_mean(reference)
    others = population - _log_mean(own)
    scores = (ratio[:, None] >= others[None, :]).double().mean(1)
    # Ties at the top of the population are broken by the ratio itself, on a scale too small to reorder the
    # shares.
    scores = scores + torch.tanh(ratio) * 1e-6
    return _scored(scores, _spread(scores), references=len(reference), population=len(population))


def _log_mean(values: Tensor) -> Tensor:
    return torch.logsumexp(values, dim=0) - torch.log(torch.tensor(float(len(values))))


def _logit(log_probability: Tensor) -> Tensor:
    probability = log_probability.exp().clamp(1e-9, 1 - 1e-9)
    return torch.log(probability / (1 - probability))


def _target_and_reference(
    observation: Observation, model: nn.Module | None, prior: Prior
) -> tuple[Tensor, Tensor]:
    candidates = _candidates(prior)
    if not prior.reference_models:
        raise NotApplicable(
            "reference models trained without the target are needed: set prior.reference_models"
        )
    target = _logit(confidences(working_copy(model, observation), candidates))
    reference = torch.stack(
        [_logit(confidences(other.eval(), candidates)) for other in prior.reference_models]
    )
    return target, reference


def matched_filter() -> Attack:
    """Return the matched filter: the update's component along each candidate's own gradient."""
    return PlainAttack(
        name="matched_filter",
        family="membership",
        attempt=_matched,
        requires=("model", "prior.candidates"),
        summary="membership of candidates in one update, by the direction of their gradients",
    )


def projection_residual() -> Attack:
    """Return the projection residual:
    how far a candidate's hidden states lie from the update's row spaces.
    """
    return PlainAttack(
        name="projection_residual",
        family="membership",
        attempt=_residual,
        requires=("model", "prior.candidates"),
        summary="membership of candidates in one update or sum, by the row spaces of its layers",
    )


def lira() -> Attack:
    """Return the offline likelihood-ratio attack on a released model."""
    return PlainAttack(
        name="lira",
        family="membership",
        attempt=_lira,
        requires=("model", "prior.candidates", "prior.reference_models"),
        summary="membership in a released model, against models trained without the target",
    )


def rmia() -> Attack:
    """Return the robust membership attack on a released model, with few reference models."""
    return PlainAttack(
        name="rmia",
        family="membership",
        attempt=_rmia,
        requires=("model", "prior.candidates", "prior.reference_models", "prior.examples"),
        summary="membership in a released model, pairwise against a population",
    )
