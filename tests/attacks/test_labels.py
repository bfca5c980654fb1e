"""Label counts: exact at the start, honest later, and what the uniform guess reaches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings, strategies

from attacks import Budget, Knowledge, Prior
from attacks.baselines import uniform_counts
from attacks.inversion import labels
from attacks.metrics import count_accuracy
from attacks.registry import build
from tests.attacks import models

QUICK = Budget.quick()
IMAGES, LABELS = models.digits()


def digits_observation(model, count, *, seed=0, **changes):
    chosen = torch.randint(1000, 1797, (count,), generator=torch.Generator().manual_seed(seed))
    batch = {"images": IMAGES[chosen], "labels": LABELS[chosen]}
    knowledge = Knowledge(batch_size=count, image_shape=(1, 8, 8))
    observation = models.observe(model, batch, models.image_loss, knowledge=knowledge)
    return observation, torch.bincount(LABELS[chosen], minlength=10).tolist()


def accuracy(name, model, count, *, seed=0, prior=None):
    observation, true = digits_observation(model, count, seed=seed)
    result = build(name).run(observation, model, prior or Prior(), QUICK, 0)
    assert result.applicable, result.reason
    return count_accuracy(result.of("label_counts")[0].tolist(), true)


@pytest.mark.parametrize("count", [1, 4, 16, 64])
def test_identity_is_exact_on_an_untrained_network(count):
    public = Prior(examples={"images": IMAGES[:500]})
    assert all(
        accuracy("label_identity", models.mlp(), count, seed=seed, prior=public) == 1.0 for seed in range(3)
    )


def test_identity_is_exact_when_the_mean_probability_is_known():
    model = models.mlp(seed=3)
    observation, true = digits_observation(model, 16, seed=4)
    chosen = torch.randint(1000, 1797, (16,), generator=torch.Generator().manual_seed(4))
    mean = torch.softmax(model(IMAGES[chosen]), 1).mean(0)
    raw = labels.identity_counts(observation.tensors["3.bias"], mean, 16)
    assert torch.allclose(raw, torch.tensor(true, dtype=raw.dtype), atol=1e-4)


def test_random_probes_do_almost_as_well_at_the_start():
    assert accuracy("label_identity", models.mlp(), 16) == 1.0


@pytest.mark.parametrize("name", ["idlg_label", "llg", "ilrg", "label_identity"])
def test_one_label_is_always_read(name):
    public = Prior(examples={"images": IMAGES[:300]})
    assert all(accuracy(name, models.mlp(seed=1), 1, seed=seed, prior=public) == 1.0 for seed in range(5))


def test_published_estimators_at_batch_four():
    assert all(accuracy(name, models.mlp(), 4, seed=2) == 1.0 for name in ("llg", "ilrg"))


def trained():
    """Return a network after 200 steps on other digits than those attacked."""
    model = models.mlp()
    step = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        chosen = torch.randint(0, 1000, (32,), generator=generator)
        step.zero_grad()
        models.image_loss(model, {"images": IMAGES[chosen], "labels": LABELS[chosen]}).backward()
        step.step()
    model.zero_grad(set_to_none=True)
    return model


@pytest.mark.parametrize(("count", "least"), [(1, 1.0), (2, 0.9), (4, 0.8)])
def test_few_labels_are_read_from_a_trained_network_without_any_probe(count, least):
    """Random pictures tell nothing about what a trained network predicts; signs and the column space do."""
    model = trained()
    assert sum(accuracy("label_identity", model, count, seed=seed) for seed in range(8)) / 8 >= least


def test_a_trained_network_leaves_estimators_near_the_uniform_guess():
    model = trained()
    public = Prior(examples={"images": IMAGES[:500]})
    scores = {
        name: sum(accuracy(name, model, 64, seed=s, prior=public) for s in range(5)) / 5
        for name in ("label_identity", "llg")
    }
    guess = (
        sum(
            count_accuracy(uniform_counts(10, 64).tolist(), digits_observation(model, 64, seed=s)[1])
            for s in range(5)
        )
        / 5
    )
    assert guess > 0.75
    assert scores["label_identity"] > guess - 0.05
    assert scores["llg"] < guess


def test_a_delta_of_sgd_and_a_sum_count_all_their_examples():
    model, public = models.mlp(), Prior(examples={"images": IMAGES[:500]})
    batch = {"images": IMAGES[:8], "labels": LABELS[:8]}
    delta = models.observe_delta(
        model, [batch], models.image_loss, learning_rate=0.01, knowledge=Knowledge(batch_size=8)
    )
    counts = build("label_identity").run(delta, model, public, QUICK, 0).of("label_counts")[0]
    assert counts.tolist() == torch.bincount(LABELS[:8], minlength=10).tolist()
    clients = [{"images": IMAGES[i : i + 4], "labels": LABELS[i : i + 4]} for i in (0, 4)]
    total = models.observe_sum(model, clients, models.image_loss, batch_size=4)
    counts = build("label_identity").run(total, model, public, QUICK, 0).of("label_counts")[0]
    assert counts.tolist() == torch.bincount(LABELS[:8], minlength=10).tolist()


def test_an_adaptive_optimiser_or_an_unknown_batch_is_not_applicable():
    model = models.mlp()
    batch = {"images": IMAGES[:4], "labels": LABELS[:4]}
    adaptive = models.observe_delta(
        model,
        [batch],
        models.image_loss,
        learning_rate=0.01,
        optimiser="adamw",
        knowledge=Knowledge(batch_size=4),
    )
    assert "scale" in build("label_identity").run(adaptive, model, Prior(), QUICK, 0).reason
    unknown = models.observe(model, batch, models.image_loss)
    assert "batch size" in build("llg").run(unknown, model, Prior(), QUICK, 0).reason


def test_a_head_without_bias_is_read_through_the_mean_feature():
    model = models.gpt2(vocabulary=200, width=32, classes=4)
    ids = models.sentences(8, 6, 200)
    true = torch.tensor([0, 1, 1, 2, 3, 3, 3, 0])
    observation = models.observe(model, {"input_ids": ids, "labels": true}, models.text_loss, batch_size=8)
    result = build("label_identity").run(
        observation,
        model,
        Prior(examples={"token_ids": models.sentences(64, 6, 200, distinct=False)}),
        QUICK,
        0,
    )
    assert count_accuracy(result.of("label_counts")[0].tolist(), torch.bincount(true).tolist()) >= 0.75


@given(
    classes=strategies.integers(3, 12),
    examples=strategies.integers(1, 12),
    seed=strategies.integers(0, 10**6),
    sure=strategies.floats(0.1, 8.0),
    single=strategies.booleans(),
)
@example(
    classes=5, examples=5, seed=1, sure=6.0, single=False
)  # the model is sure of both examples of one label
@settings(max_examples=60, deadline=None)
def test_bounds_and_the_column_space_never_exclude_the_truth(classes, examples, seed, sure, single):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(classes, (examples,), generator=generator)
    chances = torch.softmax(sure * torch.randn(examples, classes, generator=generator).double(), dim=1)
    errors = (chances - torch.nn.functional.one_hot(truth, classes)) / examples
    counts = torch.bincount(truth, minlength=classes)
    assert bool((labels.least_counts(errors.sum(0), examples) <= counts).all())
    features = torch.randn(examples, 32, generator=generator).double()
    weight = errors.T @ features
    weight = weight.float().double() if single else weight
    possible = labels.possible_labels(weight, examples, QUICK.start())
    assert possible is None or bool(possible[truth].all())


def test_nothing_is_excluded_where_an_example_leaves_no_trace_or_shares_its_features() -> None:
    sure = torch.tensor([[1.0 - 2e-9, 1e-9, 1e-9, 0.0, 0.0, 0.0], [0.0, 0.2, 0.3, 0.5, 0.0, 0.0]]).double()
    errors = sure - torch.nn.functional.one_hot(torch.tensor([0, 2]), 6)
    features = torch.randn(2, 16, generator=torch.Generator().manual_seed(0)).double()
    assert labels.possible_labels(errors.T @ features, 2, QUICK.start()) is None
    generator = torch.Generator().manual_seed(1)
    chances = torch.softmax(torch.randn(4, 20, generator=generator).double(), dim=1)
    errors = chances - torch.nn.functional.one_hot(torch.tensor([3, 7, 1, 9]), 20)
    shared = torch.randn(3, 32, generator=generator).double()[[0, 0, 1, 2]]
    assert labels.possible_labels(errors.T @ shared, 4, QUICK.start()) is None
    narrow = torch.randn(4, 3, generator=generator).double()
    assert labels.possible_labels(errors.T @ narrow, 4, QUICK.start()) is None


def test_a_small_batch_excludes_most_labels():
    generator = torch.Generator().manual_seed(0)
    chances = torch.softmax(torch.randn(3, 40, generator=generator).double(), dim=1)
    errors = chances - torch.nn.functional.one_hot(torch.tensor([7, 7, 31]), 40)
    possible = labels.possible_labels(
        errors.T @ torch.randn(3, 64, generator=generator).double(), 3, QUICK.start()
    )
    assert possible.nonzero().flatten().tolist() == [7, 31]


@pytest.mark.parametrize(("classes", "bias"), [(2, True), (3, False), (10, True), (300, False)])
def test_the_label_of_one_example_is_exact(classes: int, bias: bool) -> None:
    for seed in range(10):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, classes, bias=bias)
        )
        label = seed * classes // 10
        batch = {"images": torch.randn(1, 8), "labels": torch.tensor([label])}
        seen = models.observe(
            model, batch, models.image_loss, knowledge=Knowledge(batch_size=1, image_shape=(8,))
        )
        for name in ("idlg_label", "label_identity"):
            assert build(name).run(seen, model, Prior(), QUICK, 0).of("labels")[0].tolist() == [label], (
                name,
                seed,
            )


def test_of_two_classes_without_a_bias_either_label_fits() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2, bias=False))
    batch = {"images": torch.randn(1, 8), "labels": torch.tensor([1])}
    seen = models.observe(model, batch, models.image_loss, batch_size=1)
    found = build("idlg_label").run(seen, model, Prior(), QUICK, 0)
    assert not found.applicable
    assert "mirror" in found.reason


def test_a_gradient_of_another_scale_is_refused_at_once() -> None:
    observation, _ = digits_observation(models.mlp(width=32), 64)
    scaled = observation.replace_tensors(
        {name: 65_536 * value for name, value in observation.tensors.items()}
    )
    found = build("label_identity").run(
        scaled, models.mlp(width=32), Prior(), Budget(steps=1_000, iterations=1, restarts=1), 0
    )
    assert not found.applicable
    assert "scaled" in found.reason
    assert found.seconds < 1.0


def test_decay_of_plain_sgd_is_no_example() -> None:
    model = models.mlp()
    with torch.no_grad():
        model[-1].bias.copy_(torch.tensor([3.0, -3.0] * 5))
    batch = {"images": IMAGES[:64], "labels": torch.ones(64, dtype=torch.long)}
    seen = models.observe_delta(
        model, [batch], models.image_loss, learning_rate=0.01, weight_decay=0.01,
        knowledge=Knowledge(batch_size=64, image_shape=(1, 8, 8)),
    )  # fmt: skip
    head = labels.find_head(seen, model)
    assert int(labels.least_counts(head.bias, 64).sum()) <= 64
    assert build("label_identity").run(seen, model, Prior(), QUICK, 0).of("label_counts")[0].tolist()[1] == 64


def test_counts_stay_within_bounds_and_keep_the_total():
    least, possible = torch.tensor([0, 2, 0, 0]), torch.tensor([True, True, False, True])
    estimate = torch.tensor([1.6, 0.0, 9.0, 0.4])
    assert labels.bounded_counts(estimate, least, possible, 4).tolist() == [2, 2, 0, 0]
    assert labels.bounded_counts(estimate, least, possible, 1).tolist() == [0, 1, 0, 0]


@given(
    estimate=strategies.lists(strategies.floats(-50, 50), min_size=1, max_size=12),
    total=strategies.integers(1, 10**6),
    seed=strategies.integers(0, 10**6),
)
@settings(max_examples=80, deadline=None)
def test_bounded_counts_add_up_and_keep_their_bounds(estimate, total, seed):
    generator = torch.Generator().manual_seed(seed)
    possible = torch.rand(len(estimate), generator=generator) < 0.7
    possible[int(torch.randint(len(estimate), (1,), generator=generator))] = True
    least = torch.randint(0, max(2, total // len(estimate)), (len(estimate),), generator=generator) * possible
    counts = labels.bounded_counts(torch.tensor(estimate), least, possible, total)
    assert int(counts.sum()) == total
    assert not bool(counts[~possible].any())
    assert int(least.sum()) >= total or bool((counts >= least).all())


def test_rounding_keeps_the_total_and_the_nearest_shares():
    assert labels.round_to_total(torch.tensor([1.4, 2.6, -0.2]), 4).tolist() == [1, 3, 0]
    assert int(labels.round_to_total(torch.zeros(3), 7).sum()) == 7
