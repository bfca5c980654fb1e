"""Steps are counted from what is computed: the same beside a busy loop, and about a thousand to a second."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator

import pytest
import torch

from attacks import Budget, Observation, Prior, steps
from attacks.registry import build
from tests.attacks.models import bert, observe, sentences, text_loss

ATTACKS = ("token_presence", "span", "text_matching")


def _spin() -> None:
    while True:
        pass


@pytest.fixture(params=[0, 2], ids=["quiet", "beside busy loops"])
def load(request: pytest.FixtureRequest) -> Iterator[int]:
    others = [
        multiprocessing.get_context("spawn").Process(target=_spin, daemon=True) for _ in range(request.param)
    ]
    for one in others:
        one.start()
    yield request.param
    for one in others:
        one.kill()
        one.join()


def seen() -> tuple[torch.nn.Module, Observation]:
    model = bert(vocabulary=120, width=32, length=16)
    batch = {"input_ids": sentences(1, 6, 120), "labels": torch.tensor([1])}
    return model, observe(model, batch, text_loss, batch_size=1, sequence_length=6)


_COUNTED: dict[str, set[tuple[float, str]]] = {}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_takes_the_same_steps_and_reads_the_same_on_a_loaded_core(name: str, load: int) -> None:
    model, update = seen()
    budget = Budget(steps=150, iterations=400, restarts=1)
    reading = build(name).run(update, model, Prior(), budget, 0)
    values = [(item.kind, item.value.tolist()) for item in reading.items]
    _COUNTED.setdefault(name, set()).add((reading.steps, repr(values)))
    assert len(_COUNTED[name]) == 1
    assert reading.steps > 0


def test_a_search_stops_when_its_steps_are_used_up_and_says_so() -> None:
    model, update = seen()
    short = build("text_matching").run(
        update, model, Prior(), Budget(steps=50, iterations=400, restarts=1), 0
    )
    assert "budget of steps" in short.reason
    assert short.details["iterations"] < 100
    whole = build("text_matching").run(
        update, model, Prior(), Budget(steps=1e9, iterations=20, restarts=1), 0
    )
    assert "budget of steps" not in whole.reason


def test_the_count_grows_with_the_work_and_stands_still_outside() -> None:
    matrix = torch.randn(200, 200)
    torch.linalg.svdvals(matrix)
    assert steps.so_far() == 0.0
    costs = []
    for work in (lambda: matrix + 1, lambda: matrix @ matrix, lambda: torch.linalg.svdvals(matrix)):
        with steps.counted():
            work()
            costs.append(steps.so_far())
    assert 0.0 < costs[0] < costs[1] < costs[2]
    with steps.counted():
        matrix + 1
        before = steps.so_far()
        with steps.counted():  # a count within a count is one count
            matrix + 1
        assert steps.so_far() == pytest.approx(2 * before)


def test_going_back_is_charged_for_the_way_there_once_and_for_nothing_else() -> None:
    weight = torch.randn(50, 50, requires_grad=True)
    with steps.counted():
        for _ in range(100):
            torch.ones(50, 50) + 1  # no gradient passes here
        before = steps.so_far()
        torch.autograd.grad((weight @ weight).sum(), weight)
        first = steps.so_far() - before
        torch.autograd.grad((weight @ weight).sum(), weight)
        assert steps.so_far() - before == pytest.approx(2 * first)
        assert first < before
