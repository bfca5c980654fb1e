"""Model folders of the kinds people have: each loads rightly, or is one sentence that says what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ffm_secure.errors import ModelError
from ffm_secure.models.backbone import load_backbone
from ffm_secure.models.builtin import tiny_tokenizer

CAUSAL = "causal_lm"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a GPT-2 with a tied head, in one file."""
    folder, tokenizer = tmp_path_factory.mktemp("sound"), tiny_tokenizer()
    config = transformers.GPT2Config(
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=32,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(3)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path / "model")
    return tmp_path / "model"


def load(folder: Path, kind: str = CAUSAL) -> torch.nn.Module:
    return load_backbone(str(folder), kind=kind, labels=2, base=folder, seed=1).model


def answers(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.tensor([[7, 8, 9]])).logits
    return logits


def change_config(folder: Path, **keys: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_weights_in_several_files_are_the_same_weights(sound: Path, folder: Path) -> None:
    model = transformers.GPT2LMHeadModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="5KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert torch.equal(answers(load(folder)), answers(load(sound)))


def test_a_tied_head_stays_tied(folder: Path) -> None:
    model = load(folder)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_half_precision_weights_are_loaded_as_what_they_are(sound: Path, folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.update({k: v.half() for k, v in tensors.items()}))
    change_config(folder, dtype="float16")
    model = load(folder)
    assert next(model.parameters()).dtype == torch.float32
    assert torch.allclose(answers(model), answers(load(sound)), atol=1e-2)


def _drop(pattern: str) -> Callable[[Path], None]:
    def drop(folder: Path) -> None:
        for path in folder.glob(pattern):
            path.unlink()

    return drop


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])


def _not_a_number(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors["transformer.h.0.ln_1.weight"].fill_(float("nan")))


def _without_layer(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.pop("transformer.h.0.ln_1.weight"))


def _adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def _other_format(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "model.gguf").write_bytes(b"GGUF")


def _own_code(folder: Path) -> None:
    change_config(
        folder, model_type="mine", auto_map={"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.M"}
    )


def _cut_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _grown_tokenizer(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<new{number}>" for number in range(40)])
    tokenizer.save_pretrained(folder)


def _config_of(**keys: object) -> Callable[[Path], None]:
    return lambda folder: change_config(folder, **keys)


BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "pickled weights": (_pickled, "pickled, and a pickle can run code; convert them"),
    "no weights": (_drop("*.safetensors"), r"holds no \*.safetensors"),
    "cut weights": (_cut, "the folder cannot be loaded"),
    "a layer that is missing": (_without_layer, "missing or of another shape .*ln_1.weight"),
    "weights that are no numbers": (_not_a_number, "1 tensors hold NaN or infinity .*ln_1.weight.*write the"),
    "four bits": (_config_of(quantization_config=BITS), r"quantised \(bitsandbytes, 4 bits\).*dequantize"),
    "another way of few bits": (
        _config_of(quantization_config={"quant_method": "gptq", "bits": 4}),
        r"\(gptq\)",
    ),
    "an adapter alone": (_adapter, "holds an adapter of PEFT: set model.adapter"),
    "a file of another program": (_other_format, r"holds \*.gguf, which is not read; write the model"),
    "code of its own": (_own_code, "no code of a model is ever run; choose"),
    "a configuration that is no JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        "cannot be loaded",
    ),
    "no tokenizer": (_drop("tokenizer*"), "holds no tokenizer; write the model's own"),
    "half a tokenizer": (
        _drop("tokenizer.json"),
        r"cannot be loaded from tokenizer_config.json .*missing or damaged: write the model's own",
    ),
    "a tokenizer that grew": (_grown_tokenizer, "resize_token_embeddings"),
    "a task it cannot do": (_config_of(), "cannot do sequence_to_sequence"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_one_sentence(case: str, folder: Path) -> None:
    spoil, words = REFUSED[case]
    spoil(folder)
    kind = "sequence_to_sequence" if "task" in case else CAUSAL
    with pytest.raises(ModelError, match=words) as caught:
        load(folder, kind)
    assert str(caught.value).startswith("model.name = ")
    assert len(str(caught.value).splitlines()) == 1
