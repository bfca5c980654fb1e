"""The README of an exported model: what it is, what it was trained with, what is promised, and code that
loads it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path, PurePath

from ffm_secure.foreign import JsonValue
from ffm_secure.quantities import bound, metric, small
from ffm_secure.records import ModelExport, PrivacyStatement, RunSummary
from ffm_secure.report.release import without_paths

_PIPELINES = {
    "text_classification": "text-classification",
    "causal_lm": "text-generation",
    "masked_lm": "fill-mask",
    "image_classification": "image-classification",
    "sequence_to_sequence": "text2text-generation",
    "image_text_classification": "zero-shot-image-classification",
    "image_text_contrastive_classification": "zero-shot-image-classification",
}
# Layouts of what a causal model goes on from, as a text that asks.
_QUESTIONS = {"answered": r'"A prompt to answer.\n"', "lines": r'"user: A question.\nassistant: "'}
_TEMPLATED = """tokenizer.apply_chat_template(
    [[{"role": "user", "content": "A question."}]],
    add_generation_prompt=True,
    return_tensors="pt",
    return_dict=True,
)"""


def model_card(export: ModelExport, summary: RunSummary) -> str:
    """Write the card: front matter, then sections in the order a reader asks.

    Guarantee: nothing of it says more about single owners than the report's public part; paths of the machine
    are left out.
    """
    parts = [
        _front_matter(export, summary),
        f"# {summary.name}",
        _opening(export, summary),
        "## Load it",
        _loading(export),
        "## What it learned",
        _metrics(summary),
        "## What is promised",
        _promise(summary),
        "## What it was trained with",
        _training(export, summary),
        "## Data check",
        _data(export, summary),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def loading_code(export: ModelExport, folder: str = ".") -> str:
    """Return Python that loads an export with stock libraries alone and leaves `model` and, for texts,
    `tokenizer`, for pictures `processor`.
    """
    auto, names = export.auto_class, _preparations(export)
    prepare = ", ".join(names.values())
    dtype = f"dtype=torch.{export.dtype}"
    lines = ["from pathlib import Path", "", "import torch"]
    if export.form == "adapter":
        source = 'folder / "base"' if export.base_inside else json.dumps(export.base_model)
        lines += ["from peft import PeftModel", f"from transformers import AutoConfig, {auto}, {prepare}", ""]
        lines += [
            f"folder = Path({json.dumps(folder)})",
            'config = AutoConfig.from_pretrained(folder / "base")',
        ]
        renamed = f", key_mapping={json.dumps(dict(export.key_mapping))}" if export.key_mapping else ""
        options = f"config=config, {dtype}, ignore_mismatched_sizes=True{renamed}"
        lines += [
            f"base = {auto}.from_pretrained({source}, {options})",
            "model = PeftModel.from_pretrained(base, folder).eval()",
        ]
    else:
        inside = ' / "model"' if export.form == "model" else ""
        lines += [f"from transformers import {auto}, {prepare}", ""]
        lines += [f"folder = Path({json.dumps(folder)}){inside}"]
        lines += [f"model = {auto}.from_pretrained(folder, {dtype}).eval()"]
    prepared = [f"{name} = {kind}.from_pretrained(folder)" for name, kind in names.items()]
    return "\n".join([*lines, *prepared])


def _preparations(export: ModelExport) -> dict[str, str]:
    """Return what prepares the input of a model: name in the code, and class of transformers."""
    names = {}
    if export.task.startswith("image"):
        names["processor"] = "AutoImageProcessor"
    if not export.task.startswith("image") or export.class_text:
        names["tokenizer"] = "AutoTokenizer"
    return names


def answering_code(export: ModelExport) -> str:
    """Return Python that asks the loaded model something."""
    if export.class_text:
        return _scoring_code(export)
    if export.task == "image_classification":
        batch = 'processor(Image.open("picture.png"), return_tensors="pt")'
    else:
        text = _QUESTIONS.get(export.layout, '"A text to judge."')
        if export.task == "masked_lm":
            text = '"Two plus " + tokenizer.mask_token'
        batch = f'tokenizer([{text}], padding=True, truncation=True, return_tensors="pt")'
    if export.layout == "template":
        batch = _TEMPLATED
    if export.task == "sequence_to_sequence":
        return "\n".join(
            [
                f"batch = {batch}",
                "with torch.inference_mode():",
                "    written = model.generate(**batch, max_new_tokens=32)",
                "print(tokenizer.batch_decode(written, skip_special_tokens=True))",
            ]
        )
    picture = ["from PIL import Image", ""] if export.task == "image_classification" else []
    cut = f"[:, {export.virtual}:]" if export.virtual else ""
    lines = [
        *picture,
        f"batch = {batch}",
        "with torch.inference_mode():",
        f"    logits = model(**batch).logits{cut}",
    ]
    if export.labels:
        lines.append("print([model.config.id2label[number] for number in logits.argmax(dim=-1).tolist()])")
    return "\n".join(lines)


def _scoring_code(export: ModelExport) -> str:
    """Return Python that scores a picture against the texts of the classes."""
    texts = [export.class_text.replace("{}", name) for name in export.labels]
    return "\n".join(
        [
            "from PIL import Image",
            "",
            f"texts = {json.dumps(texts, ensure_ascii=False)}",
            'pictures = processor(Image.open("picture.png"), return_tensors="pt")',
            'full = model.config.model_type.startswith("siglip")  # which reads the last place of a text',
            'padding = "max_length" if full else True',
            'words = tokenizer(texts, padding=padding, return_tensors="pt")',
            "with torch.inference_mode():",
            '    logits = model(**pictures, input_ids=words["input_ids"]).logits_per_image',
            "print([texts[number] for number in logits.argmax(dim=-1).tolist()])",
        ]
    )


def _front_matter(export: ModelExport, summary: RunSummary) -> str:
    tags = ["federated-learning", "ffm-secure"]
    lines = ["---", f"library_name: {'peft' if export.form == 'adapter' else 'transformers'}"]
    if _is_hub_name(export.base_model):
        lines.append(f"base_model: {export.base_model}")
    lines.append(f"pipeline_tag: {_PIPELINES[export.task]}")
    return "\n".join([*lines, f"tags: [{', '.join(tags)}]", *_model_index(export, summary), "---"])


def _model_index(export: ModelExport, summary: RunSummary) -> list[str]:
    """Write the result as the hub reads it; every text is a JSON string, which is one of YAML, too."""
    if not math.isfinite(summary.metric_final):
        return []
    public = str(without_paths(_setting(summary, "task", "data")))
    return [
        "model-index:",
        f"- name: {json.dumps(summary.name)}",
        "  results:",
        f"  - task: {{type: {_PIPELINES[export.task]}}}",
        f"    dataset: {{name: {json.dumps(public)}, type: {json.dumps(public)}, split: validation}}",
        "    metrics:",
        f"    - type: {json.dumps(summary.metric_name)}",
        f"      name: {json.dumps(f'{summary.metric_name} on public validation rows')}",
        f"      value: {summary.metric_final!r}",
    ]


def _is_hub_name(name: str) -> bool:
    return not name.startswith(("builtin:", "/", ".", "~")) and ":" not in name and "\\" not in name


def _base_words(export: ModelExport) -> str:
    """Return the base as people call it, without the path of this machine."""
    return (
        export.base_model
        if _is_hub_name(export.base_model) or ":" in export.base_model
        else PurePath(export.base_model).name
    )


def _opening(export: ModelExport, summary: RunSummary) -> str:
    stamps = "".join(f"**{stamp}**\n\n" for stamp in summary.stamps)
    return (
        f"{stamps}`{_base_words(export)}` adapted by {_setting(summary, 'task', 'clients')} data owners "
        f"together, for {export.task.replace('_', ' ')}; trained: {summary.plan.trains}."
    )


def _setting(summary: RunSummary, section: str, key: str) -> JsonValue:
    table = summary.config.get(section, {})
    return table.get(key, "unknown") if isinstance(table, dict) else "unknown"


def _loading(export: ModelExport) -> str:
    if export.form == "own":
        return (
            f"No class of transformers or PEFT computes a {export.trainable.replace('_', ' ')} before this "
            "model, so nothing loads it by mistake: `ffm-secure predict RUN --text '...'` answers with it."
        )
    folder = (
        "folder" if export.task.startswith("image") else "folder, or `ffm-secure predict RUN --text '...'`"
    )
    notes = [
        f"Run in this {folder}:",
        "",
        "```python",
        loading_code(export),
        "",
        answering_code(export),
        "```",
    ]
    if export.form == "model" and export.trainable not in ("prompt", "p_tuning"):
        notes += ["", "`model/` holds everything, weights merged; keep it in float32."]
    return "\n".join(notes)


def _metrics(summary: RunSummary) -> str:
    rows = [
        ("after the last round", summary.metric_final),
        ("before training", summary.metric_zero_round),
        ("always the commonest label", summary.metric_majority),
    ]
    if summary.classes is not None:
        rows += [
            ("macro F1", summary.classes.macro_f1),
            ("balanced accuracy", summary.classes.balanced_accuracy),
            ("calibration error", summary.classes.calibration_error),
        ]
    lines = [f"| {summary.metric_name} on public validation rows | |", "|---|---|"]
    return "\n".join(
        [*lines, *(f"| {name} | {metric(value)} |" for name, value in rows if value is not None)]
    )


def _promise(summary: RunSummary) -> str:
    lines = ["| against | epsilon | delta | unit | adjacency | accountant |", "|---|---|---|---|---|---|"]
    lines += [_statement(item) for item in summary.statements]
    for words in dict.fromkeys(words for item in summary.statements for words in item.mechanism):
        lines += ["", f"Mechanism: {words}."]
    note = (
        f"Ledger: {summary.ledger_entries} entries, head `{summary.ledger_head}`."
        if summary.ledger_head
        else ""
    )
    return "\n".join(lines) + (f"\n\n{note}" if note else "")


def _statement(item: PrivacyStatement) -> str:
    amount = bound(item.epsilon)
    cells = (
        item.observer.replace("_", " "),
        amount,
        small(item.delta),
        item.unit,
        item.adjacency,
        item.accountant,
    )
    return f"| {' | '.join(cells)} |"


def _training(export: ModelExport, summary: RunSummary) -> str:
    lifecycle = _setting(summary, "federation", "lifecycle")
    kind = lifecycle.get("kind", "") if isinstance(lifecycle, dict) else ""
    rows = {
        "base": f"`{_base_words(export)}`",
        "base digest": f"`{export.base_fingerprint}` (SHA-256 over names, shapes and values)",
        "trained numbers": f"{summary.plan.trainable_parameters:,} of {summary.plan.total_parameters:,}",
        "rounds": f"{len(summary.rounds)}, {kind}".rstrip(", "),
        "noise multiplier": f"{summary.plan.noise_multiplier:.4g}",
        "protection": str(_kind(summary, "protection")),
        "software": ", ".join(f"{name} {version}" for name, version in sorted(summary.software.items())),
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _kind(summary: RunSummary, section: str) -> JsonValue:
    return _setting(summary, section, "kind")


def _data(export: ModelExport, summary: RunSummary) -> str:
    labels = ", ".join(export.labels) if export.labels else "none"
    lines = [
        (
            f"- data set: `{PurePath(str(_setting(summary, 'task', 'data'))).name}`, "
            f"{_setting(summary, 'task', 'clients')} owners"
        ),
        f"- labels: {labels}",
    ]
    if export.class_text:
        lines.append(f"- text of a class: `{export.class_text}`")
    elif export.task != "image_classification":
        lines.append(f"- texts longer than {export.max_length} tokens were cut")
    return "\n".join([*lines, "- rows and sizes of single owners are not published here"])


def write_card(folder: Path, export: ModelExport, summary: RunSummary) -> Path:
    """Write the card as README.md."""
    path = folder / "README.md"
    path.write_text(model_card(export, summary))
    return path
