"""Gradient matching on images: DLG, iDLG, inverting gradients and its successors, as presets of one engine.

Images are recovered in the units the model takes. With `prior.image_mean` and `image_std` the valid range is
that of normalised pixels, otherwise [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from attacks.contract import Attack, Budget, Finding, Item, NotApplicable, PlainAttack, Prior, working_copy
from attacks.inversion.batch_norm import with_client_statistics
from attacks.inversion.kinks import see_kinks
from attacks.inversion.labels import find_head, identity_counts, probe_head, round_to_total, single_label
from attacks.inversion.optimise import (
    Match,
    Penalty,
    Problem,
    Settings,
    differentiable_attention,
    image_logits,
    image_loss,
    in_double,
    share_only,
    solve,
)
from attacks.inversion.priors import (
    batch_statistics_distance,
    class_features,
    feature_distance,
    patch_seams,
    pixel_box,
    total_variation,
)
from attacks.inversion.tokens import noise_per_entry
from attacks.observation import Observation

DLG = Settings(distance="squared", optimiser="lbfgs", rate=1.0, joint=True)
IDLG = replace(DLG, joint=False)
# With kinks seen the size of the gradient means something, so that its sign alone, as published, would throw
# it away.
GEIPING = Settings(
    distance="cosine", rate=0.1, schedule="cosine", smoothness=(0.1, 3e-3), kink=1.0, start="normal"
)
MODERN = Settings(
    distance="cosine",
    rate=0.1,
    sign="soft",
    schedule="cosine",
    smoothness=(0.1, 1e-4),
    opponents=True,
    feature=0.1,
    start="grey",
)
GRAD_INVERSION = Settings(
    distance="squared",
    rate=0.1,
    schedule="cosine",
    smoothness=(1e-1, 1e-4),
    batch_norm=0.1,
    magnitude=1e-6,
    langevin=0.01,
    group=0.01,
    start="normal",
)
GRAD_VIT = Settings(
    distance="cosine per tensor",
    optimiser="lbfgs",
    rate=1.0,
    line_search=True,
    precise=True,
    seams=1e-4,
    start="grey",
)


def cohort_size(observation: Observation) -> int:
    """Return how many examples stand behind the observation: the batch size times the contributors.

    Raises: NotApplicable when the batch size is not known.
    """
    batch = observation.known("batch_size")
    if not batch:
        raise NotApplicable("the batch size is not known")
    return int(batch) * observation.contributors


def known_or_inferred_labels(
    observation: Observation, model: nn.Module, prior: Prior, count: int, seed: int
) -> Tensor | None:
    """Return labels (count,) granted or read off the head's gradient, or None when neither is possible."""
    granted = observation.known("labels")
    if granted is not None:
        labels = torch.tensor(granted)
        if len(labels) == count:
            return labels
        return None
    counts = observation.known("label_counts")
    if counts is not None and sum(counts) == count:
        return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    try:
        head = find_head(observation, model)
        if count == 1:
            return torch.tensor([single_label(head.weight)])
        if head.bias is None:
            return None
        mean, _, _ = probe_head(observation, model, prior, head, seed)
    except NotApplicable:
        return None
    label_counts = round_to_total(identity_counts(head.bias, mean.double(), count), count)
    return torch.repeat_interleave(torch.arange(len(label_counts)), label_counts)


def image_problem(
    observation: Observation, model: nn.Module | None, prior: Prior, seed: int, *, joint: bool = False
) -> Problem:
    """Return the inversion problem of an image classifier.

    Raises: NotApplicable when the model, the image shape or the batch size is missing, or nothing observed
    matches.
    """
    private = with_client_statistics(observation, working_copy(model, observation))
    shape = observation.known("image_shape")
    if not shape:
        raise NotApplicable("the image shape is not known")
    count = cohort_size(observation)
    labels = None
    if not joint:
        labels = known_or_inferred_labels(observation, private, prior, count, seed)
    names, target, scaled = share_only(private, observation)
    with torch.no_grad():
        classes = int(image_logits(private, torch.zeros(1, *shape)).shape[-1])
    noise = noise_per_entry(observation) / observation.contributors
    return Problem(
        model=private,
        names=names,
        target=target,
        loss=image_loss,
        shape=(count, *shape),
        classes=classes,
        labels=labels,
        scaled=scaled,
        noise=noise,
        box=pixel_box(prior),
    )


def image_penalty(
    problem: Problem, settings: Settings, observation: Observation
) -> tuple[Problem, Penalty | None]:
    """Return the problem with the activations the priors need, and the weighted sum of those priors."""
    norms = tuple(
        name for name, module in problem.model.named_modules() if isinstance(module, nn.BatchNorm2d)
    )
    if settings.batch_norm:
        taps = norms
    else:
        taps = ()
    wanted = None
    if settings.feature:
        wanted = _wanted_features(problem, observation)
    taps += (wanted[0],) if wanted is not None else ()
    patch = None
    if settings.seams:
        patch = _patch_size(problem.model)
    if not taps and not settings.magnitude and patch is None:
        return problem, None

    def penalty(inputs: Tensor, tapped: Mapping[str, Tensor]) -> Tensor:
        total = torch.zeros(())
        if norms and settings.batch_norm:
            total = total + settings.batch_norm * batch_statistics_distance(
                {name: tapped[name] for name in norms}, problem.model
            )
        if wanted is not None:
            total = total + settings.feature * feature_distance(
                tapped[wanted[0]].flatten(1), wanted[1], wanted[2]
            )
        if settings.magnitude:
            total = total + settings.magnitude * inputs.square().mean()
        if patch is not None:
            total = total + settings.seams * patch_seams(inputs, patch)
        return total

    return replace(problem, taps=taps), penalty


