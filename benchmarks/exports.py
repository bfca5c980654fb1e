"""Export every trainable on many architectures and load it back with stock libraries alone.

`python -m benchmarks.exports` writes docs/results/export.md; tests run parts of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

from ffm_secure.errors import ModelError
from ffm_secure.models.backbone import Backbone, load_backbone
from ffm_secure.models.builtin import tiny_tokenizer
from ffm_secure.report.model_card import loading_code
from ffm_secure.tasks import build_task
from ffm_secure.trainable import attach
from ffm_secure.trainable.exports import export

PAGE = Path(__file__).resolve().parents[1] / "docs" / "results" / "export.md"
BOUND = 1e-5
LENGTH = 24
CLASSIFY, CAUSAL, MASKED, PICTURES = "text_classification", "causal_lm", "masked_lm", "image_classification"
WRITE = "sequence_to_sequence"
_SIZE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
_DECODER = _SIZE | {"num_key_value_heads": 2, "head_dim": 8}
_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
}
_PICTURE = {"image_size": 32, "num_channels": 3}
TEXT: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "bert": (_SIZE, (CLASSIFY, MASKED)),
    "roberta": (_SIZE, (CLASSIFY, MASKED)),
    "distilbert": ({"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}, (CLASSIFY, MASKED)),
    "electra": (_SIZE | {"embedding_size": 16}, (CLASSIFY, MASKED)),
    "albert": (_SIZE | {"embedding_size": 16}, (CLASSIFY, MASKED)),
    "mpnet": (_SIZE, (CLASSIFY, MASKED)),
    "deberta-v2": (_SIZE, (CLASSIFY, MASKED)),
    "gpt2": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, (CLASSIFY, CAUSAL)),
    "gpt_neox": (_SIZE, (CLASSIFY, CAUSAL)),
    "llama": (_DECODER, (CLASSIFY, CAUSAL)),
    "mistral": (_DECODER, (CLASSIFY, CAUSAL)),
    "qwen2": (_DECODER, (CLASSIFY, CAUSAL)),
    "qwen3": (_DECODER, (CLASSIFY, CAUSAL)),
    "gemma": (_DECODER, (CLASSIFY, CAUSAL)),
    "gemma2": (_DECODER, (CLASSIFY, CAUSAL)),
    "phi3": (_DECODER, (CLASSIFY, CAUSAL)),
    "opt": (_SIZE | {"ffn_dim": 64, "word_embed_proj_dim": 32}, (CLASSIFY, CAUSAL)),
    "falcon": (_SIZE, (CLASSIFY, CAUSAL)),
    "bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 4}, (CLASSIFY, CAUSAL)),
    "t5": ({"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}, (CLASSIFY, WRITE)),
    "bart": (_BART, (CLASSIFY, WRITE)),
}
_PATCHES = (
    {name: _SIZE[name] for name in _SIZE if name != "max_position_embeddings"} | _PICTURE | {"patch_size": 8}
)
_STAGES = {"image_size": 32, "hidden_sizes": [16, 32], "depths": [1, 1]}
PICTURE: dict[str, dict[str, Any]] = {
    "vit": _PATCHES,
    "dinov2": _PATCHES,
    "beit": _PATCHES,
    "swin": {
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 16,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 4,
    },
    "clip": {"vision_config": _PATCHES, "text_config": _SIZE, "projection_dim": 16},
    "siglip": {"vision_config": _PATCHES, "text_config": _SIZE},
    "resnet": _STAGES | {"embedding_size": 16, "layer_type": "basic"},
    "convnext": _STAGES | {"num_stages": 2},
}
SPECS: tuple[dict[str, Any], ...] = (
    {"kind": "full"},
    {"kind": "head"},
    {"kind": "lora", "rank": 2},
    {"kind": "lora", "rank": 2, "folded": True},
    {"kind": "lora_xs", "rank": 2},
    {"kind": "prompt", "length": 3},
    {"kind": "p_tuning", "length": 3, "hidden": 8},
    {"kind": "prefix", "length": 3},
    {"kind": "deep_prompt", "length": 3},
    {"kind": "prompt_generator", "length": 3, "hidden": 8},
)
TEXTS = ["a good movie", "the plot is bad and long", "home", "we love this story very much today"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One architecture, one task, one trainable."""

    model: str
    task: str
    spec: Mapping[str, Any]

    @property
    def title(self) -> str:
        """Name the case as a folder can be named."""
        folded = "-folded" if self.spec.get("folded") else ""
        return f"{self.model}.{self.task}.{self.spec['kind']}{folded}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a case ended: the largest difference of a logit, or why there is none."""

    case: Case
    form: str = ""
    difference: float | None = None
    refusal: str = ""


