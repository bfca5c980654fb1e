"""Label counts from the last layer's gradient: the exact identity, iDLG, LLG and iLRG.

For cross-entropy averaged over K examples the bias gradient of class c is mean p_c - n_c / K, so n_c = K
(mean p_c
- db_c): only the mean predicted probability is unknown, and public or random probes estimate it. Without any
probe the identity bounds the counts, for no probability is negative, and the column space of a small batch
excludes labels.
Sources: Zhao et al., "iDLG", 2020; Wainakh et al., "User-Level Label Leakage from Gradients", 2021 (LLG);
Dang et al., "Revealing and Protecting Labels in Distributed Training", 2021 (RLG); Ma et al., "Instance-wise
Batch Label Restoration via Gradients", 2023 (iLRG).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linprog
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
from attacks.inversion.channels import capture_inputs, ended, linear_modules, numerical_rank
from attacks.inversion.tokens import embedding_names, vocabulary_size
from attacks.observation import Observation

_PROBES = 256
_SEPARABLE = 256  # classes up to which one linear programme for each is affordable
_TILT = 2e-3  # how far rounding may turn a vector of the column space, by entry
_CLOSED = 1e-3  # how far the rows of a cross-entropy's gradient may be from adding up to nothing


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Head:
    """The last layer.

    Gradient per example of weight (classes, features) and bias (or None), its module, and the examples behind
    it.
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
    """Return the last linear layer with an observed gradient, scaled to a mean over all the examples behind
    the observation.

    Raises: NotApplicable when there is no head, its scale is unknown (an adaptive optimiser), or the number
    of examples is.
    """
    view = observation.gradient()
    names = [name for name, module in linear_modules(model).items() if isinstance(module, nn.Linear)]
    observed = [name for name in names if f"{name}.weight" in view.tensors]
    if not names or not observed or observed[-1] != names[-1]:
        raise NotApplicable("the last linear layer was not trained, so its gradient was not observed")
    if not view.scaled:
        raise NotApplicable(
            "the update's scale is unknown: label counts need plain SGD with "
            "known rate and steps, or a gradient"
        )
    batch = observation.known("batch_size")
    if not batch:
        raise NotApplicable("the batch size is not known")
    steps = 1
    if observation.content == "delta":
        steps = int(observation.known("local_steps") or 1)
    name = observed[-1]
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    # Plain SGD adds its decay to the gradient; it is known, and no example caused it.
    decay = 0.0
    if observation.content == "delta":
        decay = float(observation.known("weight_decay") or 0.0)
    bias = view.tensors.get(f"{name}.bias")
    return Head(
        name=name,
        module=module,
        weight=view.tensors[f"{name}.weight"].double() / observation.contributors
        - decay * module.weight.detach().double(),
        bias=None
        if bias is None
        else bias.double() / observation.contributors - decay * module.bias.detach().double(),
        examples=int(batch) * steps * observation.contributors,
    )


def round_to_total(counts: Tensor, total: int) -> Tensor:
    """Round non-negative estimates to whole numbers with a given sum, by largest remainder."""
    scaled = counts.double().clamp_min(0.0)
    if float(scaled.sum()) > 0:
        scaled = scaled * (total / float(scaled.sum()))
    else:
        scaled = torch.full_like(scaled, total / len(scaled))
    whole = scaled.floor()
    missing = total - int(whole.sum())
    whole[(scaled - whole).argsort(descending=True, stable=True)[:missing]] += 1
    return whole.long()


def identity_counts(bias: Tensor, mean_probability: Tensor, examples: int) -> Tensor:
    """Return n_c = K (mean p_c - db_c), before rounding."""
    return examples * (mean_probability - bias)


def least_counts(bias: Tensor, examples: int) -> Tensor:
    """Return how often each label occurs at least: n_c >= -K db_c, since no probability is negative.

    Assumes: the gradient is that of the loss alone, without a decay of weights, and a mean over K examples.
    """
    rounding = float(bias.sum().abs()) + 1e-5 * float(bias.abs().max())
    return (-examples * (bias + rounding)).ceil().clamp_min(0.0).long()


