"""One client for every attack: what the server sees of it under a given noise, and what it trained on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from attacks import Budget, Knowledge, Observation, Prior
from attacks.contract import Reconstruction
from attacks.inversion import active, active_adapters, active_neurons, active_text
from attacks.registry import build
from attacks.scoring import Score, score
from attacks.truth import Truth
from tests.attacks import models
from tests.attacks.models import adapted_bert, framed_texts
from tests.attacks.test_active_peft import DOWN, UP, adapted_vit, encoder
from tests.attacks.test_linear import Bottleneck
from tests.attacks.test_optimise import sigmoid_lenet
from tests.attacks.test_position import PlainBlocks
from tests.attacks.test_text import chain, dropping, walk

BUDGET = Budget(steps=60_000, iterations=50, restarts=1)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What one attack is given, and the truth about it."""

    seen: Observation
    model: nn.Module | None
    truth: Truth
    prior: Prior = Prior()
    budget: Budget = BUDGET

    def noised(self, noise: float, seed: int) -> Case:
        """Return the case with the update clipped as a whole at length
        one and noise of that multiplier added.
        """
        return replace(self, seen=models.noised(self.seen, noise, seed=seed)) if noise else self

    def iterations(self, count: int, restarts: int = 1) -> Case:
        """Return the case with more or less effort."""
        return replace(self, budget=Budget(steps=300_000, iterations=count, restarts=restarts))


def run(name: str, case: Case) -> Reconstruction:
    """Run a registered attack on a case."""
    return build(name).run(case.seen, case.model, case.prior, case.budget, 0)


def scored(name: str, case: Case) -> Score | None:
    """Return the score of a registered attack on a case, None where it finds nothing that can be scored."""
    return score(run(name, case), case.truth)


def words(ids: Tensor) -> Truth:
    """Return the truth about texts of equal length."""
    return Truth(sequences=tuple(tuple(row) for row in ids.tolist()))


def observed(
    model: nn.Module, batch: models.Batch, loss: models.Loss, granted: Knowledge, clients: int
) -> Observation:
    """Return one client's gradient, or the sum over clients that hold one example each."""
    if clients == 1:
        return models.observe(model, batch, loss, knowledge=granted)
    parts = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(clients)]
    seen = models.observe_sum(model, parts, loss)
    return replace(seen, knowledge=replace(granted, batch_size=1))


# ----------------------------------------------------------------------------------------------------- images


def digits(make: Callable[[], nn.Module], count: int = 1, *, start: int = 0, clients: int = 1) -> Case:
    """Return digits behind a gradient, or behind a sum over as many clients;
    labels, shape and number are granted.
    """
    model, (images, labels) = make(), models.digits()
    batch = {"images": images[start : start + count], "labels": labels[start : start + count]}
    granted = Knowledge(batch_size=count, labels=tuple(batch["labels"].tolist()), image_shape=(1, 8, 8))
    seen = observed(model, batch, models.image_loss, granted, clients)
    return Case(seen=seen, model=model, truth=Truth(images=batch["images"]))


def labelled(count: int) -> Case:
    """Return digits of which the labels alone are the truth."""
    case = digits(models.mlp, count)
    labels = tuple(models.digits()[1][:count].tolist())
    seen = replace(case.seen, knowledge=Knowledge(batch_size=count, image_shape=(1, 8, 8)))
    return replace(case, seen=seen, truth=Truth(labels=labels, classes=10))


def stepped(count: int = 2, *, rate: float = 0.05) -> Case:
    """Return digits behind two epochs of local steps, one image each."""
    model, (images, labels) = models.cnn(), models.digits()
    images, labels = images[10 : 10 + count], labels[10 : 10 + count]
    steps = [{"images": images[i : i + 1], "labels": labels[i : i + 1]} for i in range(count)] * 2
    granted = Knowledge(image_shape=(1, 8, 8), labels=tuple(labels.tolist()), local_epochs=2, batch_size=1)
    seen = models.observe_delta(model, steps, models.image_loss, learning_rate=rate, knowledge=granted)
    return Case(seen=seen, model=model, truth=Truth(images=images))


