"""Attacks on votes, on what they keep and on what is trained of it: each beside a control that succeeds.

    python -m benchmarks.synthetic_attacks ../shared --cache FOLDER --out docs/results/synthetic-attacks.md

Votes, noise and choice are the product's own, on the same features as `benchmarks.synthetic`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import nn

from attacks import Budget, Observation, Prior
from attacks.canary import lower_bound
from attacks.extraction import Secret, draw_secret
from attacks.metrics import auc
from attacks.registry import build
from attacks.released_texts import extract_from_texts
from attacks.votes import crafted_candidates
from benchmarks.heads import Part, part_of
from benchmarks.synthetic import (
    MEDICAL,
    PRIVATE,
    Draw,
    Election,
    drawn,
    features_of,
    noise_of,
    printed,
    shuffled,
    table,
    voted,
)
from ffm_secure.privacy.query_noise import QueryNoise
from ffm_secure.queries.candidate_votes import Standing, after_votes
from ffm_secure.queries.class_sums import unit_rows

SECRETS, REPEATS, BEGINNING, END = 40, 10, 12, 6  # planted texts, how often each, words of each part
KEEP, NEAREST = 200, 1
EPSILONS = (None, 8.0, 3.0, 1.0)
SEEDS = range(1, 4)
REFERENCES, COPIES = 8, 400


def said(epsilon: float | None) -> str:
    """Return how an epsilon stands in a table."""
    return "no noise" if epsilon is None else f"{epsilon:g}"


def noise_or_none(size: int, epsilon: float | None, nearest: int = NEAREST) -> QueryNoise | None:
    """Return the noise of one question; none where there is no guarantee."""
    return None if epsilon is None else noise_of(size, nearest=nearest, epsilon=epsilon)


# --------------------------------------------------------------------------- canaries in the text alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Planted:
    """Texts with an ordinary beginning and an end nobody would guess, and words as numbers."""

    secrets: tuple[Secret, ...]
    texts: tuple[str, ...]
    numbers: dict[str, int]

    def tokens(self, text: str) -> tuple[int, ...]:
        """Return a text as numbers of words."""
        return tuple(self.numbers[word] for word in text.split())


def planted(texts: Sequence[str]) -> Planted:
    """Plant secrets behind beginnings of the first texts; ends are words of all of them, drawn evenly."""
    words = sorted({word for text in texts for word in text.split()})
    numbers = {word: place for place, word in enumerate(words)}
    secrets, whole = [], []
    for seed, text in enumerate(texts[:SECRETS]):
        beginning = [numbers[word] for word in text.split()[:BEGINNING]]
        secrets.append(draw_secret(beginning, [range(len(words))] * END, seed, repeats=REPEATS))
        whole.append(" ".join(words[place] for place in (*beginning, *secrets[-1].drawn)))
    return Planted(secrets=tuple(secrets), texts=tuple(whole), numbers=numbers)


def canaries(medical: Part, texts: Sequence[str], cache: Path) -> Iterator[list[str]]:
    """Yield one row for every epsilon, with public candidates and with such as hold the planted texts."""
    plant = planted(texts)
    features = features_of(plant.texts, cache / "planted.npz")
    for leaky in (False, True):
        for epsilon in EPSILONS:
            read, leaked, ranks = [], [], []
            for seed in SEEDS:
                order = shuffled(medical, seed)
                order = order[order >= SECRETS]  # whose beginnings are known is nobody's row or candidate
                released = kept_texts(medical, texts, plant, features, order, epsilon=epsilon, leaky=leaky)
                results = extract_from_texts(plant.secrets, released)
                read.append(fmean(one.read for one in results))
                leaked.append(fmean(one.leaked for one in results))
                ranks.append(fmean(2.0**-one.exposure for one in results))
            yield printed(
                "control: the planted texts are candidates" if leaky else "public candidates",
                said(epsilon),
                f"**{fmean(read):.2f}**",
                f"{fmean(leaked):.2f}",
                f"{fmean(ranks):.2f}",
            )


def kept_texts(
    medical: Part,
    texts: Sequence[str],
    plant: Planted,
    features: torch.Tensor,
    order: NDArray[np.int64],
    *,
    epsilon: float | None,
    leaky: bool,
) -> list[tuple[int, ...]]:
    """Let rows with the planted ones among them vote, and return what is kept, in numbers of words."""
    pool = order[PRIVATE - SECRETS * REPEATS :][:410]
    rows = drawn(medical, order[: PRIVATE - SECRETS * REPEATS])
    again = np.repeat(np.arange(SECRETS), REPEATS)
    rows = Part(
        features=torch.cat([rows.features, features[again]]),
        labels=np.concatenate([rows.labels, medical.labels[again]]),
    )
    candidates, named = medical.features[pool], [texts[place] for place in pool]
    if leaky:
        candidates, named = torch.cat([candidates, features]), [*named, *plant.texts]
    noise = noise_or_none(5 * len(candidates), epsilon)
    opened = Election(rows=rows, candidates=candidates, classes=5, nearest=NEAREST).opened(noise)
    standing = after_votes(opened, candidates, Standing(), first=tuple(range(len(candidates))), keep=KEEP)
    return [plant.tokens(named[place]) for place in standing.chosen]


# --------------------------------------------------------------------------- who was asked, from a model


class Classifier(nn.Module):
    """A softmax classifier of features, as an attack sees a released model."""

    def __init__(self, rows: Part) -> None:
        super().__init__()
        fitted = LogisticRegression(max_iter=1000, C=10.0)
        fitted.fit(unit_rows(rows.features).numpy(), rows.labels)
        weight = torch.zeros((5, rows.features.shape[1]), dtype=torch.float64)
        bias = torch.full((5,), -20.0, dtype=torch.float64)
        places = torch.from_numpy(fitted.classes_)
        weight[places], bias[places] = torch.from_numpy(fitted.coef_), torch.from_numpy(fitted.intercept_)
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return logits [n, classes]."""
        return features @ self.weight.T + self.bias


