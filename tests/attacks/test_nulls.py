"""Noise looks like the update it stands for:
zeros, rank, length, rounding and sparsity are kept, the data are not.
"""

from __future__ import annotations

import pytest
import torch

from attacks import Observation
from attacks.nulls import coarseness, study
from tests.attacks import cases

SHAPES = torch.Generator().manual_seed(0)
DENSE = torch.randn(12, 20, generator=SHAPES)
ROWS = DENSE * (torch.arange(12) % 4 == 0)[:, None]
LOW = torch.randn(12, 3, generator=SHAPES) @ torch.randn(3, 20, generator=SHAPES)
SPARSE = DENSE * (torch.rand(12, 20, generator=SHAPES) < 0.1)
TENSORS = {
    "dense": DENSE,
    "rows": ROWS,
    "low": LOW,
    "sparse": SPARSE,
    "coarse": DENSE.bfloat16().float(),
    "bias": DENSE[0],
}


def noise_of(places: str, seed: int = 0) -> dict[str, torch.Tensor]:
    return dict(study(Observation(kind="gradient", tensors=TENSORS)).draw(seed, places).tensors)


@pytest.mark.parametrize("name", list(TENSORS))
def test_noise_keeps_what_could_give_it_away(name: str) -> None:
    noise, tensor = noise_of("as they are")[name], TENSORS[name]
    assert torch.equal(noise == 0, tensor == 0)
    assert float(noise.norm()) == pytest.approx(float(tensor.norm()), rel=1e-2)
    assert coarseness(noise) == coarseness(tensor)
    if tensor.ndim == 2:
        assert torch.linalg.matrix_rank(noise) == torch.linalg.matrix_rank(tensor)
    assert abs(float(torch.nn.functional.cosine_similarity(noise.flatten(), tensor.flatten(), dim=0))) < 0.6


def test_moved_zeros_are_as_many_and_elsewhere() -> None:
    noise = noise_of("moved", seed=3)
    for name in ("rows", "sparse"):
        assert int((noise[name] == 0).sum()) == int((TENSORS[name] == 0).sum())
        assert not torch.equal(noise[name] == 0, TENSORS[name] == 0)
    again = {**TENSORS, "tied": ROWS}
    moved = study(Observation(kind="gradient", tensors=again)).draw(5, "moved").tensors
    assert torch.equal(moved["tied"] == 0, moved["rows"] == 0)  # one table under two names stays one


def test_noise_differs_by_seed_and_repeats_by_seed() -> None:
    assert torch.equal(noise_of("moved", 1)["dense"], noise_of("moved", 1)["dense"])
    assert not torch.equal(noise_of("moved", 1)["dense"], noise_of("moved", 2)["dense"])


def test_the_rows_of_a_text_give_the_same_tokens_in_noise_until_they_move() -> None:
    case = cases.text()
    noise = study(case.seen)
    real = cases.run("token_presence", case).of("token_set")[0]
    reading = cases.build("token_presence")
    same = reading.run(noise.draw(0), case.model, case.prior, case.budget, 0).of("token_set")[0]
    moved = reading.run(noise.draw(0, "moved"), case.model, case.prior, case.budget, 0).of("token_set")[0]
    assert same.tolist() == real.tolist()
    assert len(moved) == len(real)
    assert set(moved.tolist()) != set(real.tolist())
