"""Tiny models and clients built in code, and what a server would observe of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from attacks import Knowledge, Observation

Batch = Mapping[str, Tensor]


def _plain(model: nn.Module) -> nn.Module:
    model.config._attn_implementation = "eager"  # fused attention has no second derivative on CPU
    return model.eval()


def bert(
    *,
    vocabulary: int = 1000,
    width: int = 64,
    layers: int = 2,
    length: int = 32,
    classes: int = 2,
    seed: int = 0,
):
    """Return a BERT classifier without dropout."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=length,
        num_labels=classes,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
        attn_implementation="eager",
    )
    return _plain(BertForSequenceClassification(config))


def gpt2(
    *,
    vocabulary: int = 2000,
    width: int = 128,
    layers: int = 2,
    length: int = 32,
    classes: int | None = 2,
    tied: bool = True,
    seed: int = 0,
):
    """Return a GPT-2 classifier, or a language model when `classes` is None, without dropout."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_embd=width,
        n_layer=layers,
        n_head=2,
        n_positions=length,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        num_labels=classes or 2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    return _plain(GPT2LMHeadModel(config) if classes is None else GPT2ForSequenceClassification(config))


class Bottleneck(nn.Module):
    """A layer with a ReLU bottleneck behind it, which starts as no change."""

    def __init__(self, base: nn.Module, width: int, rank: int) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(width, rank), nn.Linear(rank, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.base(inputs)
        return hidden + self.up(torch.relu(self.down(hidden)))


def adapted_bert(*, rank: int = 48) -> nn.Module:
    """Return a frozen BERT of 60 words with one trained adapter behind its first attention.

    Its first place is as unlike the others as in a trained one.
    """
    model = bert(vocabulary=60, length=12).requires_grad_(False)
    attention = model.bert.encoder.layer[0].attention
    model.bert.embeddings.position_embeddings.weight[0].mul_(8)
    attention.output.dense = Bottleneck(attention.output.dense, 64, rank)
    model.classifier.requires_grad_(True)
    return model


def framed_texts(count: int, seed: int) -> Tensor:
    """Return texts of six tokens (count, 6) between a first and a last one that all have."""
    ids = torch.randint(3, 60, (count, 6), generator=torch.Generator().manual_seed(seed))
    ids[:, 0], ids[:, -1] = 1, 2
    return ids


def llama(*, vocabulary: int = 500, width: int = 64, layers: int = 2, seed: int = 0, tied: bool = False):
    """Return a LLaMA language model: rotary positions, RMSNorm."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    return _plain(LlamaForCausalLM(config))


def vit(
    *,
    size: int = 32,
    patch: int = 8,
    width: int = 192,
    layers: int = 2,
    heads: int = 2,
    classes: int = 10,
    seed: int = 0,
):
    """Return a standard pre-norm residual vision transformer."""
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=size,
        patch_size=patch,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=2 * width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=classes,
        attn_implementation="eager",
    )
    return _plain(ViTForImageClassification(config))


def mlp(*, inputs: int = 64, width: int = 64, classes: int = 10, seed: int = 0) -> nn.Module:
    """Return a two-layer ReLU network for 8 x 8 digits."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, classes)).eval()


def cnn(*, classes: int = 10, channels: int = 1, seed: int = 0) -> nn.Module:
    """Return a small convolutional network with pooling and a linear head."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, classes),
    ).eval()


def digits() -> tuple[Tensor, Tensor]:
    """Return the 8 x 8 digits as (1797, 1, 8, 8) in [0, 1] with their labels."""
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)


def sentences(count: int, length: int, vocabulary: int, *, seed: int = 0, distinct: bool = True) -> Tensor:
    """Return random token ids (count, length), never 0, 1 or 2;
    all tokens differ when `distinct` and the vocabulary allows.
    """
    generator = torch.Generator().manual_seed(seed)
    if distinct and count * length <= vocabulary - 3:
        return 3 + torch.randperm(vocabulary - 3, generator=generator)[: count * length].reshape(
            count, length
        )
    return torch.randint(3, vocabulary, (count, length), generator=generator)


def text_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss a Hugging Face model computes itself."""
    return model(**batch).loss


def image_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross-entropy of a classifier on images."""
    output = model(batch["images"])
    logits = output.logits if hasattr(output, "logits") else output
    return nn.functional.cross_entropy(logits, batch["labels"])


Loss = Callable[[nn.Module, Batch], Tensor]


