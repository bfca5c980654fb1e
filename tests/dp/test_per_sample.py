"""Per-sample gradients equal a loop over batches of one, for every architecture and every kind of trainable."""

from __future__ import annotations

import peft
import pytest
from torch import nn

from defenses.dp.per_sample import PerSampleEngine
from tests.dp.models import ATTENTION, BUILDERS, EMBEDDING, Case, build, case, one_by_one, wake

ALL = list(BUILDERS)


def assert_equal_to_loop(subject: Case, *, tolerance: float = 1e-5) -> None:
    slow = one_by_one(subject)
    whole = sum(float(value.norm() ** 2) for value in slow.values()) ** 0.5
    assert whole > 0
    with PerSampleEngine(subject.model) as engine:
        fast = engine.per_sample(lambda: subject.losses([0, 1, 2, 3]))
    assert fast.keys() == slow.keys()
    for name, expected in slow.items():
        error = float((fast[name] - expected).norm() / expected.norm().clamp_min(1e-2 * whole))
        assert error <= tolerance, f"{name}: {error:.1e}"


def lora(name: str, **options: object) -> nn.Module:
    config = peft.LoraConfig(r=3, lora_dropout=0.0, **({"target_modules": ATTENTION[name]} | options))
    return wake(peft.get_peft_model(build(name), config))


@pytest.mark.parametrize("name", ALL)
def test_lora_on_attention(name: str) -> None:
    assert_equal_to_loop(case(name, lora(name)))


@pytest.mark.parametrize("name", ALL)
def test_lora_on_all_linear_with_head_bias_and_norms(name: str) -> None:
    model = lora(name, target_modules="all-linear")
    for path, parameter in model.named_parameters():
        if path.endswith("bias") or "norm" in path.lower() or "classifier" in path or "lm_head" in path:
            parameter.requires_grad_(True)
    assert_equal_to_loop(case(name, wake(model)))


@pytest.mark.parametrize("name", ALL)
def test_dora(name: str) -> None:
    assert_equal_to_loop(case(name, lora(name, use_dora=True)))


@pytest.mark.parametrize("name", list(EMBEDDING))
def test_lora_on_embeddings(name: str) -> None:
    assert_equal_to_loop(case(name, lora(name, target_modules=EMBEDDING[name] + ATTENTION[name])))


IA3 = {
    "bert": (["key", "value", "output.dense"], ["output.dense"]),
    "roberta": (["key", "value", "output.dense"], ["output.dense"]),
    "distilbert": (["k_lin", "v_lin", "lin2"], ["lin2"]),
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "qwen": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "t5": (["k", "v", "wo"], ["wo"]),
    "vit": (["k_proj", "v_proj", "fc2"], ["fc2"]),
}


@pytest.mark.parametrize("name", ALL)
def test_ia3(name: str) -> None:
    targets, feedforward = IA3[name]
    config = peft.IA3Config(target_modules=targets, feedforward_modules=feedforward)
    assert_equal_to_loop(case(name, wake(peft.get_peft_model(build(name), config))))


@pytest.mark.parametrize("name", ALL)
def test_full_fine_tuning_with_ties_and_broadcast_positions(name: str) -> None:
    assert_equal_to_loop(case(name, build(name)))