def picture(model: nn.Module, side: int) -> Case:
    """Return one random colour picture behind a gradient."""
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)).to(
        next(model.parameters()).dtype
    )
    granted = Knowledge(batch_size=1, labels=(3,), image_shape=(3, side, side))
    seen = models.observe(
        model, {"images": image, "labels": torch.tensor([3])}, models.image_loss, knowledge=granted
    )
    return Case(seen=seen, model=model, truth=Truth(images=image.float()))


def vision() -> nn.Module:
    """Return a small vision transformer for 16 x 16 pictures."""
    return models.vit(size=16, patch=8, width=64)


def imprinted(bins: int = 64) -> nn.Module:
    """Return a network behind an imprint block."""
    return active.craft_imprint(models.mlp(), models.digits()[0][600:1000], bins=bins)


def trapped() -> nn.Module:
    """Return a network with trap weights."""
    return active.craft_trap(models.mlp(width=256), models.digits()[0][600:1500])


def fished(count: int = 8, *, order: Tensor | None = None) -> Case:
    """Return one image of a class among others of other classes, behind a head that wants that class.

    `order` is the order in which digits are taken.
    """
    images, labels = models.digits()
    order = torch.arange(len(labels)) if order is None else order
    chosen = torch.cat([order[labels[order] == 3][:1], order[labels[order] != 3][: count - 1]])
    model = active.craft_fishing(models.mlp(), 3)
    batch = {"images": images[chosen], "labels": labels[chosen]}
    seen = models.observe(model, batch, models.image_loss, knowledge=Knowledge(image_shape=(1, 8, 8)))
    return Case(seen=seen, model=model, truth=Truth(images=images[chosen[:1]]))


def silenced(clients: int = 5, *, order: Tensor | None = None) -> Case:
    """Return one client in a sum whose other clients were sent weights that keep them silent."""
    model, (images, labels) = models.mlp(), models.digits()
    places = torch.arange(clients) if order is None else order[:clients]
    quiet = active.craft_suppression(model)
    parts = [
        models.gradient(sent, {"images": images[i : i + 1], "labels": labels[i : i + 1]}, models.image_loss)
        for i, sent in zip(places.tolist(), [model, *[quiet] * (clients - 1)], strict=True)
    ]
    total = {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}
    seen = Observation(
        kind="sum", tensors=total, contributors=clients, metadata={"summand": "gradient"},
        knowledge=Knowledge(image_shape=(1, 8, 8)),
    )  # fmt: skip
    return Case(seen=seen, model=model, truth=Truth(images=images[places[:1]]))


def adapter(count: int = 1, *, clients: int = 1) -> Case:
    """Return digits behind the crafted adapter of a frozen vision transformer."""
    images, labels = models.digits()
    model = active_adapters.craft_adapter_leak(adapted_vit(), images[:600], down=DOWN, up=UP)
    batch = {"images": images[700 : 700 + count], "labels": labels[700 : 700 + count]}
    seen = observed(model, batch, models.image_loss, Knowledge(image_shape=(1, 8, 8)), clients)
    return Case(seen=seen, model=model, truth=Truth(images=batch["images"]))


@dataclass(frozen=True, kw_only=True)
class Simulated(Case):
    """A case whose attacker trains on the client's exact pipeline, so that noise reaches its training too."""

    @staticmethod
    def sent(examples: Mapping[str, Tensor], seed: int, *, noise: float) -> dict[str, Tensor]:
        """Return what the client sends, clipped at length one when there is noise."""
        seen = models.observe(models.mlp(width=32), examples, models.image_loss)
        return dict((models.noised(seen, noise, seed=seed) if noise else seen).tensors)

    def noised(self, noise: float, seed: int) -> Case:
        """Return the case with the noise in the update and in the attacker's simulation."""
        batch = {"images": self.truth.images, "labels": torch.tensor(self.truth.labels)}
        tensors = self.sent(batch, 10**9 + seed, noise=noise)  # no seed that the attacker trains on
        prior = replace(self.prior, client=functools.partial(self.sent, noise=noise))
        return replace(self, seen=self.seen.replace_tensors(tensors), prior=prior)


