"""Label counts from the last layer's gradient: the exact identity, iDLG, LLG and iLRG.

For cross-entropy averaged over K examples the bias gradient of class c is mean p_c - n_c / K, so n_c = K (mean p_c
- db_c): only the mean predicted probability is unknown, and public or random probes estimate it. Sources: Zhao et
al., "iDLG", 2020; Wainakh et al., "User-Level Label Leakage from Gradients", 2021 (LLG); Ma et al., "Instance-wise
Batch Label Restoration via Gradients", 2023 (iLRG).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from attacks.contract import Attack, Budget, Finding, Item, NotApplicable, PlainAttack, Prior, working_copy
from attacks.inversion.channels import capture_inputs, linear_modules
from attacks.inversion.tokens import embedding_names, vocabulary_size
from attacks.observation import Observation

_PROBES = 256


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Head:
    """The last layer.

    Gradient per example of weight (classes, features) and bias (or None), its module, and the examples behind it.
    """

    name: str
    module: nn.Linear
    weight: Tensor
    bias: Tensor | None
    examples: int

    @property
    def classes(self) -> int:
        """Return the number of classes."""
        return len(self.weight)


def find_head(observation: Observation, model: nn.Module) -> Head:
    """Return the last linear layer with an observed gradient, scaled to a mean over all the examples behind the observation.

    Raises: NotApplicable when there is no head, its scale is unknown (an adaptive optimiser), or the number of
    examples is.
    """
    view = observation.gradient()
    names = [name for name, module in linear_modules(model).items() if isinstance(module, nn.Linear)]
    observed = [name for name in names if f"{name}.weight" in view.tensors]
    if not names or not observed or observed[-1] != names[-1]:
        raise NotApplicable("the last linear layer was not trained, so its gradient was not observed")
    if not view.scaled:
        raise NotApplicable(
            "the update's scale is unknown: label counts need plain SGD with known rate and steps, or a gradient"
        )
    batch = observation.known("batch_size")
    if not batch:
        raise NotApplicable("the batch size is not known")
    steps = int(observation.known("local_steps") or 1) if observation.content == "delta" else 1
    name = observed[-1]
    weight = view.tensors[f"{name}.weight"].double() / observation.contributors
    bias = view.tensors.get(f"{name}.bias")
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return Head(
        name=name,
        module=module,
        weight=weight,
        bias=None if bias is None else bias.double() / observation.contributors,
        examples=int(batch) * steps * observation.contributors,
    )


def round_to_total(counts: Tensor, total: int) -> Tensor:
    """Round non-negative estimates to whole numbers with a given sum, by largest remainder."""
    scaled = counts.double().clamp_min(0.0)
    scaled = (
        scaled * (total / float(scaled.sum()))
        if float(scaled.sum()) > 0
        else torch.full_like(scaled, total / len(scaled))
    )
    whole = scaled.floor()
    missing = total - int(whole.sum())
    whole[(scaled - whole).argsort(descending=True, stable=True)[:missing]] += 1
    return whole.long()


def identity_counts(bias: Tensor, mean_probability: Tensor, examples: int) -> Tensor:
    """Return n_c = K (mean p_c - db_c), before rounding."""
    return examples * (mean_probability - bias)


def single_label(weight: Tensor) -> int:
    """Return the label of a batch of one.

    The row whose inner product with the other rows is smallest. Source: iDLG, equation 4.
    """
    gram = weight @ weight.T
    gram.fill_diagonal_(0.0)
    return int(gram.sum(dim=1).argmin())


def llg_counts(weight: Tensor, examples: int) -> Tensor:
    """Return label counts by greedy removal of the mean impact of one label. Source: LLG, algorithm 1.

    Assumes: features are not negative, so that a present class pulls its row's sum below zero.
    """
    classes, sums = len(weight), weight.sum(dim=1).clone()
    impact = float(sums[sums < 0].sum()) * (1 + 1 / classes) / examples
    counts = torch.zeros(classes, dtype=torch.long)
    for label in (sums < 0).nonzero().flatten().tolist()[:examples]:
        counts[label] += 1
        sums[label] -= impact
    while int(counts.sum()) < examples:
        label = int(sums.argmin())
        counts[label] += 1
        sums[label] -= impact
    return counts


def ilrg_counts(weight: Tensor, bias: Tensor, module: nn.Linear, examples: int) -> Tensor:
    """Return label counts from class-wise mean features and the head's own probabilities.

    Source: iLRG, equations 5 to 9.
    """
    features = weight / torch.where(bias.abs() < 1e-12, torch.full_like(bias, 1e-12), bias)[:, None]
    own = module.bias.double() if module.bias is not None else 0.0
    probabilities = torch.softmax(features @ module.weight.double().T + own, dim=1)
    system = torch.cat(
        [(probabilities - torch.eye(len(bias), dtype=torch.float64)).T, torch.ones(1, len(bias), dtype=torch.float64)]
    )
    target = torch.cat([bias * examples, torch.tensor([float(examples)], dtype=torch.float64)])
    solution: Tensor = torch.linalg.lstsq(system, target[:, None], driver="gelsd").solution
    return solution.flatten()


def probe_head(
    observation: Observation, model: nn.Module, prior: Prior, head: Head, seed: int
) -> tuple[Tensor, Tensor, bool]:
    """Return the mean predicted probability, the mean feature, and whether real public examples were the probes."""
    generator = torch.Generator().manual_seed(seed)
    examples = prior.examples or {}
    shape = observation.known("image_shape")
    if "images" in examples:
        forward, real = _on_images(model, examples["images"][:_PROBES]), True
    elif "token_ids" in examples:
        forward, real = _on_tokens(model, examples["token_ids"][:_PROBES]), True
    elif shape:
        forward, real = _on_images(model, torch.rand(_PROBES, *shape, generator=generator)), False
    elif embedding_names(model):
        size = vocabulary_size(observation, model)
        forward, real = _on_tokens(model, torch.randint(size, (64, 8), generator=generator)), False
    else:
        raise NotApplicable("no probes: neither public examples nor the image shape are known")
    features = capture_inputs({head.name: head.module}, forward)[head.name].double()
    if features.ndim == 3:
        features = features[:, -1]
    own = head.module.bias.double() if head.module.bias is not None else 0.0
    probabilities = torch.softmax(features @ head.module.weight.double().T + own, dim=1)
    return probabilities.mean(0), features.mean(0), real


def _on_images(model: nn.Module, images: Tensor) -> Callable[[], object]:
    return lambda: model(images.to(next(model.parameters()).dtype))


def _on_tokens(model: nn.Module, ids: Tensor) -> Callable[[], object]:
    return lambda: model(input_ids=ids)


def _bias(head: Head, mean_feature: Tensor) -> Tensor:
    # Without a bias the weight gradient stands in: dW_c is about db_c times the mean feature.
    return head.bias if head.bias is not None else head.weight @ mean_feature / mean_feature.square().sum()


def _finding(counts: Tensor, head: Head, confidence: float) -> Finding:
    rounded = round_to_total(counts, head.examples)
    labels = torch.repeat_interleave(torch.arange(head.classes), rounded)
    items = (
        Item(kind="label_counts", value=rounded, confidence=confidence),
        Item(kind="labels", value=labels, confidence=confidence),
    )
    return Finding(items=items, confidence=confidence, details={"head": head.name, "examples": head.examples})


def _identity(observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int) -> Finding:
    private = working_copy(model, observation).requires_grad_(False)
    head = find_head(observation, private)
    probability, feature, _ = probe_head(observation, private, prior, head, seed)
    raw = identity_counts(_bias(head, feature), probability, head.examples)
    distance = float((raw - raw.round()).abs().mean())
    return _finding(raw, head, max(0.0, 1.0 - 2.0 * distance))


def _idlg(observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int) -> Finding:
    head = find_head(observation, working_copy(model, observation).requires_grad_(False))
    if head.examples != 1:
        raise NotApplicable(f"iDLG reads one label, here are {head.examples}")
    rows = head.weight
    label = single_label(rows.clone())
    others = np.delete((rows @ rows[label]).numpy(), label)
    opposite = float((others <= 0).mean()) if len(others) else 0.0
    counts = torch.zeros(head.classes)
    counts[label] = 1
    return _finding(counts, head, opposite)


def _llg(observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int) -> Finding:
    head = find_head(observation, working_copy(model, observation).requires_grad_(False))
    if not bool((head.weight.sum(dim=1) < 0).any()):
        raise NotApplicable("no row of the head has a negative sum: the features are not of one sign")
    return _finding(llg_counts(head.weight, head.examples), head, 0.5)


def _ilrg(observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int) -> Finding:
    head = find_head(observation, working_copy(model, observation).requires_grad_(False))
    if head.bias is None:
        raise NotApplicable("iLRG divides by the head's bias gradient, and the head has no bias")
    return _finding(ilrg_counts(head.weight, head.bias, head.module, head.examples), head, 0.5)


def label_identity() -> Attack:
    """Return the attack that counts labels by the exact identity, with public or random probes for the mean probability."""
    return PlainAttack(
        name="label_identity",
        family="labels",
        attempt=_identity,
        requires=("model",),
        summary="label counts, exact as soon as the mean predicted probability is known",
    )


def idlg_label() -> Attack:
    """Return iDLG's label of a batch of one."""
    return PlainAttack(
        name="idlg_label",
        family="labels",
        attempt=_idlg,
        requires=("model",),
        summary="the label of one example, from signs",
    )


def llg() -> Attack:
    """Return LLG without auxiliary data."""
    return PlainAttack(
        name="llg",
        family="labels",
        attempt=_llg,
        requires=("model",),
        summary="label counts by greedy removal of impacts",
    )


def ilrg() -> Attack:
    """Return iLRG."""
    return PlainAttack(
        name="ilrg",
        family="labels",
        attempt=_ilrg,
        requires=("model",),
        summary="label counts from class-wise mean features",
    )
