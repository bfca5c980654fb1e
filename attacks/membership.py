"""Membership: was this candidate part of what was observed? Scores for updates and for released models.

Candidates come in `prior.candidates`: {"images", "labels"} or {"token_ids"[, "labels"]}. Every attack
returns one score per candidate, higher for members; `attacks.metrics` turns scores and truth into AUC and
rates at low false- positive rates. Sources: matched filter, Pyrgelis-style and Nasr et al., "Adversary
Instantiation", 2021; projection residual, ProjRes, 2026; LiRA, Carlini et al., 2022, section 5 (offline
variant); RMIA, Zarifzadeh et al., 2024, equation 4 (offline).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from attacks.contract import Attack, Budget, Finding, Item, NotApplicable, PlainAttack, Prior, working_copy
from attacks.inversion.channels import Span, capture_inputs, observed_channels, spectrum_of
from attacks.inversion.example_gradients import gradients_of_each
from attacks.inversion.tokens import noise_per_entry
from attacks.observation import Observation

Batch = Mapping[str, Tensor]

_ROUNDING = 1e-5
_RIDGE = 1e-6  # of unit gradients that are combined without noise
_SHARED = 16.0  # most of an update's power is what records share, which tells none of them apart
_TOGETHER = 16  # candidates in one forward pass
_REMEMBERED = 50_000_000  # the most numbers of one kind that candidates remember

Studied = dict[str, Tensor]


class Candidates(dict[str, Tensor]):
    """Hold candidates with what attacks computed of them: it depends on the model alone, not on the update.

    One test asks of several updates which of the same candidates are in them; the passes of the model are the
    dear part of it, and are made once.
    """

    def __init__(self, batch: Batch) -> None:
        super().__init__(batch)
        self._studied: dict[tuple[object, ...], tuple[nn.Module, Studied]] = {}

    def study(self, key: tuple[object, ...], model: nn.Module, compute: Callable[[], Studied]) -> Studied:
        """Return what was computed under a key for this very model, or compute it and remember it."""
        place = (*key, id(model))
        if place in self._studied:
            return self._studied[place][1]
        values = compute()
        if sum(value.numel() for value in values.values()) <= _REMEMBERED:
            self._studied[place] = (model, values)  # the model stays alive, so its id stays its own
        return values


def _studied(
    candidates: Batch,
    key: tuple[object, ...],
    model: nn.Module,
    observation: Observation,
    compute: Callable[[], Studied],
) -> Studied:
    """Compute something of candidates, once for each model as it stands; a broadcast makes it another one."""
    if isinstance(candidates, Candidates) and observation.broadcast is None:
        return candidates.study(key, model, compute)
    return compute()


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


def _example_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy of each example, of a text the mean over its places: shape (n,)."""
    logits, targets = logits_and_targets(model, batch)
    losses = nn.functional.cross_entropy(logits, targets, reduction="none")
    return losses.reshape(batch_size(batch), -1).mean(1)


def example_gradients(model: nn.Module, batch: Batch, names: tuple[str, ...]) -> Tensor:
    """Return one flat gradient per example over the named parameters: shape (n, parameters).

    Examples of which linear layers alone are asked share a pass of the model, the others take one each.
    """
    parameters = dict(model.named_parameters())
    rows = []
    for start in range(0, batch_size(batch), _TOGETHER):
        some = {name: value[start : start + _TOGETHER] for name, value in batch.items()}
        losses = partial(_example_losses, model, some)
        together = gradients_of_each(model, names, losses, batch_size(some))
        if together is None:
            wanted = [parameters[name].requires_grad_(True) for name in names]
            together = _one_by_one(model, some, wanted)
        rows.append(together)
    return torch.cat(rows)


def _one_by_one(model: nn.Module, batch: Batch, wanted: list[Tensor]) -> Tensor:
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
    assert model is not None, "the contract asks for a model"
    candidates, own = _candidates(prior), dict(model.named_parameters())
    view = observation.gradient().tensors
    names = tuple(name for name in view if name in own and own[name].shape == view[name].shape)
    if not names:
        raise NotApplicable("no observed tensor has the name and shape of a parameter")
    update = torch.cat([view[name].flatten() for name in names]).double()

    def compute() -> Studied:
        private = working_copy(model, observation)
        gradients = example_gradients(private, candidates, names).double()
        # What all candidates share says nothing of any: public examples give it, else the candidates
        # themselves.
        expected = gradients.mean(0)
        if prior.examples:
            expected = example_gradients(private, prior.examples, names).double().mean(0)
        units = gradients - expected
        units = units / units.norm(dim=1, keepdim=True).clamp_min(1e-30)
        return {"expected": expected, "units": units, "together": units @ units.T}

    if prior.examples:
        studied = compute()
    else:
        studied = _studied(candidates, ("units", names), model, observation, compute)
    expected, units = studied["expected"], studied["units"]
    scale = update.new_zeros(())
    if bool(expected.any()):
        scale = update @ expected / expected.square().sum()
    left, noise = update - scale * expected, noise_per_entry(observation)
    scores = _weights(units, studied["together"], left, noise)
    return _scored(scores, _spread(scores), parameters=len(update))


