"""A malicious server in an audit: what it crafts is refused, cannot be sent or is survived."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ffm_secure as ffm
from attacks.contract import NotApplicable
from attacks.judge import Question, decide
from attacks.registry import ATTACKS, build
from attacks.steps import counted
from ffm_secure.auditing.budget import AuditBudget
from ffm_secure.auditing.crafted import CRAFTS, REFUSED, SURVIVED, MaliciousServer, Played, play
from ffm_secure.auditing.step import with_draws
from ffm_secure.engines import simulation
from ffm_secure.errors import BroadcastRefused
from ffm_secure.site.broadcast_guard import BroadcastGuard

RUN = Path(__file__).resolve().parents[2] / "examples" / "audit" / "text.toml"
SMALL = (
    "task.data=builtin:clinic_notes?size=400&validation=80",
    "task.clients=4",
    "federation.cohort=4",
    "task.evaluation_examples=20",
)
NOISE = "privacy={unit='record',epsilon=8.0,delta=1e-5,clip_norm=0.5}"
LORA = "model.trainable={kind='lora',rank=4,alpha=8.0}"


class Careless(BroadcastGuard):
    """A site that checks nothing."""

    def accept(self, vector: torch.Tensor) -> None:
        """Train on anything."""


def prepared(*settings: str) -> simulation.Prepared:
    return ffm.load(RUN, (*SMALL, *settings)).prepared()


def played(name: str, run: simulation.Prepared, guard: type[BroadcastGuard] = BroadcastGuard) -> Played:
    server = MaliciousServer(prepared=run, guard=guard(run.trainable))
    start = run.trainable.flatten()
    with counted():
        stages = [with_draws(run, start, records) for records in (8, 1)]
        (one,) = play(server, [build(name)], stages, AuditBudget(name="quick"))
    assert torch.equal(run.trainable.flatten(), start), "the model is as it was"
    return one


def test_a_guarded_site_refuses_what_would_have_given_its_words_away() -> None:
    one = played("encoder_bins", prepared())
    assert one.judgement is not None
    assert one.judgement.verdict == "not leaked"
    assert one.judgement.reason.startswith(REFUSED)
    assert "zeroed block" in one.judgement.reason
    assert one.judgement.control is not None
    assert one.judgement.control > 0.5  # unguarded


@pytest.mark.parametrize("settings", [(), (NOISE,)], ids=["bare", "noise"])
def test_a_site_that_checks_nothing_is_judged_by_what_it_really_sends(settings: tuple[str, ...]) -> None:
    """Bins this steep need weights so large that rounding swallows what they store."""
    one = played("encoder_bins", prepared(*settings), Careless)
    assert one.question is not None
    assert one.question.control is not None
    (bare,) = decide([Question(seen=one.question.control, control=one.question.control)])
    assert bare.verdict == "leaked"
    (judged,) = decide([one.question])
    assert judged.verdict == "not leaked"
    assert SURVIVED in judged.reason


@pytest.mark.parametrize("name", sorted(name for name in ATTACKS if build(name).family == "active"))
def test_what_a_run_does_not_send_cannot_be_crafted(name: str) -> None:
    run = prepared(LORA)
    server = MaliciousServer(prepared=run, guard=BroadcastGuard(run.trainable))
    model = with_draws(run, run.trainable.flatten(), 1).model
    if name == "fishing":  # a head is trained and sent in every run
        assert server.refusal(server.craft(name, model))
        return
    with pytest.raises(NotApplicable) as refused:
        server.craft(name, model)
    if name == "encoder_bins":
        assert "its own copy" in str(refused.value)
    assert (name in CRAFTS) or "sent" in str(refused.value) or "ReLU" in str(refused.value)


@pytest.mark.parametrize("settings", [(), (LORA,)], ids=["full", "lora"])
def test_fifty_honest_rounds_are_never_refused(settings: tuple[str, ...]) -> None:
    """Also where learning is fast and batches are small: what moves a model honestly is no mark."""
    run = prepared(*settings)
    guard, trained = BroadcastGuard(run.trainable), run.trainable
    encoded = run.task.encode(run.data.rows(0))
    step = torch.optim.AdamW(trained.parameters.values(), lr=1e-2)
    order = torch.randperm(len(encoded), generator=torch.Generator().manual_seed(0))
    for number in range(50):
        rows = order.roll(4 * number)[:4].numpy()
        loss = run.task.losses(trained.model, run.task.batch(encoded, rows, device=run.device)).mean()
        step.zero_grad()
        loss.backward()
        step.step()
        guard.accept(trained.flatten())
    crafted = trained.flatten()
    crafted[: len(crafted) // 2] = 1.0
    with pytest.raises(BroadcastRefused):
        guard.accept(crafted)
