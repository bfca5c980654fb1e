"""A client in training mode sends its batches' statistics with its buffers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from attacks import Budget, Knowledge, Observation, Prior
from attacks.inversion.batch_norm import client_statistics, with_client_statistics
from attacks.inversion.channels import capture_inputs
from attacks.inversion.matching import image_problem
from attacks.registry import build
from tests.attacks import models


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2),
        nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip


def pictures(count: int, *, seed: int = 0) -> torch.Tensor:
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, size=(16, 16), mode="bilinear")


def client(model: nn.Module, batches, *, training: bool = True, clients: int = 1) -> Observation:
    """Return what the server sees of one client, or the sum of equal ones, that trained in this mode."""
    own = copy.deepcopy(model).train(training)
    step = torch.optim.SGD(own.parameters(), lr=0.1)
    for images in batches:
        step.zero_grad()
        nn.functional.cross_entropy(own(images), torch.arange(len(images)) % 4).backward()
        step.step()
    before, after = model.state_dict(), own.state_dict()
    change = {
        name: clients * (after[name] - before[name]) for name in after if after[name].is_floating_point()
    }
    facts = {"learning_rate": 0.1, "local_steps": len(batches), "optimiser": "sgd"}
    granted = Knowledge(image_shape=(3, 16, 16), batch_size=len(batches[0]))
    if clients > 1:
        return Observation(
            kind="sum",
            tensors=change,
            contributors=clients,
            metadata={**facts, "summand": "delta"},
            knowledge=granted,
        )
    return Observation(kind="delta", tensors=change, metadata=facts, knowledge=granted)


@pytest.mark.parametrize("clients", [1, 3])
def test_one_step_gives_the_batch_mean_and_variance_to_rounding(clients: int) -> None:
    model, images = network(), pictures(5)
    read = client_statistics(client(model, [images], clients=clients), model)
    assert list(read) == ["1", "4"]
    mirror = copy.deepcopy(model).train()
    inputs = capture_inputs({"1": mirror[1], "4": mirror[4]}, lambda: mirror(images))
    for name, statistics in read.items():
        assert torch.allclose(statistics.mean.float(), inputs[name].mean(dim=(0, 2, 3)), atol=1e-6)
        assert torch.allclose(statistics.variance.float(), inputs[name].var(dim=(0, 2, 3)), atol=1e-5)


def test_several_steps_give_an_average_that_counts_late_steps_more() -> None:
    model = network()
    batches = [pictures(4, seed=seed) for seed in range(3)]
    with torch.no_grad():  # the first layer hardly moves, so that its answers can be computed beside
        model[0].weight.requires_grad_(False)
        means = [model[0](images).mean(dim=(0, 2, 3)) for images in batches]
    model[0].bias.requires_grad_(False)
    weights = torch.tensor([0.1 * 0.9 ** (2 - place) for place in range(3)])
    expected = sum(w * mean for w, mean in zip(weights / weights.sum(), means, strict=True))
    read = client_statistics(client(model, batches), model)["1"].mean
    assert torch.allclose(read.float(), expected, atol=1e-6)


@pytest.mark.parametrize("count", [1, 4])
def test_the_mean_colour_is_read_up_to_what_borders_hide(count: int) -> None:
    model, images = network(), pictures(count)
    result = build("batch_statistics").run(client(model, [images]), model, Prior(), Budget.quick(), 0)
    colour = result.of("image")[0].mean(dim=(1, 2))
    assert torch.allclose(colour, images.mean(dim=(0, 2, 3)), rtol=0.04)
    assert len(result.of("embedding")) == 2


def test_noise_takes_the_colour_step_by_step() -> None:
    model, images = network(), pictures(4)
    seen, true = client(model, [images]), images.mean(dim=(0, 2, 3))
    errors = []
    for noise in (0.0, 1e-3, 1e-1, 1.0):
        hidden = seen if noise == 0.0 else models.noised(seen, noise, seed=1)
        result = build("batch_statistics").run(hidden, model, Prior(), Budget.quick(), 0)
        errors.append(float((result.of("image")[0].mean(dim=(1, 2)) - true).abs().max()))
    assert errors == sorted(errors)
    assert errors[0] < 0.03
    assert errors[-1] > 1.0, "at noise multiplier 1 the colour is off by more than the range of colours"


def test_evaluation_mode_and_gradients_show_no_statistics() -> None:
    model, images = network(), pictures(4)
    for seen in (
        client(model, [images], training=False),
        models.observe(model, {"images": images, "labels": torch.arange(4)}, models.image_loss),
    ):
        assert client_statistics(seen, model) == {}
        result = build("batch_statistics").run(seen, model, Prior(), Budget.quick(), 0)
        assert not result.applicable
        assert "running statistic" in result.reason


def test_matching_goes_by_the_clients_statistics_instead_of_the_running_ones() -> None:
    model, images = network(), pictures(2)
    seen = client(model, [images])
    problem = image_problem(seen, model, Prior(), 0)
    assert torch.allclose(
        problem.model[1].running_mean.double(), client_statistics(seen, model)["1"].mean, atol=1e-6
    )
    assert torch.equal(model[1].running_mean, torch.zeros(8))
    still = with_client_statistics(client(model, [images], training=False), copy.deepcopy(model))
    assert torch.equal(still[1].running_mean, model[1].running_mean)


@pytest.mark.assets
def test_a_trained_network_shows_the_mean_of_its_first_convolution(shared: Path) -> None:
    weights = load_file(shared / "models" / "resnet20_cifar10" / "model.safetensors")
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(16, 4),
    ).eval()  # fmt: skip
    model.load_state_dict(
        {
            f"0.{name.removeprefix('conv1.')}": value
            for name, value in weights.items()
            if name.startswith("conv1.")
        }
        | {
            f"1.{name.removeprefix('bn1.')}": value
            for name, value in weights.items()
            if name.startswith("bn1.")
        },
        strict=False,
    )
    images = pictures(4)
    read = client_statistics(client(model, [images]), model)["1"].mean
    with torch.no_grad():
        true = model[0](images).mean(dim=(0, 2, 3))
    assert float((read.float() - true).abs().max()) < 5e-7
