"""Gradient matching: move dummy inputs until the update they would cause equals the observed one.

One engine for every published variant. A `Problem` holds the model, the observed tensors (whatever subset of
the parameters was shared: full, LoRA, adapter, prefix, prompt, head) and the loss of dummy inputs; `Settings`
holds what the variants differ in; `solve` runs restarts and keeps the one whose update fits best. Sources:
Zhu et al., "Deep Leakage from Gradients", 2019; Zhao et al., "iDLG", 2020; Geiping et al., "Inverting
Gradients", 2020; Yin et al., "See through Gradients", 2021; Deng et al., "TAG", 2021; Balunovic et al.,
"LAMP", 2022.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from attacks.contract import Budget, Deadline, NotApplicable
from attacks.foreign import ModelOutput
from attacks.inversion.priors import group_distance, tapped
from attacks.observation import Observation

Distance = Literal["cosine", "cosine per tensor", "squared", "squared and absolute", "whitened"]
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
Penalty = Callable[[Tensor, Mapping[str, Tensor]], Tensor]

# Key biases of attention and LoRA-A at B = 0 have gradients of rounding size; matching them only adds a
# constant.
_NUMERICALLY_ZERO = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the variants differ in.

    `smoothness` (start, end) is the weight of total variation, lowered geometrically during a run: one run
    passes every weight, and noise of known size stops it at the weight where the fit would only follow the
    noise. `absolute` weighs the L1 part of "squared and absolute". `joint` optimises label logits as well.
    `precise` works in double precision, where L-BFGS keeps converging; `evaluations` says how many of its
    evaluations one iteration of the budget buys. `kink` is the width, relative to a unit's inputs, at which
    the descent sees rectifiers switch; 0 leaves their switching out, as plain automatic differentiation does.
    """

    distance: Distance = "cosine"
    optimiser: Literal["adam", "adamw", "lbfgs"] = "adam"
    rate: float = 0.1
    sign: Literal["none", "hard", "soft"] = "none"
    schedule: Literal["constant", "steps", "cosine", "linear", "drops"] = "cosine"
    warm_up: int = 0
    clip: float = 0.0
    langevin: float = 0.0
    absolute: float = 0.01
    smoothness: tuple[float, float] = (0.0, 0.0)
    opponents: bool = False
    feature: float = 0.0
    batch_norm: float = 0.0
    magnitude: float = 0.0
    seams: float = 0.0
    group: float = 0.0
    embedding_norm: float = 0.0
    joint: bool = False
    precise: bool = False
    evaluations: int = 1
    line_search: bool = False
    kink: float = 0.0
    start: Literal["normal", "uniform", "grey"] = "normal"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Problem:
    """One inversion: `loss(model, inputs, targets)` is the client's mean loss on dummy inputs.

    `target` holds the observed tensors as a mean gradient, in the order of `names`; `scaled` is False when
    only their direction is known. `box` is the valid range of inputs (lowest, highest), broadcast against
    them.
    """

    model: nn.Module
    names: tuple[str, ...]
    target: tuple[Tensor, ...]
    loss: Loss
    shape: tuple[int, ...]
    classes: int
    labels: Tensor | None
    scaled: bool = True
    noise: float = 0.0
    box: tuple[Tensor, Tensor] | None = None
    penalty: Penalty | None = None
    taps: tuple[str, ...] = ()
    draw: Callable[[torch.Generator], Tensor] | None = None

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """Return the shared parameters, in the order of `names`."""
        own = dict(self.model.named_parameters())
        return tuple(own[name] for name in self.names)

    @property
    def floor(self) -> float:
        """Return the cosine distance between the true and the noised gradient that known noise causes by
        itself.
        """
        entries = sum(tensor.numel() for tensor in self.target)
        energy = sum(float(tensor.double().square().sum()) for tensor in self.target)
        share = entries * self.noise**2 / max(energy, 1e-300)
        return 1.0 - math.sqrt(max(0.0, 1.0 - share))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Match:
    """One finished run: the best inputs, targets as probabilities, how well they fit, and how a random start
    fits.
    """

    inputs: Tensor
    targets: Tensor
    distance: float
    start_distance: float
    iterations: int
    stopped: bool = False
    history: tuple[float, ...] = field(default=())

    @property
    def confidence(self) -> float:
        """Return the share of the start's misfit that was explained, in [0, 1]."""
        return max(0.0, min(1.0, 1.0 - self.distance / max(self.start_distance, 1e-30)))


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """Force plain attention: the fused kernels have no second derivative."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def share_only(
    model: nn.Module, observation: Observation
) -> tuple[tuple[str, ...], tuple[Tensor, ...], bool]:
    """Let only the observed parameters require gradients; return their names, mean gradient, and whether it
    is scaled.

    This is the parameter mask: whatever was shared is matched, nothing else. Tensors that are zero in the
    observation are left out.

    Raises: NotApplicable when no observed tensor is a parameter of the model.
    """
    view = observation.gradient()
    own = dict(model.named_parameters())
    shared = {}
    for name, tensor in view.tensors.items():
        if name in own and own[name].shape == tensor.shape:
            shared[name] = tensor.to(own[name].dtype) / observation.contributors
    sizes = {}
    for name, tensor in shared.items():
        sizes[name] = float(tensor.norm()) / math.sqrt(tensor.numel())
    largest = max(sizes.values(), default=0.0)
    names = tuple(name for name in own if name in shared and sizes[name] > _NUMERICALLY_ZERO * largest)
    if not names:
        raise NotApplicable(
            "no observed tensor other than zero has the name and shape of a parameter of the model"
        )
    for name, parameter in own.items():
        parameter.requires_grad_(name in names)
    clipped = observation.known("clip_norm") is not None and observation.metadata.get("point") != "raw"
    return names, tuple(shared[name] for name in names), view.scaled and not clipped


def update_of(
    problem: Problem, inputs: Tensor, targets: Tensor, *, keep_graph: bool = True
) -> tuple[list[Tensor | None], dict[str, Tensor]]:
    """Return the gradient that dummy inputs cause, by default with its graph, and the tapped activations."""
    with tapped(problem.model, problem.taps) as taps:
        loss = problem.loss(problem.model, inputs, targets)
    grads = torch.autograd.grad(loss, problem.parameters, create_graph=keep_graph, allow_unused=True)
    return list(grads), taps


def misfit(
    ours: list[Tensor | None],
    target: tuple[Tensor, ...],
    *,
    kind: Distance,
    scaled: bool = True,
    absolute: float = 0.01,
    noise: float = 0.0,
) -> Tensor:
    """Return the distance between two updates, 0 when equal; tensors the dummies do not reach are left out.

    Guarantee: "cosine" and "cosine per tensor" do not change when either update is rescaled; the others first
    scale ours to fit best when `scaled` is False. The squared kinds are relative to the observed squared
    norm; "whitened" weighs each tensor by the inverse of its own mean square plus the noise variance.
    """
    pairs = []
    for own, observed in zip(ours, target, strict=True):
        if own is not None:
            pairs.append((own, observed))
    if not pairs:
        raise NotApplicable("the shared parameters do not depend on the inputs")
    if kind == "cosine per tensor":
        angles = []
        for own, observed in pairs:
            angles.append(_angle([own], [observed]))
        return torch.stack(angles).mean()
    if kind == "cosine":
        own_tensors, observed_tensors = zip(*pairs, strict=True)
        return _angle(list(own_tensors), list(observed_tensors))
    inner, own_squares, seen_squares = [], [], []
    for own, observed in pairs:
        inner.append((own * observed).sum())
        own_squares.append(own.square().sum())
        seen_squares.append(observed.square().sum())
    factor = torch.ones(())
    if not scaled:
        own_square = torch.stack(own_squares).sum()
        factor = (torch.stack(inner).sum() / own_square.clamp_min(1e-30)).detach()
    if kind == "whitened":
        parts = []
        for own, observed in pairs:
            parts.append(
                (factor * own - observed).square().mean()
                / (observed.square().mean() + noise**2).clamp_min(1e-30)
            )
        return torch.stack(parts).mean()
    square_gaps, gaps, seen_lengths = [], [], []
    for own, observed in pairs:
        square_gaps.append((factor * own - observed).square().sum())
        gaps.append((factor * own - observed).abs().sum())
        seen_lengths.append(observed.abs().sum())
    squares = torch.stack(square_gaps).sum() / torch.stack(seen_squares).sum()
    if kind == "squared":
        return squares
    return squares + absolute * torch.stack(gaps).sum() / torch.stack(seen_lengths).sum()


def _angle(ours: list[Tensor], observed: list[Tensor]) -> Tensor:
    """Return 1 - cosine, as half the squared distance of unit vectors: 1 - cosine itself would cancel to
    rounding.
    """
    own, other = (torch.cat([tensor.reshape(-1) for tensor in tensors]) for tensors in (ours, observed))
    own_length, seen_length = (vector.square().sum().clamp_min(1e-30).sqrt() for vector in (own, other))
    return 0.5 * torch.addcdiv(-other / seen_length, own, own_length).square().sum()


def label_targets(labels: Tensor, classes: int) -> Tensor:
    """Return labels as probabilities (n, classes)."""
    return nn.functional.one_hot(labels.long(), classes).float()


def solve(
    problem: Problem,
    settings: Settings,
    budget: Budget,
    seed: int,
    *,
    penalty: Penalty | None = None,
    smoother: Callable[[Tensor], Tensor] | None = None,
) -> Match:
    """Run every restart of the budget and return the run that fits best.

    With a group prior, every restart but the first is also drawn to the mean of those before it. Guarantee:
    deterministic by seed unless its steps run out, which `stopped` reports.
    """
    deadline = budget.start()
    runs: list[Match] = []
    for restart in range(budget.restarts):
        if runs and deadline.expired:
            break
        generator = torch.Generator().manual_seed(seed * 1_000_003 + restart)
        added = penalty
        if settings.group and runs:
            consensus = torch.stack([run.inputs for run in runs]).mean(0)
            added = _with_group(penalty, consensus, settings.group)
        run = match(
            problem,
            settings,
            iterations=budget.iterations,
            generator=generator,
            deadline=deadline,
            penalty=added,
            smoother=smoother,
        )
        runs.append(run)
        if runs[-1].distance < 1e-7 and not problem.noise:
            break
    best = min(runs, key=lambda run: run.distance)
    return replace(best, stopped=deadline.expired)


def _with_group(penalty: Penalty | None, consensus: Tensor, weight: float) -> Penalty:
    def both(inputs: Tensor, taps: Mapping[str, Tensor]) -> Tensor:
        own = penalty(inputs, taps) if penalty is not None else torch.zeros(())
        return own + weight * group_distance(inputs, consensus)

    return both


def match(
    problem: Problem,
    settings: Settings,
    *,
    iterations: int,
    generator: torch.Generator,
    deadline: Deadline,
    penalty: Penalty | None = None,
    start: Tensor | None = None,
    smoother: Callable[[Tensor], Tensor] | None = None,
    unit: float | None = None,
) -> Match:
    """Run one descent from one start and return its best iterate by objective, not its last.

    `smoother` is total variation or its like, weighted by the falling `settings.smoothness`. The misfit is
    divided by `unit`, by default that of the start, so that priors weigh the same whether much or little
    depends on the inputs. With noise of known size the run ends once the fit is better than noise allows.
    Starts from `start` when given.
    """
    if start is None:
        start = draw_start(problem, settings, generator)
    inputs = start.clone().requires_grad_(True)
    logits = _start_logits(problem, settings, generator)
    if settings.optimiser == "lbfgs":
        return _quasi_newton(
            problem,
            settings,
            inputs,
            logits,
            iterations=iterations,
            deadline=deadline,
            penalty=penalty,
            unit=unit,
        )
    descent = _Descent(problem, settings, iterations, penalty, smoother, unit)
    variables = [inputs] if logits is None else [inputs, logits]
    kind = torch.optim.AdamW if settings.optimiser == "adamw" else torch.optim.Adam
    # Near a solution the gradients are tiny; the usual epsilon of 1e-8 would stop the descent there.
    optimiser = kind(variables, lr=settings.rate, eps=1e-20)
    first, history, best = (
        math.inf,
        [],
        (math.inf, inputs.detach().clone(), _targets(problem, logits).detach(), math.inf),
    )
    steps = 0
    for steps in range(iterations):
        objective, distance, judged = descent.objective(inputs, logits, steps)
        first = distance if steps == 0 else first
        history.append(distance)
        if judged < best[0]:
            best = (judged, inputs.detach().clone(), _targets(problem, logits).detach(), distance)
        if deadline.expired or (problem.noise and settings.distance == "cosine" and distance < problem.floor):
            break
        grads = torch.autograd.grad(objective, variables)
        descent.step(optimiser, variables, grads, steps, generator)
        _project(inputs, problem.box)
    return Match(
        inputs=best[1],
        targets=best[2],
        distance=best[3],
        start_distance=first,
        iterations=steps + 1,
        stopped=deadline.expired,
        history=tuple(history),
    )


class _Descent:
    """The objective at a step, and the step itself."""

    def __init__(
        self,
        problem: Problem,
        settings: Settings,
        iterations: int,
        penalty: Penalty | None,
        smoother: Callable[[Tensor], Tensor] | None,
        unit: float | None,
    ) -> None:
        self.problem, self.settings, self.iterations = problem, settings, iterations
        self.penalty, self.smoother, self.unit = penalty, smoother, unit

    def smoothness(self, step: int) -> float:
        start, end = self.settings.smoothness
        if start <= 0 or end <= 0:
            return start
        return float(start * (end / start) ** (step / max(1, self.iterations - 1)))

    def objective(self, inputs: Tensor, logits: Tensor | None, step: int) -> tuple[Tensor, float, float]:
        """Return the objective, the misfit alone, and the objective at the final smoothness (to compare
        iterates).
        """
        grads, taps = update_of(self.problem, inputs, _targets(self.problem, logits))
        distance = misfit(
            grads,
            self.problem.target,
            kind=self.settings.distance,
            scaled=self.problem.scaled,
            absolute=self.settings.absolute,
            noise=self.problem.noise,
        )
        if self.penalty is not None:
            rest = self.penalty(inputs, taps)
        else:
            rest = torch.zeros(())
        rough = torch.zeros(())
        if self.smoother is not None:
            rough = self.smoother(inputs)
        if self.unit is None:
            self.unit = max(float(distance.detach()), 1e-12)
        relative = distance / self.unit
        objective = relative + rest + self.smoothness(step) * rough
        # Noise is fitted last: under noise the latest iterate above the floor is the one to keep.
        final = (relative + rest + self.settings.smoothness[1] * rough).detach()
        judged = -float(step) if self.problem.noise else float(final)
        return objective, float(distance.detach()), judged if math.isfinite(judged) else math.inf

    def step(
        self,
        optimiser: torch.optim.Optimizer,
        variables: list[Tensor],
        grads: tuple[Tensor, ...],
        step: int,
        generator: torch.Generator,
    ) -> None:
        settings, rate = self.settings, self.settings.rate * _schedule(self.settings, step, self.iterations)
        for group in optimiser.param_groups:
            group["lr"] = rate
        if settings.clip:
            total = torch.stack([grad.norm() for grad in grads]).norm()
        else:
            total = torch.zeros(())
        for variable, raw in zip(variables, grads, strict=True):
            grad = torch.nan_to_num(raw)
            if settings.clip and float(total) > settings.clip:
                grad = grad * (settings.clip / total)
            if settings.sign == "hard":
                grad = grad.sign()
            elif settings.sign == "soft":
                grad = torch.tanh(
                    grad / (grad.abs().mean() * (0.1 + step / self.iterations)).clamp_min(1e-30)
                )
            variable.grad = grad
        optimiser.step()
        if settings.langevin:
            noise = torch.randn(variables[0].shape, generator=generator)
            with torch.no_grad():
                variables[0].add_(settings.langevin * rate * noise)


def _schedule(settings: Settings, step: int, iterations: int) -> float:
    if settings.warm_up and step < settings.warm_up:
        return (step + 1) / settings.warm_up
    part = step / max(1, iterations)
    if settings.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * part)) + 1e-3
    if settings.schedule == "linear":
        return 1.0 - part
    if settings.schedule == "steps":  # Geiping et al., 2020: a tenth at 3/8, 5/8 and 7/8
        return float(0.1 ** sum(part >= mark for mark in (3 / 8, 5 / 8, 7 / 8)))
    if settings.schedule == "drops":  # LAMP: 0.89 every 50 steps
        return float(0.89 ** (step // 50))
    return 1.0


def _quasi_newton(
    problem: Problem,
    settings: Settings,
    inputs: Tensor,
    logits: Tensor | None,
    *,
    iterations: int,
    deadline: Deadline,
    penalty: Penalty | None,
    unit: float | None,
) -> Match:
    variables = [inputs] if logits is None else [inputs, logits]
    optimiser = torch.optim.LBFGS(
        variables,
        lr=settings.rate,
        max_iter=20,
        history_size=60,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe" if settings.line_search else None,
    )
    history: list[float] = []
    best = (math.inf, inputs.detach().clone(), _targets(problem, logits).detach())

    def closure() -> Tensor:
        nonlocal best, unit
        grads, taps = update_of(problem, inputs, _targets(problem, logits))
        value = misfit(
            grads,
            problem.target,
            kind=settings.distance,
            scaled=problem.scaled,
            absolute=settings.absolute,
            noise=problem.noise,
        )
        history.append(float(value.detach()))
        if unit is None:
            unit = max(history[0], 1e-12)
        total = value / unit + (penalty(inputs, taps) if penalty is not None else 0.0)
        for variable, grad in zip(variables, torch.autograd.grad(total, variables), strict=True):
            variable.grad = torch.nan_to_num(grad).contiguous()  # L-BFGS lays it flat without a copy
        if history[-1] < best[0]:
            best = (history[-1], inputs.detach().clone(), _targets(problem, logits).detach())
        return total.detach()

    while len(history) < iterations * settings.evaluations:
        optimiser.step(closure)  # type: ignore[no-untyped-call]
        converged = best[0] < 1e-14 or (
            problem.noise > 0 and settings.distance == "cosine" and best[0] < problem.floor
        )
        stuck = len(history) > 100 and history[-60] - min(history) < 1e-6 * history[-60]
        if deadline.expired or converged or stuck or not math.isfinite(history[-1]):
            break
    return Match(
        inputs=best[1],
        targets=best[2],
        distance=best[0],
        start_distance=history[0],
        iterations=len(history),
        stopped=deadline.expired,
        history=tuple(history),
    )


def in_double(problem: Problem) -> Problem:
    """Return the problem in double precision."""
    draw = problem.draw
    box = problem.box
    if box is not None:
        box = (box[0].double(), box[1].double())
    return replace(
        problem,
        model=problem.model.double(),
        target=tuple(tensor.double() for tensor in problem.target),
        box=box,
        draw=None if draw is None else lambda generator: draw(generator).double(),
    )


def draw_start(problem: Problem, settings: Settings, generator: torch.Generator) -> Tensor:
    """Return the first dummies of a run."""
    if problem.draw is not None:
        return problem.draw(generator)
    if settings.start == "uniform":
        return _inside(torch.rand(problem.shape, generator=generator), problem.box)
    if settings.start == "grey" and problem.box is not None:
        low, high = problem.box
        return (0.5 * (low + high)).expand(problem.shape) + 0.02 * torch.randn(
            problem.shape, generator=generator
        )
    return torch.randn(problem.shape, generator=generator)


def _inside(unit: Tensor, box: tuple[Tensor, Tensor] | None) -> Tensor:
    if box is None:
        return unit
    return box[0] + unit * (box[1] - box[0])


def _start_logits(problem: Problem, settings: Settings, generator: torch.Generator) -> Tensor | None:
    if not (settings.joint or problem.labels is None) or problem.classes == 0:
        return None
    return torch.randn(problem.shape[0], problem.classes, generator=generator).requires_grad_(True)


def _targets(problem: Problem, logits: Tensor | None) -> Tensor:
    if logits is not None:
        return torch.softmax(logits, dim=-1)
    if problem.labels is None:
        return torch.zeros(problem.shape[0], 0)
    return label_targets(problem.labels, problem.classes)


def _project(inputs: Tensor, box: tuple[Tensor, Tensor] | None) -> None:
    if box is not None:
        with torch.no_grad():
            inputs.copy_(torch.maximum(torch.minimum(inputs, box[1]), box[0]))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits (n, classes) against probabilities (n, classes)."""
    return -(targets * torch.log_softmax(logits, dim=-1)).sum(-1).mean()


def image_logits(model: nn.Module, images: Tensor) -> ModelOutput:
    """Return the logits of an image classifier, whether a plain module or one with a configuration."""
    output = model(pixel_values=images) if hasattr(model, "config") else model(images)
    return getattr(output, "logits", output)


def image_loss(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """Return the client's mean loss on images against label probabilities."""
    return cross_entropy(image_logits(model, images), targets)
