"""How each kind of trainable layer tells one sample's gradient from another's, in the one backward pass.

While the engine records, a covered module runs a custom autograd function in place of its own forward. The
function returns no gradient for the parameters, so autograd never forms the batch sum that differential
privacy cannot use; it records what the per-sample gradient is made of instead. Inputs must have samples along
their first axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from defenses.dp.expanded import ExpandedParameter
from defenses.errors import NotPrivateError
from defenses.foreign import AutogradContext, LibraryLayer


@dataclass(slots=True)
class Dense:
    """Hold per-sample gradients as they are: `[batch, *shape]`."""

    values: Tensor

    @property
    def batch(self) -> int:
        return self.values.shape[0]


@dataclass(slots=True)
class Outer:
    """Hold the per-sample gradient `sum_t rows[b, t] columns[b, t]^T` by factors `[batch, t, r]`, `[batch, t,
    c]`.
    """

    rows: Tensor
    columns: Tensor

    @property
    def batch(self) -> int:
        return self.rows.shape[0]

    def dense(self, shape: torch.Size) -> Dense:
        """Multiply the factors out."""
        product = torch.bmm(self.rows.float().transpose(1, 2), self.columns.float())
        return Dense(product.reshape(self.batch, *shape))

    def smallest(self, shape: torch.Size) -> Dense | Outer:
        """Keep whichever of product and factors needs less memory."""
        tokens, rows, columns = self.rows.shape[1], self.rows.shape[2], self.columns.shape[2]
        return self.dense(shape) if rows * columns <= tokens * (rows + columns) else self


@dataclass(slots=True)
class Rows:
    """Hold the per-sample gradient of a lookup table: `values[b, t]` lands on row `indices[b, t]`."""

    indices: Tensor
    values: Tensor

    @property
    def batch(self) -> int:
        return self.values.shape[0]

    def dense(self, shape: torch.Size) -> Dense:
        """Scatter the values into `[batch, *shape]`."""
        size, width = shape
        out = self.values.new_zeros(self.batch * size, width, dtype=torch.float32)
        offset = torch.arange(self.batch, device=self.indices.device)[:, None] * size
        out.index_add_(0, (self.indices + offset).reshape(-1), self.values.float().reshape(-1, width))
        return Dense(out.reshape(self.batch, size, width))

    def smallest(self, shape: torch.Size) -> Dense | Rows:
        """Keep whichever of table and lookups needs less memory."""
        tokens, width = self.values.shape[1:]
        return self.dense(shape) if shape.numel() <= tokens * (width + 2) else self


Use = Dense | Outer | Rows


@dataclass(slots=True)
class Recorder:
    """Collect every use of every trained parameter during one backward pass."""

    batch: int | None = None
    uses: dict[nn.Parameter, list[Use]] = field(default_factory=dict)

    def add(self, parameter: nn.Parameter, use: Use) -> None:
        """Note one use; a parameter may be used many times."""
        if isinstance(use, Outer | Rows):
            use = use.smallest(parameter.shape)
        self.uses.setdefault(parameter, []).append(use)

    def spread(self, x: Tensor) -> Tensor:
        """Give every sample its own row of an input that the model feeds once for the whole batch."""
        if self.batch is not None and self.batch > 1 and x.ndim > 1 and x.shape[0] == 1:
            return x.expand(self.batch, *x.shape[1:])
        return x

    def expand(self, parameter: nn.Parameter, batch: int, ndim: int) -> Tensor:
        """Return the parameter as `[batch, 1, ..., 1, *shape]` with `ndim` axes; its gradient is recorded by
        sample.
        """
        if not parameter.requires_grad:
            return parameter
        middle = [1] * (ndim - 1 - parameter.ndim)
        return _expand(parameter, self, (batch, *middle, *parameter.shape))


def tokens(x: Tensor) -> Tensor:
    """Merge all axes between the first and the last: `[batch, t, width]`."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: AutogradContext, parameter: nn.Parameter, recorder: Recorder, shape: tuple[int, ...]
    ) -> Tensor:
        ctx.recorder, ctx.parameter = recorder, parameter
        return parameter.detach().expand(shape)

    @staticmethod
    def backward(ctx: AutogradContext, *gradients: Tensor) -> tuple[None, None, None]:
        gradient = gradients[0].float()
        ctx.recorder.add(ctx.parameter, Dense(gradient.reshape(gradient.shape[0], *ctx.parameter.shape)))
        return None, None, None


