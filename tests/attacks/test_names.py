"""Updates of other libraries: names are matched, or the mismatch is an error that says which."""

from __future__ import annotations

import copy
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus import GradSampleModule
from safetensors.torch import save_file
from torch import nn

from attacks import Knowledge, Observation, ObservationError
from attacks.command import run_one
from attacks.fitting import fit, names_of
from attacks.names import Matching, Mismatch, ModelNames, bare, match_names
from attacks.png import png_bytes
from tests.attacks.models import (
    bert,
    digits,
    gpt2,
    gradient,
    image_loss,
    llama,
    mlp,
    sentences,
    text_loss,
    vit,
)

WRAPPERS = (
    "module.",
    "_module.",
    "_orig_mod.",
    "module._orig_mod.",
    "base_model.model.",
    "_fsdp_wrapped_module.",
)


def shapes(tensors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in dict(tensors).items()}


def lora(base: nn.Module, *, task: str = "SEQ_CLS", **options) -> nn.Module:
    targets = options.pop("target_modules", ["query", "value"])
    config = peft.LoraConfig(r=4, target_modules=targets, task_type=task, init_lora_weights=False, **options)
    return peft.get_peft_model(copy.deepcopy(base), config).eval()


def places(matching: Matching | Mismatch) -> dict[str, str]:
    assert isinstance(matching, Matching), matching
    return {seen: place.name for seen, place in matching.places.items()}


# ------------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("make", [bert, gpt2, llama], ids=["bert", "gpt2", "llama"])
def test_what_a_wrapper_puts_before_names_is_read_past_and_named(wrapper: str, make) -> None:
    own = names_of(make())
    matching = match_names({wrapper + name: shape for name, shape in own.parameters.items()}, own)
    assert places(matching) == {wrapper + name: name for name in own.parameters}
    assert any(repr(wrapper) in note for note in matching.notes)


def test_a_prefix_nobody_knows_is_taken_off_or_put_before_where_every_name_then_fits() -> None:
    own = names_of(bert())
    foreign = match_names({f"net.student.{name}": shape for name, shape in own.parameters.items()}, own)
    assert places(foreign) == {f"net.student.{name}": name for name in own.parameters}
    assert "'net.student.'" in foreign.notes[0]
    body = {name.removeprefix("bert."): s for name, s in own.parameters.items() if name.startswith("bert.")}
    inner = match_names(body, own)
    assert places(inner) == {name: f"bert.{name}" for name in body}
    assert "'bert.'" in inner.notes[0]


def test_a_prefix_that_fits_two_parts_of_a_model_is_refused() -> None:
    own = ModelNames(parameters={"left.0.weight": (3, 2), "right.0.weight": (3, 2)})
    refused = match_names({"0.weight": (3, 2)}, own)
    assert isinstance(refused, Mismatch)
    assert "'left.'" in refused.reasons[0]
    assert "'right.'" in refused.reasons[0]


@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"target_modules": ["query", "word_embeddings"]}],
    ids=["plain", "dora", "embedding"],
)
def test_live_names_and_file_names_of_an_adapter_name_the_same_tensors(options) -> None:
    model = lora(bert(), **options)
    own = names_of(model)
    live = {name: shape for name, shape in own.parameters.items() if name in own.trained}
    assert places(match_names(live, own)) == {name: name for name in live}
    state = peft.get_peft_model_state_dict(model)
    stored = shapes({name: value for name, value in state.items() if "base_layer" not in name})
    assert set(stored) - set(live)
    matched = places(match_names(stored, own))
    assert set(live) <= set(matched.values())
    mine = dict(model.named_parameters())
    assert all(torch.equal(mine[matched[name]], state[name]) for name in stored)


def test_prompts_and_rescaling_adapters_are_matched_from_their_files() -> None:
    prompts = peft.PromptTuningConfig(num_virtual_tokens=4, task_type="SEQ_CLS")
    rescaled = peft.IA3Config(target_modules=["key"], feedforward_modules=[], task_type="SEQ_CLS")
    for config in (prompts, rescaled):
        model = peft.get_peft_model(bert(), config)
        state = peft.get_peft_model_state_dict(model)
        matched = places(match_names(shapes(state), names_of(model)))
        mine = dict(model.named_parameters())
        assert all(torch.equal(mine[matched[name]], value) for name, value in state.items())


