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


def test_a_run_or_an_observation_beside_it_is_refused(folder: Path) -> None:
    code, output = said(str(folder), "--secrets", str(folder / "secrets.json"))
    assert code == 2
    assert "--model alone" in output
    assert "need --model" in output