def possible_labels(weight: Tensor, examples: int, deadline: Deadline) -> Tensor | None:
    """Return which labels can be in the batch (boolean), or None when nothing is excluded, or not in time.

    Every example puts its p - e_y into the column space of the weight's gradient, a vector that sums to zero
    and is negative at y alone. A class at which no vector of that space is the only negative one is absent.

    Assumes: as many examples as the rank, which must be below the features' number. Of fewer dimensions some
    example is not seen (the model is sure of it) or shares its features with another, and its label must not
    be excluded.
    Source: RLG, section 3.
    """
    columns, singular, _ = torch.linalg.svd(weight, full_matrices=False)
    classes, rank = len(weight), numerical_rank(singular, tuple(weight.shape))
    if rank != examples or rank >= min(classes - 1, weight.shape[1]) or classes > _SEPARABLE:
        return None
    basis, possible = columns[:, :rank].numpy(), torch.zeros(classes, dtype=torch.bool)
    for label in range(classes):
        if deadline.expired:
            return None
        others, slack = -np.delete(basis, label, axis=0), np.full(classes - 1, _TILT)
        solved = linprog(basis[label], A_ub=others, b_ub=slack, bounds=[(-1, 1)] * rank)
        possible[label] = solved.status == 0 and solved.fun < -0.5
    if bool(possible.any()):
        return possible
    return None


def bounded_counts(estimate: Tensor, least: Tensor, possible: Tensor, total: int) -> Tensor:
    """Return the whole counts of a given sum nearest to an estimate, within bounds as far as these agree with
    the sum.

    All counts above their bound give up the same amount, so that they add up; what rounding leaves goes to
    the largest rests.
    """
    if int(least.sum()) >= total:
        return round_to_total(least, total)
    wanted, floor = estimate.double().masked_fill(~possible, -torch.inf), least.double()
    reach = total + float(estimate.abs().max()) + 1.0
    low, high = -reach, reach
    for _ in range(80):
        middle = (low + high) / 2
        if float(torch.maximum(wanted - middle, floor).sum()) > total:
            low, high = (middle, high)
        else:
            low, high = (low, middle)
    exact = torch.maximum(wanted - high, floor)
    whole = exact.floor()
    rest = torch.where(possible, exact - whole, torch.full_like(exact, -1.0))
    missing = total - int(whole.sum())
    order = rest.argsort(descending=True, stable=True)[: max(1, int(possible.sum()))]
    whole[order] += missing // len(order)
    whole[order[: missing % len(order)]] += 1
    return whole.long()


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
    own = bias.new_zeros(())
    if module.bias is not None:
        own = module.bias.detach().double()
    probabilities = torch.softmax(features @ module.weight.detach().double().T + own, dim=1)
    system = torch.cat(
        [
            (probabilities - torch.eye(len(bias), dtype=torch.float64)).T,
            torch.ones(1, len(bias), dtype=torch.float64),
        ]
    )
    target = torch.cat([bias * examples, torch.tensor([float(examples)], dtype=torch.float64)])
    solution: Tensor = torch.linalg.lstsq(system, target[:, None], driver="gelsd").solution
    return solution.flatten()


def probe_head(
    observation: Observation, model: nn.Module, prior: Prior, head: Head, seed: int
) -> tuple[Tensor, Tensor, bool]:
    """Return the mean predicted probability, the mean feature, and whether real public examples were the
    probes.
    """
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
    own = features.new_zeros(())
    if head.module.bias is not None:
        own = head.module.bias.detach().double()
    probabilities = torch.softmax(features @ head.module.weight.detach().double().T + own, dim=1)
    return probabilities.mean(0), features.mean(0), real


def _on_images(model: nn.Module, images: Tensor) -> Callable[[], object]:
    return lambda: model(images.to(next(model.parameters()).dtype))


def _on_tokens(model: nn.Module, ids: Tensor) -> Callable[[], object]:
    closed = ended(model, ids)
    return lambda: model(input_ids=closed)


def _bias(head: Head, mean_feature: Tensor) -> Tensor:
    # Without a bias the weight gradient stands in: dW_c is about db_c times the mean feature.
    if head.bias is not None:
        return head.bias
    return head.weight @ mean_feature / mean_feature.square().sum()


def _finding(counts: Tensor, head: Head, confidence: float) -> Finding:
    labels = torch.repeat_interleave(torch.arange(head.classes), counts)
    items = (
        Item(kind="label_counts", value=counts, confidence=confidence),
        Item(kind="labels", value=labels, confidence=confidence),
    )
    return Finding(items=items, confidence=confidence, details={"head": head.name, "examples": head.examples})


