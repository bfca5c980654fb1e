"""What every compression promises: a linear map with orthonormal rows that both sides find by themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ffm_secure.compression.base import Compression, PublicState, Setting, places, public_source
from ffm_secure.compression.support import Support
from ffm_secure.config.tables import Compression as CompressionConfig
from ffm_secure.registry import COMPRESSIONS

KINDS = {
    "bits": CompressionConfig(kind="bits", field_bits=16),
    "rotation": CompressionConfig(kind="rotation"),
    "projection": CompressionConfig(kind="projection", share=0.3),
    "fresh projection": CompressionConfig(kind="projection", share=0.3, basis="fresh"),
    "support": CompressionConfig(kind="support", share=0.3, by_lot=0.5),
}


def built(config: CompressionConfig, size: int, seed: int = 7) -> Compression:
    compression: Compression = COMPRESSIONS.load(config.kind)(Setting(config=config, seed=seed, size=size))
    return compression


def at(size: int, *, round: int = 3, seed: int = 0) -> PublicState:
    """Return the state of a round after sums have moved half of the numbers."""
    moved = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    moved[::2] = 0.0
    return PublicState(round=round, moved=moved)


def matrix(compression: Compression, state: PublicState) -> Tensor:
    """Return the map as a matrix [length, size], one column at a time: its slow and obvious definition."""
    unit = torch.eye(compression.size, dtype=torch.float64)
    return torch.stack([compression.compress(column, state).double() for column in unit], dim=1)


def test_every_registered_kind_is_held_to_it() -> None:
    assert set(COMPRESSIONS) - {"none"} == {config.kind for config in KINDS.values()}


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=12, deadline=None)
@given(size=st.integers(1, 40), seed=st.integers(0, 2**40), round=st.integers(1, 9))
def test_rows_are_orthonormal_and_restoring_is_the_transpose(
    name: str, size: int, seed: int, round: int
) -> None:
    compression, state = built(KINDS[name], size, seed), at(size, round=round, seed=seed % 999)
    rows = matrix(compression, state)
    assert rows.shape == (compression.length, size)
    assert torch.allclose(rows @ rows.T, torch.eye(compression.length, dtype=torch.float64), atol=1e-12)
    opened = torch.randn(compression.length, dtype=torch.float64)
    assert torch.allclose(compression.restore(opened, state), rows.T @ opened, atol=1e-12)


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=25, deadline=None)
@given(
    numbers=st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=60),
    other=st.floats(-1e6, 1e6),
    round=st.integers(1, 9),
)
def test_no_update_whatever_it_holds_becomes_longer(
    name: str, numbers: list[float], other: float, round: int
) -> None:
    update = torch.tensor(numbers, dtype=torch.float64)
    compression, state = built(KINDS[name], len(numbers)), at(len(numbers), round=round)
    sent = compression.compress(update, state)
    length = float(update.norm())
    assert float(sent.norm()) <= length * (1 + 1e-12) + 1e-12
    # one update moves the sum by no more than itself, wherever the others stand
    others = torch.full_like(update, other)
    moved = compression.compress(others + update, state) - compression.compress(others, state)
    assert float(moved.norm()) <= length + 1e-9 * (length + float(others.norm())) + 1e-12
    # what comes back is the nearest update that can be said in so many numbers
    back = compression.restore(sent.double(), state)
    error = float((update - back).norm())
    assert error <= length * (1 + 1e-12) + 1e-9
    assert error**2 + float(back.norm()) ** 2 == pytest.approx(length**2, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", ["fresh projection", "support"])
def test_a_number_comes_back_as_often_as_it_is_drawn(name: str) -> None:
    """Over rounds the restored update is the update times a share: no number is forgotten for good."""
    size, rounds = 24, 300
    compression = built(KINDS[name], size)
    update = torch.linspace(-1.0, 1.0, size, dtype=torch.float64)
    total = torch.zeros(size, dtype=torch.float64)
    for round in range(rounds):
        state = PublicState(round=round, moved=torch.zeros(size))
        total += compression.restore(compression.compress(update, state), state)
    share = compression.length / size
    assert torch.allclose(total / rounds, share * update, atol=0.13)
    fixed = built(KINDS["projection"], size)
    state = at(size)
    assert torch.equal(fixed.compress(update, state), fixed.compress(update, at(size, round=8)))


def test_a_support_holds_the_numbers_that_sums_moved_furthest() -> None:
    support = Support(size=10, length=4, by_lot=1, seed=1)
    moved = torch.tensor([0.0, -5.0, 0.0, 2.0, 0.0, 2.0, 0.0, 2.0, 0.0, 0.1])
    for round in range(30):
        chosen = support.places(PublicState(round=round, moved=moved)).tolist()
        assert chosen == sorted(set(chosen))
        assert len(chosen) == 4
        assert {1, 3, 5} <= set(chosen)  # ties by place: 7 is as far, and only its turn by lot brings it in
    drawn_places = {
        place
        for round in range(200)
        for place in support.places(PublicState(round=round, moved=moved)).tolist()
    }
    assert drawn_places == set(range(10))
    first = [support.places(PublicState(round=n, moved=torch.zeros(10))).tolist() for n in range(50)]
    assert len({tuple(places_of_round) for places_of_round in first}) > 30  # nothing known: all by lot


def test_places_by_lot_are_uniform() -> None:
    counts = torch.zeros(9)
    for round in range(600):
        counts[places(3, among=9, source=public_source(5, round))] += 1
    assert float((counts / 600 - 1 / 3).abs().max()) < 0.08
