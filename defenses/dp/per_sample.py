"""Clipped sums of per-sample gradients from one forward and one backward pass."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Self, cast

import torch
from torch import Tensor, nn

from defenses.dp.clip import Clipping
from defenses.dp.layers import BIAS_METHODS, Cover, Dense, Outer, Recorder, Rows, Use, cover, seen_once
from defenses.dp.subclasses import cover_subclass
from defenses.errors import NotPrivateError, ParameterError

Losses = Callable[[], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClippedSum:
    """Hold the sum over samples of clipped gradients in float64, with the bound that was applied.

    A large sum in float32 rounds away part of every sample, differently when one is missing: one sample moved
    the sum of 4,096 by 1.25 times its bound when they were added one by one. `batch_size` and `within`
    (samples whose norm was at most the bound) are private: they leave only with noise.
    """

    gradients: dict[str, Tensor]
    batch_size: int
    clip: Clipping
    within: int = 0

    def __add__(self, other: ClippedSum) -> ClippedSum:
        """Add another micro-batch of the same step."""
        if self.clip != other.clip or self.gradients.keys() != other.gradients.keys():
            raise ParameterError("only sums with the same parameters and the same clipping can be added")
        gradients = {}
        for name, value in self.gradients.items():
            gradients[name] = value + other.gradients[name]
        return ClippedSum(
            gradients=gradients,
            batch_size=self.batch_size + other.batch_size,
            clip=self.clip,
            within=self.within + other.within,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSums:
    """Hold the sums over one group of samples: as they are, and clipped. Both are private."""

    plain: dict[str, Tensor]
    clipped: ClippedSum


class PerSampleEngine:
    """Compute sums of clipped per-sample gradients of a model's trainable parameters.

    The model is untouched between calls: modules are rerouted only while a loss is computed and
    differentiated. `close()` forgets the model; the engine is also a context manager.

    Guarantee: one forward and one backward pass; every sample contributes at most the clipping bound (norms
    and factors in float32 whatever the precision of the forward pass, sums of more than a few samples in
    float64); a sample with NaN or Inf contributes zero; a gradient that reaches a parameter by any path the
    engine does not see is an error, not a leak.
    Assumes: each loss depends on its own sample only. `probe_sensitivity` checks that on random data.
    Raises: NotPrivateError, naming the culprit, for anything outside the covered kinds.
    """

    def __init__(self, model: nn.Module, *, parameters: Mapping[str, nn.Parameter] | None = None) -> None:
        trainable = {}
        for name, value in model.named_parameters():
            if value.requires_grad:
                trainable[name] = value
        self._model = model
        self._recorder = Recorder()
        self._names = _names(trainable, parameters)
        self._covers = _covers(model, self._recorder)
        self._parameters = {name: parameter for parameter, name in self._names.items()}
        self._batch_norms = [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.modules.instancenorm._InstanceNorm)
        ]
        self._graph_seen = False
        self._closed = False
        _refuse(_prompts_seen_once(model) + _uncovered(model, self._covers, trainable))
        self._refuse_batch_statistics()

    @property
    def model(self) -> nn.Module:
        """Return the model."""
        return self._model

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Return the trained parameters by name."""
        return dict(self._parameters)

    def clipped_sum(self, losses: Losses, *, clip: Clipping, batch_size: int | None = None) -> ClippedSum:
        """Sum the clipped gradients of a batch; `losses()` runs the forward pass and returns `[batch]`
        losses.

        `batch_size` is needed only when the forward pass does not go through the engine's model and some
        input is fed once for the whole batch.
        """
        uses, values = self._differentiate(losses, batch_size)
        with (
            torch.no_grad()
        ):  # layer inputs still carry the forward pass's graph, which must not grow into the sums
            return self._clip(uses, values, clip)

    def group_sums(self, losses: Losses, *, clip: Clipping, groups: Tensor) -> list[GroupSums]:
        """Sum the gradients of several groups of samples of one batch, plain and clipped, in one pass.

        `groups` is boolean `[groups, batch]`; a sample may be in many groups or none. For audits, which ask
        what would have been sent had other samples of the batch been in the step.
        """
        uses, values = self._differentiate(losses, None)
        with torch.no_grad():
            squared = self._squared(uses, values)
            factors = clip.factors(squared)
            sums = []
            for group in groups:
                inside = group.to(values.device).float()
                finite = dict.fromkeys(uses, inside * torch.isfinite(values))
                weighted = {name: factors[name] * inside for name in uses}
                own = {name: norms[group] for name, norms in squared.items()}
                clipped = ClippedSum(
                    gradients=self._weighted(uses, weighted),
                    batch_size=int(group.sum()),
                    clip=clip,
                    within=clip.within(own) if clip.kind == "adaptive" else 0,
                )
                sums.append(GroupSums(plain=self._weighted(uses, finite), clipped=clipped))
            return sums

    def _clip(self, uses: dict[str, list[Use]], values: Tensor, clip: Clipping) -> ClippedSum:
        squared = self._squared(uses, values)
        if not squared:
            return self.empty(clip)
        sums = self._weighted(uses, clip.factors(squared))
        within = clip.within(squared) if clip.kind == "adaptive" else 0
        return ClippedSum(gradients=sums, batch_size=len(values), clip=clip, within=within)

    def _squared(self, uses: dict[str, list[Use]], values: Tensor) -> dict[str, Tensor]:
        """Return the squared norm of every sample's gradient by parameter, infinite where its loss is no
        number.
        """
        poisoned = ~torch.isfinite(values)
        squared, grams = {}, Grams()
        for name, parts in uses.items():
            norms = _squared_norm(parts, self._parameters[name], grams)
            squared[name] = torch.where(poisoned, torch.inf, norms)
        return squared

    def _weighted(self, uses: dict[str, list[Use]], factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the sum over samples of their gradients times their factors, in float64."""
        sums = {}
        for name, parameter in self._parameters.items():
            sums[name] = _summed(uses.get(name, []), factors.get(name), parameter)
        return sums

    def per_sample(self, losses: Losses, *, batch_size: int | None = None) -> dict[str, Tensor]:
        """Return every gradient as `[batch, *shape]`: for tests and small models, nothing is clipped."""
        uses, values = self._differentiate(losses, batch_size)
        result = {}
        for name, parameter in self._parameters.items():
            parts = []
            for part in uses.get(name, []):
                parts.append(_dense(part, parameter.shape).values.detach())
            zero = torch.zeros(len(values), *parameter.shape, device=parameter.device)
            result[name] = torch.stack(parts).sum(0) if parts else zero
        return result

    def empty(self, clip: Clipping) -> ClippedSum:
        """Return the sum over an empty batch: zeros, to which the step still adds its noise."""
        return ClippedSum(gradients=self._zeros(), batch_size=0, clip=clip)

    def _zeros(self) -> dict[str, Tensor]:
        return {name: _nothing(value) for name, value in self._parameters.items()}

    def close(self) -> None:
        """Let go of the model."""
        self._closed = True
        self._covers = []
        self._recorder.uses.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _differentiate(self, losses: Losses, batch_size: int | None) -> tuple[dict[str, list[Use]], Tensor]:
        if self._closed:
            raise ParameterError("the engine is closed; open a new one")
        self._refuse_batch_statistics()
        self._refuse_new_parameters()
        try:
            with self._recording(batch_size):
                values = losses()
                _check_losses(values, self._recorder.batch)
                self._refuse_foreign_leaves(values)
                if values.requires_grad:
                    torch.autograd.backward(values, torch.ones_like(values))
            self._refuse_stray_gradients()
            uses = {}
            for parameter, parts in self._recorder.uses.items():
                uses[self._names[parameter]] = parts
        finally:
            self._recorder.uses = {}
        for name, parts in uses.items():
            other_batches = {part.batch for part in parts} - {len(values)}
            if other_batches:
                raise NotPrivateError(
                    f"{name}: its module saw {sorted(other_batches)} rows where the batch has {len(values)} "
                    "samples; the first axis of its input must be the batch (a prompt fed "
                    "once must be an ExpandedParameter)"
                )
        return uses, values.detach()

    @contextmanager
    def _recording(self, batch_size: int | None) -> Iterator[None]:
        gradients = {name: parameter.grad for name, parameter in self._parameters.items()}
        for parameter in self._parameters.values():
            parameter.grad = None
        self._recorder.batch = batch_size
        watch = None
        if not batch_size:
            watch = self._model.register_forward_pre_hook(self._note_batch, with_kwargs=True)
        before = [(item, item.module.__dict__.get(item.attribute)) for item in self._covers]
        try:
            for item in self._covers:
                item.module.__dict__[item.attribute] = item.replacement
            yield
            self._stray = [name for name, parameter in self._parameters.items() if parameter.grad is not None]
        finally:
            for item, value in before:
                if value is None:
                    item.module.__dict__.pop(item.attribute, None)
                else:
                    item.module.__dict__[item.attribute] = value
            if watch is not None:
                watch.remove()
            for name, parameter in self._parameters.items():
                parameter.grad = gradients[name]

    def _note_batch(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        tensors = []
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.ndim > 1:
                tensors.append(value)
        sizes = {value.shape[0] for value in tensors}
        self._recorder.batch = max(sizes) if sizes and len(sizes - {1}) <= 1 else None

    def _refuse_stray_gradients(self) -> None:
        if self._stray:
            raise NotPrivateError(
                f"{', '.join(self._stray)}: a gradient arrived outside the covered modules, so it is not "
                "per sample; the parameter is used by another path than its module's forward"
            )

    def _refuse_foreign_leaves(self, values: Tensor) -> None:
        """Walk the graph once: a trainable leaf the engine does not know would be trained without a bound."""
        if self._graph_seen or values.grad_fn is None:
            return
        known = set(self._names)
        foreign = []
        for leaf in _leaves(values):
            if isinstance(leaf, nn.Parameter) and leaf not in known:
                foreign.append(leaf)
        if foreign:
            shapes = ", ".join(str(tuple(leaf.shape)) for leaf in foreign)
            raise NotPrivateError(
                f"the loss trains parameters of shape {shapes} that are not part of the model"
            )
        self._graph_seen = True

    def _refuse_batch_statistics(self) -> None:
        guilty = []
        for name, module in self._batch_norms:
            if _mixes(module):
                guilty.append(
                    f"{name} ({type(module).__name__}: statistics over the batch mix samples; "
                    "call .eval() on it or replace it)"
                )
        _refuse(guilty)

    def _refuse_new_parameters(self) -> None:
        trainable = []
        for name, value in self._model.named_parameters():
            if value.requires_grad:
                trainable.append((name, value))
        fresh = [name for name, value in trainable if value not in self._names]
        _refuse([f"{name} (became trainable after the engine was opened)" for name in fresh])


def _mixes(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return module.training and module.track_running_stats
    return module.training or getattr(module, "running_mean", None) is None


def _names(
    trainable: Mapping[str, nn.Parameter], parameters: Mapping[str, nn.Parameter] | None
) -> dict[nn.Parameter, str]:
    chosen = trainable if parameters is None else parameters
    names = {parameter: name for name, parameter in chosen.items()}
    outside = [name for name, value in trainable.items() if value not in names]
    _refuse([f"{name} (trainable, but not among the parameters given to the engine)" for name in outside])
    return names


def _prompts_seen_once(model: nn.Module) -> list[str]:
    return [
        (
            f"{name} ({type(module).__name__} is fed as a batch of one and repeated; hold the "
            "prompt in an ExpandedParameter)"
        )
        for name, module in model.named_modules()
        if seen_once(module) and any(value.requires_grad for value in module.parameters())
    ]


def _covers(model: nn.Module, recorder: Recorder) -> list[Cover]:
    covers: list[Cover] = []
    owned: set[nn.Module] = set()
    for module in model.modules():
        if module in owned or not any(value.requires_grad for value in module.parameters()):
            continue
        item = cover(module, recorder) or cover_subclass(module, recorder)
        if item is not None and item.parameters:
            covers.append(item)
            if item.attribute in BIAS_METHODS:
                owned.add(cast(nn.Module, module.relative_attention_bias))
    return covers


def _uncovered(model: nn.Module, covers: list[Cover], trainable: Mapping[str, nn.Parameter]) -> list[str]:
    """Name every place that holds a trainable parameter no cover takes care of; a tied parameter has several
    places.
    """
    covered: dict[nn.Parameter, list[nn.Module]] = {}
    for item in covers:
        for parameter in item.parameters:
            covered.setdefault(parameter, []).append(item.module)
    names = {parameter: name for name, parameter in trainable.items()}
    guilty = []
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if parameter not in names:
                continue
            homes = covered.get(parameter, [])
            if not any(home is module or module in set(home.modules()) for home in homes):
                guilty.append(f"{names[parameter]} (in {path or 'the model'}, {type(module).__name__})")
    return guilty


def _refuse(guilty: list[str]) -> None:
    if guilty:
        raise NotPrivateError("no per-sample gradients for: " + "; ".join(guilty))


def _leaves(values: Tensor) -> Iterator[Tensor]:
    stack = [values.grad_fn]
    visited: set[object] = set()
    while stack:
        node = stack.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        stack.extend(parent for parent, _ in node.next_functions)


def _check_losses(values: object, batch: int | None) -> None:
    if not isinstance(values, Tensor) or values.ndim != 1:
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise NotPrivateError(
            f"losses() returned {shape}: it must return one loss per sample, shape [batch]; a mean over "
            "samples or tokens of the batch couples samples (use reduction='none' "
            "and reduce within each sample)"
        )
    if batch is not None and len(values) != batch:
        raise NotPrivateError(
            f"losses() returned {len(values)} losses for a batch of {batch}; return one a sample"
        )


def _dense(use: Use, shape: torch.Size) -> Dense:
    return use if isinstance(use, Dense) else use.dense(shape)


class Grams:
    """Inner products of all pairs of tokens, `[batch, t, t]`, of tensors that several layers share: the
    query, key and value of attention read one input. Only the newest are kept.
    """

    def __init__(self) -> None:
        self._newest: deque[tuple[Tensor, Tensor]] = deque(maxlen=_GRAMS)

    def of(self, factor: Tensor) -> Tensor:
        """Return the products of one tensor with itself."""
        for known, products in self._newest:
            if _one_and_the_same(known, factor):
                return products
        values = factor.float()
        products = torch.bmm(values, values.transpose(1, 2))
        self._newest.append((factor, products))  # which holds the storage, so its address is not used anew
        return products


_GRAMS = 4


def _one_and_the_same(left: Tensor, right: Tensor) -> bool:
    """Tell whether two tensors are views of the same numbers."""
    return (
        left.data_ptr() == right.data_ptr()
        and left.shape == right.shape
        and left.stride() == right.stride()
        and left.dtype == right.dtype
        and left.device == right.device
    )


def _squared_norm(parts: list[Use], parameter: nn.Parameter, grams: Grams) -> Tensor:
    """Return the squared norm `[batch]` of the sum of all uses of one parameter, and merge what must be
    merged.

    Norms from factors can cancel: terms far larger than the result leave their float32 rounding behind. That
    rounding is added on top, so that a norm is never taken for smaller than it is and no sample slips past
    its bound.
    """
    if len(parts) > 1 and any(isinstance(part, Dense) for part in parts):
        total = torch.stack([_dense(part, parameter.shape).values for part in parts]).sum(0)
        parts[:] = [Dense(total)]
    result = torch.zeros(parts[0].batch, device=parameter.device)
    size = torch.zeros_like(result)
    for i, left in enumerate(parts):
        own, terms = _own_norm(left, grams)
        result, size = result + own, size + terms
        for right in parts[i + 1 :]:
            result = result + 2.0 * _inner(left, right)
    return result.clamp_min(0.0) + _ROUNDING * size.square()


# Four units in the last place of float32, relative to the sum of the norms of all terms.
_ROUNDING = 2.0**-22


def _own_norm(use: Use, grams: Grams) -> tuple[Tensor, Tensor]:
    """Return the squared norm of one use, and the sum over tokens of the norms of their terms, each
    `[batch]`; of a gradient held whole there are no terms.
    """
    if isinstance(use, Dense):
        return use.values.flatten(1).square().sum(1), use.values.new_zeros(use.batch)
    if isinstance(use, Rows):
        products = grams.of(use.values)
        same = use.indices[:, :, None] == use.indices[:, None, :]
        return (products * same).sum((1, 2)), _token_norms(products).sum(1)
    rows, columns = grams.of(use.rows), grams.of(use.columns)
    return (rows * columns).sum((1, 2)), (_token_norms(rows) * _token_norms(columns)).sum(1)


def _token_norms(products: Tensor) -> Tensor:
    """Return the norm of every token, `[batch, t]`, from the products of all pairs."""
    return products.diagonal(dim1=1, dim2=2).clamp_min(0.0).sqrt()


def _nothing(parameter: nn.Parameter) -> Tensor:
    return torch.zeros(parameter.shape, dtype=torch.float64, device=_wide_device(parameter))


def _summed(parts: list[Use], factors: Tensor | None, parameter: nn.Parameter) -> Tensor:
    """Return the sum over samples of all uses of one parameter, scaled by the factors, in float64."""
    total: Tensor | None = None
    for part in parts:
        assert factors is not None, "whatever has a gradient has factors"
        for few, share in _few(part, factors):
            wide = _widened(_weighted_sum(few, share, parameter.shape))
            total = wide if total is None else total.add_(wide)
    return _nothing(parameter) if total is None else total


def _inner(left: Use, right: Use) -> Tensor:
    """Return the inner product `[batch]` of two per-sample gradients without forming them."""
    if isinstance(left, Dense) and isinstance(right, Dense):
        return torch.einsum("bn,bn->b", left.values.flatten(1), right.values.flatten(1))
    if isinstance(left, Outer) and isinstance(right, Outer):
        rows = torch.bmm(left.rows.float(), right.rows.float().transpose(1, 2))
        return (rows * torch.bmm(left.columns.float(), right.columns.float().transpose(1, 2))).sum((1, 2))
    if isinstance(left, Rows) and isinstance(right, Rows):
        same = left.indices[:, :, None] == right.indices[:, None, :]
        return (torch.bmm(left.values.float(), right.values.float().transpose(1, 2)) * same).sum((1, 2))
    if isinstance(left, Outer) and isinstance(right, Rows):
        return _inner(right, left)
    assert isinstance(left, Rows)
    assert isinstance(right, Outer)
    index = left.indices[:, None, :].expand(-1, right.rows.shape[1], -1)
    products = torch.bmm(right.columns.float(), left.values.float().transpose(1, 2))
    return (right.rows.float().gather(2, index) * products).sum((1, 2))


# Samples whose float32 products are added before the sum is widened: rounding stays below 4e-6 of the bound.
_FEW = 64


def _few(use: Use, factors: Tensor) -> Iterator[tuple[Use, Tensor]]:
    """Cut a use into parts of few samples, each with its factors."""
    if use.batch <= _FEW:
        yield use, factors
        return
    tensors = [getattr(use, field.name) for field in fields(use)]
    for start in range(0, use.batch, _FEW):
        end = start + _FEW
        yield type(use)(*(tensor[start:end] for tensor in tensors)), factors[start:end]


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(_wide_device(tensor), torch.float64)


def _wide_device(tensor: Tensor) -> torch.device:
    """Return where float64 can live: the tensor's device, or the processor where the accelerator has none."""
    return torch.device("cpu") if tensor.device.type == "mps" else tensor.device


def _weighted_sum(use: Use, factors: Tensor, shape: torch.Size) -> Tensor:
    """Sum the gradients over samples, scaled by `factors`; a factor of zero removes a sample even if it is
    NaN.
    """
    gone = factors == 0
    clean = bool(gone.any())
    if isinstance(use, Dense):
        flat = use.values.flatten(1)
        return (factors @ (flat.masked_fill(gone[:, None], 0.0) if clean else flat)).reshape(shape)
    if isinstance(use, Outer):
        rows, columns = use.rows.float() * factors[:, None, None], use.columns.float()
        if clean:
            rows = rows.masked_fill(gone[:, None, None], 0.0)
            columns = columns.masked_fill(gone[:, None, None], 0.0)
        return (rows.flatten(0, 1).t() @ columns.flatten(0, 1)).reshape(shape)
    values = use.values.float() * factors[:, None, None]
    if clean:
        values = values.masked_fill(gone[:, None, None], 0.0)
    out = torch.zeros(shape, device=values.device)
    return out.index_add_(0, use.indices.reshape(-1), values.flatten(0, 1))
