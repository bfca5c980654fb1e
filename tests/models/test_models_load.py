"""Loading: built-in and local models, what is refused and how it is said."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, ViTConfig, ViTForImageClassification

import ffm_secure.models.backbone
from ffm_secure.errors import ModelError
from ffm_secure.models.backbone import Backbone, fingerprint, load_backbone
from ffm_secure.models.builtin import MeanPoolClassifier, masked_mean, tiny_tokenizer

TINY = [
    ("tiny-bert", "text_classification"),
    ("tiny-bert", "masked_lm"),
    ("tiny-gpt2", "text_classification"),
    ("tiny-gpt2", "causal_lm"),
    ("tiny-llama", "text_classification"),
    ("tiny-llama", "causal_lm"),
    ("tiny-vit", "image_classification"),
]


def load(
    name: str,
    kind: str = "text_classification",
    *,
    labels: int = 3,
    seed: int = 1,
    base: Path = Path(),
    **rest: bool,
) -> Backbone:
    return load_backbone(name, kind=kind, labels=labels, base=base, seed=seed, **rest)


def save(backbone: Backbone, folder: Path) -> Path:
    backbone.model.save_pretrained(folder)
    if backbone.tokenizer is not None:
        backbone.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(load("builtin:tiny-bert"), tmp_path / "model")


@pytest.mark.parametrize("name, kind", TINY)
def test_tiny_models_are_frozen_quiet_and_made_by_the_seed(name: str, kind: str) -> None:
    one, same, other = (load(f"builtin:{name}", kind, seed=seed) for seed in (1, 1, 2))
    assert not one.model.training
    assert not any(p.requires_grad for p in one.model.parameters())
    assert all(m.p == 0.0 for m in one.model.modules() if isinstance(m, torch.nn.Dropout))
    assert one.total_parameters == sum(p.numel() for p in one.model.parameters())
    assert fingerprint(one.model.state_dict()) == fingerprint(same.model.state_dict())
    assert fingerprint(one.model.state_dict()) != fingerprint(other.model.state_dict())
    if kind.endswith("classification"):
        assert one.config.num_labels == 3


def test_building_a_model_leaves_the_global_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    load("builtin:tiny-bert")
    assert torch.equal(before, torch.random.get_rng_state())


def test_dropout_can_be_kept() -> None:
    kept = load("builtin:tiny-bert", dropout=True)
    assert any(m.p > 0.0 for m in kept.model.modules() if isinstance(m, torch.nn.Dropout))


@pytest.mark.parametrize("name, kind", TINY)
def test_a_saved_folder_comes_back_with_equal_logits(name: str, kind: str, tmp_path: Path) -> None:
    first = load(f"builtin:{name}", kind)
    save(first, tmp_path / "model")
    again = load("model", kind, base=tmp_path)
    assert again.fresh == ()
    if kind == "image_classification":
        inputs = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)}
    else:
        inputs = {"input_ids": torch.tensor([[2, 40, 50, 3]])}
        assert again.tokenizer("Good movie!")["input_ids"] == first.tokenizer("Good movie!")["input_ids"]
    with torch.inference_mode():
        assert torch.equal(first.model(**inputs).logits, again.model(**inputs).logits)


def test_another_number_of_labels_replaces_the_head_and_nothing_else(saved: Path) -> None:
    three, five, same = load(str(saved)), load(str(saved), labels=5), load(str(saved), labels=5)
    assert three.fresh == ()
    assert five.fresh == ("classifier.weight", "classifier.bias")
    assert five.model.classifier.weight.shape == (5, 64)
    assert any("5 labels" in note for note in five.notes)
    assert fingerprint(five.model.state_dict()) == fingerprint(same.model.state_dict())
    body = [{k: v for k, v in m.model.state_dict().items() if k.startswith("bert.")} for m in (three, five)]
    assert fingerprint(body[0]) == fingerprint(body[1])


def test_a_sentence_encoder_gets_its_mean_pooling_head(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    BertModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    backbone = load(str(tmp_path))
    assert isinstance(backbone.model, MeanPoolClassifier)
    assert backbone.fresh == ("classifier.weight", "classifier.bias")
    stored = BertModel.from_pretrained(tmp_path)
    ids, mask = torch.tensor([[2, 40, 3, 0]]), torch.tensor([[1, 1, 1, 0]])
    with torch.inference_mode():
        hidden = stored.eval()(input_ids=ids, attention_mask=mask).last_hidden_state
        wanted = backbone.model.classifier(hidden[:, :3].mean(dim=1))
        torch.testing.assert_close(backbone.model(input_ids=ids, attention_mask=mask).logits, wanted)


def test_masked_mean_leaves_padding_out() -> None:
    hidden = torch.tensor([[[1.0], [3.0], [100.0]]])
    assert masked_mean(hidden, torch.tensor([[1, 1, 0]])).item() == 2.0
    assert masked_mean(hidden, None).item() == pytest.approx(104 / 3)


def test_a_masked_lm_head_is_made_where_the_checkpoint_has_none(saved: Path) -> None:
    backbone = load(str(saved), "masked_lm")
    assert "cls.predictions.transform.dense.weight" in backbone.fresh
    assert any("tied to the input embeddings" in note for note in backbone.notes)
    tied = backbone.model.cls.predictions.decoder.weight
    assert tied is backbone.model.bert.embeddings.word_embeddings.weight


def test_pickled_weights_are_refused_and_never_opened(saved: Path, tmp_path: Path) -> None:
    (saved / "model.safetensors").unlink()
    (saved / "pytorch_model.bin").write_bytes(f"cos\nsystem\n(S'touch {tmp_path / 'opened'}'\ntR.".encode())
    with pytest.raises(ModelError, match="pickled"):
        load(str(saved))
    assert not (tmp_path / "opened").exists()


def test_code_in_a_model_folder_is_not_run(saved: Path, tmp_path: Path) -> None:
    table = json.loads((saved / "config.json").read_text())
    table |= {"model_type": "unheard-of", "auto_map": {"AutoConfig": "evil.Config"}}
    (saved / "config.json").write_text(json.dumps(table))
    (saved / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    with pytest.raises(ModelError):
        load(str(saved))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.3, 0.999])
def test_cut_off_weights_are_one_clear_error(saved: Path, keep: float) -> None:
    path = saved / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(str(saved))


def test_random_damage_is_an_error_or_a_model_but_never_a_traceback(saved: Path, tmp_path: Path) -> None:
    """60 seeded corruptions of any file of the folder."""
    stream = torch.Generator().manual_seed(7)
    files = sorted(path.name for path in saved.iterdir())
    refused = 0
    for trial in range(60):
        folder = tmp_path / f"damaged{trial}"
        shutil.copytree(saved, folder)
        path = folder / files[trial % len(files)]
        data = bytearray(path.read_bytes())
        for _ in range(8):
            place = int(torch.randint(min(len(data), 4096), (1,), generator=stream))
            data[place] = int(torch.randint(256, (1,), generator=stream))
        path.write_bytes(data)
        try:
            load(str(folder))
        except ModelError:
            refused += 1
        shutil.rmtree(folder)
    assert refused >= 30


def test_weights_of_another_model_are_refused(saved: Path) -> None:
    table = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(table | {"intermediate_size": 96}))
    with pytest.raises(ModelError, match="do not belong to this config"):
        load(str(saved))


def test_an_encoder_is_no_causal_model(tmp_path: Path) -> None:
    save(load("builtin:tiny-bert", "masked_lm"), tmp_path)
    with pytest.raises(ModelError, match="look at later tokens"):
        load(str(tmp_path), "causal_lm")


def test_a_causal_model_needs_its_output_layer(tmp_path: Path) -> None:
    backbone = load("builtin:tiny-llama", "causal_lm")
    backbone.model.model.save_pretrained(tmp_path)
    backbone.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no language-model head"):
        load(str(tmp_path), "causal_lm")


def test_a_vision_model_cannot_read(tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
    )
    ViTForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot do text_classification"):
        load(str(tmp_path))
    assert load(str(tmp_path), "image_classification").image_size == 8


def test_a_tokenizer_larger_than_the_embedding_is_refused(saved: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["extra-token"])
    tokenizer.save_pretrained(saved)
    with pytest.raises(ModelError, match="do not belong together"):
        load(str(saved))


@pytest.mark.parametrize(
    "name, kind, words",
    [
        ("builtin:huge", "text_classification", "builtin:tiny-bert"),
        ("builtin:tiny-vit", "causal_lm", "it can do image_classification"),
        ("./nowhere", "text_classification", "no such folder"),
        ("a/b/c", "text_classification", "no such folder"),
        ("builtin:tiny-bert", "sorting", "must be one of"),
    ],
)
def test_wrong_names_are_explained(name: str, kind: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=words):
        load(name, kind, base=tmp_path)


def test_one_label_is_no_task() -> None:
    with pytest.raises(ModelError, match="at least two labels"):
        load("builtin:tiny-bert", labels=1)


def test_an_empty_folder_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        load(str(tmp_path))


def test_a_hub_name_without_network_is_an_error_within_seconds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    start = time.monotonic()
    with pytest.raises(ModelError, match="model hub gave nothing"):
        load("nobody/no-such-model", base=tmp_path)
    assert time.monotonic() - start < 20


def test_an_unreachable_hub_is_noticed_before_any_retry(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for key in ("HF_HUB_OFFLINE", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: nothing listens
    start = time.monotonic()
    with pytest.raises(ModelError, match="model hub gave nothing"):
        load("nobody/no-such-model", base=tmp_path)
    assert time.monotonic() - start < 20


def test_without_the_demo_extra_minilm_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ffm_secure.models.backbone, "_MINILM", "package_that_is_not_there")
    with pytest.raises(ModelError, match="extra 'demo'"):
        load("builtin:minilm")


def test_the_code_in_the_documentation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "docs/models.md", "exec"), {})  # noqa: S102 - our own page
    assert "LoRA rank 4" in capsys.readouterr().out
