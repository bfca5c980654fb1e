"""What an observation may hold, and that its folder is read strictly."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from attacks import Budget, Finding, Knowledge, Observation, ObservationError, PlainAttack, Prior, load_observation


def seen(**changes) -> Observation:
    facts = {
        "kind": "delta",
        "tensors": {"layer.weight": torch.arange(6.0).reshape(2, 3), "layer.bias": torch.ones(2)},
        "metadata": {"learning_rate": 0.1, "local_steps": 2, "optimiser": "sgd", "point": "raw"},
        "broadcast": {"layer.weight": torch.zeros(2, 3)},
        "knowledge": Knowledge(labels=(1, 2), dropout=0.0),
    }
    return Observation(**(facts | changes))


def test_saved_and_loaded_are_equal(tmp_path):
    before = seen()
    before.save(tmp_path / "round")
    after = load_observation(tmp_path / "round")
    assert after.kind == before.kind
    assert dict(after.metadata) == dict(before.metadata)
    assert after.knowledge == before.knowledge
    assert all(torch.equal(after.tensors[name], before.tensors[name]) for name in before.tensors)
    assert torch.equal(after.broadcast["layer.weight"], before.broadcast["layer.weight"])


def test_tied_tensors_and_half_precision_survive(tmp_path):
    shared = torch.ones(3, dtype=torch.bfloat16)
    seen(tensors={"a": shared, "b": shared}, broadcast=None).save(tmp_path)
    assert load_observation(tmp_path).tensors["b"].dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: d.update(format=2), "format is 2"),
        (lambda d: d.update(surprise=1), "unknown keys"),
        (lambda d: d.pop("kind"), "missing keys"),
        (lambda d: d["knowledge"].update(password="x"), "unknown names"),
        (lambda d: d["tensors"]["layer.bias"].update(shape=[3]), "layer.bias"),
        (lambda d: d.update(metadata=[1]), "must be JSON objects"),
        (lambda d: d.update(kind="rumour"), "must be one of"),
    ],
)
def test_a_spoiled_description_is_refused(tmp_path, spoil, message):
    seen().save(tmp_path)
    path = tmp_path / "observation.json"
    description = json.loads(path.read_text())
    spoil(description)
    path.write_text(json.dumps(description))
    with pytest.raises(ObservationError, match=message):
        load_observation(tmp_path)


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(ObservationError, match=r"observation\.json is missing"):
        load_observation(tmp_path)
    seen().save(tmp_path)
    (tmp_path / "tensors.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ObservationError, match="not a safetensors file"):
        load_observation(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "sum"},
        {"contributors": 3},
        {"round": -1},
        {"tensors": {}},
        {"observer": ""},
        {"metadata": {"point": "cooked"}},
        {"metadata": {"learning_rate": float("nan")}},
        {"tensors": {"a": [1.0]}},
    ],
)
def test_contradictions_are_refused(changes):
    values = {"kind": "gradient", "tensors": {"a": torch.ones(1)}} | changes
    with pytest.raises((ObservationError, AttributeError)):
        Observation(**values)


def test_an_observation_cannot_be_changed():
    observation = seen()
    with pytest.raises(dataclasses.FrozenInstanceError):
        observation.round = 3
    with pytest.raises(TypeError):
        observation.tensors["layer.bias"] = torch.zeros(2)
    with pytest.raises(TypeError):
        observation.metadata["learning_rate"] = 1.0


def test_a_delta_of_plain_sgd_is_scaled_to_a_gradient():
    view = seen().gradient()
    assert view.scaled
    assert torch.allclose(view.tensors["layer.bias"], torch.full((2,), -1.0 / 0.2))
    adaptive = seen(metadata={"learning_rate": 0.1, "local_steps": 2, "optimiser": "adamw"}).gradient()
    assert not adaptive.scaled
    assert torch.equal(adaptive.tensors["layer.bias"], -torch.ones(2))


def test_the_protocol_is_believed_before_the_assumption():
    observation = seen(knowledge=Knowledge(learning_rate=9.0, batch_size=4))
    assert observation.known("learning_rate") == 0.1
    assert observation.known("batch_size") == 4
    assert observation.known("nonsense") is None
    assert observation.knowledge.granted() == ("batch_size", "learning_rate")


def test_the_ledger_lists_what_was_read_and_nothing_else():
    def attempt(observation, model, prior, budget, seed):
        observation.known("labels"), observation.known("lengths"), prior.token_frequencies
        return Finding()

    attack = PlainAttack(name="reader", family="labels", attempt=attempt)
    prior = Prior(token_frequencies=torch.ones(3), examples={"images": torch.ones(1)})
    used = attack.run(seen(), None, prior, Budget.quick(), 0).knowledge_used
    assert used == ("labels", "prior.token_frequencies")