def test_an_adapters_tensors_without_the_adapter_are_refused_with_the_remedy() -> None:
    seen = shapes(peft.get_peft_model_state_dict(lora(bert())))
    refused = match_names(seen, names_of(bert()))
    assert isinstance(refused, Mismatch)
    assert "name its folder" in refused.reasons[1]
    assert "'base_model.model." in refused.reasons[0]


@given(st.integers(0, 27), st.sampled_from(["", "_module.", "lost."]))
@settings(max_examples=30, deadline=None)
def test_one_wrong_name_refuses_all_and_is_named(number: int, prefix: str) -> None:
    own = names_of(gpt2(width=16))
    seen = {prefix + name: shape for name, shape in own.parameters.items()}
    wrong = list(seen)[number % len(seen)]
    seen[f"{wrong}_other"] = seen.pop(wrong)
    refused = match_names(seen, own)
    assert isinstance(refused, Mismatch)
    assert any(f"{wrong}_other" in reason for reason in refused.reasons) or prefix == "lost."


def test_a_shape_that_is_not_the_models_is_refused_with_both() -> None:
    own = names_of(mlp())
    refused = match_names({**own.parameters, "1.weight": (64, 65)}, own)
    assert isinstance(refused, Mismatch)
    assert "(64, 65)" in refused.reasons[0]
    assert "(64, 64)" in refused.reasons[0]


def test_bare_names_lose_marks_only() -> None:
    assert bare("module._orig_mod.module.weight") == "weight"
    assert bare("encoder.module.weight") == "encoder.module.weight"
    assert bare("x.lora_B.weight") == bare("base_model.model.x.lora_B.default.weight") == "x.lora_B.weight"
    assert bare("base_model.model.x.base_layer.bias") == "x.bias"


# --------------------------------------------------------------------------------- lists, transposition, ties


def test_a_list_is_named_in_the_order_of_the_state_dict_buffers_included() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 3))
    arrays = list(model.state_dict().values())  # what a federation without names sends
    seen = {f"arr_{place}": value for place, value in enumerate(arrays)}
    fitted = fit(Observation(kind="delta", tensors=seen), model)
    expected = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    assert set(fitted.observation.tensors) == set(expected)
    assert all(torch.equal(fitted.observation.tensors[name], value) for name, value in expected.items())
    assert any("num_batches_tracked" in note for note in fitted.notes)
    bare_list = {str(place): value.detach() for place, value in enumerate(model.parameters())}
    assert set(fit(Observation(kind="delta", tensors=bare_list), model).observation.tensors) == {
        name for name, _ in model.named_parameters()
    }


def test_a_list_of_an_adapter_is_that_of_the_trained_parameters() -> None:
    own = names_of(lora(bert()))
    seen = {str(place): own.parameters[name] for place, name in enumerate(own.trained)}
    assert list(places(match_names(seen, own)).values()) == list(own.trained)


def test_a_list_that_fits_no_order_says_where_it_breaks() -> None:
    own = names_of(mlp())
    seen = {str(place): shape for place, shape in enumerate(own.parameters.values())}
    short = match_names(dict(list(seen.items())[:-1]), own)
    assert isinstance(short, Mismatch)
    assert "3 tensors" in short.reasons[0]
    turned = match_names({**seen, "3": (7,)}, own)
    assert isinstance(turned, Mismatch)
    assert any("entry 3 is (7,)" in reason for reason in turned.reasons)


@pytest.mark.parametrize("make", [bert, gpt2], ids=["bert", "gpt2"])
def test_matrices_stored_the_other_way_round_are_turned_squares_included(make) -> None:
    model = make()
    tensors = gradient(model, {"input_ids": sentences(2, 6, 500), "labels": torch.tensor([0, 1])}, text_loss)
    tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    turned = {
        name: value.T if value.ndim == 2 and name not in tables else value for name, value in tensors.items()
    }
    fitted = fit(Observation(kind="gradient", tensors=turned), model).observation
    assert all(torch.equal(fitted.tensors[name], value) for name, value in tensors.items())


def test_a_square_matrix_whose_relatives_disagree_is_refused() -> None:
    own = ModelNames(parameters={"a.x.weight": (2, 3), "a.y.weight": (3, 2), "a.z.weight": (3, 3)})
    refused = match_names({"a.x.weight": (3, 2), "a.y.weight": (3, 2), "a.z.weight": (3, 3)}, own)
    assert isinstance(refused, Mismatch)
    assert "a.z.weight" in refused.reasons[0]


