"""The probe refuses whatever breaks the sensitivity claim;
each test first shows that the claim is really broken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import peft
import pytest
import torch
from torch import Tensor, nn

from defenses.dp.clip import Clipping
from defenses.dp.per_sample import PerSampleEngine
from defenses.dp.probe import probe_sensitivity
from defenses.errors import NotPrivateError, ParameterError
from tests.dp.models import ATTENTION, build, predict_next, text_batch, wake

SAMPLES = 4


def inputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(SAMPLES, *shape, generator=torch.Generator().manual_seed(seed))


def sensitivity_by_definition(
    parameters: list[nn.Parameter], losses_of: Callable[[Sequence[int]], Callable[[], Tensor]], bound: float
) -> float:
    """Clip the gradient of every single loss of the batch by hand;
    return the largest leave-one-out change over C.
    """

    def clipped(indices: Sequence[int]) -> Tensor:
        total = torch.zeros(sum(p.numel() for p in parameters))
        values = losses_of(indices)()
        for value in values:
            parts = torch.autograd.grad(value, parameters, retain_graph=True)
            flat = torch.cat([part.reshape(-1) for part in parts])
            total += flat * min(1.0, bound / float(flat.norm()))
        return total

    everyone = list(range(SAMPLES))
    whole = clipped(everyone)
    return max(float((whole - clipped([j for j in everyone if j != i])).norm()) / bound for i in everyone)


def worst(
    parameters: list[nn.Parameter], losses_of: Callable[[Sequence[int]], Callable[[], Tensor]]
) -> float:
    return max(
        sensitivity_by_definition(parameters, losses_of, bound)
        for bound in 10.0 ** torch.linspace(-3, 1, 25).numpy()
    )


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_a_correct_model_passes_in_train_mode_with_dropout(name: str) -> None:
    model = wake(
        peft.get_peft_model(build(name), peft.LoraConfig(target_modules=ATTENTION[name], lora_dropout=0.3))
    )
    model.train()
    batch = text_batch()

    def losses_of(indices: Sequence[int]) -> Callable[[], Tensor]:
        if name == "bert":
            part = {key: value[list(indices)] for key, value in batch.items()}
            labels = part.pop("labels")
            return lambda: nn.functional.cross_entropy(model(**part).logits, labels, reduction="none")
        return lambda: predict_next(model, batch, list(indices))

    with PerSampleEngine(model) as engine:
        noisy = [
            engine.clipped_sum(losses_of([0, 1, 2, 3]), clip=Clipping(clip_norm=1e9)).gradients
            for _ in range(2)
        ]
        assert any(not torch.equal(noisy[0][key], noisy[1][key]) for key in noisy[0])
        report = probe_sensitivity(engine, losses_of, samples=SAMPLES, clip_norm=0.1)
    assert report.sensitivity <= 1 + 1e-5
    assert report.coupling <= 1e-4


def test_token_mean_loss_is_refused_and_the_loss_is_blamed() -> None:
    model = wake(peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=ATTENTION["llama"])))
    model.eval()
    batch = text_batch()

    def losses_of(indices: Sequence[int]) -> Callable[[], Tensor]:
        mask = batch["attention_mask"][list(indices)][:, 1:]
        own = mask.sum(1)
        return lambda: predict_next(model, batch, list(indices)) * own / mask.sum()

    parameters = [p for p in model.parameters() if p.requires_grad]
    assert worst(parameters, losses_of) > 1.05
    with PerSampleEngine(model) as engine, pytest.raises(NotPrivateError, match="the loss does"):
        probe_sensitivity(engine, losses_of, samples=SAMPLES, clip_norm=1.0)


class WithBatchNorm(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm.requires_grad_(False)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))


class CentredOverBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def squared_losses(model: nn.Module, x: Tensor) -> Callable[[Sequence[int]], Callable[[], Tensor]]:
    return lambda indices: lambda: model(x[list(indices)]).square().sum(-1)


def test_frozen_batch_norm_in_train_mode_is_refused_by_name() -> None:
    torch.manual_seed(0)
    model = WithBatchNorm(nn.BatchNorm1d(6))
    losses_of = squared_losses(model, inputs(6) * torch.tensor([1.0, 1.0, 1.0, 8.0])[:, None])
    assert worst(list(model.head.parameters()), losses_of) > 1.05
    with pytest.raises(NotPrivateError, match=r"norm \(BatchNorm1d"):
        PerSampleEngine(model)
    model.eval()
    with PerSampleEngine(model) as engine:
        probe_sensitivity(engine, losses_of, samples=SAMPLES, clip_norm=1.0)
        model.train()
        with pytest.raises(NotPrivateError, match=r"norm \(BatchNorm1d"):
            probe_sensitivity(engine, losses_of, samples=SAMPLES, clip_norm=1.0)


def test_a_module_that_mixes_samples_is_found_by_the_probe_and_named() -> None:
    torch.manual_seed(0)
    model = WithBatchNorm(CentredOverBatch())
    losses_of = squared_losses(model, inputs(6) * torch.tensor([1.0, 1.0, 1.0, 8.0])[:, None])
    assert worst(list(model.head.parameters()), losses_of) > 1.05
    with (
        PerSampleEngine(model) as engine,
        pytest.raises(NotPrivateError, match=r"norm \(CentredOverBatch\) mixes"),
    ):
        probe_sensitivity(engine, losses_of, samples=SAMPLES, clip_norm=1.0)


class UsesWeightDirectly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.body(x), self.head.weight)


def test_a_parameter_used_outside_its_module_is_refused_by_name() -> None:
    torch.manual_seed(0)
    model = UsesWeightDirectly()
    losses_of = squared_losses(model, 100 * inputs(6))
    losses_of([0, 1, 2, 3])().sum().backward()
    assert model.head.weight.grad is not None
    assert (
        float(model.head.weight.grad.norm()) > 100
    )  # the whole batch, unclipped: this is what would be trained on
    model.zero_grad()
    with PerSampleEngine(model) as engine, pytest.raises(NotPrivateError, match=r"head\.weight"):
        probe_sensitivity(engine, losses_of, samples=SAMPLES, clip_norm=1.0)
    assert model.head.weight.grad is None


def test_a_trainable_outside_the_model_is_refused() -> None:
    torch.manual_seed(0)
    model, outside = nn.Linear(6, 6), nn.Linear(6, 2)
    x = inputs(6)
    with PerSampleEngine(model) as engine, pytest.raises(NotPrivateError, match="not part of the model"):
        probe_sensitivity(
            engine,
            lambda indices: lambda: outside(model(x[list(indices)])).sum(-1),
            samples=SAMPLES,
            clip_norm=1.0,
        )


class RepeatedPrompt(nn.Module):
    """A prompt looked up as a batch of one and repeated, as common adapter libraries do."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt = nn.Embedding(3, 6)
        self.head = nn.Linear(6, 2).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        prompt = self.prompt(torch.arange(3)).unsqueeze(0).repeat(len(x), 1, 1)
        return self.head(torch.tanh(prompt * x[:, None]).sum(1))