def all_cases() -> list[Case]:
    """List every architecture with each of its tasks and every trainable."""
    models = [(name, task) for name, (_, tasks) in TEXT.items() for task in tasks]
    models += [(name, PICTURES) for name in PICTURE]
    models += [("builtin:minilm", CLASSIFY)]
    return [Case(model=name, task=task, spec=spec) for name, task in models for spec in SPECS]


def measure(cases: Iterable[Case], folder: Path) -> list[Outcome]:
    """Export each case here, load all of them in a process that never imports this package, and compare."""
    outcomes = [_export(case, folder) for case in cases]
    answers = _load_elsewhere(folder)
    return [
        outcome
        if outcome.refusal or outcome.form == "own"
        else Outcome(case=outcome.case, form=outcome.form, difference=answers[outcome.case.title])
        for outcome in outcomes
    ]


def _export(case: Case, folder: Path) -> Outcome:
    name = case.model if case.model.startswith("builtin:") else str(_checkpoint(case, folder / "bases"))
    backbone = load_backbone(name, kind=case.task, labels=3, base=folder, seed=5)
    try:
        trainable = attach(backbone, case.spec, task_kind=case.task, seed=3)
    except ModelError as error:
        return Outcome(case=case, refusal=str(error))
    _shake(trainable)
    batch = _batch(backbone)
    place = folder / "exports" / case.title
    record = export(trainable, place, name, max_length=LENGTH, text_columns=("text",))
    if record.form == "own":
        return Outcome(case=case, form="own")
    with torch.inference_mode():
        logits = trainable.model(**batch).logits.float().contiguous()
    save_file(
        {"logits": logits, **{key: value.contiguous() for key, value in batch.items()}}, place / "asked"
    )
    (place / "load.py").write_text(loading_code(record, str(place)))
    return Outcome(case=case, form=record.form)


