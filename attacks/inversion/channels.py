"""Linear channels: every gradient of a linear layer holds its inputs in its row space.

For z = W x + b over rows t, dW = sum_t delta_t x_t^T. One module covers ordinary linear layers, GPT-2's
transposed ones, and both LoRA factors: the gradient of A holds the layer's inputs, the gradient of B holds A
x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attacks.contract import NotApplicable
from attacks.observation import Observation

_CLEAN = 30.0  # drop of the singular values behind the last input, rounding alone varies less

_TELLING = 64  # values that few bits hold by chance in one of 2^64 cases at most
_BINADE = math.sqrt(2.0)  # a value stands on average that many times above the start of its binade

Forward = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Channel:
    """A linear layer whose gradient was observed.

    `gradient` is (out, in), `bias` the gradient of its bias if it has one.
    """

    name: str
    gradient: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Span:
    """The row space of a channel: orthonormal `basis` (rank, in) and the shape (out, in) of the gradient."""

    channel: str
    basis: Tensor
    shape: tuple[int, int]

    @property
    def rank(self) -> int:
        """Return the dimension of the row space."""
        return len(self.basis)

    @property
    def informative(self) -> bool:
        """Say whether membership can be tested at all: the space must be neither empty nor everything."""
        return 0 < self.rank < self.shape[1]

    def distance(self, vectors: Tensor) -> Tensor:
        """Return the sine of the angle between each vector (..., in) and the row space.

        0 inside, about 1 for a stranger.
        """
        unit = vectors.to(self.basis.dtype)
        unit = unit / unit.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        residual = unit - (unit @ self.basis.T) @ self.basis
        length: Tensor = torch.linalg.vector_norm(residual, dim=-1)
        return length


def is_transposed(module: nn.Module) -> bool:
    """Say whether a layer stores its weight as (in, out), as GPT-2's Conv1D does."""
    return type(module).__name__ == "Conv1D"


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that compute z = W x + b on the last axis, by name."""
    linear_modules: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or (
            is_transposed(module) and getattr(module, "weight", torch.empty(0)).ndim == 2
        ):
            linear_modules[name] = module
    return linear_modules


def observed_channels(observation: Observation, model: nn.Module) -> dict[str, Channel]:
    """Return the channels whose weight gradient was observed and is not zero, by module name, in the model's
    order.

    Raises: NotApplicable when there is none.
    """
    tensors = observation.gradient().tensors
    channels = {}
    for name, module in linear_modules(model).items():
        weight = tensors.get(f"{name}.weight")
        if weight is None or weight.ndim != 2 or not bool(weight.any()):
            continue
        if is_transposed(module):
            gradient = weight.T
        else:
            gradient = weight
        channels[name] = Channel(name=name, gradient=gradient, bias=tensors.get(f"{name}.bias"))
    if not channels:
        raise NotApplicable("no linear layer with a gradient other than zero was observed")
    return channels


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Spectrum:
    """The singular values and right singular vectors of a channel's gradient, from which spans of any rank
    are cut.
    """

    channel: str
    singular: Tensor
    right: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    rounding: float = 0.0

    def span(self, *, tolerance: float | None = None, noise: float = 0.0) -> Span:
        """Return the row space above a relative tolerance (default: rounding) and above the edge of the
        noise.

        Without a stated tolerance a cast to half precision counts as such a noise, of known size; a lower one
        looks beneath its edge, where inputs of small weight may still show.
        """
        cast = tolerance is None and self.rounding > 0.0
        if cast:
            significant = self.singular[self.singular > self.rounding]
            dtype = torch.float32
        else:
            significant = self.singular
            dtype = self.dtype
        rank = numerical_rank(significant, self.shape, noise=noise, tolerance=tolerance, dtype=dtype)
        return Span(channel=self.channel, basis=self.right[:rank], shape=self.shape)

    def clean_span(self) -> Span | None:
        """Return the row space up to the last clean gap of the singular values, None where there is none or
        it is full.

        A gap is clean where the next value is thirty times smaller than one well above rounding.
        """
        count = len(self.singular)
        if count < 2 or float(self.singular[0]) == 0.0:
            return None
        relative = self.singular / self.singular[0]
        floor = 2.0 * float(torch.finfo(self.dtype).eps)
        drops = relative[:-1] / relative[1:].clamp_min(1e-3 * floor)
        clean = ((drops >= _CLEAN) & (relative[:-1] > floor)).nonzero().flatten()
        if len(clean) == 0:
            return None
        rank = int(clean[-1]) + 1
        return Span(channel=self.channel, basis=self.right[:rank], shape=self.shape)


def cast_type(values: Tensor) -> torch.dtype | None:
    """Return the half precision every value was cast to, whatever it is stored as now, or None where it was
    not.
    """
    for kind in (torch.bfloat16, torch.float16):
        if values.dtype is kind:
            return kind
        same = values == values.to(kind).to(values.dtype)
        if values.dtype.itemsize > 2 and int((values != 0).sum()) > _TELLING and bool(same.all()):
            return kind
    return None


def rounding_edge(values: Tensor) -> float:
    """Return how large a singular value the rounding of a cast leaves in a matrix (m, n); 0 where none was
    cast.

    Rounding to nearest errs by a uniform share of the last place: by its root mean square of a value, evenly
    spread over the binades. Independent entries of deviations s_ij have a norm of at most max_i |s_i.| +
    max_j |s_.j|, to lower orders.

    Source: Bandeira and van Handel, "Sharp nonasymptotic bounds on the norm of random matrices with
    independent entries", 2016, theorem 3.1.
    """
    kind = cast_type(values)
    if kind is None:
        return 0.0
    limits = torch.finfo(kind)
    share = limits.eps / math.sqrt(12.0) / _BINADE
    deviation = (values.double().abs() * share).clamp_min(
        limits.smallest_normal * limits.eps / math.sqrt(12.0)
    )
    deviation = deviation * (values != 0)
    return float(deviation.norm(dim=1).max() + deviation.norm(dim=0).max())


def spectrum_of(channel: Channel) -> Spectrum:
    """Return the spectrum of a channel, in double precision."""
    rows, columns = channel.gradient.shape
    _, singular, right = torch.linalg.svd(channel.gradient.double(), full_matrices=False)
    return Spectrum(
        channel=channel.name,
        singular=singular,
        right=right,
        shape=(rows, columns),
        dtype=channel.gradient.dtype,
        rounding=rounding_edge(channel.gradient),
    )


def numerical_rank(
    singular: Tensor,
    shape: tuple[int, ...],
    *,
    noise: float = 0.0,
    tolerance: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Count the singular values above the floor of rounding and, with noise of that deviation per entry,
    above its edge.

    Source: the edge sigma (sqrt(m) + sqrt(n)) of a Gaussian matrix, Vershynin, "High-Dimensional
    Probability", theorem 4.4.5.
    """
    if len(singular) == 0 or float(singular[0]) == 0.0:
        return 0
    if tolerance is None:
        tolerance = float(torch.finfo(dtype).eps) * max(shape)
    edge = noise * (shape[0] ** 0.5 + shape[1] ** 0.5)
    return int((singular > max(tolerance * float(singular[0]), edge)).sum())


