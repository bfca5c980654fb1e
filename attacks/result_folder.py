"""Write what one attack recovered to a folder: a page to read, the numbers, recovered text beside truth,
pictures.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from attacks.contract import Reconstruction
from attacks.png import png_bytes
from attacks.scoring import Score, score
from attacks.truth import Truth, load_truth

__all__ = ["Result", "load_truth", "result_of", "write_result"]

Decode = Callable[[Sequence[int]], str]
_PICTURES = 16  # recovered pictures that are written


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Result:
    """Hold a reconstruction, what had to be done to the observation to read it, and its score where the truth
    is known.
    """

    reconstruction: Reconstruction
    notes: tuple[str, ...]
    score: Score | None = None


def result_of(reconstruction: Reconstruction, notes: tuple[str, ...], truth: Truth | None) -> Result:
    """Return the result of an attack, scored where the truth is known."""
    judged = None
    if truth is not None and reconstruction.applicable:
        judged = score(reconstruction, truth)
    return Result(reconstruction=reconstruction, notes=notes, score=judged)


def score_json(judged: Score | None) -> dict[str, object] | None:
    """Return a score as plain JSON values, None where there is none."""
    if judged is None:
        return None
    return {
        "measure": judged.measure,
        "value": judged.value,
        "guessing": judged.baseline,
        "leaked": judged.proven,
    }


def write_result(
    result: Result,
    folder: Path,
    *,
    numbers: Mapping[str, object],
    decode: Decode | None = None,
    shift: Sequence[float] = (),
    scale: Sequence[float] = (),
) -> None:
    """Write `report.md`, `result.json` and the pictures of a result to a new folder.

    `shift` and `scale` are the mean and deviation per channel by which the model's pictures were normalised.
    The folder appears whole or not at all.

    Raises: OSError when the folder exists or the disk refuses.
    """
    folder = folder.absolute()
    if folder.exists():
        raise OSError(f"{folder} exists: name a new folder, so that no earlier result is written over")
    pictures = _pictures(result, shift, scale)
    stage = folder.with_name(f".{folder.name}.{secrets.token_hex(6)}.new")
    stage.mkdir(parents=True)
    try:
        for name, image in pictures.items():
            (stage / name).write_bytes(png_bytes(image))
        page = _page(result, tuple(pictures), decode)
        (stage / "report.md").write_text(page, encoding="utf-8")
        (stage / "result.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
        os.rename(stage, folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _pictures(result: Result, shift: Sequence[float], scale: Sequence[float]) -> dict[str, Tensor]:
    """Return the recovered pictures by file name, each beside its truth where that is known."""
    judged = result.score
    if judged is not None and judged.pictures:
        shown = {}
        for number, pair in enumerate(judged.pictures, start=1):
            shown[f"recovered_{number}.png"] = _as_seen(pair.recovered, shift, scale)
            shown[f"truth_{number}.png"] = _as_seen(pair.truth, shift, scale)
        return shown
    images = []
    for image in result.reconstruction.of("image"):
        if image.ndim == 3:
            images.append(image)
    drawable = [image for image in images if image.shape[0] in (1, 3)][:_PICTURES]
    pictures: dict[str, Tensor] = {}
    for number, image in enumerate(drawable, start=1):
        pictures[f"recovered_{number}.png"] = _as_seen(image, shift, scale)
    return pictures


def _as_seen(image: Tensor, shift: Sequence[float], scale: Sequence[float]) -> Tensor:
    pixels = image.float()
    if len(scale) == len(shift) == pixels.shape[0]:
        pixels = pixels * torch.tensor(scale).view(-1, 1, 1) + torch.tensor(shift).view(-1, 1, 1)
    return pixels


def _page(result: Result, pictures: Sequence[str], decode: Decode | None) -> str:
    reconstruction = result.reconstruction
    lines = [f"# {reconstruction.attack}", ""]
    lines += [_verdict(result), ""]
    for note in result.notes:
        lines.append(f"- {note}")
    if reconstruction.knowledge_used:
        lines.append(f"- assumed beyond the wire: {', '.join(reconstruction.knowledge_used)}")
    if reconstruction.reason:
        lines.append(f"- {reconstruction.reason}")
    lines += ["", *_texts(result, decode)]
    for name in pictures:
        lines.append(f"![{name}]({name})")
    return "\n".join(lines).rstrip() + "\n"


def _verdict(result: Result) -> str:
    reconstruction, judged = result.reconstruction, result.score
    if not reconstruction.applicable:
        return "Not applicable: this attack can say nothing about this update. That is no evidence of safety."
    if judged is None:
        kinds = sorted({item.kind.replace("_", " ") for item in reconstruction.items})
        claims = "nothing"
        if kinds:
            claims = ", ".join(kinds)
        return (
            f"It states a confidence of {reconstruction.confidence:.2f} in: {claims}. "
            "Without the truth nothing is proven."
        )
    beside = f"{judged.measure} {judged.value:.3f}, guessing {judged.baseline:.3f}"
    return f"**{'Leaked' if judged.proven else 'Not better than guessing'}**: {beside}."


def _texts(result: Result, decode: Decode | None) -> list[str]:
    judged = result.score
    if judged is not None and judged.pairs:
        rows = ["| truth | recovered |", "|---|---|"]
        return [
            *rows,
            *(f"| {_said(true, decode)} | {_said(recovered, decode)} |" for true, recovered in judged.pairs),
            "",
        ]
    sentences = []
    for value in result.reconstruction.of("sequence"):
        sentences.append([token for token in value.tolist() if token >= 0])
    texts: list[str] = []
    for sentence in sentences:
        texts.append(f"- {_said(' '.join(map(str, sentence)), decode)}")
    return texts


def _said(ids: str, decode: Decode | None) -> str:
    if decode is not None and ids:
        words = decode([int(token) for token in ids.split()])
    else:
        words = ids
    return words.replace("|", "\\|").replace("\n", " ").strip() or "(nothing)"