def simulated(count: int = 1, *, order: Tensor | None = None) -> Case:
    """Return digits behind a small network, and public digits to train on;
    `order` takes none of the first 1,300.
    """
    images, labels = models.digits()
    places = torch.arange(1300, 1300 + count) if order is None else order[:count]
    batch = {"images": images[places], "labels": labels[places]}
    client = functools.partial(Simulated.sent, noise=0.0)
    seen = models.observe(models.mlp(width=32), batch, models.image_loss, batch_size=count)
    prior = Prior(client=client, examples={"images": images[:1200], "labels": labels[:1200]})
    truth = Truth(images=batch["images"], labels=tuple(batch["labels"].tolist()))
    return Simulated(seen=seen, model=None, truth=truth, prior=prior).iterations(200)


# ------------------------------------------------------------------------------------------------------- text


def text(count: int = 2, *, clients: int = 1, width: int = 64, length: int = 5) -> Case:
    """Return texts behind a decoder that classifies them; labels and length are granted."""
    model = models.gpt2(vocabulary=120, width=width, length=16, tied=False)
    ids, labels = models.sentences(count, length, 120), torch.arange(count) % 2
    granted = Knowledge(batch_size=count, labels=tuple(labels.tolist()), sequence_length=length)
    seen = observed(model, {"input_ids": ids, "labels": labels}, models.text_loss, granted, clients)
    return Case(seen=seen, model=model, truth=words(ids))


def hidden_words(model: nn.Module, ids: Tensor, *, keep: bool = False, dropout: float | None = None) -> Case:
    """Return texts behind an encoder whose embeddings are not sent, but for the words' when `keep`."""
    labels = torch.arange(len(ids)) % 2
    granted = Knowledge(
        batch_size=len(ids), labels=tuple(labels.tolist()), sequence_length=ids.shape[1], dropout=dropout
    )
    torch.manual_seed(1)
    model.train(dropout is not None)
    seen = models.observe(model, {"input_ids": ids, "labels": labels}, models.text_loss, knowledge=granted)
    model.eval()
    kept = {k: v for k, v in seen.tensors.items() if "_embeddings" not in k or (keep and "word_" in k)}
    return Case(seen=seen.replace_tensors(kept), model=model, truth=words(ids))


def small_encoder(rank: int = 0) -> nn.Module:
    """Return a small encoder, with LoRA pairs of that rank when it is not zero."""
    model = models.bert(vocabulary=200, width=32, layers=1, length=16)
    return models.add_lora(model, rank, ("query", "value"), zero_b=False) if rank else model


def matched(count: int = 1, *, rank: int = 0) -> Case:
    """Return texts behind a small encoder whose embeddings are not sent."""
    return hidden_words(small_encoder(rank), models.sentences(count, 4, 200)).iterations(60)


def spoken(*, keep: bool) -> Case:
    """Return two texts of a language that the attacker knows."""
    language_model, successor = chain(200)
    ids = torch.stack([walk(successor, first, 6) for first in (5, 60)])
    case = hidden_words(models.bert(vocabulary=200), ids, keep=keep)
    return replace(case, prior=Prior(language_model=language_model))


def bottleneck() -> Case:
    """Return one text in front of an adapter."""
    model, ids = Bottleneck(), torch.tensor([[17, 60, 133, 9]])

    def loss(network: nn.Module, batch: models.Batch) -> Tensor:
        return nn.functional.cross_entropy(network(batch["input_ids"]), batch["labels"])

    seen = models.observe(model, {"input_ids": ids, "labels": torch.tensor([1])}, loss)
    return Case(seen=seen, model=model, truth=words(ids))


def low_rank(rank: int = 8, length: int = 12) -> Case:
    """Return one text behind crafted LoRA factors of an encoder."""
    model = active_adapters.craft_lora_leak(models.add_lora(encoder(), rank, ("value",)))
    ids = models.sentences(1, length, 500)
    seen = models.observe(model, {"input_ids": ids, "labels": torch.tensor([1])}, models.text_loss)
    return Case(seen=seen, model=model, truth=words(ids))


