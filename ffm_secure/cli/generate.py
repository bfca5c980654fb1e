"""The command `generate`: draw a data set from the language model of a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ffm_secure.cli.predict import load_predictor
from ffm_secure.display.console import clear_errors, say
from ffm_secure.errors import ConfigError, ModelError, StoreError

if TYPE_CHECKING:
    from ffm_secure.report.croissant import Row
    from ffm_secure.trainable.predictor import Predictor


def generate(
    folder: Path,
    out: Path,
    *,
    labels: str,
    count: int,
    longest: int,
    temperature: float,
    seed: int,
    json: bool,
) -> None:
    """Write texts drawn from a run's model, and their description, into an empty folder.

    Guarantee: nothing is read but the export and the public summary of the run, so the set costs no epsilon
    beyond the model's.
    Raises:
      ConfigError: the labels do not fit the model.
      StoreError: the run is not finished, or the folder holds something.
    """
    from ffm_secure import record_codec
    from ffm_secure.records import RunSummary
    from ffm_secure.report import croissant
    from ffm_secure.report.document import PUBLIC_DATA
    from ffm_secure.storage.run_directory import Store

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StoreError(f"{out}: is there already; name an empty or a new folder")
    with clear_errors():
        config = Store.read(folder).config()
        reported = folder / PUBLIC_DATA
        if not reported.is_file():
            raise StoreError(f"{folder}: is not finished; let it end first (ffm-secure run)")
        summary = record_codec.from_json(RunSummary, reported.read_text(encoding="utf-8"), str(reported))
        predictor = load_predictor(folder)
        prompts = _prompts(predictor, labels, count=count, longest=longest)
        rows = _rows(predictor, prompts, count=count, longest=longest, temperature=temperature, seed=seed)
        out.mkdir(parents=True, exist_ok=True)
        described = croissant.SyntheticSet(
            name=f"{config.name}-generated",
            rows=rows,
            columns=_columns(labelled=bool(labels)),
            made_how=f"{len(rows)} texts drawn from a language model (temperature {temperature:g}, seed "
            f"{seed}, at most {longest} tokens) that learned from the rows of private data owners.",
            released=("the trained model", "no label count: texts are dealt evenly to the labels asked for"),
        )
        croissant.write(out, described, summary)
    lines = [
        f"{len(rows)} texts in {out / croissant.ROWS}",
        croissant.promise(croissant.public_statement(summary)),
    ]
    say({"folder": str(out), "texts": len(rows)}, lines, json=json)


def _columns(*, labelled: bool) -> dict[str, str]:
    columns = {"text": "drawn from the model; a model may repeat what it learned within its epsilon"}
    if labelled:
        columns["label"] = "the prompt it was drawn behind"
    return columns


def _prompts(predictor: Predictor, labels: str, *, count: int, longest: int) -> list[str]:
    """Return the prompts to draw behind, in their order, each once.

    Raises:
      ConfigError: all that is wrong with them.
    """
    export = predictor.export
    if export.task != "causal_lm" or predictor.answers_chats:
        raise ModelError("only a causal_lm run of texts, or of labels and texts, can be drawn from")
    named = [label.strip() for label in labels.split(",")] if labels else [""]
    problems = []
    if (export.layout == "answered") != bool(labels):
        problems.append(
            "--labels: the model learned texts behind a label, so name at least one"
            if export.layout == "answered"
            else "--labels: the model learned texts without a label; leave it out, or train with "
            "columns 'prompt' (the label) and 'completion'"
        )
    if labels and ("" in named or len(set(named)) < len(named)):
        problems.append(f"--labels = {labels!r}: each must be there once, and none empty")
    if count < len(named):
        problems.append(f"--count = {count}: must be at least {len(named)}, one text a label")
    room = min(predictor.room_behind(prompt) for prompt in named)
    if longest > room:
        problems.append(f"--longest = {longest}: the model has {room} places behind its longest label")
    if problems:
        raise ConfigError("generate", problems)
    return named


def _rows(
    predictor: Predictor, prompts: list[str], *, count: int, longest: int, temperature: float, seed: int
) -> list[Row]:
    from ffm_secure.trainable.sampling import sample

    rows: list[Row] = []
    for place, prompt in enumerate(prompts):
        part = count // len(prompts) + (place < count % len(prompts))
        texts = sample(
            predictor,
            prompt,
            part,
            longest=longest,
            temperature=temperature,
            seed=seed * len(prompts) + place,
        )
        for text in texts:
            rows.append({"text": text, "label": prompt} if prompt else {"text": text})
    return rows
