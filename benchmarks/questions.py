"""When do public and private data in turn beat either alone? A linear head on fixed features, many settings.

    python -m benchmarks.questions ../shared --cache FOLDER --out docs/results/questions-phases.md

The rhythm is the product's own (`ffm_secure.lifecycle.pretrain`), and so is the noise, which its plan asks
for; steps are those of a client and of the server, on a head alone, in one place. Nothing is released.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.continual import DOMAINS, OFFSETS, domains_of
from benchmarks.heads import Part
from ffm_secure.config import compatibility, run_file
from ffm_secure.config.run_file import RunConfig
from ffm_secure.lifecycle.pretrain import next_phase
from ffm_secure.privacy.calibration import calibrate
from ffm_secure.records import RoundRecord

CLIENTS, COHORT, ROUNDS, STEPS, RATE = 10, 2, 12, 10, 0.2
PUBLIC, SKEWS, SEEDS = (20, 80, 320), (0.05, 0.5, 100.0), range(1, 9)
SEEN_BY_CONTROLLER = 100  # public rows whose loss a controller decides by; none of them is tested on
Table = Mapping[str, Any]
RHYTHMS: Mapping[str, Table] = {
    "public": {"kind": "fixed", "public": 1, "private": 0},
    "3 to 1": {"kind": "fixed", "public": 3, "private": 1},
    "1 to 1": {"kind": "fixed", "public": 1, "private": 1},
    "1 to 3": {"kind": "fixed", "public": 1, "private": 3},
    "private": {"kind": "fixed", "public": 0, "private": 1},
    "plateau": {"kind": "plateau", "patience": 2, "margin": 0.01},
    "gain a byte": {"kind": "gain_per_cost", "cost": "bytes"},
    "gain a phase": {"kind": "gain_per_cost", "cost": "phases", "window": 1, "retry": 3},
}
SWITCHES = tuple(product((1, 2, 4), (0.0, 0.01, 0.05)))  # patience and margin of a plateau


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The rows of one seed: public ones, those of every client, what a controller sees, what is tested on."""

    public: Part
    clients: tuple[Part, ...]
    seen: Part
    tested: Part


def config_of(controller: Table, epsilon: float, nominal: int) -> RunConfig:
    """Return the run file of one rhythm; an epsilon of 0 stands for none."""
    privacy: dict[str, Any] = {"unit": "none", "reason": "public benchmark data", "ledger": "run"}
    if epsilon:
        privacy = {"unit": "record", "epsilon": epsilon, "delta": 1e-5, "clip_norm": 1.0, "ledger": "run"}
    lifecycle = {"kind": "pretrain", "local_steps": STEPS, "batch_size": 16, "learning_rate": RATE}
    return run_file.from_table(
        {
            "format": 1,
            "name": "questions",
            "seed": 1,
            "task": {
                "kind": "text_classification",
                "data": "features",
                "clients": CLIENTS,
                "nominal_examples": nominal,
            },
            "model": {"name": "builtin:minilm", "trainable": {"kind": "head"}},
            "federation": {
                "rounds": ROUNDS,
                "cohort": COHORT,
                "lifecycle": {**lifecycle, "public_examples": 80, "controller": dict(controller)},
            },
            "privacy": privacy,
            "protection": {"kind": "none"},
        }
    )


def chosen(part: Part, rows: np.ndarray) -> Part:
    """Return some rows of a part, with a column of ones for the bias."""
    features = part.features[rows].float()
    return Part(features=torch.cat([features, torch.ones(len(rows), 1)], dim=1), labels=part.labels[rows])


def split_of(train: Part, tested: Part, *, public: int, skew: float, seed: int) -> Split:
    """Deal the rows: the first are public, the others go to clients by Dirichlet shares of every class."""
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(train.labels))
    hands: list[list[int]] = [[] for _ in range(CLIENTS)]
    private = order[public:]
    for label in np.unique(train.labels):
        rows = private[train.labels[private] == label]
        bounds = (np.cumsum(generator.dirichlet([skew] * CLIENTS)) * len(rows)).astype(int)[:-1]
        for hand, share in zip(hands, np.split(rows, bounds), strict=True):
            hand.extend(share.tolist())
    others = generator.permutation(len(tested.labels))
    return Split(
        public=chosen(train, order[:public]),
        clients=tuple(chosen(train, np.array(hand, dtype=int)) for hand in hands),
        seen=chosen(tested, others[:SEEN_BY_CONTROLLER]),
        tested=chosen(tested, others[SEEN_BY_CONTROLLER : SEEN_BY_CONTROLLER + 1000]),
    )


def gradient_sum(weight: Tensor, part: Part, rows: Tensor, clip_norm: float) -> Tensor:
    """Return the sum of the rows' gradients, each cut to the bound where there is one."""
    features = part.features[rows]
    errors = torch.softmax(features @ weight.T, dim=1)
    errors[torch.arange(len(rows)), torch.from_numpy(part.labels)[rows]] -= 1.0
    if clip_norm:
        lengths = errors.norm(dim=1) * features.norm(dim=1)
        errors = errors * (clip_norm / lengths.clamp(min=clip_norm))[:, None]
    return errors.T @ features