def deceived(count: int = 2, *, clients: int = 1) -> Case:
    """Return texts behind a crafted decoder."""
    public = torch.randint(3, 500, (64, 8), generator=torch.Generator().manual_seed(1))
    model = active_text.craft_decepticon(models.gpt2(vocabulary=500, width=128, layers=2), public)
    ids = models.sentences(count, 8, 500)
    batch = {"input_ids": ids, "labels": torch.arange(count) % 2}
    seen = observed(model, batch, models.text_loss, Knowledge(), clients)
    return Case(seen=seen, model=model, truth=words(ids))


def binned(count: int = 2, *, clients: int = 1) -> Case:
    """Return texts behind a crafted encoder."""
    public = torch.randint(3, 500, (64, 8), generator=torch.Generator().manual_seed(1))
    model = active_text.craft_encoder_bins(encoder(), public)
    ids = models.sentences(count, 8, 500)
    batch = {"input_ids": ids, "labels": torch.arange(count) % 2}
    seen = observed(model, batch, models.text_loss, Knowledge(), clients)
    return Case(seen=seen, model=model, truth=words(ids))


def remembered(count: int = 4, *, clients: int = 1) -> Case:
    """Return texts behind a crafted adapter that keeps whole texts."""
    public = framed_texts(1000, 0)
    model = active_neurons.craft_neuron_imprint(
        adapted_bert(), public, torch.arange(len(public)) % 2, texts=count
    )
    ids = framed_texts(count, 3)
    seen = observed(
        model, {"input_ids": ids, "labels": torch.arange(count) % 2}, models.text_loss, Knowledge(), clients
    )
    return Case(seen=seen, model=model, truth=words(ids), prior=Prior(examples={"token_ids": public}))


CASES: dict[str, Callable[[], Case]] = {
    "token_presence": text,
    "label_identity": lambda: labelled(4),
    "idlg_label": lambda: labelled(1),
    "llg": lambda: labelled(4),
    "ilrg": lambda: labelled(4),
    "linear_readout": lambda: digits(models.mlp),
    "spear": lambda: digits(lambda: models.mlp(width=200), 2),
    "adapter_readout": bottleneck,
    "position_text": text,
    "position_vision": lambda: picture(vision(), 16),
    "april": lambda: picture(PlainBlocks(patch=4), 8),
    "span": text,
    "span_exact": text,
    "somp": text,
    "tiger": text,
    "cocktail_party": lambda: digits(models.mlp),
    "dlg": lambda: digits(lambda: sigmoid_lenet(0), start=5).iterations(25, restarts=2),
    "idlg": lambda: digits(lambda: sigmoid_lenet(0), start=5).iterations(25, restarts=2),
    "inverting_gradients": lambda: digits(models.cnn, start=3).iterations(60),
    "modern_inversion": lambda: digits(models.cnn, start=3).iterations(60),
    "grad_inversion": lambda: digits(models.cnn, start=3).iterations(60, restarts=2),
    "grad_vit": lambda: picture(models.vit(size=8, patch=8, width=96, layers=1), 8).iterations(150),
    "tag": lambda: hidden_words(small_encoder(), models.sentences(1, 4, 200), keep=True),
    "text_matching": matched,
    "text_matching_whitened": matched,
    "lamp": lambda: spoken(keep=False).iterations(100),
    "film": lambda: spoken(keep=True).iterations(40),
    "grab": lambda: hidden_words(dropping(0.2), models.sentences(1, 6, 300), dropout=0.2).iterations(200),
    "fedavg_unrolled": lambda: stepped(1, rate=0.3).iterations(60),
    "fedavg_surrogate": lambda: stepped().iterations(60),
    "learned_inversion": simulated,
    "imprint": lambda: digits(imprinted, 2),
    "trap_weights": lambda: digits(trapped, 4),
    "fishing": fished,
    "model_inconsistency": silenced,
    "adapter_leak": adapter,
    "lora_leak": low_rank,
    "decepticon": deceived,
    "encoder_bins": binned,
    "neuron_imprint": remembered,
}
