"""Per-sample gradients equal a loop over batches of one,
for every architecture and every kind of trainable.
"""

from __future__ import annotations

import peft
import pytest
import torch
from torch import Tensor, nn

from defenses.dp.clip import Clipping, ClippingKind
from defenses.dp.per_sample import PerSampleEngine
from defenses.dp.probe import no_dropout
from defenses.errors import NotPrivateError, ParameterError
from tests.dp.models import ATTENTION, BATCH, BUILDERS, EMBEDDING, Case, build, case, one_by_one, wake
from tests.dp.prompts import CACHED, DeepPrompted, Prefixed, Prompted

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


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_prefixes_of_the_adapter_library(name: str) -> None:
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    assert_equal_to_loop(case(name, wake(peft.get_peft_model(build(name), config))))


def test_saved_classifier_head_of_the_adapter_library() -> None:
    model = lora("roberta", task_type="SEQ_CLS", modules_to_save=["classifier"])
    assert any("modules_to_save" in name for name, value in model.named_parameters() if value.requires_grad)
    assert_equal_to_loop(case("roberta", model))


@pytest.mark.parametrize("kind", ["prompt", "p_tuning", "generator"])
@pytest.mark.parametrize("name", ALL)
def test_soft_prompts_encoded_prompts_and_generated_prompts(name: str, kind: str) -> None:
    assert_equal_to_loop(case(name, Prompted(name, kind)))


@pytest.mark.parametrize("name", ALL)
def test_prefixes_and_where_no_keys_are_kept_deep_prompts(name: str) -> None:
    assert_equal_to_loop(case(name, Prefixed(name) if name in CACHED else DeepPrompted(name)))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    model = lora(name, target_modules="all-linear")
    subject = case(name, model)
    with PerSampleEngine(model) as engine:
        plain = engine.per_sample(lambda: subject.losses([0, 1, 2, 3]))
        model.train()  # checkpointing is active in train mode only
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        with no_dropout():
            again = engine.per_sample(lambda: subject.losses([0, 1, 2, 3]))
    for key, value in plain.items():
        torch.testing.assert_close(again[key], value, rtol=1e-5, atol=1e-7)
    assert any(float(value.abs().max()) > 0 for value in plain.values())


def clipped_by_definition(rows: dict[str, Tensor], clip: Clipping) -> dict[str, Tensor]:
    """Sum clipped gradients one sample at a time, in float64."""
    total = {name: torch.zeros_like(value[0], dtype=torch.float64) for name, value in rows.items()}
    modules = {name.rpartition(".")[0] for name in rows}
    for sample in range(BATCH):
        own = {name: value[sample].double() for name, value in rows.items()}
        whole = sum(float(value.norm()) ** 2 for value in own.values()) ** 0.5
        for name, value in own.items():
            if clip.kind == "per_layer":
                module = name.rpartition(".")[0]
                norm = (
                    sum(float(v.norm()) ** 2 for n, v in own.items() if n.rpartition(".")[0] == module) ** 0.5
                )
                factor = min(1.0, clip.clip_norm / len(modules) ** 0.5 / norm) if norm else 1.0
            elif clip.kind == "automatic":
                factor = clip.clip_norm / (whole + clip.stabiliser)
            else:
                factor = min(1.0, clip.clip_norm / whole)
            total[name] += factor * value
    return total


KINDS = ["flat", "per_layer", "automatic", "adaptive"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ALL)
def test_clipped_sum_of_full_fine_tuning_equals_the_definition(name: str, kind: ClippingKind) -> None:
    subject = case(name, build(name))
    rows = one_by_one(subject)
    norms = torch.stack([value.flatten(1).square().sum(1) for value in rows.values()]).sum(0).sqrt()
    clip = Clipping(kind=kind, clip_norm=1.01 * float(norms.median()))
    expected = clipped_by_definition(rows, clip)
    with PerSampleEngine(subject.model) as engine:
        found = engine.clipped_sum(lambda: subject.losses([0, 1, 2, 3]), clip=clip)
    whole = sum(float(value.norm()) ** 2 for value in expected.values()) ** 0.5
    for key, value in expected.items():
        assert found.gradients[key].dtype == torch.float64
        assert not found.gradients[key].requires_grad, f"{key} drags the graph of the forward pass along"
        assert float((found.gradients[key] - value).norm()) <= 1e-5 * whole, key
    assert found.batch_size == BATCH
    assert found.within == (int((norms <= clip.clip_norm).sum()) if kind == "adaptive" else 0)