def learned(weight: Tensor, part: Part, noise: float, nominal: int, generator: torch.Generator) -> Tensor:
    """Return the weight after the steps of one round; `noise` below 0 stands for no privacy."""
    for _ in range(STEPS):
        if noise < 0.0:
            batch = min(8, len(part.labels))
            rows = torch.randint(max(len(part.labels), 1), (batch,), generator=generator)
            weight = weight - RATE * gradient_sum(weight, part, rows, 0.0) / max(batch, 1)
            continue
        sampled = torch.rand(len(part.labels), generator=generator) < 16 / nominal
        total = gradient_sum(weight, part, sampled.nonzero().flatten(), 1.0)
        total = total + noise * torch.randn(total.shape, generator=generator)
        weight = weight - RATE * total / 16
    return weight


def measured(weight: Tensor, part: Part) -> tuple[float, float]:
    """Return loss and accuracy."""
    scores, labels = part.features @ weight.T, torch.from_numpy(part.labels)
    loss = torch.nn.functional.cross_entropy(scores, labels)
    return float(loss), float(scores.argmax(dim=1).eq(labels).float().mean())


def play(split: Split, config: RunConfig, noise: float, classes: int, seed: int) -> float:
    """Play one run and return the accuracy of its last round."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.zeros(classes, split.public.features.shape[1])
    nominal = config.task.nominal_examples
    most, history = compatibility.private_rounds(config), list[RoundRecord]()
    for number in range(ROUNDS):
        phase = next_phase(history, config.federation.lifecycle, private_rounds=most)
        if phase == "public":
            weight = learned(weight, split.public, -1.0, nominal, generator)
        else:
            cohort = torch.randperm(CLIENTS, generator=generator)[:COHORT].tolist()
            updates = [learned(weight, split.clients[who], noise, nominal, generator) for who in cohort]
            weight = torch.stack(updates).mean(dim=0)
        loss, _ = measured(weight, split.seen)
        history.append(record(number, phase == "private", loss))
    return measured(weight, split.tested)[1]


def record(number: int, private: bool, loss: float) -> RoundRecord:
    """Write down what a controller looks at."""
    return RoundRecord(
        round=number + 1,
        phase="private" if private else "public",
        cohort=(),
        survivors=(),
        loss=loss,
        metric=0.0,
        metric_name="accuracy",
        epsilon_spent=0.0,
        bytes_up=1000 * COHORT * private,
        bytes_down=1000 * COHORT * private,
        seconds=1.0,
        client_seconds=1.0,
    )


def noise_of(controller: Table, epsilon: float, nominal: int, size: int) -> tuple[RunConfig, float]:
    """Return the run file of a rhythm and the noise its plan asks for, below 0 without privacy."""
    config = config_of(controller, epsilon, nominal)
    if not epsilon or compatibility.private_rounds(config) == 0:
        return config, -1.0
    return config, calibrate(config, size=size, public_client_size=nominal).noise_multiplier


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One place of the grid, with the accuracy of every rhythm by seed."""

    title: str
    classes: int
    public: int
    skew: float
    epsilon: float
    accuracies: Mapping[str, tuple[float, ...]]

    @property
    def better_single(self) -> str:
        """Name the better of the two single sources, by its mean."""
        return max(("public", "private"), key=lambda name: fmean(self.accuracies[name]))

    def lead(self, rhythm: str) -> tuple[float, float]:
        """Return the mean lead over the better single source and half its 95 % interval, paired by seed."""
        pairs = zip(self.accuracies[rhythm], self.accuracies[self.better_single], strict=True)
        leads = [mine - single for mine, single in pairs]
        return fmean(leads), 2.365 * stdev(leads) / math.sqrt(len(leads))  # Student, seven degrees


def settings(
    parts: Sequence[tuple[Part, Part, str, int]], rhythms: Mapping[str, Table], publics: Sequence[int]
) -> Iterator[Setting]:
    """Play the grid."""
    for (train, tested, title, classes), public, skew, epsilon in product(parts, publics, SKEWS, (0.0, 8.0)):
        nominal = (len(train.labels) - public) // CLIENTS
        splits = [split_of(train, tested, public=public, skew=skew, seed=seed) for seed in SEEDS]
        accuracies = {}
        for name, controller in rhythms.items():
            config, noise = noise_of(controller, epsilon, nominal, classes * 385)
            runs = [
                play(split, config, noise, classes, seed) for split, seed in zip(splits, SEEDS, strict=True)
            ]
            accuracies[name] = tuple(runs)
        yield Setting(
            title=title, classes=classes, public=public, skew=skew, epsilon=epsilon, accuracies=accuracies
        )