def _identity(
    observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
) -> Finding:
    deadline = budget.start()
    private = working_copy(model, observation).requires_grad_(False)
    head = find_head(observation, private)
    total, closed = head.examples, float(head.weight.sum(dim=0).norm()) <= _CLOSED * float(head.weight.norm())
    if (
        closed and total == 1 and (head.classes > 2 or head.bias is not None)
    ):  # the other rows all point away from its own
        return _finding(_one_hot(_single(head), head.classes), head, 1.0)
    probability, feature, _ = probe_head(observation, private, prior, head, seed)
    bias = _bias(head, feature)
    raw = identity_counts(bias, probability, total)
    roundness = max(0.0, 1.0 - 2.0 * float((raw - raw.round()).abs().mean()))
    if not closed:  # noise, or no cross-entropy
        return _finding(round_to_total(raw, total), head, roundness)
    possible, least = _bounds(head, deadline)
    if float((least - raw).clamp_min(0.0).sum()) > 0.25 * total:
        # The probes are foreign to the model. A calibrated one predicts the batch's own shares, all but a
        # part e spread
        # evenly: then n_c / K = 1 / C - db_c / e, and e is taken as twice what keeps every count from being
        # negative.
        raw = total / head.classes * (1.0 - bias / (2.0 * bias.max().clamp_min(1e-12)))
        roundness = 0.0
    pinned = min(1.0, int(least.sum()) / total)
    return _finding(bounded_counts(raw, least, possible, total), head, pinned + (1.0 - pinned) * roundness)


def _bounds(head: Head, deadline: Deadline) -> tuple[Tensor, Tensor]:
    """Return which labels are possible, and how often each occurs at least.

    Raises: NotApplicable when the bounds together exceed the examples by far: another scale, or more
    examples.
    """
    least = torch.zeros(head.classes, dtype=torch.long)
    if head.bias is not None:
        least = least_counts(head.bias, head.examples)
    if int(least.sum()) > 2 * head.examples + head.classes:
        raise NotApplicable(
            f"the head's gradient is larger than {head.examples} examples can cause: "
            "it is scaled, or there were more"
        )
    possible = possible_labels(head.weight, head.examples, deadline)
    if possible is None:
        return torch.ones(head.classes, dtype=torch.bool), least
    possible |= least > 0
    if int(possible.sum()) <= min(
        head.examples, head.classes // 2
    ):  # in few dimensions hardly one passes by chance
        least = torch.maximum(least, possible.long())
    return possible, least


def _single(head: Head) -> int:
    """Return the label of a single example; with two classes the rows mirror each other, and the bias
    decides.
    """
    if head.classes == 2 and head.bias is not None:
        return int(head.bias.argmin())
    return single_label(head.weight.clone())


def _one_hot(label: int, classes: int) -> Tensor:
    return nn.functional.one_hot(torch.tensor(label), classes)


def _idlg(
    observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
) -> Finding:
    head = find_head(observation, working_copy(model, observation).requires_grad_(False))
    if head.examples != 1:
        raise NotApplicable(f"iDLG reads one label, here are {head.examples}")
    if head.classes == 2 and head.bias is None:
        raise NotApplicable("of two classes without a bias the rows mirror each other: either label fits")
    rows, label = head.weight, _single(head)
    others = np.delete((rows @ rows[label]).numpy(), label)
    opposite = 0.0
    if len(others):
        opposite = float((others <= 0).mean())
    return _finding(_one_hot(label, head.classes), head, opposite)


def _llg(
    observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
) -> Finding:
    head = find_head(observation, working_copy(model, observation).requires_grad_(False))
    if not bool((head.weight.sum(dim=1) < 0).any()):
        raise NotApplicable("no row of the head has a negative sum: the features are not of one sign")
    return _finding(llg_counts(head.weight, head.examples), head, 0.5)


def _ilrg(
    observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
) -> Finding:
    head = find_head(observation, working_copy(model, observation).requires_grad_(False))
    if head.bias is None:
        raise NotApplicable("iLRG divides by the head's bias gradient, and the head has no bias")
    counts = ilrg_counts(head.weight, head.bias, head.module, head.examples)
    return _finding(round_to_total(counts, head.examples), head, 0.5)


def label_identity() -> Attack:
    """Return the attack that counts labels by the exact identity and its bounds.

    Public or random probes stand for the mean probability.
    """
    return PlainAttack(
        name="label_identity",
        family="labels",
        attempt=_identity,
        requires=("model",),
        summary="label counts, exact as soon as the mean predicted probability is known, bounded without it",
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