@pytest.mark.parametrize("microbatch", [1, 64])
def test_one_sample_of_thousands_moves_the_sum_by_its_bound(microbatch: int) -> None:
    """In float32 one of 4,096 samples moved the sum by 1.25 bounds (one by one) or 1.004 (64 at once).

    It lifts the sum over a power of two, from where on every later addition is rounded up by half a unit.
    """
    model = nn.Linear(256, 1, bias=False)
    lifting = torch.full((2052, 256), 0.0624)
    following = torch.full((2044, 256), 0.51 * 2.0**-16 / microbatch)

    def total(samples: Tensor) -> Tensor:
        with PerSampleEngine(model) as engine:
            result = engine.empty(Clipping(clip_norm=1.0))
            for part in samples.split(microbatch):
                losses = lambda part=part: model(part).squeeze(1)
                result = result + engine.clipped_sum(losses, clip=Clipping(clip_norm=1.0))
        return result.gradients["weight"].double()

    whole, without = (total(torch.cat([part, following])) for part in (lifting, lifting[1:]))
    assert float((whole - without).norm()) <= 1.0


def test_micro_batches_add_up_to_the_whole_batch() -> None:
    subject = case("bert", lora("bert"))
    clip = Clipping(kind="adaptive", clip_norm=0.5)
    with PerSampleEngine(subject.model) as engine:
        whole = engine.clipped_sum(lambda: subject.losses([0, 1, 2, 3]), clip=clip)
        parts = [
            engine.clipped_sum(lambda index=index: subject.losses(index), clip=clip)
            for index in ([0, 1, 2], [3])
        ]
        joined = parts[0] + parts[1] + engine.empty(clip)
    assert joined.batch_size == whole.batch_size
    assert joined.within == whole.within
    for name, value in whole.gradients.items():
        torch.testing.assert_close(joined.gradients[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["flat", "adaptive"])
def test_sums_of_groups_are_the_sums_of_their_samples_alone(kind: ClippingKind) -> None:
    subject = case("bert", build("bert"))
    clip = Clipping(kind=kind, clip_norm=0.5)
    members = [[0, 1], [1, 3], [0, 1, 2, 3], [2]]
    groups = torch.zeros(len(members), BATCH, dtype=torch.bool)
    for row, chosen in zip(groups, members, strict=True):
        row[chosen] = True
    with PerSampleEngine(subject.model) as engine:
        together = engine.group_sums(lambda: subject.losses([0, 1, 2, 3]), clip=clip, groups=groups)
        rows = engine.per_sample(lambda: subject.losses([0, 1, 2, 3]))
        for chosen, sums in zip(members, together, strict=True):
            alone = engine.clipped_sum(lambda chosen=chosen: subject.losses(chosen), clip=clip)
            assert sums.clipped.batch_size == alone.batch_size
            assert sums.clipped.within == alone.within
            assert sums.clipped.clip == clip
            for name, value in alone.gradients.items():
                torch.testing.assert_close(sums.clipped.gradients[name], value, rtol=1e-4, atol=1e-6)
                plain = rows[name][chosen].double().sum(0)
                torch.testing.assert_close(sums.plain[name], plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_a_non_finite_sample_contributes_exactly_zero(poison: float, trainable: str) -> None:
    model = lora("bert") if trainable == "lora" else build("bert")
    subject = case("bert", model)
    subject.model.float()
    clip = Clipping(clip_norm=0.1)
    weight = torch.tensor([1.0, poison, 1.0, 1.0])
    with PerSampleEngine(model) as engine:
        found = engine.clipped_sum(lambda: subject.losses([0, 1, 2, 3]) * weight, clip=clip)
        clean = engine.clipped_sum(
            lambda: subject.losses([0, 1, 2, 3]) * weight.nan_to_num(0, 0, 0).clamp_max(1), clip=clip
        )
        zero = engine.clipped_sum(lambda: subject.losses([0, 1, 2, 3]) * (weight == 1), clip=clip)
    for name, value in zero.gradients.items():
        assert torch.isfinite(found.gradients[name]).all()
        if poison != 1e30:
            torch.testing.assert_close(found.gradients[name], clean.gradients[name], rtol=0, atol=0)
        torch.testing.assert_close(found.gradients[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_a_bfloat16_forward_keeps_norms_factors_and_sums_in_float32(how: str) -> None:
    model = lora("llama", target_modules="all-linear")
    subject = case("llama", model)
    model.float() if how == "autocast" else model.bfloat16()
    clip = Clipping(clip_norm=0.05)

    def losses() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
            return subject.losses([0, 1, 2, 3]).float()

    with PerSampleEngine(model) as engine:
        rows = engine.per_sample(losses)
        assert all(value.dtype == torch.float32 for value in rows.values())
        norms = torch.stack([value.flatten(1).square().sum(1) for value in rows.values()]).sum(0).sqrt()
        assert float(norms.min()) > clip.clip_norm
        for sample in range(BATCH):
            only = torch.zeros(BATCH)
            only[sample] = 1.0
            alone = engine.clipped_sum(lambda only=only: losses() * only, clip=clip).gradients
            norm = sum(float(value.double().square().sum()) for value in alone.values()) ** 0.5
            assert norm == pytest.approx(clip.clip_norm, rel=1e-5)


def test_opacus_agrees_where_it_is_right() -> None:
    from opacus import GradSampleModule

    subject = case("llama", lora("llama", target_modules="all-linear"))
    with PerSampleEngine(subject.model) as engine:
        ours = engine.per_sample(lambda: subject.losses([0, 1, 2, 3]))
    wrapped = GradSampleModule(subject.model, loss_reduction="sum")
    again = case("llama", wrapped)
    wrapped.train()  # its hooks sleep in eval mode; this model has no dropout
    again.losses([0, 1, 2, 3]).sum().backward()
    theirs = {
        name.removeprefix("_module."): value
        for name, value in wrapped.named_parameters()
        if value.requires_grad
    }
    for name, value in ours.items():
        assert float((theirs[name].grad_sample - value).norm()) <= 1e-5 * float(value.norm()), name


def test_the_model_is_untouched_between_and_after_calls() -> None:
    subject = case("t5", build("t5"))
    before = {module: dict(module.__dict__) for module in subject.model.modules()}
    kept = next(subject.model.parameters())
    kept.grad = torch.ones_like(kept)
    with PerSampleEngine(subject.model) as engine:
        engine.per_sample(lambda: subject.losses([0, 1, 2, 3]))
    for module, values in before.items():
        assert module.__dict__.keys() == values.keys()
    assert torch.equal(kept.grad, torch.ones_like(kept))
    with pytest.raises(ParameterError, match="closed"):
        engine.per_sample(lambda: subject.losses([0]))


def test_a_scalar_loss_is_refused() -> None:
    subject = case("bert", lora("bert"))
    with (
        PerSampleEngine(subject.model) as engine,
        pytest.raises(NotPrivateError, match="one loss per sample"),
    ):
        engine.clipped_sum(lambda: subject.losses([0, 1, 2, 3]).mean(), clip=Clipping(clip_norm=1.0))


def test_too_few_losses_are_refused() -> None:
    subject = case("bert", lora("bert"))
    with (
        PerSampleEngine(subject.model) as engine,
        pytest.raises(NotPrivateError, match="3 losses for a batch of 4"),
    ):
        engine.clipped_sum(lambda: subject.losses([0, 1, 2, 3])[:3], clip=Clipping(clip_norm=1.0))


@pytest.mark.parametrize("module, name", [
    (nn.GRU(4, 4), "GRU"),
    (nn.Bilinear(4, 4, 2), "Bilinear"),
    (nn.Conv2d(4, 4, 3, groups=2), "Conv2d"),
    (nn.Embedding(5, 4, max_norm=1.0), "Embedding"),
    (nn.Embedding(5, 4, scale_grad_by_freq=True), "Embedding"),
    (nn.MultiheadAttention(4, 2), "MultiheadAttention"),
    (nn.Conv1d(4, 1, 3, bias=False), "Conv1d"),
])  # fmt: skip
def test_unknown_kinds_are_refused_by_name(module: nn.Module, name: str) -> None:
    with pytest.raises(NotPrivateError, match=rf"weight.*inner, {name}"):
        PerSampleEngine(nn.ModuleDict({"inner": module}))


def test_a_trainable_left_out_of_the_engine_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(NotPrivateError, match=r"1\.weight"):
        PerSampleEngine(model, parameters={"a": model[0].weight, "b": model[0].bias})
    with PerSampleEngine(model[0].requires_grad_(True)) as engine:
        model[0].register_parameter("late", nn.Parameter(torch.zeros(2)))
        with pytest.raises(NotPrivateError, match="late"):
            engine.per_sample(lambda: model[0](torch.ones(2, 4)).sum(1))


def test_tokens_flattened_into_the_batch_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    x = torch.randn(3, 5, 4)
    with PerSampleEngine(model) as engine, pytest.raises(NotPrivateError, match=r"0\.weight.*15.*3 samples"):
        engine.per_sample(lambda: model[0](x.reshape(15, 4)).reshape(3, -1).sum(1), batch_size=3)


@pytest.mark.parametrize("scale", [1.0, 1e2, 1e3, 1e5])
def test_cancelling_tokens_do_not_slip_past_the_bound(scale: float) -> None:
    """Tokens whose large terms cancel leave a small gradient;
    its norm, computed from factors, must not come out less.
    """
    torch.manual_seed(0)
    model = nn.Linear(64, 64, bias=False)
    base = torch.randn(1, 64)
    x = (scale * base + torch.randn(2, 64))[None]
    signs = torch.tensor([1.0, -1.0])[None, :, None] * torch.randn(64)
    clip = Clipping(clip_norm=1.0)
    with PerSampleEngine(model) as engine:
        found = engine.clipped_sum(lambda: (model(x) * signs).sum((1, 2)), clip=clip).gradients["weight"]
    exact = torch.einsum("to,ti->oi", signs[0].double(), x[0].double())
    assert float(exact.norm()) > 10 * clip.clip_norm
    assert float(found.double().norm()) <= clip.clip_norm * (1 + 1e-5)


class OneFilter(nn.Module):
    """Looks like a broadcast parameter (leading size 1), but is a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv1d(x, self.weight)


def test_a_parameter_that_only_looks_broadcast_is_refused_by_name() -> None:
    model = OneFilter()
    with PerSampleEngine(model) as engine, pytest.raises(NotPrivateError, match="OneFilter"):
        engine.per_sample(lambda: model(torch.randn(3, 4, 8)).sum((1, 2)))


def test_adapter_variants_that_are_not_rewritten_are_refused_by_name() -> None:
    with pytest.raises(NotPrivateError, match="lora_embedding_A"):
        PerSampleEngine(lora("llama", target_modules=["embed_tokens"], use_dora=True))


def test_a_module_whose_forward_was_replaced_or_reparametrised_is_refused_by_name() -> None:
    replaced = nn.Sequential(nn.Linear(4, 2))
    replaced[0].forward = lambda x: x
    with pytest.raises(NotPrivateError, match=r"0\.weight"):
        PerSampleEngine(replaced)
    with pytest.raises(NotPrivateError, match="original"):
        PerSampleEngine(nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)))