HEAD = f"""# When do public and private data in turn beat either alone?

A linear head on fixed MiniLM features, {ROUNDS} rounds of {STEPS} steps at rate {RATE:g}; ten clients by
Dirichlet shares of every class, two of them in a private round; *public* rows are on the server. The rhythm
comes from the product's controllers and the noise from its plan (epsilon 8, delta 1e-5, record unit, bound 1,
the whole noise at every site). A simulation of the head alone, in one place; eight seeds, mean accuracy on up
to 1,000 validation rows, among which the 100 that adaptive controllers look at are not. Steps, rate and
cohort are those of [the shipped grid](ffm-vs-single-source.md); window and retry of *gain a phase* are
the best of three tried on four of these seeds and four of these sets, so its column is flattered.

Made by `python -m benchmarks.questions ../shared --cache FOLDER --out docs/results/questions-phases.md`

**Bold**: surely ahead of the better single source (95 % interval of the paired difference); *slanted*: surely
behind it.

"""


def cell(setting: Setting, name: str) -> str:
    """Write the mean of one rhythm, marked where it surely differs from the better single source."""
    mean = f"{fmean(setting.accuracies[name]):.3f}"
    if name == setting.better_single:
        return mean
    lead, half = setting.lead(name)
    if lead - half > 0.0:
        return f"**{mean}**"
    if lead + half < 0.0:
        return f"*{mean}*"
    return mean


def grid_lines(results: Sequence[Setting], epsilon: float) -> list[str]:
    """Write the table of one privacy."""
    names = list(RHYTHMS)
    lines = ["", f"## {'Epsilon 8' if epsilon else 'Without privacy'}", ""]
    lines += [
        f"| set (classes) | public rows | skew | {' | '.join(names)} |",
        "|" + "---|" * (3 + len(names)),
    ]
    for setting in results:
        if setting.epsilon == epsilon:
            cells = " | ".join(cell(setting, name) for name in names)
            skew = "none" if setting.skew > 10 else f"{setting.skew:g}"
            lines.append(f"| {setting.title} ({setting.classes}) | {setting.public} | {skew} | {cells} |")
    return lines


def summary_lines(results: Sequence[Setting]) -> list[str]:
    """Count, by what a setting is, where turns are surely ahead of the better single source and behind it."""
    lines = [
        "",
        "## Counts",
        "",
        "Settings in which a rhythm is surely ahead of / surely behind the better single",
    ]
    lines += ["source, and the mean lead over it:", ""]
    names = [name for name in RHYTHMS if name not in ("public", "private")]
    lines += [f"| settings | number | {' | '.join(names)} |", "|" + "---|" * (2 + len(names))]
    groups: dict[str, list[Setting]] = {}
    for setting in results:
        privacy = "epsilon 8" if setting.epsilon else "no privacy"
        groups.setdefault(privacy, []).append(setting)
        groups.setdefault(f"{privacy}, {setting.public} public rows", []).append(setting)
        skew = "no skew" if setting.skew > 10 else f"skew {setting.skew:g}"
        groups.setdefault(f"{privacy}, {skew}", []).append(setting)
        groups.setdefault(f"{privacy}, {setting.classes} classes", []).append(setting)
    for group in sorted(groups):
        cells = []
        for name in names:
            leads = [setting.lead(name) for setting in groups[group]]
            ahead = sum(lead - half > 0.0 for lead, half in leads)
            behind = sum(lead + half < 0.0 for lead, half in leads)
            cells.append(f"{ahead} / {behind}, {fmean(lead for lead, _ in leads):+.3f}")
        lines.append(f"| {group} | {len(groups[group])} | {' | '.join(cells)} |")
    return lines


def switch_lines(parts: Sequence[tuple[Part, Part, str, int]]) -> list[str]:
    """Play the plateau with other thresholds at 80 public rows, and write what it gains."""
    rhythms = {name: RHYTHMS[name] for name in ("public", "private")}
    for patience, margin in SWITCHES:
        rhythms[f"{patience}, {margin:g}"] = {"kind": "plateau", "patience": patience, "margin": margin}
    results = list(settings(parts, rhythms, (80,)))
    lines = ["", "## How much the switch depends on its thresholds", ""]
    lines += [
        "The plateau controller at 80 public rows, mean lead over the better single source (worst setting):",
        "",
    ]
    lines += ["| patience, margin | no privacy | epsilon 8 |", "|---|---|---|"]
    for name in list(rhythms)[2:]:
        cells = []
        for epsilon in (0.0, 8.0):
            leads = [one.lead(name)[0] for one in results if one.epsilon == epsilon]
            cells.append(f"{fmean(leads):+.3f} ({min(leads):+.3f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Play everything and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    parts = []
    for domain, offset in zip(domains_of(asked.shared, asked.cache), OFFSETS, strict=True):
        train, tested = (
            Part(features=part.features, labels=part.labels - int(offset))
            for part in (domain.train, domain.validation)
        )
        parts.append((train, tested, domain.case.title, domain.case.classes))
    assert len(parts) == len(DOMAINS)
    results = list(settings(parts, RHYTHMS, PUBLIC))
    lines = [
        *summary_lines(results),
        *switch_lines(parts),
        *grid_lines(results, 0.0),
        *grid_lines(results, 8.0),
    ]
    asked.out.write_text(HEAD + "\n".join(lines).lstrip("\n") + "\n")


if __name__ == "__main__":
    main()