def _weights(units: Tensor, together: Tensor, update: Tensor, noise: float) -> Tensor:
    """Return how much of each unit gradient (n, parameters) is in an update, taken together: (n,).

    `together` (n, n) holds their products with each other.

    Records of one class have gradients that point one way, so that each alone finds them all. The least
    squares of all together tell them apart; noise of that deviation per entry is their ridge, and where it is
    all there is, what is left is each one's own component.
    """
    along = units @ update
    signal = float(update.square().sum()) - noise**2 * len(update)
    power = max(signal, 1e-6 * float(update.square().sum()), 1e-300) / len(units)
    ridge = max(_SHARED * noise**2 / power, _RIDGE)
    weights: Tensor = torch.linalg.solve(together + ridge * torch.eye(len(units), dtype=units.dtype), along)
    return weights


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


def telling_spans(observation: Observation, model: nn.Module) -> list[Span]:
    """Return up to four row spaces of the highest rank that still leaves something out.

    Raises: NotApplicable when there is none.
    """
    noise = noise_per_entry(observation)
    spans = []
    for channel in observed_channels(observation, model).values():
        spans.append(spectrum_of(channel).span(noise=noise))
    spans = [span for span in spans if span.informative]
    if not spans:
        raise NotApplicable(
            "every observed row space is full or empty: too many tokens, noise, or a foreign optimiser"
        )
    most = max(span.rank for span in spans)
    return [span for span in spans if span.rank == most][:4]


def _residual(
    observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
) -> Finding:
    assert model is not None, "the contract asks for a model"
    candidates = _candidates(prior)
    spans = telling_spans(observation, model)
    states = _all_states(observation, model, candidates, tuple(span.channel for span in spans))
    means = []
    for span in spans:
        if span.channel in states:
            distances = span.distance(states[span.channel])
            # The mean over all but the last place: a causal model's last token leaves no trace.
            means.append((distances[:, :-1] if distances.shape[1] > 1 else distances).mean(dim=1))
    table = -torch.stack(means).mean(dim=0)
    if float(-table.min()) < _ROUNDING:
        return Finding(
            reason="every candidate lies in the row spaces: they are full, or all candidates are members"
        )
    return _scored(table, _spread(table), rank=spans[0].rank, channels=len(spans))


def _all_states(
    observation: Observation, model: nn.Module, candidates: Batch, wanted: tuple[str, ...]
) -> Studied:
    """Return what candidates feed to the wanted channels, or to all that are observed.

    Which channels tell most differs from update to update, and one pass reaches them all: so all are taken
    where they can be remembered.
    """
    everything = tuple(observed_channels(observation, model))
    names = (
        everything if isinstance(candidates, Candidates) and _fits(candidates, model, everything) else wanted
    )

    def compute() -> Studied:
        return _states(working_copy(model, observation).double(), candidates, names)

    return _studied(candidates, ("states", names), model, observation, compute)


def _fits(candidates: Batch, model: nn.Module, names: tuple[str, ...]) -> bool:
    """Say whether what candidates feed to channels is little enough to be remembered."""
    places = max(value[0].numel() for value in candidates.values())
    widths = 0
    for name in names:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        widths += max(weight.shape)
    return batch_size(candidates) * places * widths <= _REMEMBERED


def _states(model: nn.Module, candidates: Batch, channels: tuple[str, ...]) -> Studied:
    """Return what each candidate feeds to channels: (n, places, width) by name, of those that are reached."""
    modules = {name: model.get_submodule(name) for name in channels}
    rows: dict[str, list[Tensor]] = {}
    for start in range(0, batch_size(candidates), _TOGETHER):
        some = {name: value[start : start + _TOGETHER] for name, value in candidates.items()}
        captured = capture_inputs(modules, partial(logits_and_targets, model, some))
        if any(len(state) != batch_size(some) for state in captured.values()):
            alone = []
            for index in range(batch_size(some)):
                alone.append(capture_inputs(modules, partial(logits_and_targets, model, one(some, index))))
            captured = {name: torch.stack([state[name] for state in alone]) for name in captured}
        for name, state in captured.items():
            rows.setdefault(name, []).append(state.reshape(batch_size(some), -1, state.shape[-1]))
    return {name: torch.cat(parts) for name, parts in rows.items()}


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