def _checkpoint(case: Case, folder: Path) -> Path:
    """Write a small checkpoint of random weights as transformers does."""
    place = folder / f"{case.model}.{case.task}"
    if place.is_dir():
        return place
    tokenizer = tiny_tokenizer()
    options: dict[str, Any] = PICTURE[case.model] if case.task == PICTURES else TEXT[case.model][0]
    if case.task != PICTURES:
        ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        begins = {"bos_token_id": tokenizer.bos_token_id, "decoder_start_token_id": tokenizer.pad_token_id}
        options = options | ends | begins | {"vocab_size": len(tokenizer)}
        tokenizer.save_pretrained(place)
    auto = {
        CLASSIFY: transformers.AutoModelForSequenceClassification,
        CAUSAL: transformers.AutoModelForCausalLM,
        MASKED: transformers.AutoModelForMaskedLM,
        WRITE: transformers.AutoModelForSeq2SeqLM,
        PICTURES: transformers.AutoModelForImageClassification,
    }[case.task]
    config = transformers.AutoConfig.for_model(case.model, num_labels=3, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = auto.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(place)
    return place


def _shake(trainable: Any) -> None:
    """Move away from the start, where a factor of zero hides mistakes."""
    stream = torch.Generator().manual_seed(9)
    size = 0.01 if trainable.size > 1_000_000 else 0.05
    trainable.load_vector(trainable.flatten() + size * torch.randn(trainable.size, generator=stream))


class _Table:
    def __init__(self, **columns: Any) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(TEXTS)

    def column(self, name: str) -> Any:
        return self.columns[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Data:
    text_columns: tuple[str, ...] = ()
    label_column: str = "label"
    image_column: str | None = None
    label_names: tuple[str, ...] = ("north", "south", "west")


def _batch(backbone: Backbone) -> dict[str, torch.Tensor]:
    """Prepare inputs as a run does, padded to unequal lengths."""
    pictures = backbone.kind == PICTURES
    data = _Data(image_column="picture") if pictures else _Data(text_columns=("text",))
    if backbone.kind == WRITE:
        data = _Data(text_columns=("text", "answer"))
    task = build_task(backbone.kind, backbone=backbone, dataset=data, max_length=LENGTH)
    noise = np.random.default_rng(1).integers(0, 256, (len(TEXTS), 32, 32, 3), dtype=np.uint8)
    table = _Table(text=TEXTS, answer=TEXTS[::-1], picture=noise, label=np.zeros(len(TEXTS), dtype=np.int64))
    batch = task.batch(task.encode(table), range(len(TEXTS)), device="cpu")
    return {name: value for name, value in batch.items() if name not in ("labels", "targets")}


# Runs in the other process: what the model card says, then the questions asked here.
_ELSEWHERE = """
import json, pathlib, sys
import torch, transformers
from safetensors.torch import load_file
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

def ask(place):
    space = {}
    exec((place / "load.py").read_text(), space)
    model, asked = space["model"], load_file(place / "asked")
    wanted = asked.pop("logits")
    record = json.loads((place / "export.json").read_text())
    if "input_ids" in asked and record["form"] == "model":
        asked = with_prompt(asked, space["tokenizer"], place)
    with torch.inference_mode():
        logits = model(**asked).logits.float()
    if record["virtual"]:
        logits = logits[:, record["virtual"]:]
    apart = (logits - wanted).abs() / wanted.abs().clamp(min=1.0)
    if apart.ndim == 3:
        apart = apart[asked.get("decoder_attention_mask", asked["attention_mask"]).bool()]
    names = model.config.id2label
    assert not record["labels"] or list(names.values()) == record["labels"], names
    return float(apart.max())

def with_prompt(asked, tokenizer, place):
    plain = transformers.AutoTokenizer.from_pretrained(place)
    front = tokenizer("a")["input_ids"][: len(tokenizer("a")["input_ids"]) - len(plain("a")["input_ids"])]
    first = torch.tensor(front, dtype=torch.long).expand(len(asked["input_ids"]), -1)
    asked["input_ids"] = torch.cat([first, asked["input_ids"]], dim=1)
    asked["attention_mask"] = torch.cat([torch.ones_like(first), asked["attention_mask"]], dim=1)
    return asked

answers = {}
for place in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    if (place / "load.py").is_file():
        answers[place.name] = ask(place)
assert not any(name.split(".")[0] in ("ffm_secure", "defenses", "attacks") for name in sys.modules)
print(json.dumps(answers))
"""


def _load_elsewhere(folder: Path) -> dict[str, float]:
    """Load every export in a process of its own, outside this folder and without its path."""
    if not (folder / "exports").is_dir():
        return {}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    script = folder / "elsewhere.py"
    script.write_text(_ELSEWHERE)
    command = [sys.executable, str(script), str(folder / "exports")]
    answer = subprocess.run(
        command,
        cwd=folder,
        env=environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if answer.returncode:
        raise RuntimeError(answer.stderr[-3000:])
    table: dict[str, float] = json.loads(answer.stdout.splitlines()[-1])
    return table


def page(outcomes: Sequence[Outcome]) -> str:
    """Write the table: architectures down, trainables across."""
    columns = [_column(spec) for spec in SPECS]
    models = list(dict.fromkeys((outcome.case.model, outcome.case.task) for outcome in outcomes))
    cells = {(o.case.model, o.case.task, _column(o.case.spec)): _cell(o) for o in outcomes}
    lines = [
        "# Exported models, loaded by others",
        "",
        (
            "Each cell is the largest difference of a logit, relative where it is above one, between a "
            "trained model here and its"
        ),
        (
            "`adapter/` folder loaded with the code of its own README by transformers and PEFT, in a "
            "process that never imports this"
        ),
        (
            "package. Four texts of unequal length (padded), or four pictures; random weights, every "
            "trained number moved away from"
        ),
        (
            "its start. *adapter*: PEFT on the base; *model*: the complete model in `model/`; *whole*: the "
            "folder itself is the model."
        ),
        (
            "`own`: no stock class computes it, `ffm-secure predict` does; `-`: `plan` "
            "refuses this pair in one sentence."
        ),
        "",
        f"| model, task | {' | '.join(columns)} |",
        f"|---{'|---' * len(columns)}|",
    ]
    lines += [
        (
            f"| {model}, {task.replace('_', ' ')} | "
            f"{' | '.join(cells[model, task, column] for column in columns)} |"
        )
        for model, task in models
    ]
    largest = max((o.difference for o in outcomes if o.difference is not None), default=0.0)
    loaded = sum(o.difference is not None for o in outcomes)
    lines += ["", f"{loaded} exports loaded; the largest difference is {largest:.1e} (bound {BOUND:.0e})."]
    lines += [
        "",
        (
            "Written by `python -m benchmarks.exports`; a subset runs in the default "
            "tests, all of it in the slow ones."
        ),
    ]
    return "\n".join(lines) + "\n"


def _column(spec: Mapping[str, Any]) -> str:
    return f"{spec['kind']}{', folded' if spec.get('folded') else ''}"


def _cell(outcome: Outcome) -> str:
    if outcome.refusal:
        return "-"
    return outcome.form if outcome.difference is None else f"{outcome.difference:.0e} {outcome.form}"


def main() -> None:
    """Measure everything and write the page."""
    with tempfile.TemporaryDirectory() as folder:
        outcomes = measure(all_cases(), Path(folder))
    PAGE.write_text(page(outcomes))
    sys.stdout.write(PAGE.read_text())


if __name__ == "__main__":
    main()
