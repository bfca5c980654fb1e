"""How often verdicts are wrong: audits of noise, of guessing and of undefended updates, and what lower bounds
reach.

python -m benchmarks.verdicts [--noise 200] [--guessing 200] [--undefended 100] [--bounds 1000]

Prints docs/results/verdicts.md. Everything is built in code from seeds; all verdicts come from
`attacks.examine`.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.stats import beta
from torch import Tensor, nn

from attacks import canary
from attacks import Budget, Finding, Item, Knowledge, Observation, PlainAttack, Prior
from attacks.cohort import OpenedSum, attribution_score
from attacks.contract import Attack
from attacks.examine import Examined, examine, leaks, study
from attacks.judge import LEVEL
from attacks.metrics import token_set_score
from attacks.registry import ATTACKS, build
from attacks.scoring import read_tokens
from attacks.truth import Truth
from tests.attacks import models

SEARCHES = frozenset({"matching", "text search", "fedavg", "learned", "aggregate"})
NULL_STEPS = 500
VOCABULARY, LENGTH, SIDE = 400, 8, 16
KINDS = ("dense", "sparse", "row-sparse", "low-rank", "signs in rows")
CLASSES, BATCHES = (2, 3, 5, 10, 77), (1, 2, 4, 8, 16)
UPDATES = ("gradient", "SGD steps", "AdamW step", "sum")
CANARIES, DELTA = 3_000, 1e-5
CLIENTS = 8
AUDITS = ("audits of", "audits", "with a leak", "share, 95 % interval", "by attack", "CPU s")
COHORTS = ("noise multiplier", "F1 of the cohort's words", "5 rounds", "10", "20", "40", "attributed")
BOUNDS = ("lower bound", "z", "true epsilon", "mean share", "least", "most", "above the truth")
WARM = 1_000_003  # seeds of unused records lie beyond those of used ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """One audit to be made: what was seen, of which model, and the truth where it is given."""

    name: str
    seen: Observation
    model: nn.Module
    truth: Truth | None
    unused: Truth | None = None


def texts(count: int, seed: int, *, vocabulary: int = VOCABULARY) -> Tensor:
    """Return token ids (count, LENGTH) as language has them: few frequent words, topics, repeats."""
    rng = np.random.default_rng(seed)
    topics = np.random.default_rng(12).dirichlet(np.full(vocabulary - 3, 0.05), size=6)
    common = 1 / np.arange(1, vocabulary - 2)
    rows = []
    for _ in range(count):
        chances = 0.6 * common / common.sum() + 0.4 * topics[rng.integers(len(topics))]
        rows.append(3 + rng.choice(vocabulary - 3, size=LENGTH, p=chances / chances.sum()))
    return torch.tensor(np.stack(rows))


def pictures(count: int, seed: int) -> Tensor:
    """Return smooth pictures (count, 3, SIDE, SIDE)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, SIDE // 4, SIDE // 4, generator=generator)
    return nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear")


def classifier(kind: str, classes: int, seed: int) -> nn.Module:
    """Return a small model of one make with random weights."""
    if kind == "encoder":
        return models.bert(vocabulary=VOCABULARY, width=32, length=16, classes=classes, seed=seed)
    if kind == "decoder":
        return models.gpt2(vocabulary=VOCABULARY, width=64, length=16, classes=classes, seed=seed)
    return models.vit(size=SIDE, patch=8, width=64, layers=1, classes=classes, seed=seed)


def truth_of(kind: str, count: int, classes: int, seed: int) -> Truth:
    """Return records of a kind with labels."""
    labels = tuple(np.random.default_rng(seed + 5).integers(classes, size=count).tolist())
    if kind == "vision":
        return Truth(images=pictures(count, seed), labels=labels, classes=classes)
    return Truth(sequences=tuple(map(tuple, texts(count, seed).tolist())), labels=labels, classes=classes)


