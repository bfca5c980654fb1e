"""Distillation of three architectures on AG News: what the student reaches, what attacks read off answers.

    python -m benchmarks.distillation ../shared --out docs/results/distillation.md --cache FOLDER [--choose]

Ten owners, Dirichlet 0.5, 300 rows each on average, 500 public texts. The architectures are MiniLM cut
after 2, 4 and 6 layers, each frozen, with a linear head over its mean-pooled vectors made 10 long; those are
computed once. Everything else is the product's own: split, calibration, steps, answers, rounding, ring,
student. `--choose` prints the grid that the settings came from, on 500 training rows of no owner.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from attacks.answers import ANSWER_ATTACKS
from attacks.contract import Budget, Prior
from attacks.metrics import auc
from attacks.observation import Observation
from benchmarks.sums import opened_sum
from defenses.dp import PerSampleEngine
from defenses.random_source import RandomSource
from ffm_secure.aggregation.base import Aggregate
from ffm_secure.config import run_file
from ffm_secure.data.dataset import Examples
from ffm_secure.data.partition import partition
from ffm_secure.lifecycle.base import ServerPhase
from ffm_secure.lifecycle.distillation import Distil, Lesson, Taught, answers_of, balanced
from ffm_secure.lifecycle.finetune import GradientRule, PlainGradient, PrivateGradient
from ffm_secure.models.backbone import load_backbone
from ffm_secure.privacy.calibration import calibrate
from ffm_secure.privacy.mechanism import Mechanism
from ffm_secure.protection.codec import codec_for
from ffm_secure.strategies.average import Average
from ffm_secure.strategies.base import ServerState
from ffm_secure.tasks.base import Classification
from ffm_secure.trainable.base import TrainableModel

LAYERS, CLIENTS, CLASSES, WIDTH = (2, 4, 6), 10, 4, 384
PRIVATE, PUBLIC, CHOOSING, TESTED = 3000, 500, 500, 1000
SEEDS, CHOOSE_BY, LENGTH = (1, 2, 3), (11,), 10.0


class Cut(nn.Module):
    """A linear head over what a cut model gives."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, CLASSES)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, features: Tensor) -> SimpleNamespace:
        """Return the logits as a model of transformers does."""
        return SimpleNamespace(logits=self.head(features))


