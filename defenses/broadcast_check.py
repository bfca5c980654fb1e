"""What a client checks before it trains on a broadcast model: signs that the model was crafted to read data.

A malicious server can change what it sends so that honest answers hold the inputs (imprint blocks, trap
weights, fishing, silenced clients, crafted adapters). Most of those leave marks in the weights: parallel
rows, evenly sorted biases, blocks of zeros or identities, huge scales, an unexpected layout. The strongest
checks need memory: frozen tensors must not change, trained ones change little in a round, and all clients
must see one digest.

Not detected by the marks alone, without `previous` or an agreed digest: trap weights and planted prompt
keys, which look like ordinary matrices, and models trained together with a secret decoder (Garov et al.,
"Hiding in Plain Sight", 2024), whose whole point is to look ordinary. Per-record clipping and noise hold
against those; this check does not.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Rule = Literal[
    "layout", "digest", "not finite", "parallel rows", "sorted biases", "zeroed block", "identity block",
    "extreme scale", "frozen tensor changed", "large jump",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Why a broadcast is refused: the rule, the tensor, and what was found against what is allowed."""

    rule: Rule
    tensor: str
    detail: str

    def __str__(self) -> str:
        return f"{self.tensor}: {self.rule} ({self.detail})"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorLayout:
    """What one tensor of the agreed architecture looks like; `zero_at_start` if its honest initial value is
    all zero.
    """

    shape: tuple[int, ...]
    dtype: str
    zero_at_start: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The bounds of the check.

    `parallel_share`: largest share of a matrix's rows that may be parallel to another row; `vocabulary_share`
    is the same for tables of tokens, where tokens that were never trained stay alike. `sorted_run`: longest
    run of rising or falling biases. `zero_share`: largest share of exact zeros in a matrix.
    `attention_scale`: largest entry of query and key projections. `scale`: largest entry of anything. `jump`:
    largest change of a matrix relative to its previous norm. `shrunk`: smallest norm of a matrix relative to
    its previous one: training does not undo a matrix in a round, what stores texts below an optimiser's
    epsilon has to.
    """

    parallel_share: float = 0.1
    vocabulary_share: float = 0.5
    sorted_run: int = 12
    zero_share: float = 0.3
    attention_scale: float = 25.0
    scale: float = 500.0
    jump: float = 1.0
    shrunk: float = 0.1


_ATTENTION = re.compile(r"(^|[._])(query|key|q_proj|k_proj|q|k|c_attn|in_proj|qkv)([._]|$)")
_VOCABULARY = re.compile(r"(embed_tokens|word_embeddings|tok_embeddings|token_embedding|wte|lm_head)[._]")
_STATISTICS = re.compile(r"(running_mean|running_var|num_batches_tracked)$")
_NARROW = 8  # in fewer dimensions rows are parallel by chance


def layout_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorLayout]:
    """Return the layout of an honest, freshly built model: names, shapes, dtypes, and which tensors start at
    zero.
    """
    return {
        name: TensorLayout(
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            zero_at_start=not bool(tensor.any()),
        )
        for name, tensor in tensors.items()
    }


def broadcast_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and contents, in the order of the names, as hexadecimal.

    Clients that compare it find a server that sends them different models.
    """
    digest = hashlib.sha256(b"ffm-secure broadcast 1")
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        header = f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode()
        digest.update(len(header).to_bytes(8, "little") + header)
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_broadcast(
    tensors: Mapping[str, Tensor],
    reference_layout: Mapping[str, TensorLayout],
    previous: Mapping[str, Tensor] | None = None,
    *,
    frozen: Collection[str] = (),
    expected_digest: str | None = None,
    limits: Limits | None = None,
) -> list[Reason]:
    """Return every reason to refuse a broadcast; an empty list means that no mark of a crafted model was
    found.

    `previous` is the broadcast this client accepted before (or its own copy of the public backbone); `frozen`
    names tensors that never change, which must equal `previous` bit for bit.

    Guarantee: a tensor missing, added, reshaped, retyped or not finite is always named; contents are judged
    only where the layout fits. Assumes: the client's own model code is used, so that a layout is an
    architecture.
    """
    bounds = limits or Limits()
    reasons = _layout(tensors, reference_layout)
    unfit = {reason.tensor for reason in reasons}
    if expected_digest is not None and broadcast_digest(tensors) != expected_digest:
        reasons.append(Reason(rule="digest", tensor="broadcast", detail="differs from the agreed digest"))
    for name, tensor in tensors.items():
        if name in unfit or _STATISTICS.search(name) or not tensor.is_floating_point():
            continue
        if not bool(torch.isfinite(tensor).all()):
            reasons.append(
                Reason(rule="not finite", tensor=name, detail="holds infinite or undefined values")
            )
            continue
        reasons.extend(_content(name, tensor.detach(), reference_layout[name], bounds))
        if previous is not None and name in previous and previous[name].shape == tensor.shape:
            reasons.extend(_memory(name, tensor.detach(), previous[name].detach(), name in frozen, bounds))
    return reasons