def test_a_prompt_seen_as_a_batch_of_one_is_refused_by_name() -> None:
    torch.manual_seed(0)
    model = RepeatedPrompt()
    x = inputs(6)
    seen = []
    handle = model.prompt.register_full_backward_hook(
        lambda module, grad_in, grad_out: seen.append(grad_out[0].shape)
    )
    squared_losses(model, x)([0, 1, 2, 3])().sum().backward()
    handle.remove()
    assert seen == [
        (3, 6)
    ]  # no sample axis reaches the hook: any clipping there clips the batch as one sample
    with PerSampleEngine(model) as engine, pytest.raises(NotPrivateError, match=r"prompt\.weight"):
        probe_sensitivity(engine, squared_losses(model, x), samples=SAMPLES, clip_norm=1.0)


@pytest.mark.parametrize("config", [
    peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=8),
])  # fmt: skip
def test_adapter_library_prompts_are_refused_by_name(config: peft.PeftConfig) -> None:
    model = peft.get_peft_model(build("llama"), config)
    batch = text_batch()
    with pytest.raises(NotPrivateError, match="prompt_encoder"), PerSampleEngine(model) as engine:
        engine.clipped_sum(
            lambda: model(input_ids=batch["input_ids"]).logits.square().mean((1, 2)),
            clip=Clipping(clip_norm=1.0),
        )


def test_randomness_other_than_dropout_is_refused() -> None:
    model = nn.Linear(6, 2)
    x = inputs(6)
    with PerSampleEngine(model) as engine, pytest.raises(NotPrivateError, match="randomness"):
        probe_sensitivity(
            engine,
            lambda indices: lambda: model(x[list(indices)] + torch.randn(len(indices), 6)).square().sum(1),
            samples=SAMPLES,
            clip_norm=1.0,
        )


def test_two_samples_are_too_few() -> None:
    model = nn.Linear(6, 2)
    with PerSampleEngine(model) as engine, pytest.raises(ParameterError, match="samples = 2"):
        probe_sensitivity(engine, squared_losses(model, inputs(6)), samples=2, clip_norm=1.0)
