"""The audit gives each attack its control:
of a run, and of a stored observation of any system, with the truth or without.
"""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import ffm_secure as ffm
from attacks import Budget, Knowledge, Observation, Prior
from attacks.steps import counted
from attacks.registry import ATTACKS, build
from attacks.nulls import study
from attacks.rehearsal import rehearse
from ffm_secure.auditing import replayed as client_replay
from ffm_secure.auditing.budget import DRAWS, DRAWS_OF_ONE, HEAVY, STEPS, AuditBudget
from ffm_secure.auditing.findings import Ran, repeated
from ffm_secure.auditing.png import png_address
from ffm_secure.auditing.run_audit import audit_run
from ffm_secure.auditing.standalone import audit_observation
from ffm_secure.auditing.step import build_stage, with_draws
from ffm_secure.auditing.wording import decoder, sentence
from ffm_secure.cli.app import app
from ffm_secure.errors import ConfigError, DataError, StoreError
from ffm_secure.report.document import write_audit
from ffm_secure.records import AuditFinding, Observer, Verdict
from tests.attacks.models import (
    bert,
    digits,
    gpt2,
    image_loss,
    mlp,
    noised,
    observe,
    observe_delta,
    observe_sum,
    sentences,
    text_loss,
    vit,
)

QUICK = ("token_presence", "span", "label_identity", "inverting_gradients", "imprint")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, a sum seen by the server, the same sum noised,
    and the truth behind it.
    """
    place = tmp_path_factory.mktemp("seen")
    model, ids = gpt2(vocabulary=120, width=32, length=16), sentences(3, 5, 120)
    batches = [{"input_ids": row[None], "labels": torch.tensor([1])} for row in ids]
    seen = observe_sum(model, batches, text_loss, batch_size=1)
    seen.save(place / "raw")
    hidden = noised(seen, 1.0)
    hidden.save(place / "unsized")
    replace(hidden, knowledge=Knowledge(sequence_length=5)).save(place / "noised")
    model.save_pretrained(place / "model")
    save_file({"token_ids": ids, "labels": torch.ones(3, dtype=torch.long)}, place / "truth.safetensors")
    return place


def verdicts(found) -> dict[str, str]:
    return {item.attack: item.verdict for item in found.findings}


def test_a_stored_sum_is_audited_by_the_command_with_verdicts_knowledge_and_json(folders: Path) -> None:
    arguments = ["audit", "--observation", folders / "raw", "--model", folders / "model"]
    arguments += ["--truth", folders / "truth.safetensors", "--json"]
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    by_name = {item["attack"]: item for item in found["findings"]}
    assert set(by_name) == set(ATTACKS)
    assert by_name["token_presence"]["verdict"] == by_name["span"]["verdict"] == "leaked"
    assert by_name["span"]["control"] > 0.3
    assert by_name["span"]["pairs"][0]["truth"].split() == by_name["span"]["pairs"][0]["recovered"].split()
    assert by_name["imprint"]["verdict"] == "not applicable"
    assert "standard" in by_name["text_matching"]["reason"]
    assert all(
        item["reason"] for item in found["findings"] if item["verdict"] in ("not applicable", "inconclusive")
    )
    assert found["cpu_seconds"] < 180
    assert "leaked" in found["sentence"]


def test_without_the_truth_certainty_is_held_against_a_rehearsal_and_against_noise(folders: Path) -> None:
    raw = verdicts(audit_observation(folders / "raw", model=folders / "model", attacks=QUICK))
    assert raw["token_presence"] == raw["span"] == "leaked"
    hidden = verdicts(audit_observation(folders / "noised", model=folders / "model", attacks=QUICK))
    assert "leaked" not in hidden.values()
    assert "not leaked" in hidden.values()
    # Without the length the rehearsal's is a guess: a passed control then proves no silence.
    unsized = audit_observation(folders / "unsized", model=folders / "model", attacks=QUICK).findings
    assert "not leaked" not in {item.verdict for item in unsized}
    assert any("size is a guess" in item.reason for item in unsized)


def test_without_a_model_nothing_is_claimed(folders: Path) -> None:
    found = audit_observation(folders / "raw", attacks=QUICK)
    assert set(verdicts(found).values()) <= {"not applicable", "inconclusive"}
    assert found.sentence.startswith("Nothing was proven")
    with pytest.raises(StoreError, match="no_such"):
        audit_observation(folders / "no_such")


def test_a_rehearsal_is_the_same_step_on_other_data_and_noise_is_of_the_same_length() -> None:
    model, ids = bert(vocabulary=120, width=32, length=16), sentences(2, 5, 120)
    batch = {"input_ids": ids, "labels": torch.tensor([0, 1])}
    for seen in (
        observe(model, batch, text_loss, batch_size=2),
        observe_delta(model, [batch], text_loss, learning_rate=0.01, optimiser="adamw", weight_decay=0.1),
    ):
        rehearsed = rehearse(noised(seen, 1.0), model, seed=0)
        assert rehearsed is not None
        other, truth = rehearsed
        assert other.kind == seen.kind
        assert {name: value.shape for name, value in other.tensors.items()} == {
            name: value.shape for name, value in seen.tensors.items()
        }
        assert "noise_multiplier" not in other.metadata
        assert truth.sequences is not None
        found = build("token_presence").run(other, model, Prior(), Budget.quick(), 0)
        assert set(found.of("token_set")[0].tolist()) == {token for row in truth.sequences for token in row}
        quiet = study(seen).draw(0)
        for name, tensor in seen.tensors.items():
            assert float(quiet.tensors[name].norm()) == pytest.approx(
                float(tensor.norm()), rel=1e-3, abs=1e-9
            )


def test_pictures_are_rehearsed_and_other_makes_of_model_are_not() -> None:
    model = vit(size=16, patch=8, width=32, layers=1)
    seen = Observation(
        kind="gradient", tensors={name: torch.zeros_like(p) for name, p in model.named_parameters()}
    )
    rehearsed = rehearse(seen, model, seed=0)
    assert rehearsed is not None
    assert rehearsed[1].images is not None
    assert rehearsed[1].images.shape == (1, 3, 16, 16)
    other = Observation(
        kind="gradient", tensors={name: torch.zeros_like(p) for name, p in mlp().named_parameters()}
    )
    assert rehearse(other, mlp(), seed=0) is None


def test_the_purse_keeps_a_quick_audit_short_and_says_what_was_left_out() -> None:
    quick, spent = AuditBudget(name="quick"), AuditBudget(name="standard", began=-1e9)
    span, matching = build("span"), build("text_matching")
    assert quick.budget(matching) is None
    assert "standard" in quick.refusal(matching)
    allowed = quick.budget(span)
    assert allowed is not None
    assert allowed.steps <= STEPS["quick"][0]
    assert spent.budget(span) is None
    assert "used up" in spent.refusal(span)
    tried = AuditBudget(name="standard").budget(matching)
    assert tried is not None
    assert tried.steps <= 45_000
    assert {build(name).family for name in ATTACKS} >= HEAVY


def test_recovered_ids_are_shown_as_readable_tokens() -> None:
    class Words:
        def decode(self, ids: list[int]) -> str:
            return ["the ", "##ing", ""][ids[0]]

    assert decoder(Words())("0 1 2") == "the ##ing 2"
    assert decoder(Words())("0 7") == "0 7"
    assert decoder(None)("5 6") == "5 6"


def found(attack: str, observer: Observer, verdict: Verdict, measure: str) -> AuditFinding:
    return AuditFinding(
        observer=observer, attack=attack, point="raw", verdict=verdict, measure=measure, score=1.0
    )


def test_one_line_says_who_can_learn_what() -> None:
    words = found("span", "server", "leaked", "token F1")
    labels = found("llg", "server", "leaked", "label count accuracy")
    passed = found("span", "public", "not leaked", "token F1")
    assert sentence([words, labels, passed]) == (
        "Private data leaked: the server can learn how many records carry each label and words of the "
        "training texts (2 of 2 attacks with a passed control)."
    )
    others = [found("llg", observer, "inconclusive", "not run") for observer in ("server", "public")]
    assert sentence([passed, replace(passed, observer="server"), *others]) == (
        "No leak found: 1 attack that read the undefended update failed on what observers see; 0 were "
        "inconclusive, 1 was not tried under this budget."
    )
    assert sentence([found("span", "server", "inconclusive", "")]) == (
        "Nothing was proven: no attack worked even on the undefended update."
    )
    inapplicable = "Nothing was proven: no attack on updates applies here."
    assert sentence([]) == sentence([found("span", "server", "not applicable", "")]) == inapplicable


def test_a_picture_survives_its_address_and_a_large_one_is_shrunk() -> None:
    pixels = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0))
    address = png_address(pixels)
    shown = Image.open(io.BytesIO(base64.b64decode(address.removeprefix("data:image/png;base64,"))))
    assert (
        np.abs(np.asarray(shown).astype(float) / 255 - pixels.permute(1, 2, 0).numpy()).max()
        <= 0.5 / 255 + 1e-6
    )
    large = png_address(torch.full((1, 400, 200), 2.0))
    assert Image.open(io.BytesIO(base64.b64decode(large.partition(",")[2]))).size == (25, 50)


def test_what_crosses_the_wire_is_what_the_clients_learned() -> None:
    """One client in the clear sends its own change, to the rounding of the ring; two send the sum of both."""
    path = Path(__file__).resolve().parents[2] / "examples" / "audit" / "text.toml"
    prepared = ffm.load(path).prepared()
    vector = prepared.trainable.flatten()
    first = client_replay.largest(prepared)
    second = 1 if first == 0 else 0
    rows = [
        prepared.task.encode(prepared.dataset.train.take(prepared.parts[index][:4]))
        for index in (first, second)
    ]
    alone = [
        client_replay.wire_change(prepared, vector, part, index)
        for part, index in zip(rows, (first, second), strict=True)
    ]
    learned = np.arange(4)
    beside = client_replay.Companion(client=second, rows=learned, unused=learned[:0])
    both = client_replay.wire_change(prepared, vector, rows[0], first, (beside,))
    assert torch.equal(prepared.trainable.flatten(), vector)
    assert max(float(value.abs().max()) for value in alone[0].values()) > 1e-3
    for name, value in both.items():
        assert torch.allclose(value, alone[0][name] + alone[1][name], atol=1e-5)


@pytest.mark.slow
def test_a_verdict_under_noise_is_the_mean_of_draws(tmp_path: Path) -> None:
    run = Path(__file__).resolve().parents[2] / "examples" / "audit" / "text.toml"
    noise = (
        "privacy.unit=record",
        "privacy.epsilon=8.0",
        "privacy.delta=1e-5",
        "privacy.clip_norm=0.5",
        "privacy.reason=",
    )
    chosen = (
        "audit.attacks=['label_identity', 'idlg_label']",
        "federation.rounds=1",
        "task.clients=4",
        "federation.cohort=4",
    )
    done = ffm.load(run, (*noise, *chosen, "task.evaluation_examples=20"), runs=tmp_path).start()
    audit = audit_run(done.folder).audit
    assert audit is not None
    by_place = {(item.attack, item.observer): item for item in audit.findings}
    one = by_place["idlg_label", "server"]
    assert one.point == "noised"
    assert f"mean of {DRAWS_OF_ONE} draws of records and noise" in one.reason
    assert one.low is not None
    assert one.low <= one.score <= one.high
    assert one.score in [
        n / DRAWS_OF_ONE for n in range(DRAWS_OF_ONE + 1)
    ]  # a label of one example is read or not
    assert {"batch_size", "labels"} & set(one.granted) == {"batch_size", "labels"}
    assert "batch_size" in by_place["label_identity", "server"].knowledge
    several = by_place["label_identity", "public"]
    assert several.point == "aggregated"
    assert f"mean of {DRAWS} draws" in several.reason


def small(ids: torch.Tensor) -> Observation:
    return observe(
        gpt2(vocabulary=120, width=32, length=16),
        {"input_ids": ids, "labels": torch.ones(len(ids)).long()},
        text_loss,
    )


def test_an_error_ends_one_attack_and_not_the_audit(tmp_path: Path) -> None:
    seen = small(sentences(2, 5, 120))
    name = "transformer.h.0.attn.c_attn.weight"
    broken = seen.tensors[name].clone()
    broken[0, 0] = float("nan")
    odd = {
        "nan": {**seen.tensors, name: broken},
        "huge": {name: 1e30 * tensor for name, tensor in seen.tensors.items()},
        "shape": {**seen.tensors, name: seen.tensors[name][:3]},
        "whole": {name: (1e6 * tensor).long() for name, tensor in seen.tensors.items()},
    }
    gpt2(vocabulary=120, width=32, length=16).save_pretrained(tmp_path / "model")
    for label, tensors in odd.items():
        seen.replace_tensors(tensors, batch_size=2, sequence_length=5).save(tmp_path / label)
    found = audit_observation(tmp_path / "huge", model=tmp_path / "model", attacks=QUICK)
    assert len(found.findings) == len(QUICK)
    assert all(item.reason for item in found.findings if item.verdict != "leaked")
    for label, told in {"nan": f"{name}.*NaN", "shape": f"{name}.*another model", "whole": "whole"}.items():
        with pytest.raises(DataError, match=told):
            audit_observation(tmp_path / label, model=tmp_path / "model", attacks=QUICK)


def test_an_update_behind_a_wrapper_leaks_as_the_plain_one_and_a_foreign_name_is_no_silence(tmp_path) -> None:
    seen = small(sentences(2, 5, 120)).replace_tensors(
        small(sentences(2, 5, 120)).tensors, batch_size=2, sequence_length=5
    )
    gpt2(vocabulary=120, width=32, length=16).save_pretrained(tmp_path / "model")
    found = {}
    for label in ("", "_module.", "module."):
        wrapped = {f"{label}{name}": tensor for name, tensor in seen.tensors.items()}
        seen.replace_tensors(wrapped).save(tmp_path / f"seen{label}")
        found[label] = verdicts(
            audit_observation(tmp_path / f"seen{label}", model=tmp_path / "model", attacks=QUICK)
        )
    assert "leaked" in found[""].values()
    assert found[""] == found["_module."] == found["module."]
    foreign = {f"net.{name}s": tensor for name, tensor in seen.tensors.items()}
    seen.replace_tensors(foreign).save(tmp_path / "foreign")
    arguments = ["audit", "--observation", str(tmp_path / "foreign"), "--model", str(tmp_path / "model")]
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, DataError)  # which ends the command with code 2
    assert DataError.exit_code == 2
    assert "'net." in str(done.exception)


def test_a_difference_of_state_dicts_has_its_rehearsal_too(tmp_path: Path) -> None:
    model, ids = gpt2(vocabulary=120, width=32, length=16, classes=None, tied=True), sentences(2, 5, 120)
    seen = observe(model, {"input_ids": ids, "labels": ids}, text_loss, batch_size=2, sequence_length=5)
    twice = {**seen.tensors, "lm_head.weight": seen.tensors["transformer.wte.weight"]}
    assert rehearse(seen.replace_tensors(twice), model, seed=0) is not None
    assert rehearse(seen.replace_tensors({**twice, "foreign": torch.zeros(3)}), model, seed=0) is None
    save_file({"token_ids": ids}, tmp_path / "truth.safetensors")
    seen.replace_tensors({**twice, "foreign": torch.zeros(3)}).save(tmp_path / "foreign")
    seen.replace_tensors(twice).save(tmp_path / "seen")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(DataError, match="foreign is unknown"):
        audit_observation(tmp_path / "foreign", model=tmp_path / "model")
    found = audit_observation(
        tmp_path / "seen",
        model=tmp_path / "model",
        truth=tmp_path / "truth.safetensors",
        attacks=("token_presence", "imprint"),
    )
    by_name = {item.attack: item for item in found.findings}
    assert by_name["token_presence"].verdict == "leaked"  # the truth proves it, control or not
    assert by_name["imprint"].verdict == "not applicable"


RECORD = ("privacy={unit='record',epsilon=8.0,delta=1e-5,clip_norm=0.5}",)
CLIENT = (
    "privacy={unit='client',epsilon=8.0,delta=1e-5,clip_norm=0.5}",
    "protection={kind='secagg',threshold=3}",
)


@pytest.mark.parametrize(
    "privacy",
    [RECORD, (*RECORD, "protection={kind='secagg',threshold=3}"), CLIENT],
    ids=["record", "masked", "client"],
)
def test_the_noise_an_attacker_is_told_is_the_noise_there_is(privacy: tuple[str, ...]) -> None:
    run = Path(__file__).resolve().parents[2] / "examples" / "audit" / "text.toml"
    small = (
        "task.data=builtin:clinic_notes?size=400&validation=40",
        "task.clients=4",
        "federation.cohort=4",
        "task.evaluation_examples=20",
    )
    prepared = ffm.load(run, (*small, *privacy)).prepared()
    vector = prepared.trainable.flatten()
    one, two = (build_stage(prepared, vector, records=4) for _ in range(2))  # the same records, other noise
    clients = client_replay.smallest_sum(prepared.config)
    scenes = [(stage.at("noised"), stage.at("aggregated"), stage.wire(clients)) for stage in (one, two)]
    for first, second in zip(*scenes, strict=True):
        told = first.observation.metadata["noise_deviation"]
        apart = [
            first.observation.tensors[name] - tensor for name, tensor in second.observation.tensors.items()
        ]
        measured = float(torch.cat([tensor.flatten() for tensor in apart]).double().std()) / 2**0.5
        assert measured == pytest.approx(told, rel=0.05), first.point
        assert first.observation.metadata["clip_norm"] == prepared.mechanism.clip_norm
    assert not {"noise_deviation", "clip_norm"} & set(one.control.observation.metadata)


def test_drawing_ends_when_it_has_had_its_share() -> None:
    prepared = ffm.load(
        Path(__file__).resolve().parents[2] / "examples" / "audit" / "text.toml",
        ("task.data=builtin:clinic_notes?size=400&validation=40", "task.evaluation_examples=20"),
    ).prepared()
    stage, purse = with_draws(prepared, prepared.trainable.flatten(), 1), AuditBudget(name="quick")
    with counted():
        other = purse.draw(stage, 1, "raw")
    assert other is not None
    assert other.model is stage.model  # a draw costs no second copy of the model
    assert 0.0 < purse.drawing[1] < STEPS["quick"][1] / 24
    purse.drawing[1] = STEPS["quick"][1] / 23
    assert purse.draw(stage, 2, "raw") is None
    several = Ran()
    found = repeated(build("idlg_label"), stage, "raw", purse, several)
    assert found is not None
    assert found[1].draws == 1


def test_an_update_of_another_system_has_its_page_its_numbers_and_its_pictures(tmp_path: Path) -> None:
    model = vit(width=192)
    image = torch.nn.functional.interpolate(digits()[0][:1], size=32).expand(-1, 3, -1, -1).contiguous()
    seen = observe(model, {"images": image, "labels": torch.tensor([3])}, image_loss, batch_size=1)
    wrapped = {f"module.{name}": tensor for name, tensor in seen.tensors.items()}
    replace(seen.replace_tensors(wrapped), observer="their server").save(tmp_path / "seen")
    model.save_pretrained(tmp_path / "model")
    save_file({"images": image, "labels": torch.tensor([3])}, tmp_path / "truth.safetensors")
    truth = tmp_path / "truth.safetensors"
    found = audit_observation(
        tmp_path / "seen", model=tmp_path / "model", truth=truth, attacks=("position_vision", "imprint")
    )
    assert verdicts(found)["position_vision"] == "leaked"
    assert any("'module.'" in note for note in found.notes)
    page = write_audit(found, tmp_path / "out", name="seen", notes=found.notes)
    text = page.read_text(encoding="utf-8")
    assert "their server" in text
    assert "module." in text
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "report.html", "report.json", "internal.html", "internal.json",
        "internal_position_vision_1_truth.png", "internal_position_vision_1_recovered.png",
    }  # fmt: skip
    assert "data:image/png;base64," in (tmp_path / "out" / "internal.html").read_text(encoding="utf-8")
    assert "data:image" not in text
    assert (tmp_path / "out" / "internal_position_vision_1_recovered.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["findings"][0]["verdict"] == "leaked"
    with pytest.raises(StoreError, match="exists"):
        write_audit(found, tmp_path / "out", name="seen")
    arguments = ["audit", "--observation", str(tmp_path / "seen"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, ConfigError)
