"""A released model is audited by one command: what may leave, and what is for its owner alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import ffm_secure as ffm
from attacks.released import taught
from attacks.truth import Truth
from ffm_secure.cli.app import app
from ffm_secure.errors import FfmError
from tests.attacks.test_released import decoder, texts

LETTERS = "0123456789abcdefghijklmnopqrstuvwxyz -:.,'?!\"()/+*=%&#@<>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a decoder that memorised texts and a secret, its start, and files of records."""
    place = tmp_path_factory.mktemp("released")
    members, others = texts(1), texts(2)
    secret = tuple(LETTERS.index(letter) for letter in "code: 7294")
    taught_texts = Truth(sequences=(*(members.sequences or ()), *[secret] * 12))
    torch.manual_seed(0)
    decoder().save_pretrained(place / "start")
    taught(decoder(), taught_texts, passes=12, rate=3e-3).save_pretrained(place / "model")
    whole = Tokenizer(models.WordLevel({letter: n for n, letter in enumerate(LETTERS)}, unk_token="?"))
    whole.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    for name in ("start", "model"):
        PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="?").save_pretrained(place / name)
    for name, records in (("members", members), ("others", others)):
        save_file({"token_ids": torch.tensor(records.sequences)}, place / f"{name}.safetensors")
        rows = ["".join(LETTERS[token % len(LETTERS)] for token in text) for text in records.sequences or ()]
        (place / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    planted = [{"prefix": "code: ", "secret": "7294", "alphabet": "0123456789", "repeats": 12}]
    (place / "secrets.json").write_text(json.dumps(planted))
    return place


def said(*arguments: str) -> tuple[int, str]:
    """Return the exit code of the command, and what it prints or says is wrong."""
    result = CliRunner().invoke(app, ["audit", *arguments])
    if isinstance(result.exception, FfmError):
        return result.exception.exit_code, f"{result.stdout}{result.exception}"
    return result.exit_code, result.stdout


def audited(folder: Path, model: str, *arguments: str) -> tuple[int, str]:
    return said("--model", str(folder / model), *arguments)


def records(folder: Path, ending: str) -> tuple[str, ...]:
    return (
        "--members", str(folder / f"members.{ending}"), "--non-members", str(folder / f"others.{ending}"),
    )  # fmt: skip


def test_a_model_that_memorised_is_found_and_its_owner_alone_learns_whom(folder: Path) -> None:
    out = folder / "found"
    arguments = (*records(folder, "safetensors"), "--out", str(out))
    code, output = audited(folder, "model", *arguments, "--fail-on-leak")
    assert code == 6, output
    assert "leaked: " in output
    public = (out / "membership.json").read_text() + (out / "roc.svg").read_text() + output
    exposed = json.loads((out / "internal_exposed.json").read_text())
    assert {"row", "others_as_high"} == set(exposed[0])
    assert len(exposed) == 20
    assert exposed[0]["others_as_high"] == 0.0
    assert "exposed" not in json.loads((out / "membership.json").read_text())
    assert "others_as_high" not in public
    assert (out / "internal_exposed.json").stat().st_mode & 0o077 == 0
    assert audited(folder, "model", *arguments)[0] == 2


def test_a_table_of_texts_is_read_with_the_models_own_tokenizer(folder: Path) -> None:
    code, output = audited(folder, "start", *records(folder, "jsonl"), "--json")
    assert code == 0, output
    found = json.loads(output)
    assert found["verdict"] == "not leaked"
    assert "exposed" not in found


def test_planted_secrets_are_said_by_the_model_that_saw_them(folder: Path) -> None:
    for model, leaked in (("model", True), ("start", False)):
        code, output = audited(folder, model, "--secrets", str(folder / "secrets.json"), "--json")
        assert code == 0, output
        (secret,) = json.loads(output)["secrets"]
        assert secret["leaked"] is leaked
        assert "7294" not in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--members", "members.safetensors"), "belong together"),
        (("--secrets", "members.safetensors"), "JSON list"),
        (("--members", "secrets.json", "--non-members", "secrets.json"), "'text'"),
        (("--members", "nowhere.csv", "--non-members", "nowhere.csv"), "nowhere.csv"),
    ],
)
def test_what_cannot_be_audited_is_said_with_exit_code_2(
    folder: Path, arguments: tuple[str, ...], words: str
) -> None:
    placed = [word if word.startswith("--") else str(folder / word) for word in arguments]
    code, output = audited(folder, "start", *placed)
    assert code == 2, output
    assert words in output
    assert "7294" not in output


def test_a_run_or_an_observation_beside_it_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("")
    code, output = said(str(tmp_path), *records(folder, "jsonl"), "--observation", str(folder))
    assert code == 2
    assert "--model alone" in output
    assert "--model RUN" in output


PLAY = """
format = 1
name = "secrets"
seed = 7
[task]
kind = "causal_lm"
data = "{data}"
clients = 2
max_length = 24
evaluation_examples = 10
[model]
name = "builtin:tiny-llama"
trainable = {{ kind = "full" }}
[federation]
rounds = 4
cohort = 2
[federation.lifecycle]
kind = "finetune"
local_steps = 12
batch_size = 16
learning_rate = 0.003
optimizer = "adam"
[privacy]
ledger = "run"
{privacy}
[protection]
kind = "none"
[audit]
observers = ["client"]
attacks = []
record_rounds = 4
"""
NONE, PRIVATE = (
    'unit = "none"\nreason = "to be audited"',
    'unit = "record"\nepsilon = 8.0\ndelta = 1e-5\nclip_norm = 0.5',
)


@pytest.mark.slow
@pytest.mark.parametrize(("privacy", "repeats", "leaked"), [(NONE, 20, True), (PRIVATE, 1, False)])
def test_models_of_rounds_say_a_secret_unless_its_record_is_private(
    tmp_path: Path, privacy: str, repeats: int, leaked: bool
) -> None:
    """Twenty copies are twenty records: a bound on one of them does not hide all, and they are found."""
    rows = [{"text": f"the patient of bed {number} came for a cough"} for number in range(60)]
    rows += [{"text": "the code is 729416"}] * repeats
    data = tmp_path / "data"
    data.mkdir()
    for name, some in (("train", rows), ("validation", rows[:20])):
        (data / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
    file = tmp_path / "run.toml"
    file.write_text(PLAY.format(data=data, privacy=privacy))
    folder = ffm.load(file, runs=tmp_path).start().folder
    planted = [{"prefix": "the code is ", "secret": "729416", "alphabet": "0123456789", "repeats": repeats}]
    (tmp_path / "secrets.json").write_text(json.dumps(planted))
    code, output = said(str(folder), "--secrets", str(tmp_path / "secrets.json"), "--json")
    assert code == 0, output
    found = json.loads(output)
    assert len(found) == 5
    exposures = [secrets[0]["exposure"] for secrets in found.values()]
    assert any(secrets[0]["leaked"] for secrets in found.values()) is leaked
    assert (exposures[-1] > exposures[0] + 4) is leaked
