"""A client refuses a crafted broadcast before it touches its data, and nothing that honest training sends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ffm_secure.engines import simulation
from ffm_secure.errors import BroadcastRefused
from ffm_secure.records import DECLINED
from ffm_secure.server.rounds import collect, plan_round
from ffm_secure.site.broadcast import BroadcastReader
from ffm_secure.site.broadcast_guard import BroadcastGuard
from ffm_secure.strategies import build
from tests.federation.helpers import RECORD, finish, make, prepared

FULL = {"model": {"name": "builtin:tiny-vit", "trainable": {"kind": "full"}}}


def model(**sections):
    return prepared(make(**sections)).trainable


@pytest.mark.parametrize("sections", [{}, FULL], ids=["lora", "full"])
def test_the_start_and_small_changes_of_it_pass(sections) -> None:
    trained = model(**sections)
    inspection, start = BroadcastGuard(trained), trained.flatten()
    inspection.accept(start)
    generator = torch.Generator().manual_seed(0)
    for size in (1e-4, 1e-2):
        inspection.accept(start + size * torch.randn(start.shape, generator=generator))
    one_example = torch.zeros_like(start)
    one_example[::7] = 1e-3  # a first step of low rank, most entries untouched
    inspection.accept(start + one_example)


def test_crafted_weights_are_refused_with_every_reason() -> None:
    trained = model(**FULL)
    inspection, tensors = BroadcastGuard(trained), trained.tensors()
    rows = next(name for name, value in tensors.items() if value.ndim == 2 and min(value.shape) >= 8)
    for craft, rule in (
        (lambda value: value[:1].expand_as(value), "parallel rows"),
        (lambda value: torch.where(torch.arange(len(value))[:, None] > 2, 0.0, value), "zeroed block"),
        (lambda value: value * 1e6, "extreme scale"),
        (lambda value: value * float("nan"), "not finite"),
    ):
        changed = {**tensors, rows: craft(tensors[rows])}
        vector = torch.cat([changed[name].reshape(-1) for name, _ in trained.layout])
        with pytest.raises(BroadcastRefused, match=rule) as refusal:
            inspection.accept(vector)
        assert any(rows in reason for reason in refusal.value.reasons)


def test_a_crafted_broadcast_loses_its_sites_and_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It ended a simulation, where between machines it is one site that stays away."""
    made = make(privacy={**RECORD, "noise": "system"})
    ready = simulation.build(prepared(made), tmp_path)
    vector = torch.full_like(ready.trainable.flatten(), float("inf"))
    state = build(made.federation.strategy).start(vector)
    plan = plan_round(ready.server, 1, state)
    result = collect(ready.server, plan, state, ready.courier, lambda done, total: None)
    assert result.sum is None
    assert result.dropped == dict.fromkeys(range(4), DECLINED)
    assert result.aborted == "0 of at least 1 clients answered"
    assert not any(entry.kind == "reserve" for entry in ready.ledger.entries()), "nobody paid"
    assert caplog.text.count("its broadcast looks crafted") == 4
    assert "not finite" in caplog.text
    assert "; and 7 more reasons" in caplog.text


def test_one_site_that_takes_a_broadcast_for_crafted_is_one_site_less(tmp_path: Path) -> None:
    ready = simulation.build(prepared(make()), tmp_path)
    wary = BroadcastReader(WaryGuard(ready.trainable), ready.trainable.size)
    ready.sites[2]._broadcasts = wary
    trained = finish(ready, tmp_path)
    assert trained.status == "complete"
    assert [dict(record.dropped) for record in trained.records] == [{2: DECLINED}] * 3


class WaryGuard(BroadcastGuard):
    """Refuse whatever comes."""

    def accept(self, vector: torch.Tensor) -> None:
        raise BroadcastRefused(["of a bad feeling"])
