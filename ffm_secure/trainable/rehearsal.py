"""Try what is trained on two invented inputs, before a run or a ledger knows of it: does a gradient reach
every tensor?
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from defenses.dp import Clipping, PerSampleEngine
from ffm_secure.config.run_file import ClippingKind
from ffm_secure.errors import ModelError
from ffm_secure.foreign import Configuration, LibraryModel
from ffm_secure.models.backbone import Backbone
from ffm_secure.models.dual_encoder import fills_places
from ffm_secure.trainable.base import TrainableModel
from ffm_secure.trainable.context import ContextModel

# What to use where a kind does not work with a model.
_INSTEAD = {
    "full": "lora or prompt",
    "head": "lora or full",
    "lora": "other target_modules, or prompt",
    "lora_xs": "other target_modules, or prompt",
    "prefix": "prompt, p_tuning or lora",
    "prompt": "lora",
    "p_tuning": "lora",
    "deep_prompt": "prompt or lora",
    "prompt_generator": "prompt or lora",
    "context": "lora",
    "class_context": "lora",
}
_ROUTED = ".experts."  # two short texts reach few of a model's experts, which says nothing against the others


def rehearse(trainable: TrainableModel) -> None:
    """Run one tiny forward and backward pass.

    With `full` the backward pass is left out: its gradients are as large as the model, and every tensor is
    the model's own.

    Raises:
      ModelError: the model cannot run with what is trained, or some of it takes no part in what the model
        answers.
    """
    if (batch := tiny_batch(trainable.backbone, trainable.model)) is None:
        return
    try:
        with torch.enable_grad():
            answer: Tensor = trainable.model(**batch).logits.float().square().sum()
            lost = _unreached(answer, trainable)
    except ModelError:
        raise
    except Exception as error:  # whatever an architecture makes the library throw becomes one error of ours
        raise ModelError(_refusal(trainable, f"cannot run with it ({_first_line(error)})")) from error
    if lost:
        more = ""
        if len(lost) > 1:
            more = f" and {len(lost) - 1} more"
        raise ModelError(_refusal(trainable, f"does not use it: no gradient reaches {lost[0]}{more}"))


def rehearse_per_sample(
    trainable: TrainableModel, names: Iterable[str] | None, *, clipping: ClippingKind
) -> None:
    """Take clipped per-sample gradients of one tiny batch; `names` is what a step trains, None for all.

    Raises:
      ModelError: some parameter has no gradient per sample, or the model cannot run while its modules are
        watched; the message names the first and says what to use instead.
    """
    if (batch := tiny_batch(trainable.backbone, trainable.model)) is None:
        return

    def losses() -> Tensor:
        answer: Tensor = trainable.model(**batch).logits.float().square().flatten(1).mean(dim=1)
        return answer

    try:
        with (
            trainable.training_only(names),
            PerSampleEngine(trainable.model, parameters=trainable.active) as engine,
        ):
            engine.clipped_sum(losses, clip=Clipping(kind=clipping, clip_norm=1.0))
    except ModelError:
        raise
    except Exception as error:  # as above
        reason = f"gives no gradient per sample, which a record or person unit needs ({_first_line(error)})"
        raise ModelError(f"{_refusal(trainable, reason)}, or the client unit") from error


def tiny_batch(backbone: Backbone, model: LibraryModel) -> dict[str, Tensor] | None:
    """Invent two inputs of the model's kind: three words, of which the last ends the text, or a picture; None
    for neither.
    """
    device = next(model.parameters()).device
    if backbone.kind.startswith("image"):
        if backbone.image_size is None:
            return None
        shape = (2, backbone.channels, backbone.image_size, backbone.image_size)
        pictures = torch.linspace(-1.0, 1.0, 2 * shape[1] * shape[2] ** 2, device=device).view(shape)
        if not backbone.kind.startswith("image_text"):
            return {"pixel_values": pictures}
        return {"pixel_values": pictures, "class_texts": _class_texts(backbone, model).to(device)}
    words, end = _words(backbone.config)
    tokens = torch.tensor([[*words, end], [*reversed(words), end]], device=device)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if backbone.kind == "sequence_to_sequence":
        batch["decoder_input_ids"] = tokens.flip(1)
    return batch


def _class_texts(backbone: Backbone, model: LibraryModel) -> Tensor:
    """Invent the texts of the classes, which every picture shares, int64 [2, K, T]."""
    words, end = _words(backbone.config.text_config)
    classes, length = int(backbone.config.num_labels), 4
    if isinstance(model, ContextModel):  # which replaces the first words
        length += model.begins + model.replaced
    if fills_places(backbone.config) and backbone.max_positions is not None:
        length = backbone.max_positions
    texts = torch.full((classes, length), words[0])
    texts[1::2] = words[1]
    texts[:, -1] = end
    return texts.expand(2, classes, length)


def _words(config: Configuration) -> tuple[tuple[int, int], int]:
    """Return two ordinary tokens and the one that ends a text;
    classifiers of encoder-decoders look for it.
    """
    pad, begin, end = (getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos"))
    if isinstance(end, list):
        end = end[0]
    size = int(getattr(config, "vocab_size", 64))
    first, second, third = [token for token in range(min(64, size)) if token not in (pad, begin, end)][-3:]
    return (first, second), end if end is not None and end < size else third


def _unreached(answer: Tensor, trainable: TrainableModel) -> list[str]:
    """Name the trained tensors that have no path to the answer."""
    if not answer.requires_grad:
        return list(trainable.parameters)
    if trainable.kind == "full":
        return []
    gradients = torch.autograd.grad(answer, list(trainable.parameters.values()), allow_unused=True)
    pairs = zip(trainable.parameters, gradients, strict=True)
    return [name for name, gradient in pairs if gradient is None and _ROUTED not in name]


def _refusal(trainable: TrainableModel, reason: str) -> str:
    kind = trainable.kind
    return (
        f"model.trainable.kind = {kind!r}: {trainable.backbone.architecture} {reason}; use {_INSTEAD[kind]}"
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0][:200]}"