def test_a_tied_head_is_one_tensor_and_two_that_differ_are_refused() -> None:
    model = gpt2(classes=None)
    both = {name: value.clone() for name, value in model.state_dict().items()}
    fitted = fit(Observation(kind="delta", tensors=both), model).observation
    assert "transformer.wte.weight" in fitted.tensors
    assert "lm_head.weight" not in fitted.tensors
    alone = {"lm_head.weight": both["lm_head.weight"]}
    assert list(fit(Observation(kind="delta", tensors=alone), model).observation.tensors) == [
        "transformer.wte.weight"
    ]
    both["lm_head.weight"] += 1.0
    with pytest.raises(ObservationError, match="observed to differ"):
        fit(Observation(kind="delta", tensors=both), model)


def test_nan_is_an_error_that_says_where() -> None:
    model = mlp()
    tensors = {name: value.detach().clone() for name, value in model.named_parameters()}
    tensors["3.bias"][1] = float("nan")
    for held in (model, None):
        with pytest.raises(ObservationError, match=r"3\.bias.*1 of 4 hold NaN"):
            fit(Observation(kind="delta", tensors=tensors), held)


# ------------------------------------------------------------------------------------------- one command each


def command(
    tmp_path: Path, capsys, attack: str, seen: Observation, model: nn.Module, truth, **options
) -> dict:
    """Run one attack's command on folders and return what it printed."""
    seen.save(tmp_path / "seen")
    model.save_pretrained(tmp_path / "model")
    save_file(truth, str(tmp_path / "truth.safetensors"))
    arguments = ["--observation", str(tmp_path / "seen"), "--model", str(tmp_path / "model"), "--json"]
    arguments += ["--truth", str(tmp_path / "truth.safetensors"), "--out", str(tmp_path / "out")]
    for name, value in options.items():
        arguments += [f"--{name}", str(value)]
    assert run_one(attack, arguments) == 0
    return json.loads(capsys.readouterr().out)


def refused(tmp_path: Path, capsys, attack: str, seen: Observation, **options) -> str:
    """Run the command on the same update under wrong names and return the error."""
    wrong = {f"{name}_lost": value for name, value in seen.tensors.items()}
    Observation(kind=seen.kind, tensors=wrong, metadata=seen.metadata).save(tmp_path / "wrong")
    arguments = ["--observation", str(tmp_path / "wrong"), "--model", str(tmp_path / "model")]
    arguments += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    with pytest.raises(SystemExit) as left:
        run_one(attack, arguments)
    assert left.value.code == 2
    return capsys.readouterr().err