def trained(medical: Part, members: NDArray[np.int64], pool: NDArray[np.int64], noise: QueryNoise | None,
            *, directly: bool) -> Classifier:  # fmt: skip
    """Return a classifier of what the members voted for, or of the members themselves."""
    rows = drawn(medical, members)
    if directly:
        return Classifier(rows)
    draw = Draw(rows=rows, candidates=medical.features[pool], looked_at=rows)
    return Classifier(voted(draw, noise, nearest=NEAREST, keep=KEEP))


def memberships(medical: Part) -> Iterator[list[str]]:
    """Yield one row for every epsilon, and for a model of the private rows themselves."""
    for directly, epsilon in ((True, None), *((False, epsilon) for epsilon in EPSILONS)):
        areas = [membership(medical, seed, epsilon, directly=directly) for seed in SEEDS]
        what = "control: trained on the private rows" if directly else "trained on what was kept"
        yield printed(what, said(epsilon), f"**{fmean(areas):.3f}**", f"{min(areas):.3f} to {max(areas):.3f}")


def membership(medical: Part, seed: int, epsilon: float | None, *, directly: bool) -> float:
    """Return the AUC of LiRA between rows that voted and rows that did not."""
    order = shuffled(medical, seed)
    rows, pool = order[:PRIVATE], order[PRIVATE:]
    noise = noise_or_none(5 * len(pool), epsilon)
    half = PRIVATE // 2
    target = trained(medical, rows[:half], pool, noise, directly=directly)
    generator = np.random.default_rng(1000 + seed)
    others = []
    for _ in range(REFERENCES):
        members = generator.permutation(rows)[:half]
        others.append(trained(medical, members, pool, noise, directly=directly))
    batch = {"images": unit_rows(medical.features[rows]), "labels": torch.from_numpy(medical.labels[rows])}
    observation = Observation(kind="delta", tensors={"weight": target.weight, "bias": target.bias})
    prior = Prior(candidates=batch, reference_models=tuple(others))
    result = build("lira").run(observation, target, prior, Budget.quick(), 0)
    (scores,) = result.of("scores")
    return auc(scores[:half].numpy(), scores[half:].numpy())


# --------------------------------------------------------------------------- candidates made for a purpose


