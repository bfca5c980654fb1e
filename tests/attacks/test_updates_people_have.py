"""Updates as training libraries leave them: read rightly in any precision, or refused in words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from attacks import Knowledge, Observation, ObservationError
from attacks.answering import answer_itself, writes
from attacks.command import load_model
from attacks.fitting import fit
from ffm_secure.auditing.standalone import audit_observation
from ffm_secure.errors import DataError
from ffm_secure.models.builtin import tiny_tokenizer

READ, WRITTEN = torch.tensor([[30, 41, 52, 63, 74, 85]]), torch.tensor([[31, 42, 53, 1]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a T5 stored in bfloat16, with its tokenizer."""
    place, tokenizer = tmp_path_factory.mktemp("t5"), tiny_tokenizer()
    config = transformers.T5Config(
        vocab_size=len(tokenizer),
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        eos_token_id=1,
        pad_token_id=0,
        decoder_start_token_id=0,  # type: ignore[call-arg]
    )
    torch.manual_seed(1)
    transformers.T5ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def model(folder: Path) -> nn.Module:
    return load_model(folder)


@pytest.fixture(scope="module")
def gradient(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=READ, labels=WRITTEN).loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def seen(tensors: dict[str, Tensor]) -> Observation:
    return Observation(
        kind="gradient", tensors=tensors, knowledge=Knowledge(batch_size=1, sequence_length=READ.shape[1])
    )


def test_a_stored_half_precision_model_is_attacked_in_single_and_loads_without_a_word(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert {value.dtype for value in load_model(folder).parameters()} == {torch.float32}
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_precision_is_read_in_that_of_the_model(
    model: nn.Module, gradient: dict[str, Tensor], dtype: torch.dtype
) -> None:
    fitted = fit(seen({name: value.to(dtype) for name, value in gradient.items()}), model)
    for name, value in fitted.observation.tensors.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, gradient[name], rtol=0.01, atol=1e-4)
    assert f"stored as {str(dtype).removeprefix('torch.')}" in fitted.notes[-1]
    assert fit(seen(gradient), model).notes == ()


def test_an_update_of_zeros_is_no_update(model: nn.Module, gradient: dict[str, Tensor]) -> None:
    with pytest.raises(ObservationError, match=r"all of .* are zero.*record it"):
        fit(seen({name: torch.zeros_like(value) for name, value in gradient.items()}), model)


WRONG = {
    "a flat parameter of a sharded model": lambda tensors: {
        "_fsdp_wrapped_module._flat_param": torch.cat([value.flatten() for value in tensors.values()])
    },
    "another width": lambda tensors: {name: value[..., :-1] for name, value in tensors.items()},
    "not a number": lambda tensors: {name: value * float("nan") for name, value in tensors.items()},
    "names of nobody": lambda tensors: {f"{name}.mine": value for name, value in tensors.items()},
}
NAMED = {
    "compiled inside": lambda name: f"module._orig_mod.{name}",
    "compiled by blocks": lambda name: name.replace("block.0.", "block.0._orig_mod."),
    "sharded by blocks": lambda name: name.replace("block.0.", "block.0._fsdp_wrapped_module."),
    "of a trainer": lambda name: f"model.{name}",
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_an_update_of_the_model_is_refused(
    case: str, folder: Path, gradient: dict[str, Tensor], tmp_path: Path
) -> None:
    seen_nothing = Observation(kind="gradient", tensors=WRONG[case](gradient))
    seen_nothing.save(tmp_path / "seen")
    with pytest.raises(DataError, match="tensors: "):
        audit_observation(tmp_path / "seen", model=folder, attacks=["token_presence"])


@pytest.mark.parametrize("case", NAMED)
def test_names_of_wrappers_are_read_past(case: str, model: nn.Module, gradient: dict[str, Tensor]) -> None:
    fitted = fit(seen({NAMED[case](name): value for name, value in gradient.items()}), model)
    assert set(fitted.observation.tensors) == set(gradient)
    assert fitted.notes


def test_what_an_encoder_read_leaks_from_half_precision_under_wrapped_names(
    folder: Path, gradient: dict[str, Tensor], tmp_path: Path
) -> None:
    seen({f"_module.{name}": value.half() for name, value in gradient.items()}).save(tmp_path / "seen")
    audit = audit_observation(tmp_path / "seen", model=folder, attacks=["token_presence"])
    (finding,) = audit.findings
    assert finding.verdict == "leaked", finding
    assert any("float16" in note for note in audit.notes)


def test_a_model_that_writes_runs_on_one_text(model: nn.Module, folder: Path) -> None:
    plain = transformers.T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    assert writes(plain)
    with pytest.raises(ValueError, match="specify"):
        plain(input_ids=READ)
    with torch.inference_mode():
        alone = answer_itself(plain)(input_ids=READ).logits
        told = model(input_ids=READ, labels=READ).logits
    torch.testing.assert_close(alone, told)
    assert not writes(nn.Linear(2, 2))


LEFT_OVER = {
    "places of words": ("encoder.embed_positions", torch.arange(4)),
    "a mask": ("encoder.block.0.mask", torch.ones(4, 4, dtype=torch.bool)),
}


@pytest.mark.parametrize("case", LEFT_OVER)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_what_older_libraries_keep_beside_weights_is_left_out_and_said(
    case: str, prefix: str, model: nn.Module, gradient: dict[str, Tensor]
) -> None:
    name, value = LEFT_OVER[case]
    fitted = fit(seen({prefix + key: tensor for key, tensor in {**gradient, name: value}.items()}), model)
    assert set(fitted.observation.tensors) == set(gradient)
    assert fitted.notes[0] == (
        f"tensors: {prefix}{name} holds no real numbers, has no place in the model and was left out"
    )


SHAPED = {
    "laid flat": (lambda value: value.flatten(), "laid flat; record it in its own shape"),
    "of single samples": (lambda value: value[None].repeat(2, 1, 1), "single samples do; record their mean"),
    "of a larger vocabulary": (lambda value: torch.cat([value, value[:3]]), "a vocabulary that grew"),
    "of eight bits": (
        lambda value: (value * 1000).to(torch.int8),
        "1 of .* whole numbers .*times their scale",
    ),
    "of another model": (lambda value: value[:, :3, None], "another model was trained"),
}


@pytest.mark.parametrize("case", SHAPED)
def test_a_tensor_of_another_kind_is_refused_with_how_it_came_about(
    case: str, model: nn.Module, gradient: dict[str, Tensor]
) -> None:
    change, words = SHAPED[case]
    changed = {**gradient, "shared.weight": change(gradient["shared.weight"])}
    with pytest.raises(ObservationError, match=words):
        fit(seen(changed), model)


def test_numbers_of_eight_bits_are_read(model: nn.Module, gradient: dict[str, Tensor]) -> None:
    scale = max(float(value.abs().max()) for value in gradient.values())
    narrow = {name: (value / scale).to(torch.float8_e4m3fn) for name, value in gradient.items()}
    assert set(fit(seen(narrow), model).observation.tensors) == set(gradient)