def gradient(model: nn.Module, batch: Batch, loss: Loss) -> dict[str, Tensor]:
    """Return the mean gradient of one batch with respect to every trainable parameter."""
    named = {name: value for name, value in model.named_parameters() if value.requires_grad}
    with torch.enable_grad():
        grads = torch.autograd.grad(loss(model, batch), list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(value) if grad is None else grad.detach()
        for (name, value), grad in zip(named.items(), grads, strict=True)
    }


def observe(
    model: nn.Module, batch: Batch, loss: Loss, *, knowledge: Knowledge | None = None, **facts
) -> Observation:
    """Return what the server sees when one client sends the gradient of one batch."""
    return Observation(
        kind="gradient",
        tensors=gradient(model, batch, loss),
        metadata=facts,
        knowledge=knowledge or Knowledge(),
    )


def observe_sum(model: nn.Module, batches: Iterable[Batch], loss: Loss, **facts) -> Observation:
    """Return what the server sees when several clients' gradients are securely summed."""
    parts = [gradient(model, batch, loss) for batch in batches]
    total = {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}
    return Observation(
        kind="sum",
        tensors=total,
        contributors=len(parts),
        metadata={"summand": "gradient", "point": "aggregated", **facts},
    )


def observe_delta(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Loss,
    *,
    learning_rate: float,
    optimiser: str = "sgd",
    weight_decay: float = 0.0,
    knowledge: Knowledge | None = None,
) -> Observation:
    """Return what the server sees after a client trained one step per batch from the broadcast model."""
    client = copy.deepcopy(model)
    trained = [value for value in client.parameters() if value.requires_grad]
    if optimiser == "sgd":
        step = torch.optim.SGD(trained, lr=learning_rate, weight_decay=weight_decay)
    else:
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimiser]
        step = kind(trained, lr=learning_rate, weight_decay=weight_decay)
    steps = 0
    for batch in batches:
        step.zero_grad()
        loss(client, batch).backward()
        step.step()
        steps += 1
    before = dict(model.named_parameters())
    delta = {n: (v - before[n]).detach() for n, v in client.named_parameters() if v.requires_grad}
    facts = {
        "learning_rate": learning_rate,
        "local_steps": steps,
        "optimiser": optimiser,
        "weight_decay": weight_decay,
    }
    broadcast = {name: value.detach().clone() for name, value in before.items()}
    return Observation(
        kind="delta", tensors=delta, metadata=facts, broadcast=broadcast, knowledge=knowledge or Knowledge()
    )


class LowRank(nn.Module):
    """A linear layer with frozen weights and a LoRA pair beside it,
    named as the common adapter libraries name them.
    """

    def __init__(self, base: nn.Module, rank: int, *, zero_b: bool = True) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        fused = not isinstance(base, nn.Linear)
        rows, columns = base.weight.T.shape if fused else base.weight.shape
        self.lora_A = nn.Linear(columns, rank, bias=False)
        self.lora_B = nn.Linear(rank, rows, bias=False)
        if zero_b:
            nn.init.zeros_(self.lora_B.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.base_layer(inputs) + self.lora_B(self.lora_A(inputs))


def add_lora(
    model: nn.Module, rank: int, suffixes: tuple[str, ...], *, zero_b: bool = True, seed: int = 0
) -> nn.Module:
    """Freeze the model and put LoRA pairs on the modules whose name ends in one of the suffixes."""
    torch.manual_seed(seed)
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if name.endswith(suffixes) and hasattr(module, "weight"):
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], LowRank(module, rank, zero_b=zero_b))
    return model


class Prompted(nn.Module):
    """A frozen model with trained soft prompts in front: only the prompts are shared."""

    def __init__(self, model: nn.Module, count: int) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.config = model.config
        torch.manual_seed(0)
        self.prompt = nn.Parameter(0.1 * torch.randn(count, model.config.hidden_size))

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None):
        words = self.get_input_embeddings()(input_ids)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.model(
            inputs_embeds=torch.cat([self.prompt.expand(len(words), -1, -1), words], 1),
            attention_mask=torch.cat([mask.new_ones(len(words), len(self.prompt)), mask], 1),
            labels=labels,
        )


def noised(
    observation: Observation, multiplier: float, *, clip_norm: float = 1.0, seed: int = 0
) -> Observation:
    """Return the observation as it would look under one Gaussian step:
    clipped as a whole, then noise z C on every entry.
    """
    norm = torch.sqrt(sum(t.double().square().sum() for t in observation.tensors.values()))
    factor = min(1.0, clip_norm / float(norm))
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: tensor * factor
        + multiplier
        * clip_norm
        * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
        for name, tensor in observation.tensors.items()
    }
    return observation.replace_tensors(
        tensors, noise_multiplier=multiplier, clip_norm=clip_norm, point="noised"
    )
