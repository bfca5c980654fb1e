"""Audit a model as it was released: who was in its training set, and which planted secrets it says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from attacks.command import load_model, load_tokenizer
from attacks.extraction import RIVALS, Extracted, Secret, extract
from attacks.foreign import Tokenizer
from attacks.released import ReleasedAudit, audit_released
from attacks.truth import Truth, load_truth
from ffm_secure.agreed.loaded_model import load_model as load_run_model
from ffm_secure.agreed.loaded_model import read_facts, stored_noise
from ffm_secure.data.files import read_table
from ffm_secure.data.table import Table
from ffm_secure.errors import DataError, StoreError
from ffm_secure.report.roc import roc_chart
from ffm_secure.storage.durable import create_folder, write_atomic
from ffm_secure.storage.observations import read_observations
from ffm_secure.storage.run_directory import Store
from ffm_secure.record_codec import read_json
from ffm_secure.record_codec import read_regular

_LONGEST = 512
_MOST_ROUNDS = 8
_LABELS = ("label", "labels")
_FORMAT = (
    'must be a JSON list of {"prefix": text, "secret": text, "alphabet": letters, "repeats": number}, '
    "each secret made of letters of its alphabet"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    """A released model: its folder, the adapter on top of it, and folders of models trained on none of it."""

    model: Path
    adapter: Path | None = None
    references: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reader:
    """Read records as a model takes them."""

    folder: Path
    tokenizer: Tokenizer
    model: nn.Module

    def read(self, path: Path) -> Truth:
        """Return the records of a safetensors file or of a table.

        Raises: DataError naming the file and what is missing; no row is shown.
        """
        if path.suffix == ".safetensors":
            try:
                return load_truth(path)
            except ValueError as error:
                raise DataError(str(error)) from None
        if self.tokenizer is None:
            raise DataError(f"{path}: the model has no tokenizer; give a safetensors file")
        table = read_table(path)
        texts = self._texts(table, path)
        sequences = []
        for text in texts:
            ids = self.tokenizer(text, truncation=True, max_length=self._longest())["input_ids"]
            sequences.append(tuple(ids))
        return Truth(sequences=tuple(sequences), labels=self._labels(table, path))

    def _texts(self, table: Table, path: Path) -> list[str]:
        wanted = _stated(self.folder, "text_columns")
        if not isinstance(wanted, list):
            wanted = ["text"]
        name = str(wanted[0])
        if len(wanted) > 1 or name not in table.columns:
            raise DataError(
                f"{path}: needs one column {name!r} of texts; a model that reads pairs takes safetensors"
            )
        return [str(text) for text in table.columns[name]]

    def _labels(self, table: Table, path: Path) -> tuple[int, ...] | None:
        config = getattr(self.model, "config", None)
        headed = any("Classification" in name for name in getattr(config, "architectures", None) or [])
        names = {str(name): int(number) for number, name in (getattr(config, "id2label", None) or {}).items()}
        column = next((name for name in _LABELS if name in table.columns), None)
        if not headed:
            return None
        if column is None:
            raise DataError(f"{path}: the model is a classifier, so a column 'label' is needed")
        labels = []
        for value in table.columns[column]:
            number = names.get(str(value), value)
            if not str(number).isdigit() or not 0 <= int(number) < max(1, len(names)):
                raise DataError(f"{path}: holds labels the model does not know; it knows {sorted(names)}")
            labels.append(int(number))
        return tuple(labels)

    def _longest(self) -> int:
        config = getattr(self.model, "config", None)
        stated = _stated(self.folder, "max_length")
        positions = getattr(config, "max_position_embeddings", None) or _LONGEST
        return min(int(stated) if isinstance(stated, int) else _LONGEST, int(positions))


def _stated(folder: Path, key: str) -> list[str] | int | None:
    """Return what the export of a run says beside its model, nothing for other models."""
    try:
        value = read_json(folder.parent / "export.json").get(key)
    except (OSError, ValueError, AttributeError):
        return None
    return value if isinstance(value, (list, int)) else None


def model_folder(path: Path) -> Path:
    """Return the folder with a model's config: that of a run's export for a run directory or its adapter."""
    for inner in (path, path / "model", path / "adapter" / "model"):
        if (inner / "config.json").is_file():
            return inner
    raise StoreError(f"{path}: holds no config.json, nor adapter/model/config.json as a finished run does")


def load_released(released: Released) -> tuple[nn.Module, Path]:
    """Load a released model and the folder it lies in.

    Raises: StoreError where a folder holds no model.
    """
    folder = model_folder(released.model)
    try:
        return load_model(folder, adapter=released.adapter), folder
    except (OSError, ValueError) as error:
        raise StoreError(str(error)) from None


def audit_membership(released: Released, members: Path, others: Path) -> ReleasedAudit:
    """Say whether a released model gives away which records it was trained on.

    `members` and `others` are tables (a column `text`, and `label` for a classifier) or safetensors files
    with token_ids or images, and labels. Seeded: the same files and model give the same answer.

    Raises:
      DataError: a file cannot be read as records of the model, or holds fewer than twenty.
      StoreError: a folder holds no model.
    """
    model, folder = load_released(released)
    references = []
    for path in released.references:
        references.append(load_released(Released(model=path))[0])
    reader = _Reader(folder=folder, tokenizer=load_tokenizer(folder), model=model)
    inside, outside = reader.read(members), reader.read(others)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            return audit_released(model, inside, outside, references=references)
        except (ValueError, RuntimeError, IndexError) as error:
            raise DataError(f"{members}, {others}: {str(error).splitlines()[0]}") from None


def audit_secrets(released: Released, secrets: Path) -> tuple[Extracted, ...]:
    """Say which planted secrets a released language model gives away.

    `secrets` is a JSON list of {"prefix": text, "secret": text, "alphabet": text, "repeats": n}: every letter
    of the secret was drawn evenly from the alphabet.

    Raises:
      DataError: the file is no such list; nothing of it is shown.
    """
    model, folder = load_released(released)
    return extract(model, _read_secrets(secrets, load_tokenizer(folder)))


def audit_rounds(folder: Path, secrets: Path) -> tuple[tuple[str, tuple[Extracted, ...]], ...]:
    """Say which planted secrets the models of a run gave away, round by round, as every client got them.

    Asked are the rounds that the run recorded (`audit.record_rounds`), eight of them at most, and the last
    model. Early models may give away more than the last one.

    Raises:
      StoreError: the folder holds no finished round.
      DataError: the file is no list of secrets; nothing of it is shown.
    """
    store = Store.read(folder)
    config, resumed = store.config(), store.resume()
    if resumed is None:
        raise StoreError(f"{folder}: no round was finished, so there is nothing to audit")
    loaded = load_run_model(config, Path.cwd(), read_facts(folder), multiplier=stored_noise(folder))
    planted = _read_secrets(secrets, loaded.backbone.tokenizer)
    vectors = {}
    for description, tensors in read_observations(folder / "observations"):
        if "broadcast" in tensors:
            vectors[f"broadcast of round {description.round}"] = tensors["broadcast"]
    chosen = list(vectors.items())
    if len(chosen) > _MOST_ROUNDS:
        places = np.linspace(0, len(chosen) - 1, _MOST_ROUNDS).astype(int)
        chosen = [chosen[place] for place in places]
    chosen.append((f"after round {len(resumed[1])}", resumed[0].vector))
    results = []
    for name, vector in chosen:
        loaded.trainable.load_vector(vector)
        results.append((name, extract(loaded.trainable.model, planted, among=len(chosen))))
    return tuple(results)


def _read_secrets(secrets: Path, tokenizer: Tokenizer) -> list[Secret]:
    if tokenizer is None:
        raise DataError("the model has no tokenizer, so no secret can be asked for")
    planted = []
    try:
        for number, stated in enumerate(json.loads(read_regular(secrets))):
            planted.append(_secret(stated, tokenizer, number))
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{secrets}: {_FORMAT}") from None
    if not planted:
        raise DataError(f"{secrets}: {_FORMAT}")
    return planted


def _secret(stated: Mapping[str, str | int], tokenizer: Tokenizer, number: int) -> Secret:
    """Cut a secret and other draws of its letters into tokens."""
    secret, alphabet = str(stated["secret"]), sorted(set(str(stated["alphabet"])))
    if not secret or len(alphabet) < 2 or set(secret) - set(alphabet):
        raise ValueError("a secret is made of letters of its alphabet")
    letters = np.random.default_rng(number).choice(alphabet, size=(RIVALS, len(secret)))
    endings = [secret, *("".join(row) for row in letters)]
    ids = tokenizer([str(stated["prefix"]) + ending for ending in endings])["input_ids"]
    texts = [_unended(row, set(tokenizer.all_special_ids)) for row in ids]
    # What all share is the prefix, whatever a tokenizer makes of the place where the secret begins.
    shared = _shared(texts)
    behind = [tuple(text[shared:]) for text in texts]
    return Secret(
        prefix=tuple(texts[0][:shared]),
        drawn=behind[0],
        rivals=tuple(behind[1:]),
        repeats=int(stated.get("repeats", 1)),
    )


def _shared(texts: Sequence[Sequence[int]]) -> int:
    """Count the tokens all texts begin with."""
    count = 0
    for column in zip(*texts, strict=False):
        if len(set(column)) > 1:
            break
        count += 1
    return count


def _unended(ids: Sequence[int], special: set[int]) -> list[int]:
    """Return token ids without marks of the end."""
    count = len(ids)
    while count and ids[count - 1] in special:
        count -= 1
    return list(ids[:count])


# ---------------------------------------------------------------------------------------------------- output


def membership_lines(audit: ReleasedAudit) -> list[str]:
    """Say in the terminal what came of an audit of membership; no record is named."""
    lines = [f"  {audit.verdict}: {audit.reason}", f"  {audit.members} members, {audit.others} others"]
    for test in (*audit.tests, audit.blind):
        rates = []
        for rate in test.rates:
            share = "too few others" if rate.true_positive is None else f"{rate.true_positive:.1%}"
            rates.append(f"{share} at {rate.false_positive:.1%} false positives")
        span = f"[{test.low:.3f}, {test.high:.3f}]"
        lines.append(f"  {test.score:<18} AUC {test.auc:.3f} {span}, finds {', '.join(rates)}")
    if audit.control is not None:
        control = audit.control
        lines.append(f"  control            AUC {control.auc:.3f} after {control.passes} passes of AdamW")
    return lines


def public_part(audit: ReleasedAudit) -> dict[str, object]:
    """Return what of an audit may leave: everything but who is exposed."""
    plain = asdict(audit)
    plain.pop("exposed")
    return plain


def write_membership(audit: ReleasedAudit, folder: Path) -> None:
    """Write an audit of membership to a new folder.

    membership.json and roc.svg may leave; internal_exposed.json names the most exposed members by their
    place in the file, for their owner alone.
    """
    if folder.exists():
        raise StoreError(f"{folder} exists: --out names a new folder")
    create_folder(folder)
    exposed = []
    for place, share in audit.exposed:
        exposed.append({"row": place, "others_as_high": share})
    texts = {
        "membership.json": json.dumps(public_part(audit), indent=1) + "\n",
        "roc.svg": roc_chart({test.score: test.curve for test in audit.tests}),
        "internal_exposed.json": json.dumps(exposed, indent=1) + "\n",
    }
    for name, text in texts.items():
        write_atomic(folder / name, text.encode("utf-8"))


def secret_lines(results: Sequence[Extracted]) -> list[str]:
    """Say in the terminal which planted secrets a model gives away, by their number in the file."""
    lines = []
    for number, one in enumerate(results):
        word = "leaked" if one.leaked else "not leaked"
        written = ", written out word for word" if one.read else ""
        measured = f"exposure {one.exposure:.1f} bits, repeated {one.repeats} times"
        lines.append(f"  secret {number}: {word}, {measured}{written}")
    return lines


__all__ = [
    "Released",
    "audit_membership",
    "audit_rounds",
    "audit_secrets",
    "membership_lines",
    "public_part",
    "secret_lines",
    "write_membership",
]