def _wanted_features(problem: Problem, observation: Observation) -> tuple[str, Tensor, Tensor] | None:
    if problem.labels is None:
        return None
    linear = []
    for name, module in problem.model.named_modules():
        if isinstance(module, nn.Linear):
            linear.append(name)
    shared = dict(zip(problem.names, problem.target, strict=True))
    if not linear or f"{linear[-1]}.weight" not in shared or f"{linear[-1]}.bias" not in shared:
        return None
    wanted, usable = class_features(
        shared[f"{linear[-1]}.weight"], shared[f"{linear[-1]}.bias"], problem.labels
    )
    alone = (problem.labels[:, None] == problem.labels[None, :]).sum(1) == 1
    usable = usable & alone
    if bool(usable.any()) and wanted.ndim == 2:
        return (linear[-1], wanted, usable)
    return None


def _patch_size(model: nn.Module) -> tuple[int, int] | None:
    for module in model.modules():
        if (
            isinstance(module, nn.Conv2d)
            and module.stride == module.kernel_size
            and module.kernel_size[0] > 1
        ):
            return int(module.kernel_size[0]), int(module.kernel_size[1])
    return None


def image_finding(solution: Match, problem: Problem) -> Finding:
    """Return recovered images with the labels they were matched under."""
    confidence = solution.confidence
    if problem.box is not None:
        low, high = problem.box
    else:
        low, high = (solution.inputs.min(), solution.inputs.max())
    images = torch.maximum(torch.minimum(solution.inputs, high), low).float()
    items = []
    for image in images:
        items.append(Item(kind="image", value=image, confidence=confidence))
    items.append(Item(kind="labels", value=solution.targets.argmax(-1), confidence=confidence))
    details: dict[str, float | int | str] = {
        "distance": solution.distance,
        "start_distance": solution.start_distance,
        "iterations": solution.iterations,
        "tensors": len(problem.names),
        "labels": "optimised" if problem.labels is None else "known or inferred",
    }
    reason = ""
    if solution.stopped:
        reason = "stopped by its budget of steps"
    return Finding(items=tuple(items), confidence=confidence, reason=reason, details=details)


def invert_images(
    observation: Observation,
    model: nn.Module | None,
    prior: Prior,
    budget: Budget,
    seed: int,
    *,
    settings: Settings,
) -> Finding:
    """Match the observed update with dummy images under the given settings."""
    problem = image_problem(observation, model, prior, seed, joint=settings.joint)
    problem, penalty = image_penalty(problem, settings, observation)
    if settings.kink:
        see_kinks(problem.model, settings.kink)
    if settings.precise:
        problem = in_double(problem)

    def smoother(images: Tensor) -> Tensor:
        return total_variation(images, opponents=settings.opponents)

    with differentiable_attention(), torch.enable_grad():
        solution = solve(
            problem,
            settings,
            budget,
            seed,
            penalty=penalty,
            smoother=smoother if settings.smoothness[0] else None,
        )
    return image_finding(solution, problem)


def _preset(name: str, settings: Settings, summary: str) -> Attack:
    def attempt(
        observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
    ) -> Finding:
        return invert_images(observation, model, prior, budget, seed, settings=settings)

    return PlainAttack(
        name=name,
        family="matching",
        attempt=attempt,
        requires=("model", "image_shape", "batch_size"),
        summary=summary,
    )


def dlg() -> Attack:
    """Return deep leakage from gradients: L-BFGS on images and label logits together."""
    return _preset("dlg", DLG, "images and labels by matching gradients with L-BFGS")


def idlg() -> Attack:
    """Return iDLG: the label is read first, then L-BFGS on the images."""
    return _preset("idlg", IDLG, "images by matching gradients with L-BFGS, labels read first")


def inverting_gradients() -> Attack:
    """Return inverting gradients: Adam on the cosine distance with falling total variation, kinks seen."""
    return _preset("inverting_gradients", GEIPING, "images by cosine matching with total variation")


def modern_inversion() -> Attack:
    """Return cosine matching with soft signs, colour-opponent total variation and the feature prior."""
    return _preset("modern_inversion", MODERN, "images by cosine matching with feature and colour priors")


def grad_inversion() -> Attack:
    """Return GradInversion's priors: batch-norm statistics, consensus of restarts, Langevin noise."""
    return _preset(
        "grad_inversion", GRAD_INVERSION, "images by matching with batch-norm statistics and restarts"
    )


def grad_vit() -> Attack:
    """Return per-tensor cosine matching by L-BFGS with the patch-seam prior, for vision transformers."""
    return _preset(
        "grad_vit", GRAD_VIT, "images from vision transformers by cosine matching with a patch prior"
    )