def granted(kind: str, count: int) -> Knowledge:
    """Return what an auditor states of an update: how many records, and of what shape."""
    if kind == "vision":
        return Knowledge(batch_size=count, image_shape=(3, SIDE, SIDE))
    return Knowledge(batch_size=count, sequence_length=LENGTH)


def _noise(tensor: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    dense = torch.randn(tensor.shape, generator=generator)
    if kind == "sparse":
        return dense * (torch.rand(tensor.shape, generator=generator) < 0.05)
    if kind == "row-sparse" and tensor.ndim > 1:
        rows = torch.rand(len(tensor), generator=generator) < 0.1
        return dense * rows.reshape(-1, *[1] * (tensor.ndim - 1))
    if kind == "signs in rows" and tensor.ndim > 1:  # what one step of AdamW looks like
        rows = torch.rand(len(tensor), generator=generator) < 0.1
        return dense.sign() * rows.reshape(-1, *[1] * (tensor.ndim - 1))
    if kind == "low-rank" and tensor.ndim == 2:
        rank = max(1, min(tensor.shape) // 8)
        left = torch.randn(len(tensor), rank, generator=generator)
        return left @ torch.randn(rank, tensor.shape[1], generator=generator)
    return dense


def noise_audits(count: int) -> Iterator[Audit]:
    """Yield audits of noise shaped like the gradient of a real model or told to be a step of AdamW, half of
    them with the truth about other records.
    """
    for seed in range(count):
        kind, make = KINDS[seed % 5], ("encoder", "decoder", "vision")[seed // 5 % 3]
        classes, size = CLASSES[seed // 15 % 5], BATCHES[seed // 2 % 5]
        model, generator = classifier(make, classes, seed), torch.Generator().manual_seed(seed)
        shapes = dict(model.named_parameters())
        tensors = {name: 1e-3 * _noise(value, kind, generator) for name, value in shapes.items()}
        observation = Observation(kind="gradient", tensors=tensors, knowledge=granted(make, size))
        if kind == "signs in rows" or seed % 7 == 6:
            facts = {"optimiser": "adamw", "learning_rate": 1e-3, "local_steps": 1, "weight_decay": 0.0}
            start = {name: value.detach() for name, value in shapes.items()}
            observation = replace(observation, kind="delta", metadata=facts, broadcast=start)
        truth = truth_of(make, size, classes, seed) if seed % 2 else None
        unused = truth_of(make, 64, classes, seed + WARM) if seed % 3 == 0 else None
        yield Audit(name=f"{kind} noise, {make}", seen=observation, model=model, truth=truth, unused=unused)


# --------------------------------------------------------------------------------------------------- guessing


def _guesser(name: str, say: Callable[[int], tuple[Item, ...]]) -> Attack:
    """Return an attack that looks at nothing but a number it makes of the update, so that it guesses anew
    each time.
    """

    def attempt(
        observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
    ) -> Finding:
        first = next(iter(observation.tensors.values())).double().abs().sum()
        return Finding(items=say(int(first * 1e9) % 2**31), confidence=1.0)

    return PlainAttack(name=name, family="presence", attempt=attempt)


def guessers(kind: str, size: int, classes: int, seed: int) -> tuple[Attack, ...]:
    """Return guesses of every kind: frequent words of other texts, likely label counts, usual pictures."""
    attacks = [
        _guesser("even labels", lambda _: (_counts(np.full(classes, size / classes)),)),
        _guesser(
            "drawn labels",
            lambda n: (_counts(np.random.default_rng(n).multinomial(size, np.full(classes, 1 / classes))),),
        ),
        _guesser("one label", lambda n: (_counts(np.eye(classes)[n % classes] * size),)),
    ]
    if kind == "vision":
        public = pictures(64, seed + WARM)
        attacks += [
            _guesser("mean picture", lambda _: (Item(kind="image", value=public.mean(0)),)),
            _guesser(
                "other pictures",
                lambda n: tuple(Item(kind="image", value=public[(n + i) % 64]) for i in range(size)),
            ),
        ]
        return tuple(attacks)
    flat = texts(64, seed + WARM).flatten()
    frequent = flat.bincount(minlength=VOCABULARY).argsort(descending=True)
    for share in (2, 4, 6):
        words = frequent[: share * size]
        attacks.append(_guesser(f"{share} frequent words a text", lambda _, words=words: (_words(words),)))
        attacks.append(
            _guesser(
                f"{share} drawn words a text", lambda n, share=share: (_words(_drawn(flat, share * size, n)),)
            )
        )
    return tuple(attacks)


def _counts(values: np.ndarray) -> Item:
    return Item(kind="label_counts", value=torch.as_tensor(np.asarray(values, dtype=float)))


def _words(values: Tensor) -> Item:
    return Item(kind="token_set", value=values.unique())


def _drawn(flat: Tensor, count: int, number: int) -> Tensor:
    return flat[torch.randint(len(flat), (count,), generator=torch.Generator().manual_seed(number))]


def guessing_audits(count: int) -> Iterator[tuple[Audit, tuple[Attack, ...]]]:
    """Yield audits whose attacks all guess, with the truth; every other one without unused records."""
    for seed in range(count):
        make, classes = ("encoder", "decoder", "vision")[seed % 3], CLASSES[seed // 3 % 5]
        size = (1, 4, 16, 64)[seed // 2 % 4]
        model, truth = classifier(make, classes, 0), truth_of(make, size, classes, seed)
        tensors = {name: torch.randn_like(value) for name, value in model.named_parameters()}
        observation = Observation(kind="gradient", tensors=tensors, knowledge=granted(make, size))
        unused = truth_of(make, 64, classes, seed + 2 * WARM) if seed % 2 else None
        audit = Audit(name=f"guesses, {make}", seen=observation, model=model, truth=truth, unused=unused)
        yield audit, guessers(make, size, classes, seed)


# ------------------------------------------------------------------------------------------------- undefended


def undefended_audits(count: int) -> Iterator[Audit]:
    """Yield audits of what clients send without any defence: texts, pictures and LoRA, gradients, deltas and
    sums.
    """
    for seed in range(count):
        make = ("encoder", "decoder", "vision", "LoRA")[seed % 4]
        sent = UPDATES[seed // 4 % 4]
        # One step of AdamW on LoRA factors is read by searches alone, which these audits leave out.
        shown = {"vision": ("gradient",), "LoRA": ("gradient", "SGD steps")}.get(make, UPDATES)
        yield _undefended(make, sent if sent in shown else "gradient", seed)


def _undefended(make: str, sent: str, seed: int) -> Audit:
    classes = CLASSES[seed // 16 % 5]
    size = 1 if make in ("vision", "LoRA") else (1, 2, 4)[seed // 4 % 3]
    kind = "decoder" if make == "LoRA" else make
    model = classifier(kind, classes, seed)
    if make == "LoRA":
        model = models.add_lora(model, 16, ("c_attn",), zero_b=False, seed=seed)
    truth = truth_of(kind, size, classes, seed)
    loss = models.image_loss if make == "vision" else models.text_loss
    observation, truth = _sent(model, truth, loss, sent, seed, classes, kind)
    unused = truth_of(kind, 64, classes, seed + WARM)
    return Audit(name=f"{make}, {sent}", seen=observation, model=model, truth=truth, unused=unused)


def _batch(truth: Truth) -> dict[str, Tensor]:
    labels = torch.tensor(truth.labels)
    if truth.images is not None:
        return {"images": truth.images, "labels": labels}
    return {"input_ids": torch.tensor(truth.sequences), "labels": labels}


def _sent(
    model: nn.Module, truth: Truth, loss: models.Loss, sent: str, seed: int, classes: int, kind: str
) -> tuple[Observation, Truth]:
    size = len(truth.labels or ())
    knowledge = granted(kind, size)
    if sent == "sum":
        others = [truth, *(truth_of(kind, size, classes, seed + 50_000 * n) for n in (1, 2))]
        observation = models.observe_sum(model, [_batch(one) for one in others], loss)
        whole = replace(
            truth,
            sequences=tuple(row for one in others for row in one.sequences or ()),
            labels=tuple(label for one in others for label in one.labels or ()),
        )
        return replace(observation, knowledge=knowledge), whole
    if sent == "gradient":
        return models.observe(model, _batch(truth), loss, knowledge=knowledge), truth
    steps = [_batch(truth)] * (2 if sent == "SGD steps" else 1)
    name = "sgd" if sent == "SGD steps" else "adamw"
    return models.observe_delta(
        model, steps, loss, learning_rate=0.01, optimiser=name, knowledge=knowledge
    ), truth


# ------------------------------------------------------------------------------------------- sums over rounds


def cohort_rows(seeds: int) -> Iterator[str]:
    """Yield what a server reads off secure sums of five of eight clients: the cohort's words, and over rounds
    whose they are.

    Each client holds 16 texts and learns from 8 of them in a round; sums are real gradients of a small
    encoder.
    """
    for noise in (0.0, 1.0):
        shares, read, verdicts = dict[int, list[float]](), list[float](), Counter[str]()
        for seed in range(seeds):
            sums, owners, scores = _rounds(seed, noise)
            read += scores
            for count in (5, 10, 20, 40):
                scored = (
                    attribution_score(sums[:count], owners, CLIENTS)
                    if any(one.tokens for one in sums)
                    else None
                )
                shares.setdefault(count, []).append(0.0 if scored is None else scored.value)
            verdicts[
                "attributed" if scored is not None and scored.luck <= LEVEL and scored.succeeded else "not"
            ] += 1
        cells = " | ".join(f"{np.mean(values):.2f}" for values in shares.values())
        yield f"| {noise:g} | {np.mean(read):.3f} | {cells} | {verdicts['attributed']} of {seeds} |"


def _rounds(seed: int, noise: float) -> tuple[list[OpenedSum], dict[int, int], list[float]]:
    vocabulary, rng = 2_000, np.random.default_rng(seed)
    model = models.bert(vocabulary=vocabulary, width=32, length=16, seed=seed)
    held = [texts(16, 1_000 * seed + client, vocabulary=vocabulary) for client in range(CLIENTS)]
    words = [set(part.flatten().tolist()) for part in held]
    owners = {
        word: client
        for client in range(CLIENTS)
        for word in words[client]
        if sum(word in other for other in words) == 1
    }
    sums, scores = [], []
    for number in range(40):
        cohort = sorted(rng.choice(CLIENTS, 5, replace=False).tolist())
        rows = [held[client][rng.permutation(16)[:8]] for client in cohort]
        batches = [{"input_ids": part, "labels": torch.zeros(len(part), dtype=torch.long)} for part in rows]
        observation = models.observe_sum(model, batches, models.text_loss, batch_size=8)
        observation = models.noised(observation, noise, seed=number) if noise else observation
        reading = build("token_presence").run(observation, model, Prior(), Budget.quick(), 0)
        tokens = read_tokens(reading) or set()
        true = {token for part in rows for token in part.flatten().tolist()}
        scores.append(token_set_score(tokens, true).f1)
        sums.append(OpenedSum(tokens=frozenset(tokens), cohort=tuple(cohort)))
    return sums, owners, scores


# ----------------------------------------------------------------------------------------------- lower bounds


def bound_rows(runs: int) -> Iterator[str]:
    """Yield lines on what the two printed lower bounds reach of the true epsilon on ideal Gaussian canaries,
    over runs.
    """
    for multiplier in (0.5, 1.0, 2.0):
        truth, shares = canary.gaussian_epsilon(1 / multiplier, DELTA), dict[str, list[float]]()
        for seed in range(runs):
            rng = np.random.default_rng(seed)
            coins = rng.random(CANARIES) < 0.5
            scores = coins + rng.normal(0.0, multiplier, size=CANARIES)
            for bound in canary.bounds(scores[coins], scores[~coins], DELTA, gaussian=True):
                shares.setdefault(bound.method, []).append(bound.epsilon / truth)
        for method, values in shares.items():
            above = sum(value > 1 for value in values)
            yield (
                f"| {method} | {multiplier:g} | {truth:.2f} | {np.mean(values):.2f} | {min(values):.2f} | "
                f"{max(values):.2f} | {above} of {runs} |"
            )


# ---------------------------------------------------------------------------------------------------- running


def audited(audit: Audit, attacks: Sequence[Attack] = ()) -> tuple[Examined, ...]:
    """Return the findings of one audit; searches are left out, as in a quick one."""
    chosen = attacks or [build(name) for name in ATTACKS]
    scene = study(audit.seen, audit.model, audit.truth, unused=audit.unused, null_steps=NULL_STEPS)
    return examine(
        scene,
        lambda attack: None if attack.family in SEARCHES else Budget.quick(),
        lambda attack: "a search",
        chosen,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Hold how many audits of a kind held a leak, and by which attacks."""

    name: str
    audits: int
    leaked: int
    names: Counter[str]
    seconds: float

    def row(self) -> str:
        """Return a line of the table, with the exact 95 % interval of the share."""
        low = 0.0 if self.leaked == 0 else float(beta.ppf(0.025, self.leaked, self.audits - self.leaked + 1))
        high = (
            1.0
            if self.leaked == self.audits
            else float(beta.ppf(0.975, self.leaked + 1, self.audits - self.leaked))
        )
        named = ", ".join(f"{name} {count}" for name, count in self.names.most_common(4))
        share = f"{self.leaked / self.audits:.1%} [{low:.1%}, {high:.1%}]"
        return f"| {self.name} | {self.audits} | {self.leaked} | {share} | {named} | {self.seconds:.0f} |"


def outcome(name: str, audits: Iterable[tuple[Audit, tuple[Attack, ...]]], *, show: bool) -> Outcome:
    """Make audits and count those that hold a leak."""
    began, names, count, held = time.process_time(), Counter[str](), 0, 0
    for audit, attacks in audits:
        findings = list(leaks(audited(audit, attacks)))
        count, held = count + 1, held + bool(findings)
        names.update(one.attack for one in findings)
        if show and bool(findings) != name.startswith("undefended"):
            print(
                f"# {name} {count - 1}: {audit.name}, truth {audit.truth is not None}:",
                *(f"{one.attack} {one.judgement}" for one in findings),
            )
    return Outcome(name=name, audits=count, leaked=held, names=names, seconds=time.process_time() - began)


def main() -> None:
    """Make the audits and print the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, count in (("noise", 200), ("guessing", 200), ("undefended", 100)):
        parser.add_argument(f"--{name}", type=int, default=count, help="number of audits")
    parser.add_argument(
        "--bounds", type=int, default=1_000, help="number of audits of an honest Gaussian mechanism"
    )
    parser.add_argument("--cohorts", type=int, default=5, help="number of runs of 40 rounds of secure sums")
    parser.add_argument("--show", action="store_true", help="print every wrong audit")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        outcome("noise", ((one, ()) for one in noise_audits(chosen.noise)), show=chosen.show),
        outcome("guessing", guessing_audits(chosen.guessing), show=chosen.show),
        outcome("undefended", ((one, ()) for one in undefended_audits(chosen.undefended)), show=chosen.show),
        outcome(
            "undefended, truth not known",
            ((replace(one, truth=None), ()) for one in undefended_audits(chosen.undefended)),
            show=chosen.show,
        ),
    ]
    print(_table(AUDITS, (row.row() for row in rows if row.audits)))
    if chosen.cohorts:
        print(_table(COHORTS, cohort_rows(chosen.cohorts)))
    if chosen.bounds:
        print(_table(BOUNDS, bound_rows(chosen.bounds)))


def _table(columns: Sequence[str], rows: Iterable[str]) -> str:
    """Return a Markdown table; all columns but the first are set to the right."""
    rule = "|".join(["---", *["--:"] * (len(columns) - 1)])
    return "\n".join([f"| {' | '.join(columns)} |", f"|{rule}|", *rows, ""])


if __name__ == "__main__":
    main()
