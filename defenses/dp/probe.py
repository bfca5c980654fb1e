"""The check before training: does leaving one sample out change the clipped sum by more than the bound?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses.dp.clip import Clipping
from defenses.dp.per_sample import Losses, PerSampleEngine
from defenses.errors import NotPrivateError, ParameterError

LossesOf = Callable[[Sequence[int]], Losses]
_SCALES = (1.0, 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReport:
    """Hold what the probe measured, as multiples of what is allowed.

    `sensitivity` is the largest ||sum(all) - sum(all but i)|| / C over samples and bounds; `coupling` the
    largest relative change of anything a sample contributes when another sample leaves. Both are about
    random data.
    """

    samples: int
    clip_norm: float
    sensitivity: float
    coupling: float


def probe_sensitivity(
    engine: PerSampleEngine,
    losses_of: LossesOf,
    *,
    samples: int,
    clip_norm: float,
    clip: Clipping | None = None,
    tolerance: float = 1e-5,
    coupling_tolerance: float = 1e-3,
) -> ProbeReport:
    """Leave every sample out once, with the exact model, loss and trainables of a run, on random data.

    `losses_of(indices)` returns the closure that computes the losses of those samples alone. Dropout is
    switched off for the probe (modules stay in train mode, so everything else that differs in training still
    runs): its masks depend on the shape of the batch and would look like coupling, yet they are independent
    of the data. For a forward pass below float32, probe in float32 or give wider tolerances.

    Guarantee: passes only if (a) ||sum(all) - sum(all but i)|| <= C (1 + tolerance) for every i, at the run's
    bound and at bounds between the samples' own norms, where coupling shows; (b) unclipped, sum(all) =
    sum(all but i) + sum(i alone) within `coupling_tolerance`.
    Raises: NotPrivateError, naming the module, parameter or loss at fault.
    """
    if samples < 3:
        raise ParameterError(f"samples = {samples}: the probe needs at least 3")
    clip = clip or Clipping(clip_norm=clip_norm)
    probe = _Probe(engine, losses_of, samples)
    with no_dropout():
        probe.refuse_random_model()
        alone, coupling = probe.additivity(coupling_tolerance)
        bounds = {clip_norm} | {scale * norm for norm in alone for scale in _SCALES if norm > 0}
        kinds = [clip, *(Clipping(clip_norm=bound) for bound in sorted(bounds))]
        sensitivity = max(probe.leave_one_out(kind, tolerance) for kind in kinds)
    return ProbeReport(samples=samples, clip_norm=clip_norm, sensitivity=sensitivity, coupling=coupling)


class _Probe:
    def __init__(self, engine: PerSampleEngine, losses_of: LossesOf, samples: int) -> None:
        self._engine = engine
        self._losses_of = losses_of
        self._everyone = list(range(samples))

    def _sum(self, indices: Sequence[int], clip: Clipping) -> dict[str, Tensor]:
        return self._engine.clipped_sum(self._losses_of(indices), clip=clip, batch_size=None).gradients

    def refuse_random_model(self) -> None:
        """Two identical passes must agree, or nothing below would mean anything."""
        first, second = (self._sum(self._everyone, _UNBOUNDED) for _ in range(2))
        if _norm(_difference(first, second)) > 1e-4 * _norm(first):
            raise NotPrivateError(
                "two passes over the same samples differ: the model draws randomness other than dropout, "
                "which the probe cannot tell from coupling; switch it off for training or for the probe"
            )

    def additivity(self, tolerance: float) -> tuple[list[float], float]:
        """Check that samples add up without clipping; return each sample's own norm and the largest
        deviation.
        """
        whole = self._sum(self._everyone, _UNBOUNDED)
        alone = [self._sum([i], _UNBOUNDED) for i in self._everyone]
        norms = [_norm(part) for part in alone]
        scale, worst = max(norms), 0.0
        for i in self._everyone:
            rest = self._sum(self._without(i), _UNBOUNDED)
            error = _difference(_difference(whole, rest), alone[i])
            coupling = _norm(error) / max(scale, 1e-30)
            if not coupling <= tolerance:
                self._blame(
                    i, error, f"leaving sample {i} out changes what the others contribute by {coupling:.2g}"
                )
            worst = max(worst, coupling)
        return norms, worst

    def leave_one_out(self, clip: Clipping, tolerance: float) -> float:
        """Return the largest change one sample makes to the clipped sum, over the bound."""
        whole, worst = self._sum(self._everyone, clip), 0.0
        for i in self._everyone:
            change = _difference(whole, self._sum(self._without(i), clip))
            ratio = _norm(change) / clip.clip_norm
            if not ratio <= 1 + tolerance:
                self._blame(
                    i,
                    change,
                    f"leaving sample {i} out changes the clipped sum by {ratio:.4f} times the bound",
                )
            worst = max(worst, ratio)
        return worst

    def _without(self, i: int) -> list[int]:
        return [j for j in self._everyone if j != i]

    def _blame(self, i: int, error: dict[str, Tensor], what: str) -> None:
        everyone, rest = self._everyone, self._without(i)
        guilty = _first_coupled_module(self._engine.model, self._losses_of, everyone, rest)
        if guilty is None:
            shares = sorted(((float(value.norm()), name) for name, value in error.items()), reverse=True)
            names = ", ".join(name for _, name in shares[:3])
            guilty = (
                "no module couples samples, so the loss does (a mean over "
                f"tokens or samples?); most in {names}"
            )
        raise NotPrivateError(f"{what}; {guilty}")


_UNBOUNDED = Clipping(clip_norm=3e37)


def _first_coupled_module(
    model: nn.Module, losses_of: LossesOf, everyone: list[int], rest: list[int]
) -> str | None:
    """Name the first module whose output for a sample depends on who else is in the batch while its input
    does not.
    """
    full = list(_trace(model, losses_of(everyone)))
    part = list(_trace(model, losses_of(rest)))
    for (name, module, inputs, output), (_, _, inputs_part, output_part) in zip(full, part, strict=False):
        if any(True for _ in module.children()):
            continue
        same_input = all(_agree(a, b, everyone, rest) for a, b in zip(inputs, inputs_part, strict=False))
        if same_input and not _agree(output, output_part, everyone, rest):
            return f"{name} ({type(module).__name__}) mixes the samples of a batch"
    return None


def _trace(model: nn.Module, losses: Losses) -> Iterator[tuple[str, nn.Module, list[Tensor], Tensor]]:
    calls: list[tuple[str, nn.Module, list[Tensor], Tensor]] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[object, ...], output: object) -> None:
            if isinstance(output, Tensor):
                inputs = []
                for value in args:
                    if isinstance(value, Tensor):
                        inputs.append(value.detach().clone())
                calls.append((name, module, inputs, output.detach().clone()))

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            losses()
    finally:
        for handle in handles:
            handle.remove()
    return iter(calls)


def _agree(full: Tensor, part: Tensor, everyone: list[int], rest: list[int]) -> bool:
    if full.shape[:1] != (len(everyone),) or part.shape != (len(rest), *full.shape[1:]):
        return full.shape != part.shape or torch.equal(full, part)
    others = full[[everyone.index(j) for j in rest]]
    return torch.allclose(
        others.double(), part.double(), rtol=1e-3, atol=1e-5 * float(others.abs().max() or 1)
    )


def _difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() - right[name].double() for name, value in left.items()}


def _norm(parts: dict[str, Tensor]) -> float:
    return float(sum(float(value.double().square().sum()) for value in parts.values()) ** 0.5)


@contextmanager
def no_dropout() -> Iterator[None]:
    """Make every kind of dropout the identity inside the block, module or function call, without leaving
    train mode.

    The functions of torch.nn.functional are replaced for the whole process: a torch function mode would be
    simpler but is not active while checkpoints recompute inside the backward pass. Do not train in another
    thread meanwhile.
    """
    attention: Callable[..., Tensor] = F.scaled_dot_product_attention

    def attend(*args: object, **kwargs: object) -> Tensor:
        # dropout_p is the fifth positional argument
        if len(args) > 4:
            return attention(*args[:4], 0.0, *args[5:], **kwargs)
        return attention(*args, **(kwargs | {"dropout_p": 0.0}))

    def keep(input: Tensor, *args: object, **kwargs: object) -> Tensor:
        return input

    originals = {}
    for name in (*_DROPOUTS, "scaled_dot_product_attention"):
        originals[name] = getattr(F, name)
    try:
        for name in _DROPOUTS:
            setattr(F, name, keep)
        # mypy holds the function to its exact type
        setattr(F, "scaled_dot_product_attention", attend)  # noqa: B010
        yield
    finally:
        for name, original in originals.items():
            setattr(F, name, original)


_DROPOUTS = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
