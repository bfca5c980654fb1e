"""Inversion of several local steps: an unrolled simulation of the client, and the surrogate of one point on
its path.

The simulation runs the client's own steps on dummies and differentiates through them; it needs the
optimiser's facts and costs one backward pass per step. The surrogate matches the direction of the whole
update with one gradient at a point between the old and the new weights, found together with the dummies.
Sources: Dimitrov et al., "Data Leakage in Federated Averaging", 2022, section 4; Zhu et al., "Surrogate Model
Extension", 2023, section 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from attacks.contract import Attack, Budget, Deadline, Finding, Item, NotApplicable, PlainAttack, Prior
from attacks.inversion.matching import MODERN, image_problem
from attacks.inversion.optimise import (
    Problem,
    Settings,
    cross_entropy,
    differentiable_attention,
    label_targets,
    misfit,
)
from attacks.inversion.priors import total_variation
from attacks.metrics import match_one_to_one
from attacks.observation import Observation


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalRun:
    """What the client did: SGD with `rate`,
    `epochs` passes over `examples` examples in batches of `batch`.
    """

    rate: float
    epochs: int
    examples: int
    batch: int

    @property
    def batches(self) -> int:
        """Return the number of batches per epoch."""
        return -(-self.examples // self.batch)


def local_run(observation: Observation) -> LocalRun:
    """Return what is known of the client's local training.

    Raises: NotApplicable when the update is not a delta of SGD, is a sum, or a fact is missing.
    """
    if observation.kind != "delta":
        raise NotApplicable("the update is not one client's delta: use gradient matching")
    optimiser = str(observation.known("optimiser") or "").lower()
    if optimiser != "sgd":
        raise NotApplicable(
            f"the simulation is written for SGD clients, the optimiser is {optimiser or 'unknown'}"
        )
    facts = {}
    for name in ("learning_rate", "local_steps", "batch_size"):
        facts[name] = observation.known(name)
    missing = []
    for name, value in facts.items():
        if not value:
            missing.append(name)
    if missing:
        raise NotApplicable(f"not known to this observer: {', '.join(missing)}")
    epochs = int(observation.known("local_epochs") or 1)
    steps, batch = int(facts["local_steps"]), int(facts["batch_size"])
    if steps % epochs:
        raise NotApplicable(f"{steps} steps are not a whole number of batches in {epochs} epochs")
    return LocalRun(
        rate=float(facts["learning_rate"]), epochs=epochs, examples=batch * (steps // epochs), batch=batch
    )


def logits_at(model: nn.Module, weights: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    """Return the model's logits with other weights."""
    if hasattr(model, "config"):
        arguments = {"pixel_values": inputs}
    else:
        arguments = {}
    output = functional_call(model, dict(weights), () if arguments else (inputs,), arguments)
    logits: Tensor = getattr(output, "logits", output)
    return logits


def simulated_delta(
    problem: Problem, run: LocalRun, epochs: tuple[Tensor, ...], labels: Tensor
) -> list[Tensor]:
    """Return old minus new weights after the client's steps on dummies, one set (n, ...) per epoch,
    differentiably.
    """
    start = dict(zip(problem.names, problem.parameters, strict=True))
    weights: dict[str, Tensor] = {}
    for name, value in start.items():
        weights[name] = value.detach().requires_grad_(True)
    first = dict(weights)
    targets = label_targets(labels, problem.classes)
    for dummies in epochs:
        for index in range(run.batches):
            part = slice(index * run.batch, (index + 1) * run.batch)
            loss = cross_entropy(logits_at(problem.model, weights, dummies[part]), targets[part])
            grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            weights = {
                name: value - run.rate * grad
                for (name, value), grad in zip(weights.items(), grads, strict=True)
            }
    return [first[name] - weights[name] for name in problem.names]


def set_distance(epochs: tuple[Tensor, ...]) -> Tensor:
    """Return how much the sets of different epochs differ, whatever the order inside: between means and
    ordered pixels.

    Source: Dimitrov et al., 2022, section 4.3 (order-invariant priors), here with the mean and the sorted
    values.
    """
    if len(epochs) < 2:
        return torch.zeros(())
    means = torch.stack([dummies.mean(0) for dummies in epochs])
    ordered = torch.stack([dummies.sort(dim=0).values for dummies in epochs])
    return (means - means.mean(0)).square().mean() + (ordered - ordered.mean(0)).square().mean()