def end_token(model: nn.Module) -> int | None:
    """Return the token by which an encoder-decoder classifier finds the end of a text, None for every other
    model.

    Its head reads the state at the last end token, and refuses texts without one or with different numbers of
    them.
    """
    config = getattr(model, "config", None)
    end = getattr(config, "eos_token_id", None)
    headed = any(name.rpartition(".")[2] == "classification_head" for name, _ in model.named_modules())
    decoded = bool(getattr(config, "is_encoder_decoder", False))
    if decoded and headed and isinstance(end, int):
        return end
    return None


def ended(model: nn.Module, ids: Tensor) -> Tensor:
    """Return texts (n, t) that close with the end token a model's head looks for,
    and hold it nowhere else.
    """
    end = end_token(model)
    if end is None:
        return ids
    inner = torch.where(ids == end, (end + 3) % _vocabulary(model), ids)
    closing = torch.full_like(ids[:, -1:], end)
    return torch.cat([inner[:, :-1], closing], dim=1)


def _vocabulary(model: nn.Module) -> int:
    return int(getattr(getattr(model, "config", None), "vocab_size", 2**31))


def run_tokens(model: nn.Module, ids: Tensor) -> object:
    """Run a model on any tokens (n, t), for the sake of what its layers see.

    The head of an encoder-decoder classifier refuses tokens without an end only when every layer before it
    has run.
    """
    try:
        return model(input_ids=ids)
    except (ValueError, RuntimeError):
        if end_token(model) is None:
            raise
        return None


class _Enough(Exception):
    """Stops a forward pass once the last wanted input was captured."""


def capture_inputs(modules: Mapping[str, nn.Module], forward: Forward) -> dict[str, Tensor]:
    """Run a forward pass and return the input of each named module, stopping after the last one.

    Guarantee: hooks are removed whatever happens; no gradient is recorded.
    """
    captured: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            captured.setdefault(name, inputs[0].detach())  # a layer called again sees something else
            if len(captured) == len(modules):
                raise _Enough

        return keep

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        with torch.no_grad():
            forward()
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return captured


def execution_order(modules: Mapping[str, nn.Module], forward: Forward) -> list[str]:
    """Return the names of the modules in the order in which a forward pass calls them.

    Modules it never calls are left out.
    """
    order: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda _module, _inputs, name=name: order.append(name))
        for name, module in modules.items()
    ]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return list(dict.fromkeys(order))
