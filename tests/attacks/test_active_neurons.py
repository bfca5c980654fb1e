"""One neuron of an adapter for each text: whole texts after Adam and many steps, and what stops it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from attacks import Budget, Observation, Prior
from attacks.inversion import active_neurons
from attacks.inversion.channels import capture_inputs
from defenses.broadcast_check import check_broadcast, layout_of
from tests.attacks import models
from tests.attacks.models import Bottleneck, adapted_bert, framed_texts

BUDGET = Budget(steps=60_000, iterations=10, restarts=1)
DOWN = "bert.encoder.layer.0.attention.output.dense.down"
TEXTS, STEPS = 16, 4


def crafted(model: nn.Module, public: Tensor) -> nn.Module:
    labels = torch.arange(len(public)) % 2
    return active_neurons.craft_neuron_imprint(model, public, labels, texts=TEXTS)


def answered(model: nn.Module, ids: Tensor) -> Observation:
    """Return what a client sends after four steps of AdamW on four texts each."""
    labels = torch.arange(len(ids)) % 2
    each = len(ids) // STEPS
    batches = []
    for begin in range(0, len(ids), each):
        rows = slice(begin, begin + each)
        batches.append({"input_ids": ids[rows], "labels": labels[rows]})
    return models.observe_delta(
        model, batches, models.text_loss, learning_rate=1e-3, optimiser="adamw", weight_decay=0.01
    )


def exact(seen: Observation, model: nn.Module, public: Tensor, ids: Tensor) -> int:
    """Return how many of the client's texts were read word for word."""
    prior = Prior(examples={"token_ids": public})
    reading = active_neurons.neuron_imprint().run(seen, model, prior, BUDGET, 0)
    assert reading.applicable, reading.reason
    texts = {tuple(text.tolist()) for text in reading.of("sequence")}
    return sum(tuple(row) in texts for row in ids.tolist())


def test_a_neuron_that_one_text_moved_keeps_its_state_through_four_steps_of_adamw() -> None:
    public, ids = framed_texts(1000, 0), framed_texts(TEXTS, 7)
    model = crafted(adapted_bert(), public)
    down = model.get_submodule(DOWN)
    assert isinstance(down, nn.Linear)
    states = capture_inputs({"states": down}, lambda: model(input_ids=ids))["states"]
    fired = (states @ down.weight.T + down.bias > 0).flatten(0, 1)
    alone = fired.sum(0) == 1
    assert int(alone.sum()) >= 5
    seen = answered(model, ids)
    decayed = (1 - 1e-5) ** STEPS - 1
    weight = seen.tensors[f"{DOWN}.weight"].double() - decayed * down.weight.detach().double()
    bias = seen.tensors[f"{DOWN}.bias"].double() - decayed * down.bias.detach().double()
    true = states.detach().flatten(0, 1)[fired.double().argmax(0)].double()
    misses = (weight / bias[:, None] - true).norm(dim=1) / true.norm(dim=1)
    assert float(misses[alone].median()) < 0.02
    assert exact(seen, model, public, ids) >= 2


def test_what_several_neurons_keep_of_a_text_is_one_state_and_better_known() -> None:
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(3, 200, generator=generator, dtype=torch.float64)
    precisions = torch.tensor([400.0] * 12 + [100.0] * 12, dtype=torch.float64)
    states = true.repeat(8, 1)
    noise = torch.randn(states.shape, generator=generator, dtype=torch.float64)
    states = states + noise / precisions[:, None]
    merged = torch.stack(list(active_neurons._merged(states, precisions)))
    assert merged.shape == true.shape
    misses, alone = (merged - true).norm(dim=1), (states[:3] - true).norm(dim=1)
    assert (misses < 0.65 * alone).all()


def test_an_honest_adapter_is_not_read() -> None:
    public, ids, model = framed_texts(50, 0), framed_texts(TEXTS, 7), adapted_bert()
    reading = active_neurons.neuron_imprint().run(
        answered(model, ids), model, Prior(examples={"token_ids": public}), BUDGET, 0
    )
    assert not reading.applicable
    assert "not a crafted" in reading.reason


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def test_a_site_that_remembers_refuses_it_and_never_an_honest_round() -> None:
    """Fifty rounds of four steps of AdamW, each held against the one before, and then a crafted one."""
    model, public = adapted_bert(), framed_texts(200, 0)
    layout, before = layout_of(trained(model)), trained(model)
    assert check_broadcast(trained(crafted(model, public)), layout, before)
    moving = [value for value in model.parameters() if value.requires_grad]
    optimiser = torch.optim.AdamW(moving, lr=1e-3)
    for number in range(50 * STEPS):
        rows = public.roll(-4 * number, dims=0)[:4]
        optimiser.zero_grad()
        models.text_loss(model, {"input_ids": rows, "labels": rows[:, 1] % 2}).backward()
        optimiser.step()
        if number % STEPS == STEPS - 1:
            after = trained(model)
            assert check_broadcast(after, layout, before) == []
            before = after
    reasons = check_broadcast(trained(crafted(model, public)), layout, before)
    assert "large jump" in {reason.rule for reason in reasons if DOWN in reason.tensor}


@pytest.mark.assets
@pytest.mark.slow
def test_texts_of_a_trained_encoder_are_read_after_four_steps_of_adamw(shared: Path) -> None:
    import pyarrow.parquet

    from ffm_secure.models.backbone import load_backbone

    backbone = load_backbone("builtin:minilm", kind="text_classification", labels=2, base=Path(), seed=0)
    rows = pyarrow.parquet.read_table(shared / "data" / "banking77" / "train.parquet")["text"].to_pylist()
    texts = torch.tensor([ids for ids in backbone.tokenizer(rows)["input_ids"] if len(ids) == 12])
    texts = texts[torch.randperm(len(texts), generator=torch.Generator().manual_seed(1))]
    ids = texts[800 : 800 + TEXTS]
    public = torch.cat([texts[:800], texts[800 + TEXTS :]])
    model = copy.deepcopy(backbone.model).eval().requires_grad_(False)
    torch.manual_seed(0)
    output = model.bert.encoder.layer[0].attention.output
    output.dense = Bottleneck(output.dense, 384, 256)
    honest = trained(model)
    bad = crafted(model, public)
    read = exact(answered(bad, ids), bad, public, ids)
    assert read >= TEXTS // 2, read  # 12 were read; chance reads none
    assert check_broadcast(trained(bad), layout_of(honest), honest)
