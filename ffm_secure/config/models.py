"""Which model is adapted, and what of it is trained: the run's own, and those of owners who bring another."""

from __future__ import annotations

from dataclasses import dataclass

from ffm_secure.config.schema import option
from ffm_secure.registry import TRAINABLES


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainableSpec:
    """Which numbers are trained and sent."""

    kind: str = option(choices=TRAINABLES)
    rank: int = option(8, minimum=1, maximum=1024, only_for=("lora", "lora_xs"))
    ranks: tuple[int, ...] = option(
        (),
        minimum=1,
        maximum=1024,
        help="ranks dealt to the clients in turn, with strategy flora",
        only_for=("lora",),
    )
    alpha: float = option(16.0, above=0.0, only_for=("lora", "lora_xs"))
    target_modules: tuple[str, ...] = option(
        (),
        help="empty: by architecture; ['all-linear'] for all; * stands for any part of a path",
        only_for=("lora", "lora_xs"),
    )
    length: int = option(
        16,
        minimum=1,
        maximum=1024,
        help="virtual tokens of a prompt or prefix, or vectors of a context",
        only_for=(*TRAINABLES.with_trait("prompt"), *TRAINABLES.with_trait("context")),
    )
    hidden: int = option(
        64,
        minimum=1,
        maximum=8192,
        help="width of the network that makes a prompt",
        only_for=("p_tuning", "prompt_generator"),
    )
    representation: str = option(
        "model",
        choices=("model", "embedding"),
        help="what a prompt is made from: the frozen model's mean output, or that of its input embeddings",
        only_for=("prompt_generator",),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Which foundation model is adapted, and where."""

    name: str = option(
        help="local folder, hub name, or builtin:minilm | tiny-bert | tiny-gpt2 | tiny-llama | tiny-vit | "
        "tiny-t5 | tiny-clip"
    )
    trainable: TrainableSpec
    dtype: str = option("float32", choices=("float32", "bfloat16"))
    weights: str = option(
        "checkpoint",
        choices=("checkpoint", "random"),
        help="random: only the architecture, to pre-train from scratch",
    )
    adapter: str = option("", help="start from this adapter: the adapter/ of a run, or a folder PEFT wrote")


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnModel:
    """Which model an owner trains at home and never sends."""

    name: str = option(help="as model.name")
    trainable: TrainableSpec
    learning_rate: float = option(0.0, minimum=0.0, maximum=1e3, help="0: that of the lifecycle")
    owners: tuple[str, ...] = option((), help="whose model it is; empty: dealt in turn to everybody else")


@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation:
    """What owners answer from, and how the student learns from the mean of their answers."""

    models: tuple[OwnModel, ...] = option(
        (),
        help="tables { name, trainable, learning_rate, owners }: every owner's own model, dealt in turn; "
        "empty: the run's model",
    )
    balance: bool = option(
        False,
        help="each owner divides its probabilities by their mean over the public rows, so that the classes "
        "it has most of count for no more",
    )
    steps: int = option(0, minimum=0, maximum=1_000_000, help="of the student, after every round")
    batch_size: int = option(32, minimum=1, maximum=1_000_000)
    learning_rate: float = option(0.0, minimum=0.0, maximum=1e3, help="of the student")
    optimizer: str = option("adam", choices=("sgd", "adam", "adamw"))
    back_steps: int = option(
        0,
        minimum=0,
        maximum=1_000_000,
        help="steps by which an owner's own model learns from the student's answers before a round; 0: none",
    )