class CutTrainable(TrainableModel):
    """The head, as something to train."""

    kind = "head"

    def __init__(self) -> None:
        model = Cut()
        backbone: Any = SimpleNamespace(config=SimpleNamespace(num_labels=CLASSES))
        super().__init__(
            backbone=backbone, model=model, parameters=dict(model.named_parameters()), description=()
        )

    def export(self, folder: Path, base_model_name: str) -> None:
        """Refuse: nothing of a benchmark is exported."""
        raise NotImplementedError

    def import_(self, folder: Path) -> None:
        """Refuse: nothing is read."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class Vectors:
    """Rows as an architecture gives them on."""

    features: Tensor  # float32 [n, width]
    labels: Tensor  # int64 [n]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, places: NDArray[np.int64]) -> Vectors:
        """Return some of the rows."""
        chosen = torch.from_numpy(np.asarray(places))
        return Vectors(features=self.features[chosen], labels=self.labels[chosen])


class CutTask(Classification):
    """Classification of vectors."""

    kind = "text_classification"

    def __init__(self) -> None:
        self.backbone = CutTrainable().backbone
        self.length = None

    def batch(
        self, encoded: Any, indices: ArrayLike, *, device: str, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Return the chosen rows."""
        rows = encoded.take(np.asarray(indices, dtype=np.int64))
        return {"features": rows.features, "labels": rows.labels}


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """The parts of the data set, by architecture."""

    private: tuple[Vectors, ...]
    public: tuple[Vectors, ...]
    choosing: tuple[Vectors, ...]
    tested: tuple[Vectors, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of one run: accuracies, and what attacks are given."""

    alone: tuple[float, ...]
    student: float
    answers: tuple[Tensor, ...]  # of every owner, as it would be sent
    own: tuple[Tensor, ...]
    parts: tuple[NDArray[np.int64], ...]


def table_of(epsilon: float, chosen: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Return the run file; epsilon 0 means no promise."""
    privacy: dict[str, Any] = {"unit": "none", "reason": "control", "ledger": "run"}
    if epsilon:
        privacy = {
            "unit": "record",
            "epsilon": epsilon,
            "delta": 1e-5,
            "clip_norm": 1.0,
            "ledger": "run",
        }
    return {
        "format": 1,
        "name": "distillation",
        "seed": seed,
        "task": {
            "kind": "text_classification",
            "data": "ag_news_subset",
            "clients": CLIENTS,
            "nominal_examples": PRIVATE // CLIENTS,
            "split": {"kind": "dirichlet", "alpha": 0.5},
        },
        "model": {"name": "builtin:minilm", "trainable": {"kind": "head"}},
        "federation": {
            "rounds": 1,
            "cohort": CLIENTS,
            "lifecycle": {
                "kind": "distillation",
                "public_examples": PUBLIC,
                "local_steps": chosen["local_steps"],
                "batch_size": chosen["batch_size"],
                "learning_rate": chosen["learning_rate"],
            },
        },
        "distillation": {
            "steps": 300,
            "batch_size": 64,
            "learning_rate": 0.01,
            "balance": chosen.get("balance", True),
        },
        "privacy": privacy,
        "protection": {"kind": "secagg", "threshold": CLIENTS - 1},
    }


def played(texts: Texts, epsilon: float, chosen: Mapping[str, Any], seed: int, tested: str) -> Outcome:
    """Play one round of the product's own parts over ten owners."""
    config = run_file.from_table(table_of(epsilon, chosen, seed))
    mechanism = calibrate(config, size=PUBLIC * CLASSES, public_client_size=PRIVATE // CLIENTS)
    codec = codec_for(config, mechanism, size=PUBLIC * CLASSES)
    task, owners = CutTask(), learned(texts, config, mechanism, seed)
    alone, answers, sent = [], [], []
    for index, taught in enumerate(owners.taught):
        model, kind = CutTrainable(), index % len(LAYERS)
        model.load_vector(taught.own)
        alone.append(task.evaluate(model.model, getattr(texts, tested)[kind]).metric)
        answered = taught.answers.view(PUBLIC, CLASSES)
        if chosen.get("balance", True):
            answered = balanced(answered)
        answers.append(answered)
        source = RandomSource.seeded(1000 * seed + index)
        output = mechanism.protect(answered.reshape(-1), loss=0.0, weight=1, source=source.derive("protect"))
        sent.append(codec.quantise(output, source=source.derive("round")))
    opened = opened_sum(codec, sent, round=1, survivors=tuple(range(CLIENTS)))
    student = CutTrainable()
    public: Any = texts.public[-1]
    phase = ServerPhase(config=config, trainable=student, task=task, public=public, round=1, device="cpu")
    state = ServerState(round=0, vector=student.flatten())
    mean = Aggregate.of_mean(torch.from_numpy(opened.values / opened.weight_sum))
    after = Distil().step(phase, Average(config.federation.strategy), state, mean)
    student.load_vector(after.vector)
    return Outcome(
        alone=tuple(alone),
        student=task.evaluate(student.model, getattr(texts, tested)[-1]).metric,
        answers=tuple(answers),
        own=tuple(taught.own for taught in owners.taught),
        parts=owners.parts,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Owners:
    """Every owner's rows and what it learned from them; its answers are not balanced yet."""

    taught: tuple[Taught, ...]
    parts: tuple[NDArray[np.int64], ...]


_LEARNED: dict[str, Owners] = {}  # by run file: balancing changes nothing of what is learned


def learned(texts: Texts, config: run_file.RunConfig, mechanism: Mechanism, seed: int) -> Owners:
    """Let every owner learn, once for each epsilon, setting and seed."""
    plain = replace(config, distillation=replace(config.distillation, balance=False))
    name = run_file.dump(plain)
    if name not in _LEARNED:
        rows_of = Examples(columns={"label": texts.private[0].labels.numpy()}, label_column="label")
        parts = partition(rows_of, clients=CLIENTS, split={"kind": "dirichlet", "alpha": 0.5}, seed=seed)
        taught = []
        for index, rows in enumerate(parts):
            taught.append(lesson_of(plain, mechanism, texts, index, rows, seed))
        _LEARNED[name] = Owners(taught=tuple(taught), parts=parts)
    return _LEARNED[name]


def lesson_of(
    config: run_file.RunConfig,
    mechanism: Mechanism,
    texts: Texts,
    index: int,
    rows: NDArray[np.int64],
    seed: int,
) -> Taught:
    """Let one owner learn and answer, as a site does."""
    task, kind = CutTask(), index % len(LAYERS)
    trainable, examples = CutTrainable(), texts.private[kind].take(rows)
    rule: GradientRule
    if mechanism.record_level is not None:
        rule = PrivateGradient(
            trainable=trainable,
            task=task,
            encoded=examples,  # type: ignore[arg-type]
            mechanism=mechanism.record_level,
            engine=PerSampleEngine(trainable.model, parameters=trainable.active),
            source=RandomSource.seeded(100 * seed + index),
            device="cpu",
            microbatch=512,
        )
    else:
        rule = PlainGradient(
            trainable=trainable,
            task=task,
            encoded=examples,  # type: ignore[arg-type]
            spec=config.federation.lifecycle,
            seed=(seed, index),
            device="cpu",
            microbatch=512,
        )
    lesson = Lesson(
        trainable=trainable,
        task=task,
        start=trainable.flatten(),
        spec=config.federation.lifecycle,
        rule=rule,
        public=texts.public[kind],  # type: ignore[arg-type]
        guide=torch.zeros(0),
        seed=(seed, index),
        device="cpu",
        config=config,
    )
    return Distil().teach(lesson)


def loaded(shared: Path, cache: Path) -> Texts:
    """Return the vectors of every part, computed once and kept."""
    stored = cache / "distillation.npz"
    if not stored.is_file():
        np.savez(stored, **_encoded(shared))
    arrays = np.load(stored, allow_pickle=False)
    vectors, labels = torch.from_numpy(arrays["X"]), torch.from_numpy(arrays["y"]).long()
    vectors = LENGTH * vectors / vectors.norm(dim=2, keepdim=True)
    cuts = np.cumsum([0, PRIVATE, PUBLIC, CHOOSING, TESTED])
    parts = []
    for first, last in itertools.pairwise(cuts):
        rows = labels[first:last]
        parts.append(
            tuple(Vectors(features=vectors[kind, first:last], labels=rows) for kind in range(len(LAYERS)))
        )
    return Texts(private=parts[0], public=parts[1], choosing=parts[2], tested=parts[3])


def _encoded(shared: Path) -> dict[str, np.ndarray]:
    """Return mean-pooled vectors [architectures, rows, width] and labels [rows]."""
    folder, texts, labels = shared / "data" / "ag_news_subset", [], []
    for part, count in (("train", PRIVATE + PUBLIC + CHOOSING), ("validation", TESTED)):
        table = pq.read_table(folder / f"{part}.parquet")
        table = table.take(np.random.default_rng(0).permutation(table.num_rows)[:count])
        texts += table["text"].to_pylist()
        labels += table["label"].to_pylist()
    backbone = load_backbone(
        "builtin:minilm", kind="text_classification", labels=CLASSES, base=Path.cwd(), seed=1
    )
    encoder, tokenizer = backbone.model.base_model, backbone.tokenizer
    assert tokenizer is not None
    ids = tokenizer(texts, truncation=True, max_length=64)["input_ids"]
    vectors = np.zeros((len(LAYERS), len(ids), WIDTH), dtype=np.float32)
    order = np.argsort([len(row) for row in ids], kind="stable")
    with torch.inference_mode():
        for chosen in np.array_split(order, max(1, len(order) // 16)):
            batch = tokenizer.pad({"input_ids": [ids[place] for place in chosen]}, return_tensors="pt")
            states = encoder(**batch, output_hidden_states=True).hidden_states
            counted = batch["attention_mask"][:, :, None].float()
            for place, layer in enumerate(LAYERS):
                pooled = (states[layer] * counted).sum(dim=1) / counted.sum(dim=1)
                vectors[place, chosen] = pooled.numpy()
    return {"X": vectors, "y": np.asarray(labels)}


GRID = tuple(
    {"local_steps": steps, "batch_size": batch, "learning_rate": rate}
    for steps, batch in ((30, 60), (60, 100))
    for rate in (0.03, 0.1, 0.3)
)
CHOSEN: dict[str, Any] = {"local_steps": 60, "batch_size": 100, "learning_rate": 0.3}
CONTROL: dict[str, Any] = {"local_steps": 150, "batch_size": 64, "learning_rate": 0.5}


def choose(texts: Texts) -> None:
    """Print the grid, on rows that decide settings and are in no figure."""
    for chosen in GRID:
        outcomes = [played(texts, 8.0, chosen, seed, "choosing") for seed in CHOOSE_BY]
        alone = fmean(fmean(one.alone) for one in outcomes)
        print(chosen, f"alone {alone:.3f} student {fmean(one.student for one in outcomes):.3f}", flush=True)


def figures(texts: Texts, epsilons: Sequence[float] = (8.0, 0.0)) -> Iterator[tuple[str, ...]]:
    """Yield the table of accuracies; epsilon 0 is no promise."""
    for epsilon in epsilons:
        for balance in (True, False):
            settings = {**(CHOSEN if epsilon else CONTROL), "balance": balance}
            outcomes = [played(texts, epsilon, settings, seed, "tested") for seed in SEEDS]
            alone = [fmean(one.alone) for one in outcomes]
            gains = [one.student - mine for one, mine in zip(outcomes, alone, strict=True)]
            row = (
                f"{epsilon:g}" if epsilon else "none",
                "yes" if balance else "no",
                f"{fmean(alone):.3f}",
                f"**{fmean(one.student for one in outcomes):.3f}**",
                f"{min(one.student for one in outcomes):.3f} to {max(one.student for one in outcomes):.3f}",
                f"{fmean(gains):+.3f} (least {min(gains):+.3f})",
            )
            print(*row, flush=True)
            yield row


def attacked(texts: Texts, epsilons: Sequence[float] = (8.0, 0.0)) -> Iterator[tuple[str, ...]]:
    """Yield the table of attacks on what one owner sends, and on the mean that masks leave to be seen."""
    for epsilon in epsilons:
        for balance in (False,):  # balanced answers are not measured yet
            settings = {**(CHOSEN if epsilon else CONTROL), "balance": balance}
            mixes, areas, copies = [], [], []
            for seed in SEEDS:
                outcome = played(texts, epsilon, settings, seed, "tested")
                mixes.append(_mix_error(texts, outcome))
                copies.append(_copied(texts, outcome))
                areas.append(_area(texts, epsilon, settings, outcome, seed))
            row = (
                f"{epsilon:g}" if epsilon else "none (control)",
                "yes" if balance else "no",
                f"{fmean(one[0] for one in mixes):.2f} ({fmean(one[1] for one in mixes):.2f})",
                f"{fmean(areas):.3f} ({min(areas):.3f} to {max(areas):.3f})",
                f"{fmean(one[0] for one in copies):.2f} ({fmean(one[1] for one in copies):.2f})",
            )
            print(*row, flush=True)
            yield row


def _run(name: str, answers: Tensor, examples: Mapping[str, Tensor]) -> Tensor:
    attack = ANSWER_ATTACKS[name]()
    observation = Observation(kind="answers", tensors={"answers": answers})
    result = attack.run(observation, None, Prior(examples=examples), Budget.quick(), 0)
    assert result.applicable, result.reason
    return result.items[0].value


def _mix_error(texts: Texts, outcome: Outcome) -> tuple[float, float]:
    """Return half the L1 distance of the mix that is read off, and of the mix of everybody, to an owner's."""
    public, private = texts.public[0].labels, texts.private[0].labels
    everybody = torch.bincount(private, minlength=CLASSES).double() / len(private)
    read, guessed = [], []
    for answers, rows in zip(outcome.answers, outcome.parts, strict=True):
        mix = _run("answers_label_mix", answers, {"labels": public})
        true = torch.bincount(private[torch.from_numpy(rows)], minlength=CLASSES).double() / len(rows)
        read.append(float((mix - true).abs().sum()) / 2)
        guessed.append(float((everybody - true).abs().sum()) / 2)
    return fmean(read), fmean(guessed)


def _area(texts: Texts, epsilon: float, settings: Mapping[str, Any], outcome: Outcome, seed: int) -> float:
    """Return the area under the curve of membership: half the candidates are the first owner's own rows, and
    the candidates are what everybody answers, as a server that picks the public rows could have it.

    Candidates of both halves have the owner's label mix, so that the mix tells nothing.
    """
    rng, private, spare = np.random.default_rng(seed), texts.private[0].labels.numpy(), texts.choosing
    areas = []
    for target in range(3):  # one owner of each architecture
        members, others = [], []
        for label in range(CLASSES):
            mine = outcome.parts[target][private[outcome.parts[target]] == label]
            apart = np.flatnonzero(spare[0].labels.numpy() == label)
            count = min(len(mine), len(apart))
            members += rng.choice(mine, count, replace=False).tolist()
            others += rng.choice(apart, count, replace=False).tolist()
        answers = []
        for owner in (target, *(index for index in range(CLIENTS) if index % 3 == target % 3)):
            kind, trainable = owner % len(LAYERS), CutTrainable()
            trainable.load_vector(outcome.own[owner])
            features = torch.cat([texts.private[kind].features[members], spare[kind].features[others]])
            labels = torch.cat([texts.private[kind].labels[members], spare[kind].labels[others]])
            rows: Any = Vectors(features=features, labels=labels)
            answers.append(answers_of(CutTask(), trainable, rows, device="cpu"))
        references = torch.stack([one for one in answers[1:] if not torch.equal(one, answers[0])])
        scores = _run("answers_membership", answers[0], {"labels": labels, "references": references}).numpy()
        areas.append(auc(scores[: len(members)], scores[len(members) :]))
    return fmean(areas)


def _copied(texts: Texts, outcome: Outcome) -> tuple[float, float]:
    """Return how often a copy made from one owner's answers, and one from the mean of all, says what the
    owner's model says of rows that nobody asked about.
    """
    one, everybody, mean = [], [], torch.stack(outcome.answers).mean(dim=0)
    for owner in range(len(LAYERS)):  # one of each architecture
        kind, model = owner % len(LAYERS), CutTrainable()
        model.load_vector(outcome.own[owner])
        rows: Any = texts.tested[kind]
        labelled = answers_of(CutTask(), model, rows, device="cpu").argmax(dim=1)
        known = {"features": texts.public[kind].features, "elsewhere": rows.features}
        for answers, agreed in ((outcome.answers[owner], one), (mean, everybody)):
            copied = _run("answers_copy", answers, known)
            agreed.append(float((copied.long() == labelled).double().mean()))
    return fmean(one), fmean(everybody)


HEAD = """# Distillation of three architectures

AG News, ten owners at Dirichlet 0.5 with 3,000 rows together, 500 public texts, one round, secure sum in
the ring, record unit at delta 1e-5. The architectures are MiniLM cut after 2, 4 and 6 layers with a linear
head each, dealt in turn; the student is the one of 6. The cut models stay frozen, so their vectors are
computed once; split, calibration, steps, answers, rounding, ring and student are the product's own code.
"Alone" is the mean accuracy over the owners' own models at the same epsilon. Three seeds (1 to 3) of split,
noise and rounding; 1,000 validation rows.

Steps, batch and rate were chosen on 500 training rows that are in no other part, by seed 11 and the
{grid} cells of `--choose`; the control's were set to overfit, not chosen. Validation rows decided nothing.
Noise of a benchmark is seeded; a run's is not.

Made by `python -m benchmarks.distillation ../shared --out docs/results/distillation.md --cache FOLDER`.

"""
ATTACKED = """
## What attacks read off the answers

An owner's answers alone (what the server sees with protection `none`), three seeds. *Label mix*: half the L1
distance of the mix that is read off to the owner's own, beside that of guessing everybody's mix; lower is
worse for the owner. *Membership*: area under the curve of the offline likelihood ratio, where the server
put the candidates among the public rows, over one owner of each architecture; 0.5 is chance. It is given
the own model's answers before balancing. *Copy*: how often a linear model fitted to the owner's answers
agrees with the owner's model on unseen rows, beside one fitted to the mean of all owners, which is what
masks leave to see.

"""


def main() -> None:
    """Play everything and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--choose", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    texts = loaded(asked.shared, asked.cache)
    if asked.choose:
        choose(texts)
        return
    lines = [HEAD.format(grid=len(GRID))]
    lines += table(
        ("epsilon", "balanced", "alone", "student", "over three seeds", "above alone"), figures(texts)
    )
    lines += [ATTACKED]
    lines += table(
        ("epsilon", "balanced", "label mix (guess)", "membership", "copy (of the mean)"), attacked(texts)
    )
    asked.out.write_text("".join(lines))


def table(columns: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> Iterator[str]:
    """Yield the lines of a table."""
    yield "| " + " | ".join(columns) + " |\n"
    yield "|" + "---|" * len(columns) + "\n"
    for row in rows:
        yield "| " + " | ".join(row) + " |\n"


if __name__ == "__main__":
    main()
