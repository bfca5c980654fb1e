"""A stored observation is judged as a whole:
noise and guesses are no leak, real updates are, doubtful controls are named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from attacks import nulls
from attacks import Budget, Finding, Item, Knowledge, Observation, PlainAttack, Prior
from attacks.contract import Attack
from attacks.examine import Examined, examine, leaks, study
from attacks.registry import ATTACKS, build
from attacks.rehearsal import Rehearsals, rehearse
from attacks.steps import counted, so_far
from attacks.truth import Truth
from benchmarks import verdicts as bench
from tests.attacks import models

CHEAP = ("token_presence", "label_identity", "idlg_label", "ilrg", "position_text", "span")


def audited(
    audit: bench.Audit, names: Sequence[str] = CHEAP, attacks: Sequence[Attack] = ()
) -> dict[str, Examined]:
    scene = study(audit.seen, audit.model, audit.truth, unused=audit.unused, null_steps=500)
    results = examine(
        scene, lambda attack: Budget.quick(), lambda attack: "", attacks or [build(name) for name in names]
    )
    return {one.attack: one for one in results}


@pytest.mark.parametrize("seed", range(8))
def test_noise_of_any_shape_is_no_leak_with_truth_or_without(seed: int) -> None:
    audit = list(bench.noise_audits(8))[seed]
    for one in (audit, replace(audit, truth=None)):
        assert not list(leaks(tuple(audited(one).values())))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_guesses_are_no_leak_with_unused_texts_or_without(seed: int) -> None:
    for audit, attacks in list(bench.guessing_audits(6))[seed::3]:
        assert not list(leaks(tuple(audited(audit, attacks=attacks).values())))


@pytest.mark.parametrize("seed", range(4))
def test_undefended_updates_leak_with_truth_and_texts_without(seed: int) -> None:
    audit = list(bench.undefended_audits(4))[seed]
    names = ("position_vision", "linear_readout") if "vision" in audit.name else CHEAP
    assert list(leaks(tuple(audited(audit, names).values())))
    if "coder" in audit.name:
        silent = audited(replace(audit, truth=None))
        assert silent["token_presence"].judgement.verdict == "leaked"
        assert "names the words that" in silent["token_presence"].judgement.reason


@pytest.mark.parametrize("seed", [8, 9])
def test_one_step_of_adamw_on_several_texts_leaks_without_the_truth(seed: int) -> None:
    """Signs of rows agree with those of places: noise in the same rows shows nothing of the kind."""
    audit = replace(list(bench.undefended_audits(10))[seed], truth=None)
    assert "AdamW step" in audit.name
    assert audit.seen.known("batch_size") == 4
    read = audited(audit, ("token_presence", "position_text"))
    assert {one.judgement.verdict for one in read.values()} == {"leaked"}
    silent = replace(audit, seen=nulls.study(audit.seen).draw(3))
    assert not list(leaks(tuple(audited(silent, ("token_presence", "position_text")).values())))


def test_rows_of_noise_are_no_words_without_another_reading_of_them() -> None:
    """Which rows move gives words away only where something else in the update bears them out."""
    audit = next(bench.undefended_audits(2))
    rows = {name: value for name, value in audit.seen.tensors.items() if "embeddings" in name}
    alone = replace(audit, seen=audit.seen.replace_tensors(rows), truth=None)
    assert audited(alone, ("token_presence",))["token_presence"].judgement.verdict == "inconclusive"


def test_a_finding_without_unused_texts_says_that_its_baseline_is_weak() -> None:
    audit = replace(next(bench.undefended_audits(1)), unused=None)
    assert "baseline weak" in audited(audit)["token_presence"].judgement.reason
    with_texts = replace(audit, unused=bench.truth_of("encoder", 32, 2, 99))
    assert "baseline weak" not in audited(with_texts)["token_presence"].judgement.reason


def test_a_search_is_skipped_where_all_it_looks_for_was_read() -> None:
    def never(*_: object) -> Finding:
        raise AssertionError("a dominated attack was run")

    search = PlainAttack(name="search", family="text search", attempt=never)
    audit = list(bench.undefended_audits(2))[1]
    results = audited(audit, attacks=[search, build("span"), build("token_presence")])
    assert list(results) == ["search", "span", "token_presence"]
    assert "span has read everything exactly" in results["search"].refused
    assert results["search"].judgement is None


def test_an_unknown_optimiser_leaves_the_audit_inconclusive_and_momentum_does_not() -> None:
    model, batch = bench.classifier("encoder", 2, 0), bench._batch(bench.truth_of("encoder", 2, 2, 0))
    seen = models.observe_delta(model, [batch], models.text_loss, learning_rate=0.01)
    seen = replace(seen, knowledge=Knowledge(batch_size=2, sequence_length=bench.LENGTH))
    audit = bench.Audit(name="", seen=seen, model=model, truth=None)
    for name, known in (("lion", False), ("adam with amsgrad", False), ("sgd with momentum", True)):
        told = replace(audit, seen=seen.replace_tensors(seen.tensors, optimiser=name))
        verdicts = {one.judgement.verdict for one in audited(told).values()}
        assert ("leaked" in verdicts) == known, name
        assert ("not leaked" in verdicts) is False or known


def delta(**facts: object) -> Observation:
    tensors = {
        name: torch.ones_like(value) for name, value in bench.classifier("encoder", 2, 0).named_parameters()
    }
    metadata = {"learning_rate": 0.1, "local_steps": 3, "optimiser": "sgd", **facts}
    return Observation(
        kind="delta",
        tensors=tensors,
        metadata=metadata,
        knowledge=Knowledge(batch_size=2, lengths=(3, 6)),
    )


def test_a_rehearsal_takes_the_steps_of_the_told_optimiser() -> None:
    model = bench.classifier("encoder", 2, 0)
    name = "bert.encoder.layer.0.output.dense.weight"
    changes = {}
    for stated in ("sgd", "sgd with momentum", "adam"):
        rehearsed = rehearse(delta(optimiser=stated), model, seed=0)
        assert rehearsed is not None
        changes[stated] = rehearsed[0].tensors[name]
    assert float(changes["sgd with momentum"].norm()) > 1.3 * float(changes["sgd"].norm())
    assert float(changes["adam"].abs().max()) == pytest.approx(0.3, rel=0.05)
    assert rehearse(delta(optimiser="lion"), model, seed=0) is None


def test_a_rehearsal_keeps_padding_casts_and_sparsity_and_takes_texts_like_the_users() -> None:
    model = bench.classifier("encoder", 2, 0)
    seen = delta()
    cut = {name: value.bfloat16() for name, value in seen.tensors.items()}
    sparse = "bert.encoder.layer.0.output.dense.weight"
    cut[sparse] = cut[sparse] * (
        torch.rand(cut[sparse].shape, generator=torch.Generator().manual_seed(0)) < 0.1
    )
    like = Truth(sequences=((11, 12, 13, 14, 15, 16, 17),))
    rehearsed = rehearse(seen.replace_tensors(cut), model, seed=0, like=like)
    assert rehearsed is not None
    tensors, truth = rehearsed[0].tensors, rehearsed[1]
    assert tensors[sparse].dtype == torch.bfloat16
    assert float((tensors[sparse] != 0).float().mean()) == pytest.approx(0.1, abs=0.02)
    assert {len(text) for text in truth.sequences} == {3, 6}
    assert all(text == (11, 12, 13, 14, 15, 16)[: len(text)] for text in truth.sequences)


def test_attacks_on_crafted_broadcasts_are_not_counted_where_none_was_crafted() -> None:
    audit = next(bench.undefended_audits(1))
    active = [name for name in ATTACKS if build(name).family == "active"]
    results = audited(audit, active)
    assert {one.judgement.verdict for one in results.values()} == {"not applicable"}


def test_an_attack_as_sure_on_noise_proves_nothing_without_a_truth() -> None:
    def sure(observation: Observation, model: object, prior: Prior, budget: Budget, seed: int) -> Finding:
        words = observation.tensors["bert.embeddings.word_embeddings.weight"].norm(dim=1).topk(16).indices
        return Finding(items=(Item(kind="token_set", value=words),), confidence=0.99)

    attack = PlainAttack(name="sure", family="presence", attempt=sure)
    audit = replace(next(bench.undefended_audits(1)), truth=None)
    assert audited(audit, attacks=[attack])["sure"].judgement.verdict == "inconclusive"


def test_observers_of_one_round_share_a_rehearsal_and_get_what_each_would_alone() -> None:
    """Only what a rehearsed change depends on may be shared: any of its facts makes it another one."""
    audit = list(bench.undefended_audits(10))[8]
    server = audit.seen
    assert server.broadcast is not None
    rounded = {name: value.to(torch.bfloat16).float() for name, value in server.tensors.items()}
    same = [replace(server, observer="client"), server.replace_tensors(rounded)]
    others = [replace(server, broadcast={name: 2 * value for name, value in server.broadcast.items()})]
    for facts in ({"learning_rate": 0.3}, {"weight_decay": 0.5}, {"local_steps": 2}, {"optimiser": "sgd"}):
        others.append(server.replace_tensors(server.tensors, **facts))
    others.append(replace(server, knowledge=replace(server.knowledge, batch_size=2)))
    with counted():
        stages = Rehearsals(model=audit.model)
        assert stages.of(server, 0) is not None
        dear = stages.cost(server)
        for view, shared in (*((one, True) for one in same), *((one, False) for one in others)):
            began = so_far()
            rehearsed = stages.of(view, 0)
            spent, began = so_far() - began, so_far()
            alone = rehearse(view, audit.model, seed=0)
            assert (spent < so_far() - began - 0.5 * dear) == shared
            assert alone is not None
            assert rehearsed is not None
            assert alone[1].sequences == rehearsed[1].sequences
            for name, value in alone[0].tensors.items():
                assert torch.equal(value, rehearsed[0].tensors[name])
            assert stages.of(server, 0) is not None  # the latest are held


def test_nothing_is_rehearsed_for_attacks_that_do_not_fit() -> None:
    audit = next(bench.undefended_audits(1))
    scene = study(audit.seen, audit.model, audit.truth, null_steps=500)
    for name, rehearsed in (("position_vision", False), ("token_presence", True)):
        (one,) = examine(scene, lambda _: Budget.quick(), lambda _: "", [build(name)])
        assert one.judgement is not None
        assert (one.judgement.verdict == "not applicable") != rehearsed
        assert bool(scene.controls) == rehearsed