def merged(epochs: tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Return the mean over epochs after matching each epoch's dummies one to one with the first epoch's."""
    first = epochs[0]
    total = first.clone()
    for dummies in epochs[1:]:
        far = torch.cdist(first.flatten(1), dummies.flatten(1)) + 1e6 * (labels[:, None] != labels[None, :])
        for row, column in match_one_to_one(-far.double().numpy()):
            total[row] += dummies[column]
    return total / len(epochs)


def _prepare(
    observation: Observation, model: nn.Module | None, prior: Prior, seed: int
) -> tuple[Problem, LocalRun, Tensor]:
    run = local_run(observation)
    whole = replace(observation, metadata={**observation.metadata, "batch_size": run.examples})
    problem = image_problem(whole, model, prior, seed)
    if problem.labels is None:
        raise NotApplicable("the labels are neither known nor shown by the head")
    return problem, run, problem.labels


def _simulate(
    observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
) -> Finding:
    deadline = budget.start()
    problem, run, labels = _prepare(observation, model, prior, seed)
    steps = run.epochs * run.batches
    target = tuple(tensor * run.rate * steps for tensor in problem.target)
    problem = replace(problem, target=target)
    best: tuple[float, Tensor] | None = None
    first = 1.0
    for restart in range(budget.restarts):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + restart)
        with differentiable_attention(), torch.enable_grad():
            distance, images, start = _descend(problem, run, labels, budget.iterations, generator, deadline)
        if restart == 0:
            first = start
        if best is None or distance < best[0]:
            best = distance, images
        if deadline.expired:
            break
    assert best is not None
    return _finding(best[1], labels, best[0], first, deadline, {"steps": steps, "epochs": run.epochs})


def _descend(
    problem: Problem,
    run: LocalRun,
    labels: Tensor,
    iterations: int,
    generator: torch.Generator,
    deadline: Deadline,
) -> tuple[float, Tensor, float]:
    if problem.box is not None:
        low, high = problem.box
    else:
        low, high = (torch.tensor(-3.0), torch.tensor(3.0))
    middle = (0.5 * (low + high)).expand(problem.shape)
    epochs = tuple(
        (middle + 0.05 * torch.randn(problem.shape, generator=generator)).requires_grad_(True)
        for _ in range(run.epochs)
    )
    order = torch.randperm(len(labels), generator=generator)
    placed = labels[order]
    optimiser = torch.optim.Adam(list(epochs), lr=0.1, eps=1e-20)
    best, first = (float("inf"), merged(tuple(d.detach() for d in epochs), placed)), 1.0
    for step in range(iterations):
        for group in optimiser.param_groups:
            group["lr"] = 0.1 * (1.0 - step / iterations) + 1e-3
        ours = simulated_delta(problem, run, epochs, placed)
        distance = misfit(list(ours), problem.target, kind="cosine per tensor")
        if step == 0:
            first = max(float(distance.detach()), 1e-12)
        smooth = torch.stack([total_variation(dummies) for dummies in epochs]).mean()
        weight = 0.1 * 1e-3 ** (step / max(1, iterations - 1))
        objective = distance / first + weight * smooth + 10.0 * set_distance(epochs)
        for dummies, grad in zip(epochs, torch.autograd.grad(objective, epochs), strict=True):
            dummies.grad = torch.nan_to_num(grad).sign()
        if float(distance.detach()) < best[0]:
            best = float(distance.detach()), merged(tuple(d.detach().clone() for d in epochs), placed)
        if deadline.expired:
            break
        optimiser.step()
        with torch.no_grad():
            for dummies in epochs:
                dummies.copy_(torch.maximum(torch.minimum(dummies, high), low))
    return best[0], best[1], first


def _surrogate(
    observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
) -> Finding:
    deadline = budget.start()
    if observation.content != "delta":
        raise NotApplicable("the update is a gradient: use gradient matching")
    if not observation.known("local_steps"):
        raise NotApplicable("the number of local steps is not known")
    steps, epochs = int(observation.known("local_steps")), int(observation.known("local_epochs") or 1)
    examples = int(observation.known("batch_size")) * max(1, steps // epochs)
    whole = replace(observation, metadata={**observation.metadata, "batch_size": examples})
    problem = image_problem(whole, model, prior, seed)
    if problem.labels is None:
        raise NotApplicable("the labels are neither known nor shown by the head")
    deltas = tuple(observation.tensors[name] / observation.contributors for name in problem.names)
    best: tuple[float, Tensor, float] | None = None
    for restart in range(budget.restarts):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + restart)
        with differentiable_attention(), torch.enable_grad():
            solution = _slide(problem, deltas, MODERN, budget.iterations, generator, deadline)
        if best is None or solution[0] < best[0]:
            best = solution
        if deadline.expired:
            break
    assert best is not None
    return _finding(best[1], problem.labels, best[0], 1.0, deadline, {"steps": steps, "place": best[2]})


def _slide(
    problem: Problem,
    deltas: tuple[Tensor, ...],
    settings: Settings,
    iterations: int,
    generator: torch.Generator,
    deadline: Deadline,
) -> tuple[float, Tensor, float]:
    """Match the update's direction at a point between old and new weights; return distance, images and the
    point.
    """
    assert problem.labels is not None
    if problem.box is not None:
        low, high = problem.box
    else:
        low, high = (torch.tensor(-3.0), torch.tensor(3.0))
    middle = (0.5 * (low + high)).expand(problem.shape)
    images = (middle + 0.05 * torch.randn(problem.shape, generator=generator)).requires_grad_(True)
    place = torch.tensor(0.5, requires_grad=True)
    targets = label_targets(problem.labels, problem.classes)
    start = {}
    for name, value in zip(problem.names, problem.parameters, strict=True):
        start[name] = value.detach()
    optimiser = torch.optim.Adam(
        [{"params": [images], "lr": settings.rate}, {"params": [place], "lr": 1e-3}], eps=1e-20
    )
    best = float("inf"), images.detach().clone(), 0.5
    for step in range(iterations):
        optimiser.param_groups[0]["lr"] = settings.rate * (1.0 - step / iterations) + 1e-3
        weights = {}
        for name, delta in zip(problem.names, deltas, strict=True):
            weights[name] = start[name] + place * delta
        loss = cross_entropy(logits_at(problem.model, weights, images), targets)
        grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        distance = misfit(list(grads), problem.target, kind="cosine")
        high_end, low_end = settings.smoothness
        weight = high_end * (low_end / high_end) ** (step / max(1, iterations - 1))
        objective = distance + weight * total_variation(images)
        slope, pull = torch.autograd.grad(objective, [images, place])
        if float(distance.detach()) < best[0]:
            best = float(distance.detach()), images.detach().clone(), float(place.detach())
        if deadline.expired:
            break
        images.grad, place.grad = torch.nan_to_num(slope).sign(), pull
        optimiser.step()
        with torch.no_grad():
            images.copy_(torch.maximum(torch.minimum(images, high), low))
            place.clamp_(0.0, 1.0)
    return best


def _finding(
    images: Tensor,
    labels: Tensor,
    distance: float,
    start: float,
    deadline: Deadline,
    details: dict[str, float | int],
) -> Finding:
    confidence = max(0.0, min(1.0, 1.0 - distance / max(start, 1e-30)))
    items = []
    for image in images:
        items.append(Item(kind="image", value=image, confidence=confidence))
    items.append(Item(kind="labels", value=labels, confidence=confidence))
    reason = ""
    if deadline.expired:
        reason = "stopped by its budget of steps"
    return Finding(
        items=tuple(items), confidence=confidence, reason=reason, details={"distance": distance, **details}
    )


def unrolled() -> Attack:
    """Return the inversion of a FedAvg delta through a differentiable simulation of the client."""
    return PlainAttack(
        name="fedavg_unrolled",
        family="fedavg",
        attempt=_simulate,
        requires=("model", "image_shape"),
        summary="images behind several local SGD steps, by simulating the client",
    )


def surrogate() -> Attack:
    """Return the surrogate-model attack on a FedAvg delta."""
    return PlainAttack(
        name="fedavg_surrogate",
        family="fedavg",
        attempt=_surrogate,
        requires=("model", "image_shape", "batch_size"),
        summary="images behind several local steps, by matching the update's "
        "direction at a point on its path",
    )