def _layout(tensors: Mapping[str, Tensor], reference: Mapping[str, TensorLayout]) -> list[Reason]:
    reasons = []
    for name in reference:
        if name not in tensors:
            reasons.append(Reason(rule="layout", tensor=name, detail="missing"))
    for name, tensor in tensors.items():
        wanted = reference.get(name)
        layout = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        if wanted is None:
            reasons.append(Reason(rule="layout", tensor=name, detail="not part of the agreed architecture"))
        elif layout != f"{wanted.shape} {wanted.dtype}":
            reasons.append(
                Reason(
                    rule="layout", tensor=name, detail=f"is {layout}, must be {wanted.shape} {wanted.dtype}"
                )
            )
    return reasons


def _content(name: str, tensor: Tensor, layout: TensorLayout, limits: Limits) -> list[Reason]:
    reasons = _scale(name, tensor, limits)
    if tensor.ndim == 1:
        run = longest_monotone_run(tensor)
        if run > limits.sorted_run:
            reasons.append(
                Reason(
                    rule="sorted biases", tensor=name, detail=f"{run} in order, at most {limits.sorted_run}"
                )
            )
        return reasons
    matrix = _as_matrix(tensor)
    if layout.zero_at_start and not bool(matrix.any()):
        return reasons
    if min(matrix.shape) >= 2:
        reasons.extend(_zeros(name, matrix, limits))
    for view, word in ((matrix, "rows"), (matrix.T, "columns")):
        share = parallel_share(view)
        vocabulary = word == "rows" and _VOCABULARY.search(name)
        allowed = limits.vocabulary_share if vocabulary else limits.parallel_share
        if share > allowed:
            detail = f"{share:.0%} of the {word}, at most {allowed:.0%}"
            reasons.append(Reason(rule="parallel rows", tensor=name, detail=detail))
    return reasons


def _as_matrix(tensor: Tensor) -> Tensor:
    squeezed = tensor.squeeze(0) if tensor.ndim > 2 and tensor.shape[0] == 1 else tensor
    if squeezed.ndim == 0:  # a single number, such as the scale of a model's scores
        return squeezed.reshape(1, 1).float()
    return squeezed.reshape(squeezed.shape[0], -1).float()


def _scale(name: str, tensor: Tensor, limits: Limits) -> list[Reason]:
    largest = float(tensor.abs().max()) if tensor.numel() else 0.0
    allowed = limits.attention_scale if _ATTENTION.search(name) else limits.scale
    if largest <= allowed:
        return []
    return [
        Reason(
            rule="extreme scale", tensor=name, detail=f"largest entry {largest:.3g}, at most {allowed:.3g}"
        )
    ]


def _zeros(name: str, matrix: Tensor, limits: Limits) -> list[Reason]:
    share = float((matrix == 0).double().mean())
    if share <= limits.zero_share:
        return []
    size = min(matrix.shape)
    diagonal = torch.zeros_like(matrix)
    diagonal.fill_diagonal_(1.0)
    identity = bool((matrix.diagonal() != 0).all()) and bool((matrix[diagonal == 0] == 0).all()) and size > 1
    rule: Rule = "identity block" if identity else "zeroed block"
    return [
        Reason(rule=rule, tensor=name, detail=f"{share:.0%} exact zeros, at most {limits.zero_share:.0%}")
    ]


def _memory(name: str, tensor: Tensor, before: Tensor, fixed: bool, limits: Limits) -> list[Reason]:
    if fixed:
        same = torch.equal(tensor, before)
        if same:
            return []
        return [Reason(rule="frozen tensor changed", tensor=name, detail="must equal the previous one")]
    size = float(before.double().norm())
    if tensor.ndim < 2 or size == 0.0:
        return []
    left = float(tensor.double().norm()) / size
    if left < limits.shrunk:
        return [
            Reason(
                rule="large jump",
                tensor=name,
                detail=f"shrunk to {left:.3g} of its norm, at least {limits.shrunk:.3g}",
            )
        ]
    jump = float((tensor.double() - before.double()).norm()) / size
    if jump <= limits.jump:
        return []
    return [
        Reason(rule="large jump", tensor=name, detail=f"{jump:.3g} of its norm, at most {limits.jump:.3g}")
    ]


def longest_monotone_run(values: Tensor) -> int:
    """Return the length of the longest run of strictly rising or strictly falling neighbours."""
    if values.numel() < 2:
        return int(values.numel())
    signs = torch.sign(torch.diff(values.double()))
    longest = current = 0
    last = 0.0
    for sign in signs.tolist():
        current = current + 1 if sign == last and sign != 0.0 else int(sign != 0.0)
        last, longest = sign, max(longest, current)
    return longest + 1 if longest else 1


def parallel_share(matrix: Tensor, *, tolerance: float = 1e-5) -> float:
    """Return the share of non-zero rows that are parallel to another row; 0 where rows have fewer than 8
    entries.

    Rows are sorted along a fixed direction, where parallel ones become neighbours: n log n instead of n
    squared.
    """
    rows = matrix[matrix.any(dim=1)]
    if len(rows) < 4 or matrix.shape[1] < _NARROW:
        return 0.0
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    line = torch.cos(torch.arange(1, matrix.shape[1] + 1, dtype=torch.float64) * math.sqrt(2.0))
    along = unit @ line
    unit = unit * torch.where(along < 0, -1.0, 1.0)[:, None]
    ordered = unit[along.abs().argsort()]
    same = (ordered[1:] * ordered[:-1]).sum(1) > 1.0 - tolerance
    paired = torch.zeros(len(rows), dtype=torch.bool)
    paired[1:] |= same
    paired[:-1] |= same
    return float(paired.double().mean())