def test_a_lora_update_of_plain_peft_leaks_by_one_command(tmp_path, capsys) -> None:
    base = llama()
    model = lora(base, task="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    model.save_pretrained(tmp_path / "adapter")
    ids = sentences(1, 3, 500)
    grads = gradient(model, {"input_ids": ids, "labels": ids}, text_loss)
    stored = {
        name.replace(".default", ""): value for name, value in grads.items()
    }  # as in the adapter's file
    seen = Observation(kind="gradient", tensors=stored, knowledge=Knowledge(batch_size=1))
    told = command(tmp_path, capsys, "span", seen, base, {"token_ids": ids}, adapter=tmp_path / "adapter")
    assert told["score"]["leaked"]
    page = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "| truth | recovered |" in page
    assert "_lost" in refused(tmp_path, capsys, "span", seen, adapter=tmp_path / "adapter")


@pytest.mark.filterwarnings(
    "ignore:Full backward hook is firing:UserWarning"
)  # embeddings take whole numbers
def test_a_gradient_of_opacus_leaks_by_one_command(tmp_path, capsys) -> None:
    model = bert()
    ids = sentences(2, 6, 1000)
    wrapped = GradSampleModule(copy.deepcopy(model).train())  # it takes gradients apart in training alone
    wrapped(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
    tensors = {name: value.grad_sample.mean(0) for name, value in wrapped.named_parameters()}
    assert all(name.startswith("_module.") for name in tensors)
    seen = Observation(kind="gradient", tensors=tensors, knowledge=Knowledge(batch_size=2))
    told = command(tmp_path, capsys, "token_presence", seen, model, {"token_ids": ids})
    assert told["score"]["leaked"]
    assert any("'_module.'" in note for note in told["notes"])
    assert "begin with '_module.'" in refused(tmp_path, capsys, "token_presence", seen)


def test_a_parameter_list_of_flower_leaks_by_one_command(tmp_path, capsys) -> None:
    model = bert()
    before = [value.numpy().copy() for value in model.state_dict().values()]
    client = copy.deepcopy(model)
    ids = sentences(2, 6, 1000)
    client(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
    torch.optim.SGD(client.parameters(), lr=0.1).step()
    after = [value.numpy() for value in client.state_dict().values()]
    change = {
        str(place): torch.tensor(np.subtract(new, old))
        for place, (new, old) in enumerate(zip(after, before, strict=True))
    }
    facts = {"learning_rate": 0.1, "local_steps": 1, "optimiser": "sgd", "batch_size": 2}
    seen = Observation(kind="delta", tensors=change, metadata=facts)
    told = command(tmp_path, capsys, "token_presence", seen, model, {"token_ids": ids})
    assert told["score"]["leaked"]
    assert any("list of" in note for note in told["notes"])
    assert "_lost" in refused(tmp_path, capsys, "token_presence", seen)


def test_a_delta_of_a_data_parallel_model_leaks_by_one_command_and_its_picture_is_written(
    tmp_path, capsys
) -> None:
    model = vit()
    client = nn.DataParallel(copy.deepcopy(model))
    image = nn.functional.interpolate(digits()[0][:1], size=32).expand(-1, 3, -1, -1).contiguous()
    image_loss(client.module, {"images": image, "labels": torch.tensor([3])}).backward()
    before = {name: value.detach().clone() for name, value in client.named_parameters()}
    torch.optim.SGD(client.parameters(), lr=0.1).step()
    change = {name: value.detach() - before[name] for name, value in client.named_parameters()}
    assert all(name.startswith("module.") for name in change)
    facts = {"learning_rate": 0.1, "local_steps": 1, "optimiser": "sgd", "batch_size": 1}
    seen = Observation(kind="delta", tensors=change, metadata=facts, broadcast=before)
    told = command(tmp_path, capsys, "position_vision", seen, model, {"images": image})
    assert told["score"]["leaked"]
    recovered, truth = ((tmp_path / "out" / f"{name}_1.png").read_bytes() for name in ("recovered", "truth"))
    assert _levels(recovered).shape == (32, 32, 3)
    assert np.abs(_levels(recovered).astype(int) - _levels(truth).astype(int)).max() <= 3
    assert "_lost" in refused(tmp_path, capsys, "position_vision", seen)


def test_nan_and_a_result_folder_that_exists_end_with_code_2(tmp_path, capsys) -> None:
    model = bert()
    model.save_pretrained(tmp_path / "model")
    broken = {name: torch.full_like(value, float("nan")) for name, value in model.named_parameters()}
    Observation(kind="gradient", tensors=broken).save(tmp_path / "seen")
    arguments = ["--observation", str(tmp_path / "seen"), "--model", str(tmp_path / "model")]
    with pytest.raises(SystemExit) as left:
        run_one("span", arguments)
    assert left.value.code == 2
    assert "hold NaN or infinity" in capsys.readouterr().err
    Observation(kind="gradient", tensors=dict(model.named_parameters())).save(tmp_path / "seen")
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit) as left:
        run_one("token_presence", [*arguments, "--out", str(tmp_path / "out")])
    assert left.value.code == 2
    assert list((tmp_path / "out").iterdir()) == []


def _levels(content: bytes) -> np.ndarray:
    """Decode a PNG of eight-bit colours without filters."""
    width, height = struct.unpack(">II", content[16:24])
    start = content.index(b"IDAT")
    size = struct.unpack(">I", content[start - 4 : start])[0]
    rows = np.frombuffer(zlib.decompress(content[start + 4 : start + 4 + size]), dtype=np.uint8)
    return rows.reshape(height, 1 + 3 * width)[:, 1:].reshape(height, width, 3)


def test_a_picture_keeps_its_colours_and_odd_shapes_are_refused() -> None:
    image = torch.arange(12.0).reshape(3, 2, 2) / 11
    assert np.array_equal(_levels(png_bytes(image)), (image * 255).round().byte().permute(1, 2, 0).numpy())
    with pytest.raises(ValueError, match="must be"):
        png_bytes(torch.zeros(2, 4, 4))
