"""The fingerprint: one golden vector, a second implementation beside it,
and what must and must not change it.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ffm_secure.models.backbone import fingerprint

GOLDEN = {
    "b": torch.tensor([[1.0, -2.5], [0.0, 3.25]]),
    "a": torch.tensor([1, 2**40], dtype=torch.int64),
    "ä": torch.tensor(0.5, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 3),
}
# Computed once by `spelled_out` below, on a little-endian machine.
GOLDEN_DIGEST = "eb22f1f781a78d92366b861fdb671d0dc1574750622fdecdeb41fa994dd68d1d"


def spelled_out(tensors: dict[str, torch.Tensor]) -> str:
    """Write the format down byte by byte, without the fast path."""
    stream = b"ffm-secure tensors 1\n"
    for name in sorted(tensors):
        tensor = tensors[name]
        kind = {torch.float32: "float32", torch.int64: "int64", torch.bfloat16: "bfloat16"}[tensor.dtype]
        for text in (name, kind):
            stream += len(text.encode()).to_bytes(8, "little") + text.encode()
        stream += tensor.dim().to_bytes(8, "little")
        for length in tensor.shape:
            stream += length.to_bytes(8, "little")
        for value in tensor.reshape(-1):
            if tensor.dtype == torch.int64:
                stream += int(value).to_bytes(8, "little", signed=True)
            else:
                bits = np.float32(float(value)).tobytes()
                stream += bits[2:] if tensor.dtype == torch.bfloat16 else bits
    return hashlib.sha256(stream).hexdigest()


def test_golden_vector() -> None:
    assert fingerprint(GOLDEN) == GOLDEN_DIGEST == spelled_out(GOLDEN)


def test_order_layout_and_gradient_flag_do_not_matter() -> None:
    base = {"w": torch.arange(6.0).reshape(2, 3), "v": torch.ones(2)}
    other = {
        "v": torch.nn.Parameter(torch.ones(2)),
        "w": torch.arange(6.0).reshape(2, 3).t().contiguous().t(),
    }
    assert not other["w"].is_contiguous()
    assert fingerprint(base) == fingerprint(other)


@pytest.mark.parametrize(
    "changed",
    [
        {"x": torch.ones(2, 3)},
        {"w": torch.ones(3, 2)},
        {"w": torch.ones(6)},
        {"w": torch.ones(2, 3, dtype=torch.float64)},
        {"w": torch.ones(2, 3), "v": torch.zeros(0)},
        {},
    ],
)
def test_name_shape_type_and_presence_matter(changed: dict[str, torch.Tensor]) -> None:
    assert fingerprint(changed) != fingerprint({"w": torch.ones(2, 3)})


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=8), st.integers(0, 255), st.integers(0, 31))
def test_every_bit_matters(values: list[float], place: int, bit: int) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    flipped = tensor.clone().view(torch.int32)
    flipped[place % len(values)] ^= np.int32(np.uint32(1 << bit).view(np.int32)).item()
    assert fingerprint({"w": tensor}) != fingerprint({"w": flipped.view(torch.float32)})
