"""Attacks on the answers a model gives to known rows: whose label mix, who was a member, and a copy of it.

What is observed is one table "answers" [rows, classes], probabilities; `prior.examples` holds what the
attacker knows of those rows or of others. No update of the model is seen.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from attacks.contract import Attack, Budget, Finding, Item, NotApplicable, PlainAttack, Prior
from attacks.observation import Observation

_LEAST = 1e-9
_WEIGHT_DECAY = 1e-4


def _answers(observation: Observation) -> Tensor:
    answers = observation.tensors.get("answers")
    if answers is None or answers.dim() != 2 or float(answers.min()) < 0.0:
        raise NotApplicable("no table of probabilities named 'answers' was observed")
    return answers.double()


def _known(prior: Prior, *names: str, rows: int) -> tuple[Tensor, ...]:
    """Return what is known of the answered rows.

    Raises: NotApplicable naming what is missing or does not fit.
    """
    examples: Mapping[str, Tensor] = prior.examples or {}
    lost = [name for name in names if name not in examples or len(examples[name]) != rows]
    if lost:
        raise NotApplicable(f"not known for each of the {rows} answered rows: {', '.join(lost)}")
    return tuple(examples[name] for name in names)


def _label_mix(
    observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
) -> Finding:
    """Read the mix off the mean answer: what a model has seen most of it answers most often.

    The labels of the public rows say how often each class ought to be answered.
    """
    answers = _answers(observation)
    (labels,) = _known(prior, "labels", rows=len(answers))
    even = torch.bincount(labels, minlength=answers.shape[1]).double().clamp(min=1.0) / len(labels)
    lifted = answers.mean(dim=0) / even
    mix = lifted / lifted.sum()
    return Finding(items=(Item(kind="label_counts", value=mix),), confidence=float(mix.max()))


def _membership(
    observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
) -> Finding:
    """Score rows by how much surer the model is of their labels than models that never saw them.

    The answered rows are the candidates: an attacker who chooses the public rows can put them there.
    `references` [models, rows, classes] are others' answers to the same rows.
    Source: Carlini et al. 2022, arXiv:2112.03570 (offline likelihood ratio on the logit of the confidence).
    """
    answers = _answers(observation)
    (labels,) = _known(prior, "labels", rows=len(answers))
    references = (prior.examples or {}).get("references")
    if references is None or references.shape[1:] != answers.shape or len(references) < 2:
        raise NotApplicable("answers of at least two reference models to the same rows are not known")
    places = torch.arange(len(labels))
    mine = _logit(answers[places, labels])
    others = _logit(references.double()[:, places, labels])
    spread = others.std(dim=0).clamp(min=float(others.std().clamp(min=_LEAST)) / 4)
    scores = (mine - others.mean(dim=0)) / spread
    return Finding(items=(Item(kind="scores", value=scores),), confidence=0.5)


def _copy(
    observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
) -> Finding:
    """Fit a linear model to the answers, and say what it answers to rows that nobody asked about.

    `features` [rows, width] are of the answered rows, `elsewhere` [m, width] of the others.
    """
    answers = _answers(observation)
    (features,) = _known(prior, "features", rows=len(answers))
    elsewhere = (prior.examples or {}).get("elsewhere")
    if elsewhere is None or elsewhere.shape[1:] != features.shape[1:]:
        raise NotApplicable("rows to try the copy on are not known")
    copied = nn.Linear(features.shape[1], answers.shape[1]).double()
    with torch.no_grad():
        copied.weight.zero_()
        copied.bias.zero_()
    optimizer = torch.optim.LBFGS(copied.parameters(), max_iter=min(200, budget.iterations))

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(copied(features.double()), answers)
        value = value + _WEIGHT_DECAY * copied.weight.square().sum()
        torch.autograd.backward(value)
        return value.detach()

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        copied_labels = copied(elsewhere.double()).argmax(dim=1)
    return Finding(items=(Item(kind="labels", value=copied_labels.float()),), confidence=0.5)


def _logit(chance: Tensor) -> Tensor:
    bounded = chance.clamp(min=_LEAST, max=1.0 - _LEAST)
    return bounded.log() - (1.0 - bounded).log()


def label_mix() -> Attack:
    """Return the attack that reads a site's label mix off its answers."""
    return PlainAttack(
        name="answers_label_mix",
        family="labels",
        attempt=_label_mix,
        requires=("prior.examples",),
        reads="answers",
        summary="a site's label mix from how often it answers each class",
    )


def answers_membership() -> Attack:
    """Return the attack that tells members from the answers to them."""
    return PlainAttack(
        name="answers_membership",
        family="membership",
        attempt=_membership,
        requires=("prior.examples",),
        reads="answers",
        summary="likelihood ratio on the answers to candidates among the public rows",
    )


def model_copy() -> Attack:
    """Return the attack that copies a model from its answers."""
    return PlainAttack(
        name="answers_copy",
        family="learned",
        attempt=_copy,
        requires=("prior.examples",),
        reads="answers",
        summary="a copy of the model that answered, fitted to its answers",
    )


ANSWER_ATTACKS = {
    "answers_label_mix": label_mix,
    "answers_membership": answers_membership,
    "answers_copy": model_copy,
}