def crafted(medical: Part) -> Iterator[list[str]]:
    """Yield one row for every epsilon: copies of suspected records are among the candidates."""
    for epsilon in EPSILONS:
        areas, proven = [], []
        for seed in SEEDS:
            inside, outside = copied(medical, seed, epsilon)
            areas.append(auc(inside, outside))
            proven.append(lower_bound(inside, outside, 1e-5, 0.01).epsilon)
        yield printed(
            "control" if epsilon is None else "votes",
            said(epsilon),
            f"**{fmean(areas):.3f}**",
            ", ".join(f"{bound:.2f}" for bound in proven),
        )


def copied(
    medical: Part, seed: int, epsilon: float | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the scores of records that voted and of such that a coin left out."""
    order = shuffled(medical, seed)
    suspects, rest = order[:COPIES], order[COPIES:PRIVATE]
    coins = np.random.default_rng(2000 + seed).random(COPIES) < 0.5
    rows = drawn(medical, np.concatenate([suspects[coins], rest]))
    candidates = medical.features[suspects]
    noise = noise_or_none(5 * COPIES, epsilon)
    opened = Election(rows=rows, candidates=candidates, classes=5, nearest=NEAREST).opened(noise)
    observation = Observation(
        kind="sum",
        tensors={"votes": torch.from_numpy(opened)},
        metadata={"summand": "delta"},
        contributors=10,
    )
    prior = Prior(
        candidates={"places": torch.arange(COPIES), "labels": torch.from_numpy(medical.labels[suspects])}
    )
    (scores,) = crafted_candidates().run(observation, None, prior, Budget.quick(), 0).of("scores")
    return scores[torch.from_numpy(coins)].numpy(), scores[torch.from_numpy(~coins)].numpy()


HEAD = f"""# Attacks on votes

The data, features and noise of [votes on public candidates](synthetic.md); {NEAREST} nearest, {KEEP} kept,
three draws (seeds 1 to 3; noise is drawn from the system). Epsilon is that of the ledger for one question.

## Planted texts, read from what was kept alone

{SECRETS} texts begin as abstracts do ({BEGINNING} words) and end in {END} words drawn evenly from all words;
each is {REPEATS} of {PRIVATE:,} private rows. Whoever has the kept texts alone counts pairs of words in them
and ranks each end among 4,095 other draws. *Read* is the share of ends that stand in a kept text, *given
away* the share found at level 0.01, *rank* the mean place from the top (chance: 0.5 or worse, ties count
against the attack). The control breaks the rule that candidates are public: the planted texts are among them.

"""
MEMBERSHIP = f"""## Who voted, from a classifier of what was kept

LiRA with {REFERENCES} models of other halves of the {PRIVATE:,} rows; half of them voted. The control is a
classifier of the private rows themselves. AUC, chance 0.5.

"""
CRAFTED = f"""## Candidates that are copies of suspected records

A malicious server puts copies of {COPIES} suspected records among the candidates, and half of the suspects
vote. It sees the opened table. AUC, and the lower bound on epsilon that the scores prove with 99 %
confidence in every draw; it must stay below the ledger's. This attack is what the noise is for: at epsilon 8
a vote is seen well, and no epsilon hides more than it says.

"""
MADE = (
    "Made by `python -m benchmarks.synthetic_attacks ../shared --cache FOLDER "
    "--out docs/results/synthetic-attacks.md`."
)


def sections(medical: Part, texts: Sequence[str], cache: Path) -> Iterable[str]:
    """Yield the parts of the page."""
    yield HEAD
    yield table(("candidates", "epsilon", "read", "given away", "rank"), canaries(medical, texts, cache))
    yield "\n\n" + MEMBERSHIP
    yield table(("classifier", "epsilon", "AUC", "draws"), memberships(medical))
    yield "\n\n" + CRAFTED
    yield table(("", "epsilon", "AUC", "lower bound"), crafted(medical))
    yield f"\n\n{MADE}\n"


def main() -> None:
    """Attack and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    asked = parser.parse_args()
    medical = part_of(asked.shared, MEDICAL, "train", asked.cache)
    file = asked.shared / "data" / MEDICAL.folder / "train.parquet"
    texts = pq.read_table(file).select(["text"])["text"].to_pylist()
    asked.out.write_text("".join(sections(medical, texts, asked.cache)))


if __name__ == "__main__":
    main()