class _Linear(torch.autograd.Function):
    """y = x W^T + b, with W `[out, in]`, or `[in, out]` when `transposed`."""

    @staticmethod
    def forward(
        ctx: AutogradContext,
        x: Tensor,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        recorder: Recorder,
        transposed: bool,
    ) -> Tensor:
        ctx.recorder, ctx.parameters, ctx.transposed, ctx.dtype = (
            recorder,
            (weight, bias),
            transposed,
            x.dtype,
        )
        ctx.save_for_backward(x if weight.requires_grad else None)
        return F.linear(x, weight.t() if transposed else weight, bias)

    @staticmethod
    def backward(ctx: AutogradContext, *gradients: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        gradient = gradients[0]
        (x,) = ctx.saved_tensors
        weight, bias = ctx.parameters
        if x is not None:
            inner, outer = tokens(x), tokens(gradient)
            ctx.recorder.add(weight, Outer(inner, outer) if ctx.transposed else Outer(outer, inner))
        if bias is not None and bias.requires_grad:
            ctx.recorder.add(bias, Dense(tokens(gradient).sum(1, dtype=torch.float32)))
        back = None
        if ctx.needs_input_grad[0]:
            matrix = weight.detach().to(gradient.dtype)
            back = (gradient @ (matrix.t() if ctx.transposed else matrix)).to(ctx.dtype)
        return back, None, None, None, None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: AutogradContext, indices: Tensor, weight: nn.Parameter, padding: int | None, recorder: Recorder
    ) -> Tensor:
        ctx.recorder, ctx.parameter, ctx.padding = recorder, weight, padding
        ctx.save_for_backward(indices)
        return F.embedding(indices, weight)

    @staticmethod
    def backward(ctx: AutogradContext, *gradients: Tensor) -> tuple[None, None, None, None]:
        (indices,) = ctx.saved_tensors
        gradient = gradients[0]
        if ctx.padding is not None:
            gradient = gradient.masked_fill((indices == ctx.padding).unsqueeze(-1), 0.0)
        lookups = indices.reshape(indices.shape[0], -1)
        ctx.recorder.add(ctx.parameter, Rows(lookups, gradient.reshape(*lookups.shape, -1)))
        return None, None, None, None


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: AutogradContext,
        x: Tensor,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        recorder: Recorder,
        layer: nn.Conv2d,
    ) -> Tensor:
        ctx.recorder, ctx.parameters, ctx.shape, ctx.dtype = recorder, (weight, bias), x.shape, x.dtype
        ctx.kernel = layer.kernel_size
        ctx.geometry = {"stride": layer.stride, "padding": _padding(layer), "dilation": layer.dilation}
        ctx.save_for_backward(x if weight.requires_grad else None)
        return F.conv2d(x, weight, bias, **ctx.geometry)

    @staticmethod
    def backward(ctx: AutogradContext, *gradients: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        gradient = gradients[0]
        weight, bias = ctx.parameters
        (x,) = ctx.saved_tensors
        pixels = gradient.flatten(2).transpose(1, 2)
        if x is not None:
            patches = F.unfold(x, ctx.kernel, **ctx.geometry).transpose(1, 2)
            ctx.recorder.add(weight, Outer(pixels, patches))
        if bias is not None and bias.requires_grad:
            ctx.recorder.add(bias, Dense(pixels.sum(1, dtype=torch.float32)))
        back = None
        if ctx.needs_input_grad[0]:
            matrix = weight.detach().to(gradient.dtype)
            back = _conv2d_input(ctx.shape, matrix, gradient, **ctx.geometry).to(ctx.dtype)
        return back, None, None, None, None


class _RelativeBias(torch.autograd.Function):
    """Hand `[1, heads, queries, keys]` of table lookups to every sample as `[batch, ...]`."""

    @staticmethod
    def forward(
        ctx: AutogradContext,
        bias: Tensor,
        buckets: Tensor,
        weight: nn.Parameter,
        recorder: Recorder,
        batch: int,
    ) -> Tensor:
        ctx.recorder, ctx.parameter = recorder, weight
        ctx.save_for_backward(buckets)
        return bias.detach().expand(batch, *bias.shape[1:])

    @staticmethod
    def backward(ctx: AutogradContext, *gradients: Tensor) -> tuple[None, None, None, None, None]:
        (buckets,) = ctx.saved_tensors
        values = gradients[0].permute(0, 2, 3, 1).flatten(1, 2)
        ctx.recorder.add(ctx.parameter, Rows(buckets.reshape(1, -1).expand(values.shape[0], -1), values))
        return None, None, None, None, None


# torch leaves these untyped; here is the only place that has to know.
_conv2d_input: Callable[..., Tensor] = conv2d_input
_expand: Callable[[nn.Parameter, Recorder, tuple[int, ...]], Tensor] = _Expand.apply
_linear: Callable[[Tensor, nn.Parameter, nn.Parameter | None, Recorder, bool], Tensor] = _Linear.apply
_embedding: Callable[[Tensor, nn.Parameter, int | None, Recorder], Tensor] = _Embedding.apply
_conv2d: Callable[[Tensor, nn.Parameter, nn.Parameter | None, Recorder, nn.Conv2d], Tensor] = _Conv2d.apply
_relative_bias: Callable[[Tensor, Tensor, nn.Parameter, Recorder, int], Tensor] = _RelativeBias.apply


@dataclass(frozen=True, slots=True)
class Cover:
    """Say how one module is covered: the attribute replaced while recording, and the parameters this takes
    care of.
    """

    module: nn.Module
    attribute: str
    replacement: Callable[..., Tensor]
    parameters: tuple[nn.Parameter, ...]


def seen_once(module: nn.Module) -> bool:
    """Return whether an adapter library feeds this prompt as a batch of one and repeats the output.

    No gradient by sample exists there, whatever is hooked.
    """
    source = type(module).__module__
    return source.startswith("peft.tuners.") and type(module).__name__ in {
        "PromptEmbedding",
        "PromptEncoder",
        "MultitaskPromptEmbedding",
        "CPTEmbedding",
    }


def cover(module: nn.Module, recorder: Recorder) -> Cover | None:
    """Return the cover of a module with trainable parameters,
    or None when this kind of module is not known.
    """
    if "forward" in module.__dict__:
        return None  # somebody already replaced this module's forward; what it does is not known
    for build in (_cover_core, _cover_norm, _cover_adapter, _cover_relative_bias, _cover_broadcast):
        built = build(module, recorder)
        if built is not None:
            return built
    return None


def _forward(
    module: nn.Module, replacement: Callable[..., Tensor], parameters: Iterable[nn.Parameter]
) -> Cover:
    return Cover(module, "forward", replacement, tuple(p for p in parameters if p.requires_grad))


def _cover_core(module: LibraryLayer, recorder: Recorder) -> Cover | None:
    named = dict(module.named_parameters(recurse=False))
    own = [value for name, value in named.items() if name in ("weight", "bias", "value")]
    runs, spread = type(module).forward, recorder.spread
    if runs is nn.Linear.forward:
        return _forward(
            module, lambda input: _linear(spread(input), module.weight, module.bias, recorder, False), own
        )
    if _is(module, "transformers.pytorch_utils", "Conv1D"):
        return _forward(module, lambda x: _linear(spread(x), module.weight, module.bias, recorder, True), own)
    if runs is nn.Embedding.forward and module.max_norm is None and not module.scale_grad_by_freq:
        padding = module.padding_idx
        return _forward(
            module, lambda input: _embedding(spread(input), module.weight, padding, recorder), own
        )
    if runs is nn.Conv2d.forward and _plain(module):
        return _forward(
            module, lambda input: _conv2d(spread(input), module.weight, module.bias, recorder, module), own
        )
    if isinstance(module, ExpandedParameter):
        value = module.value
        return _forward(module, lambda batch_size: recorder.expand(value, batch_size, value.ndim + 1), own)
    return None


def _plain(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and module.groups == 1
        and module.padding_mode == "zeros"
        and (module.padding != "same" or all(size % 2 for size in module.kernel_size))
    )


def _padding(layer: nn.Conv2d) -> tuple[int, ...]:
    """Return how many zeros stand on each side, for a padding given in words too ("same" with odd kernels
    only).
    """
    if layer.padding == "valid":
        return (0, 0)
    if layer.padding == "same":
        return tuple(d * (size - 1) // 2 for d, size in zip(layer.dilation, layer.kernel_size, strict=True))
    return layer.padding  # type: ignore[return-value]


def _cover_norm(module: nn.Module, recorder: Recorder) -> Cover | None:
    own = dict(module.named_parameters(recurse=False))
    runs = type(module).forward
    if runs is nn.LayerNorm.forward or runs is nn.RMSNorm.forward:
        return _forward(module, lambda x: _affine(module, recorder, recorder.spread(x)), own.values())
    if not type(module).__name__.endswith(("RMSNorm", "LayerNorm")) or any(True for _ in module.children()):
        return None
    if not own.keys() <= {"weight", "bias"} or any(value.ndim != 1 for value in own.values()):
        return None
    return _shadowed(module, own, recorder, lambda value, x: recorder.expand(value, x.shape[0], x.ndim))


def _affine(module: LibraryLayer, recorder: Recorder, x: Tensor) -> Tensor:
    shape: list[int] = list(module.normalized_shape)
    if type(module).forward is nn.RMSNorm.forward:
        y = F.rms_norm(x, shape, None, module.eps)
    else:
        y = F.layer_norm(x, shape, None, None, module.eps)
    scaled = y * recorder.expand(module.weight, x.shape[0], x.ndim)
    bias = getattr(module, "bias", None)
    return (scaled if bias is None else scaled + recorder.expand(bias, x.shape[0], x.ndim)).to(y.dtype)


def _shadowed(
    module: nn.Module,
    own: dict[str, nn.Parameter],
    recorder: Recorder,
    expand: Callable[[nn.Parameter, Tensor], Tensor],
) -> Cover:
    """Run the module's own forward while each parameter name shows a per-sample tensor that broadcasts."""
    original = module.forward
    compared = False

    def forward(x: Tensor, *args: object, **kwargs: object) -> Tensor:
        nonlocal compared
        x = recorder.spread(x)
        shape = None if compared else _plain_shape(original, x, args, kwargs)
        trained = {name: value for name, value in own.items() if value.requires_grad}
        try:
            for name, value in trained.items():
                module.__dict__[name] = expand(value, x)
            result: Tensor = original(x, *args, **kwargs)
        finally:
            for name in trained:
                module.__dict__.pop(name, None)
        if shape is not None and result.shape != shape:
            raise NotPrivateError(
                f"{type(module).__name__} does more with its parameters than broadcast them: its output "
                f"changes from {tuple(shape)} to {tuple(result.shape)} when every sample has its own copy"
            )
        compared = True
        return result

    return _forward(module, forward, own.values())


def _plain_shape(
    original: Callable[..., Tensor], x: Tensor, args: tuple[object, ...], kwargs: dict[str, object]
) -> torch.Size:
    """Return the shape of the module's own output,
    without touching the random state that dropout draws from.
    """
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []), torch.no_grad():
        return original(x, *args, **kwargs).shape


def _cover_broadcast(module: nn.Module, recorder: Recorder) -> Cover | None:
    """Cover parameters of leading size 1 (class tokens, position tables) that the module broadcasts over the
    batch.
    """
    own = {name: value for name, value in module.named_parameters(recurse=False) if value.requires_grad}
    if not own or any(value.ndim < 3 or value.shape[0] != 1 for value in own.values()):
        return None
    if any(base.__module__.startswith("torch.") and base is not nn.Module for base in type(module).__mro__):
        return None  # layers of torch do more with their weights than broadcast them
    return _shadowed(
        module, own, recorder, lambda value, x: _expand(value, recorder, (x.shape[0], *value.shape[1:]))
    )


def _cover_adapter(module: LibraryLayer, recorder: Recorder) -> Cover | None:
    if _is(module, "peft.tuners.lora.layer", "Embedding") and not module.lora_variant:
        factors = [*module.lora_embedding_A.values(), *module.lora_embedding_B.values()]
        return _forward(module, _lora_embedding(module, recorder), factors)
    if _is(module, "peft.tuners.ia3.layer", "Linear"):
        return _forward(module, _ia3(module, recorder), module.ia3_l.values())
    if _is(module, "peft.tuners.lora.dora", "DoraLinearLayer"):
        return _forward(module, _dora(module, recorder), module.parameters(recurse=False))
    return None


def _is(module: nn.Module, source: str, name: str) -> bool:
    return type(module).__module__ == source and type(module).__name__ == name


def _lora_embedding(layer: LibraryLayer, recorder: Recorder) -> Callable[..., Tensor]:
    """Rewrite LoRA over a lookup: base(x) + scaling * lookup(A^T, x) B^T."""
    original = layer.forward

    def forward(x: Tensor, *args: object, **kwargs: object) -> Tensor:
        if layer.disable_adapters or layer.merged or kwargs.get("adapter_names") is not None:
            plain: Tensor = original(x, *args, **kwargs)
            return plain
        result: Tensor = layer.base_layer(x, *args, **kwargs)
        scale = layer._get_embed_scale()
        x = recorder.spread(x)
        for name in layer.active_adapters:
            if name in layer.lora_embedding_A and name not in layer.lora_variant:
                low = _lookup_transposed(
                    x, layer.lora_embedding_A[name], layer.base_layer.padding_idx, recorder
                )
                change = (
                    _linear(low, layer.lora_embedding_B[name], None, recorder, False) * layer.scaling[name]
                )
                result = result + (change if scale is None else change * scale.to(change.dtype))
        return result

    return forward


class _LookupTransposed(torch.autograd.Function):
    """Look columns of `[width, size]` up; the gradient is recorded by sample as `[batch, width, size]`."""

    @staticmethod
    def forward(
        ctx: AutogradContext, indices: Tensor, table: nn.Parameter, padding: int | None, recorder: Recorder
    ) -> Tensor:
        ctx.recorder, ctx.parameter, ctx.padding = recorder, table, padding
        ctx.save_for_backward(indices)
        return F.embedding(indices, table.t())

    @staticmethod
    def backward(ctx: AutogradContext, *gradients: Tensor) -> tuple[None, None, None, None]:
        (indices,) = ctx.saved_tensors
        gradient = gradients[0]
        if ctx.padding is not None:
            gradient = gradient.masked_fill((indices == ctx.padding).unsqueeze(-1), 0.0)
        lookups = indices.reshape(indices.shape[0], -1)
        width, size = ctx.parameter.shape
        rows = Rows(lookups, gradient.reshape(*lookups.shape, width)).dense(torch.Size((size, width)))
        ctx.recorder.add(ctx.parameter, Dense(rows.values.transpose(1, 2)))
        return None, None, None, None


_lookup_transposed: Callable[[Tensor, nn.Parameter, int | None, Recorder], Tensor] = _LookupTransposed.apply


def _ia3(layer: LibraryLayer, recorder: Recorder) -> Callable[..., Tensor]:
    """Rewrite IA3: every sample multiplies the input or the output by its own copy of the vector."""
    original = layer.forward

    def forward(x: Tensor, *args: object, **kwargs: object) -> Tensor:
        if layer.disable_adapters or layer.merged:
            plain: Tensor = original(x, *args, **kwargs)
            return plain
        target = x if layer.is_feedforward else layer.base_layer(x, *args, **kwargs)
        scaled = recorder.spread(target)
        for name in layer.active_adapters:
            if name in layer.ia3_l:
                vector = layer.ia3_l[name]
                shape = (scaled.shape[0], *[1] * (scaled.ndim - 2), vector.numel())
                scaled = scaled * _expand_flat(vector, recorder, shape)
        scaled = scaled.to(target.dtype)
        if layer.is_feedforward:
            result: Tensor = layer.base_layer(scaled, *args, **kwargs)
        else:
            result = scaled
        return result

    return forward


def _expand_flat(parameter: nn.Parameter, recorder: Recorder, shape: tuple[int, ...]) -> Tensor:
    batch = shape[0]
    return _expand(parameter, recorder, (batch, *parameter.shape)).reshape(shape)


def _dora(layer: LibraryLayer, recorder: Recorder) -> Callable[..., Tensor]:
    """Rewrite DoRA: (m - 1) base(x) + m scaling B A x with m = magnitude / norm, the norm a constant to the
    gradient.

    Source: Liu et al. 2024 (arXiv 2402.09353), section 4.3.
    """

    def forward(
        x: Tensor,
        *,
        lora_A: nn.Module,
        lora_B: nn.Module,
        scaling: float,
        base_layer: LibraryLayer,
        base_result: Tensor | None = None,
        adapter_name: str = "default",
    ) -> Tensor:
        with torch.no_grad():
            change = layer.get_lora_weight(lora_A=lora_A, lora_B=lora_B, adapter_name=adapter_name).to(
                x.dtype
            )
            weight = base_layer.weight.to(x.dtype)
            norm = layer.get_weight_norm(
                weight=weight, lora_weight=change, scaling=scaling, adapter_name=adapter_name
            )
        if base_result is None:
            base_result = F.linear(x, weight.t() if layer.fan_in_fan_out else weight)
        elif base_layer.bias is not None:
            base_result = base_result - base_layer.bias
        base_result = recorder.spread(base_result)
        magnitude = recorder.expand(layer.weight, base_result.shape[0], base_result.ndim) / norm
        low: Tensor = lora_B(lora_A(x))
        result: Tensor = (magnitude - 1) * base_result + magnitude * low * scaling
        return result

    return forward


BIAS_METHODS = ("compute_bias", "compute_position_bias")  # T5's name for it, and MPNet's


def _cover_relative_bias(module: LibraryLayer, recorder: Recorder) -> Cover | None:
    """Cover the relative position table of T5-style attention,
    which is looked up once for the whole batch.
    """
    table = getattr(module, "relative_attention_bias", None)
    attribute = next((name for name in BIAS_METHODS if hasattr(module, name)), "")
    if not isinstance(table, nn.Embedding) or not attribute:
        return None
    original: Callable[..., Tensor] = getattr(module, attribute)
    weight: nn.Parameter = table.weight  # type: ignore[assignment]

    def compute_bias(*args: object, **kwargs: object) -> Tensor:
        inputs: list[Tensor] = []

        def look_up(buckets: Tensor) -> Tensor:
            inputs.append(buckets)
            return F.embedding(buckets, weight)

        own_forward = table.__dict__.get("forward")
        table.__dict__["forward"] = look_up
        try:
            bias = original(*args, **kwargs)
        finally:
            if own_forward is None:
                del table.__dict__["forward"]
            else:
                table.__dict__["forward"] = own_forward
        return _relative_bias(bias[:1], inputs[0], weight, recorder, recorder.batch or 1)

    return Cover(module, attribute, compute_bias, (weight,) if weight.requires_grad else ())
