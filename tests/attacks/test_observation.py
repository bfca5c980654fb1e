"""What an observation may hold, and that its folder is read strictly."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from attacks import (
    Budget,
    Finding,
    Knowledge,
    Observation,
    ObservationError,
    PlainAttack,
    Prior,
    load_observation,
)
from attacks import observation as module
from attacks.facts import RULES


def seen(**changes) -> Observation:
    facts = {
        "kind": "delta",
        "tensors": {"layer.weight": torch.arange(6.0).reshape(2, 3), "layer.bias": torch.ones(2)},
        "metadata": {"learning_rate": 0.1, "local_steps": 2, "optimiser": "sgd", "point": "raw"},
        "broadcast": {"layer.weight": torch.zeros(2, 3)},
        "knowledge": Knowledge(labels=(1, 2), dropout=0.0),
    }
    return Observation(**(facts | changes))


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("observations") / "round"
    seen().save(folder)
    return folder


@pytest.fixture
def stored(written, tmp_path) -> Path:
    return shutil.copytree(written, tmp_path / "stored")


def same(after: Observation, before: Observation) -> bool:
    facts = all(getattr(after, name) == getattr(before, name) for name in (*module._FACTS, "knowledge"))
    pairs = [(after.tensors, before.tensors), (after.broadcast or {}, before.broadcast or {})]
    return facts and all(
        set(a) == set(b)
        and all(torch.equal(a[name], b[name]) and a[name].dtype is b[name].dtype for name in b)
        for a, b in pairs
    )


def test_saved_and_loaded_are_equal(tmp_path):
    before = seen()
    before.save(tmp_path / "new" / "round")
    assert same(load_observation(tmp_path / "new" / "round"), before)
    assert not same(
        load_observation(tmp_path / "new" / "round"), seen(tensors={"layer.weight": torch.ones(2)})
    )
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["round"]


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
def test_a_spoiled_description_is_refused(stored, spoil, message):
    rewrite(stored, spoil)
    with pytest.raises(ObservationError, match=message):
        load_observation(stored)


def rewrite(folder, spoil) -> None:
    path = folder / "observation.json"
    description = json.loads(path.read_text())
    spoil(description)
    path.write_text(json.dumps(description))


@pytest.mark.parametrize(
    ("name", "value", "bound"),
    [
        ("broadcast", [1], "JSON object"),
        ("broadcast", "x", "JSON object"),
        ("broadcast", 0, "JSON object"),
        ("metadata", None, "JSON object"),
        ("knowledge", [], "JSON object"),
        ("tensors", "x", "JSON object"),
        ("broadcast", {"layer.weight": 3}, "shape"),
        ("tensors", {"layer.weight": {"shape": [2.0, 3], "dtype": "float32"}}, "shape"),
        ("tensors", {}, "tensors is empty"),
        ("format", True, "reads format 1"),
        ("format", 1.0, "reads format 1"),
        ("kind", ["delta"], "must be one of"),
        ("round", True, "whole number from 0"),
        ("round", 1.5, "whole number from 0"),
        ("round", 2**63, "whole number from 0"),
        ("contributors", True, "whole number from 1"),
        ("contributors", "1", "whole number from 1"),
        ("observer", ["a"], "must name the row"),
        ("observer", "\ud800", "must name the row"),
    ],
)
def test_a_part_of_another_type_is_refused_by_name(stored, name, value, bound):
    rewrite(stored, lambda d: d.update({name: value}))
    with pytest.raises(ObservationError, match=rf"observation\.json: .*{name}.*{bound}|: {bound}"):
        load_observation(stored)


WHOLE = ("batch_size", "local_steps", "local_epochs", "sequence_length", "vocabulary_size")
REAL = (
    "learning_rate",
    "weight_decay",
    "momentum",
    "dropout",
    "clip_norm",
    "noise_multiplier",
    "noise_deviation",
)
TEXT = ("optimiser", "schedule", "task", "auxiliary_data")
LISTS = ("labels", "label_counts", "lengths", "special_tokens", "token_set", "image_shape")
WRONG = [
    *((name, value) for name in WHOLE for value in ("many", -5, 0, 1.5, True, [1], float("nan"), 2**63)),
    *(
        (name, value)
        for name in REAL
        for value in ("fast", -1, True, [0.1], float("nan"), float("inf"), 10**400)
    ),
    *((name, value) for name in TEXT for value in (1, True, ["sgd"], {})),
    *(
        (name, value)
        for name in LISTS
        for value in ("abc", 3, {}, [[1], {}], ["1"], [-1], [1.5], [True], [2**63])
    ),
    ("dropout", 1.0),
    ("momentum", 1.0),
    ("nesterov", "yes"),
    ("image_shape", []),
    ("image_shape", [3, 0, 8]),
    ("batch_statistics", 1),
    ("batch_statistics", "yes"),
]


def test_every_fact_that_can_be_granted_is_checked():
    checked = {name for name, _ in WRONG}
    assert checked == {entry.name for entry in dataclasses.fields(Knowledge)} == set(RULES)


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_knowledge_and_metadata_of_a_wrong_type_or_range_are_refused(stored, name, value):
    for place in ("knowledge", "metadata"):
        rewrite(
            stored, lambda d, place=place: d.update({"knowledge": {}, "metadata": {}, place: {name: value}})
        )
        with pytest.raises(ObservationError, match=rf"observation\.json: {place}.*{name}.* is .*"):
            load_observation(stored)
    with pytest.raises(ObservationError, match=f"{name}.* is .*, must be"):
        Knowledge(**{name: value})
    with pytest.raises(ObservationError, match=f"{name}.* is .*"):
        seen(metadata={name: value})


@pytest.mark.parametrize("name", LISTS)
def test_lists_belong_in_knowledge(name):
    for value in (3, (3,)):
        with pytest.raises(ObservationError, match=rf"metadata\['{name}'\] is .*grant it in knowledge"):
            seen(metadata={name: value})


def test_facts_at_the_bounds_are_taken(tmp_path):
    facts = (
        dict.fromkeys(WHOLE, 1)
        | dict.fromkeys(REAL, 0)
        | dict.fromkeys(TEXT, "x")
        | {"batch_statistics": False}
    )
    lists = dict.fromkeys(LISTS, (1, 2)) | {"labels": (0,), "special_tokens": ()}
    before = seen(
        metadata=facts | {"schedule": "warm", "seconds": 1.5}, knowledge=Knowledge(**facts, **lists)
    )
    before.save(tmp_path)
    after = load_observation(tmp_path)
    assert after.knowledge == before.knowledge
    assert dict(after.metadata) == dict(before.metadata)


def test_all_problems_are_reported_at_once(stored):
    spoiled = {
        "round": -1,
        "observer": "",
        "metadata": {"local_steps": -2, "point": "cooked"},
        "broadcast": [1],
    }
    rewrite(
        stored, lambda d: d.update(spoiled, knowledge={"batch_size": -5, "lengths": [[1], {}], "password": 1})
    )
    with pytest.raises(ObservationError) as refusal:
        load_observation(stored)
    for part in (
        "round is -1, must be a whole number from 0",
        "observer is ''",
        "metadata['local_steps'] is -2, must be a whole number from 1",
        "metadata['point'] is 'cooked'",
        "broadcast is [1]",
        "knowledge.batch_size is -5, must be a whole number from 1",
        "knowledge.lengths[0] is [1] (and 1 more), must be a list of whole numbers from 0",
        "password",
    ):
        assert part in str(refusal.value)


def test_keys_that_stand_twice_are_refused(stored):
    path = stored / "observation.json"
    text = path.read_text()
    path.write_text(
        text.replace('"round": 0,', '"round": 0, "round": 0,').replace('"point"', '"local_steps": 3, "point"')
    )
    with pytest.raises(ObservationError, match=r"'local_steps' stands.*'round' stands"):
        load_observation(stored)


@pytest.mark.parametrize("depth", [9, 400, 5000])
@pytest.mark.parametrize("place", ["whole", "metadata"])
def test_deep_nesting_is_refused(stored, depth, place):
    path, deep = stored / "observation.json", "[" * depth + "]" * depth
    text = path.read_text()
    path.write_text(deep if place == "whole" else text.replace('"point": "raw"', f'"point": {deep}'))
    with pytest.raises(ObservationError, match="nested deeper than 8"):
        load_observation(stored)


def test_a_description_without_end_is_refused(tmp_path):
    seen(knowledge=Knowledge(labels=tuple(range(100_000)))).save(tmp_path)
    assert load_observation(tmp_path).knowledge.labels[-1] == 99_999
    with (tmp_path / "observation.json").open("r+b") as file:
        file.truncate(300 * 2**20)  # sparse: takes no room
    with pytest.raises(ObservationError, match=f"longer than {64 * 2**20} bytes"):
        load_observation(tmp_path)


@pytest.mark.parametrize("name", ["observation.json", "tensors.safetensors", "broadcast.safetensors"])
def test_links_out_of_the_folder_are_refused(tmp_path, name):
    seen().save(tmp_path / "round")
    (tmp_path / "round" / name).rename(tmp_path / name)
    (tmp_path / "round" / name).symlink_to(tmp_path / name)
    with pytest.raises(ObservationError, match=f"{name} is a link"):
        load_observation(tmp_path / "round")
    (tmp_path / "round" / name).unlink()
    os.mkfifo(tmp_path / "round" / name)
    with pytest.raises(ObservationError, match=f"{name} is missing"):
        load_observation(tmp_path / "round")


def test_numbers_of_numpy_become_plain_and_other_types_are_refused(tmp_path):
    knowledge = Knowledge(
        batch_size=np.int64(4),
        learning_rate=np.float32(0.5),
        labels=[np.int8(1), 2],
        batch_statistics=np.bool_(True),
    )
    seen(
        knowledge=knowledge, round=np.int32(3), metadata={"local_steps": np.uint8(2), "loss": np.float16(0.5)}
    ).save(tmp_path / "round")
    after = load_observation(tmp_path / "round")
    assert after.knowledge == Knowledge(batch_size=4, learning_rate=0.5, labels=(1, 2), batch_statistics=True)
    assert (type(after.round), type(knowledge.batch_size)) == (int, int)
    assert dict(after.metadata) == {"local_steps": 2, "loss": 0.5}
    for value in (torch.tensor(4), np.arange(2), 10**5000, object()):
        with pytest.raises(ObservationError, match=r"batch_size is .*whole number from 1"):
            Knowledge(batch_size=value)
        with pytest.raises(ObservationError, match=r"batch_size.* is .*whole number from 1"):
            seen(metadata={"batch_size": value})


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(ObservationError, match=r"observation\.json is missing"):
        load_observation(tmp_path)
    seen().save(tmp_path)
    (tmp_path / "tensors.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ObservationError, match="not a safetensors file"):
        load_observation(tmp_path)


@pytest.mark.filterwarnings(
    "ignore:torch.quantize_per_tensor:UserWarning"
)  # the kind of tensor that is refused
def test_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path):
    quantised = torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)
    for bad in (torch.ones(2).to_sparse(), torch.ones(2, device="meta"), quantised):
        for changes in ({"tensors": {"a": bad}}, {"broadcast": {"a": bad}}):
            with pytest.raises(ObservationError, match=r"safetensors: 'a' .*cannot be stored"):
                seen(**changes).save(tmp_path / "new" / "round")
    with pytest.raises(ObservationError, match="metadata"):
        seen(metadata={"huge": 10**5000}).save(tmp_path / "new" / "round")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(ObservationError, match=r"broadcast\.safetensors cannot be written.*complex128"):
        seen(broadcast={"a": torch.ones(2, dtype=torch.complex128)}).save(tmp_path / "round")
    assert list(tmp_path.iterdir()) == []


def test_an_export_too_long_to_be_read_back_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_LARGEST", 1000)
    with pytest.raises(ObservationError, match="must be 1000 at most"):
        seen(metadata={"note": "x" * 1000}).save(tmp_path / "round")
    assert list(tmp_path.iterdir()) == []


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


OTHER = {"layer.weight": torch.ones(2, 3), "layer.bias": torch.zeros(2)}  # same names, shapes and types


@pytest.mark.parametrize("bad", [torch.ones(2).to_sparse(), torch.ones(2, device="meta")])
def test_a_failed_write_over_an_observation_keeps_it(stored, bad):
    before = files(stored)
    with pytest.raises(ObservationError):
        seen(tensors=OTHER, broadcast={"layer.weight": bad}).save(stored)
    assert files(stored) == before
    assert same(load_observation(stored), seen())


@pytest.mark.parametrize("broadcast", [None, {"layer.weight": torch.ones(2, 3)}])
@pytest.mark.parametrize("fails", range(1, 7))
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_exchange_that_fails_brings_the_old_files_back(stored, monkeypatch, fails, broadcast, error):
    before, calls, move = files(stored), [], os.replace

    def failing(source, target):
        calls.append(target)
        if len(calls) == fails:
            raise error("the disk is gone")
        move(source, target)

    monkeypatch.setattr(os, "replace", failing)
    after = seen(tensors=OTHER, broadcast=broadcast)
    if broadcast is None and fails == 6:
        after.save(stored)  # five moves are enough
        assert same(load_observation(stored), after)
        return
    with pytest.raises(error):
        after.save(stored)
    assert files(stored) == before
    assert same(load_observation(stored), seen())


def test_an_exchange_that_fails_takes_away_what_was_not_there(tmp_path, monkeypatch):
    seen(broadcast=None).save(tmp_path)
    before, move = files(tmp_path), os.replace

    def failing(source, target):
        if Path(source).parent.suffix == ".new" and Path(target).name == "observation.json":
            raise OSError("the disk is gone")
        move(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="the disk is gone"):
        seen().save(tmp_path)
    assert files(tmp_path) == before


def test_a_link_to_a_folder_yet_to_be_is_followed(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "new")
    seen().save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert same(load_observation(tmp_path / "new"), seen())


def test_a_fresh_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    def failing(*_):
        raise OSError("the disk is gone")

    for name in ("rename", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, failing)
            with pytest.raises(OSError, match="the disk is gone"):
                seen().save(tmp_path / "round")
        assert list(tmp_path.iterdir()) == []


def test_writing_over_an_observation_leaves_no_part_of_the_old_one_and_all_other_files(stored):
    (stored / "notes.txt").write_text("mine")
    (stored.parent / "link").symlink_to(stored)
    (stored / "tensors.safetensors").rename(stored.parent / "elsewhere")
    (stored / "tensors.safetensors").symlink_to(stored.parent / "elsewhere")
    elsewhere = (stored.parent / "elsewhere").read_bytes()
    after = seen(tensors=OTHER, broadcast=None)
    after.save(stored.parent / "link")
    assert same(load_observation(stored), after)
    assert sorted(files(stored)) == ["notes.txt", "observation.json", "tensors.safetensors"]
    assert (stored / "notes.txt").read_text() == "mine"
    assert (stored.parent / "link").is_symlink()
    assert (stored.parent / "elsewhere").read_bytes() == elsewhere


def test_a_loaded_observation_outlives_being_written_over(stored):
    loaded = load_observation(stored)
    seen(tensors=OTHER).save(stored)
    assert same(loaded, seen())
    loaded.save(stored)
    assert same(load_observation(stored), seen())


def test_a_place_that_is_taken_is_refused(stored, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ObservationError, match="is not a folder"):
        seen().save(tmp_path / "file")
    (stored / "tensors.safetensors").unlink()
    (stored / "tensors.safetensors").mkdir()
    (stored / "tensors.safetensors" / "mine").touch()
    with pytest.raises(ObservationError, match="is a folder"):
        seen().save(stored)
    assert (stored / "tensors.safetensors" / "mine").exists()


@pytest.mark.parametrize("name", ["tensors.safetensors", "broadcast.safetensors"])
def test_files_of_two_observations_do_not_load_together(stored, tmp_path, name):
    seen(tensors=OTHER, broadcast={"layer.weight": torch.ones(2, 3)}).save(tmp_path / "other")
    shutil.copy(tmp_path / "other" / name, stored / name)
    with pytest.raises(
        ObservationError, match=rf"{name} is not the file that observation\.json describes.*SHA-256"
    ):
        load_observation(stored)


def test_a_file_exchanged_while_it_is_read_is_refused(stored, monkeypatch):
    read = module.load_file

    def slow(path):
        found = read(path)
        shutil.copy(path, f"{path}.new")
        os.replace(f"{path}.new", path)
        return found

    monkeypatch.setattr(module, "load_file", slow)
    with pytest.raises(ObservationError, match="changed while it was read"):
        load_observation(stored)


def test_folders_of_earlier_versions_name_no_digest_and_load(stored):
    rewrite(stored, lambda d: d.pop("sha256"))
    assert same(load_observation(stored), seen())


@pytest.mark.parametrize(
    "digests",
    [
        None,
        "x",
        {},
        {"tensors.safetensors": None, "broadcast.safetensors": None},
        {"tensors.safetensors": "0" * 64},
    ],
)
def test_digests_that_leave_a_file_out_are_refused(stored, digests):
    rewrite(stored, lambda d: d.update(sha256=digests))
    with pytest.raises(ObservationError, match="must give a digest"):
        load_observation(stored)


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
        {"tensors": {1: torch.ones(1)}},
        {"tensors": torch.ones(2)},
        {"broadcast": [1]},
        {"broadcast": {"a": 1}},
        {"broadcast": {"__metadata__": torch.ones(1)}},
        {"metadata": [1]},
        {"metadata": {1: 2}},
        {"metadata": {"summand": "both"}},
        {"knowledge": {"batch_size": 1}},
        {"round": True},
    ],
)
def test_contradictions_are_refused(changes):
    values = {"kind": "gradient", "tensors": {"a": torch.ones(1)}} | changes
    with pytest.raises(ObservationError):
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
