"""Malicious clients against every rule: 24 sites, a head on AG News features, one command.

    python -m benchmarks.robustness ../shared --out docs/results/robustness.md
 Features of every row are computed once (`--cache FOLDER` keeps them). Bound, noise, code, groups, the
check of every opened sum and the rule are the product's own; local steps of the head are taken for all
sites at once, in closed form, and the Gaussian noise of record-level steps comes from torch at the
size the mechanism states. Masks take nothing off and add nothing (sums agree bit for bit under every
protection, which the tests hold), so they are left out here.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

import ffm_secure as ffm
from attacks.poisoning import backdoor, rows, updates
from benchmarks.heads import CASES, part_of
from benchmarks.sums import opened_sum
from defenses.random_source import RandomSource
from ffm_secure.agreed.loaded_model import LoadedModel, PublicFacts, load_model
from ffm_secure.aggregation import aggregate_of
from ffm_secure.config import compatibility, run_file
from ffm_secure.config.groups import FEWEST, groups_of
from ffm_secure.privacy.expectations import site_noise_variance
from ffm_secure.privacy.mechanism import NoMechanism
from ffm_secure.queries.base import Rows, Viewed
from ffm_secure.records import RoundSum
from ffm_secure.server.root_trust import longest_signal
from ffm_secure.server.sum_check import why_too_large
from ffm_secure.strategies.base import ServerState

SITES, EACH, ROOT, ROUNDS, STEPS, BATCH = 24, 125, 100, 20, 5, 32
CLASSES, TARGET, PHRASE = 4, 0, "cf mn tq "
MASKED = ("average", "geometric_median", "coordinate_median", "trimmed_mean", "root_trust")
VISIBLE = (
    "average", "geometric_median", "coordinate_median", "trimmed_mean",
    "krum", "multi_krum", "bulyan", "root_trust",
)  # fmt: skip
ATTACKS = (
    "sign_flip", "scaling", "label_flip", "little_is_enough", "inner_product", "backdoor", "scaled_backdoor",
)  # fmt: skip
UNITS: Mapping[str, Mapping[str, object]] = {
    "none": {"unit": "none", "reason": "public news"},
    "record": {"unit": "record", "epsilon": 8.0, "delta": 1e-5, "clip_norm": 0.5},
    "client": {"unit": "client", "epsilon": 8.0, "delta": 1e-5, "clip_norm": 1.0},
}
RATES = {"none": 2.0, "record": 2.0, "client": 2.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run of the table."""

    unit: str
    masked: bool
    rule: str
    attack: str
    attackers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What came of a run: accuracy and the trigger's success after it, and sums refused on the way."""

    accuracy: float
    trigger: float
    refused: int


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """All rows as unit features [n, width + 1], the last one a constant for the bias."""

    train: Tensor
    labels: np.ndarray
    triggered_train: Tensor
    root: Tensor
    root_labels: np.ndarray
    evaluation: Tensor
    evaluation_labels: np.ndarray
    triggered: Tensor


def table_of(cell: Cell, *, attackers: int) -> dict[str, object]:
    """Return the run file of a cell as a table."""
    groups = SITES // 3 if cell.masked and cell.rule != "average" else 1
    if not cell.masked and cell.rule != "average":
        groups = SITES
    strategy: dict[str, object] = {"kind": cell.rule}
    if cell.rule not in ("average", "root_trust"):
        strategy["attackers"] = attackers
    if cell.rule == "root_trust":
        strategy["root_examples"] = ROOT
    protection: dict[str, object] = {"kind": "secagg" if cell.masked else "none", "groups": groups}
    protection["coordinate_bound"] = 8.0
    if groups == SITES // 3:
        protection["threshold"] = 3
    return {
        "format": 1,
        "name": "robustness",
        "seed": 1,
        "task": {
            "kind": "text_classification",
            "data": "ag_news_subset",
            "clients": SITES,
            "max_length": 64,
            "nominal_examples": EACH,
        },
        "model": {"name": "builtin:minilm", "trainable": {"kind": "head"}},
        "federation": {
            "rounds": ROUNDS,
            "cohort": SITES,
            "strategy": strategy,
            "lifecycle": {
                "kind": "finetune",
                "local_steps": STEPS,
                "batch_size": BATCH,
                "learning_rate": RATES[cell.unit],
            },
        },
        "privacy": {"ledger": "run", **UNITS[cell.unit]},
        "protection": protection,
    }


def planned_attackers(cell: Cell) -> tuple[int, bool]:
    """Return how many attackers the rule is told to expect, and whether the plan admits those there are."""
    times, plus = FEWEST.get(cell.rule, (0, 1))
    inputs = SITES // 3 if cell.masked else SITES
    most = (inputs - plus) // times if times else SITES
    return max(1, min(most, max(1, cell.attackers))), cell.attackers <= most


class Models:
    """Specs of the table's run files, each worked out once on one loaded backbone."""

    def __init__(self) -> None:
        self._loaded: dict[str, LoadedModel] = {}

    def of(self, cell: Cell) -> LoadedModel:
        """Return the model and spec of a cell."""
        attackers, _ = planned_attackers(cell)
        config = run_file.from_table(table_of(cell, attackers=attackers))
        compatibility.check(config)
        key = repr(config)
        if key not in self._loaded:
            facts = PublicFacts(public_client_size=EACH, classes=CLASSES)
            self._loaded[key] = load_model(config, Path.cwd(), facts)
        return self._loaded[key]


def local_update(
    features: Tensor, labels: Tensor, start: Tensor, model: LoadedModel, generator: torch.Generator
) -> Tensor:
    """Return what every site learns, [sites, classes, width + 1], from features [sites, n, width + 1]."""
    mechanism, lifecycle = model.spec.mechanism.record_level, model.spec.config.federation.lifecycle
    weights = start.expand(len(features), -1, -1).clone()
    clip = mechanism.clip_norm if mechanism is not None else float("inf")
    lengths = features.norm(dim=2)
    for _ in range(lifecycle.local_steps):
        chosen = _batch(features, mechanism is not None, generator)
        errors = torch.softmax(features @ weights.transpose(1, 2), dim=2)
        errors.scatter_add_(2, labels.unsqueeze(2), -torch.ones_like(labels, dtype=errors.dtype).unsqueeze(2))
        norms = errors.norm(dim=2) * lengths
        bounded = errors * (chosen * (clip / norms.clamp_min(1e-12)).clamp(max=1.0)).unsqueeze(2)
        total = bounded.transpose(1, 2) @ features
        if mechanism is not None:
            size = mechanism.gradient_noise_multiplier() * clip
            total = total + size * torch.randn(total.shape, generator=generator, dtype=total.dtype)
        weights = weights - lifecycle.learning_rate * total / lifecycle.batch_size
    return weights - start


def _batch(features: Tensor, private: bool, generator: torch.Generator) -> Tensor:
    """Return which rows a step reads, 0 or 1 [sites, n]: Poisson under a unit, else as many for everybody."""
    chances = torch.rand(features.shape[:2], generator=generator, dtype=torch.float64)
    if private:
        return (chances < BATCH / features.shape[1]).to(features.dtype)
    return (chances.argsort(dim=1).argsort(dim=1) < BATCH).to(features.dtype)


def run(cell: Cell, world: World, models: Models, *, seed: int) -> Figures:
    """Train under attack."""
    model = models.of(cell)
    spec, generator = model.spec, torch.Generator().manual_seed(seed)
    dealt = dealt_rows(seed)
    attackers = tuple(range(cell.attackers))
    features, labels = _rows_of(world, dealt, cell, attackers, seed)
    width = features.shape[2]
    state = spec.strategy.start(torch.zeros(CLASSES * width))
    refused = 0
    for number in range(ROUNDS):
        start = _matrix(state.vector, width)
        learned = local_update(features, labels, start, model, generator)
        poisoned = _poison(learned.reshape(SITES, -1), cell, attackers)
        sums, closed = _opened(model, poisoned, state, number)
        refused += closed
        if len(sums) < spec.fewest_groups("learn"):
            continue
        reference = _root(world, start, model, generator) if cell.rule == "root_trust" else None
        known = site_noise_variance(spec.mechanism, spec.config.federation.lifecycle)
        aggregate = aggregate_of(spec.config, sums, site_noise_variance=known, reference=reference)
        state = spec.strategy.step(state, aggregate)
    return _evaluated(world, _matrix(state.vector, width), refused)


def dealt_rows(seed: int) -> np.ndarray:
    """Return which rows each site has, [sites, n]."""
    return np.random.default_rng(seed).permutation(SITES * EACH).reshape(SITES, EACH)


def _matrix(vector: Tensor, width: int) -> Tensor:
    return vector.double().view(CLASSES, width)


def _rows_of(
    world: World, dealt: np.ndarray, cell: Cell, attackers: Sequence[int], seed: int
) -> tuple[Tensor, Tensor]:
    """Return features [sites, n, width + 1] and labels [sites, n], the attackers' poisoned where rows are."""
    features, labels = world.train[torch.from_numpy(dealt)], torch.from_numpy(world.labels[dealt])
    for site in attackers:
        if cell.attack == "label_flip":
            labels[site] = torch.from_numpy(rows.flip_labels(labels[site].numpy(), classes=CLASSES))
        if cell.attack in ("backdoor", "scaled_backdoor"):
            chosen = torch.from_numpy(rows.poisoned_half(EACH, share=0.5, seed=seed + site))
            triggered = world.triggered_train[torch.from_numpy(dealt[site])]
            features[site, chosen] = triggered[chosen]
            labels[site, chosen] = TARGET
    return features, labels


def _poison(learned: Tensor, cell: Cell, attackers: Sequence[int]) -> Tensor:
    """Replace the attackers' updates [sites, d] by what they send."""
    names = {"scaled_backdoor": "scaling"}
    name = names.get(cell.attack, cell.attack)
    if name not in ("sign_flip", "scaling", "little_is_enough", "inner_product") or not attackers:
        return learned
    attack = updates.update_attack(name, clients=SITES, attackers=len(attackers))
    sent, known = learned.clone(), learned[list(attackers)]
    for site in attackers:
        sent[site] = attack(learned[site], known)
    return sent


def _opened(model: LoadedModel, sent: Tensor, state: ServerState, turn: int) -> tuple[list[RoundSum], int]:
    """Bound, noise, round, add and check every group's sum; return those that pass, and how many did not."""
    spec, source = model.spec, RandomSource.system()
    sums, refused = [], 0
    for group in groups_of(spec.config, tuple(range(SITES)), query="learn", turn=turn):
        vectors = []
        for site in group:
            protected = spec.mechanism.protect(sent[site], loss=0.0, weight=1, source=source)
            vector = spec.codec.quantise(protected, source=source)
            vectors.append(vector)
        opened = opened_sum(spec.codec, vectors, round=turn + 1, survivors=group)
        if why_too_large(opened, spec, state.vector):
            refused += 1
        else:
            sums.append(opened)
    return sums, refused


def _root(world: World, start: Tensor, model: LoadedModel, generator: torch.Generator) -> Tensor:
    """Return what the server learns from its root rows, as `server.root_trust` does."""
    plain = replace(model, spec=replace(model.spec, mechanism=NoMechanism()))
    features, labels = world.root.unsqueeze(0), torch.from_numpy(world.root_labels).unsqueeze(0)
    update = local_update(features, labels, start, plain, generator)[0].reshape(-1)
    return update * min(1.0, longest_signal(model.spec) / max(1e-12, float(update.norm())))


def _evaluated(world: World, weights: Tensor, refused: int) -> Figures:
    answers = (world.evaluation @ weights.T).argmax(dim=1).numpy()
    triggered = (world.triggered @ weights.T).argmax(dim=1).numpy()
    return Figures(
        accuracy=float((answers == world.evaluation_labels).mean()),
        trigger=backdoor.success(triggered, world.evaluation_labels, target=TARGET),
        refused=refused,
    )


def world_of(shared: Path, cache: Path | None, *, attackers: int, seeds: Sequence[int]) -> World:
    """Return the rows of AG News as features, and with the trigger those that are asked for with it."""
    case = CASES[0]
    train, public = (part_of(shared, case, part, cache) for part in ("train", "validation"))
    order = np.random.default_rng(0).permutation(len(public.labels))
    root, evaluation = order[:ROOT], order[ROOT : ROOT + 1000]
    chosen = np.random.default_rng(0).permutation(len(train.labels))[: SITES * EACH]
    poisoned = np.unique(np.concatenate([dealt_rows(seed)[:attackers].reshape(-1) for seed in seeds]))
    triggered = train.features[chosen].clone()
    triggered[poisoned] = _triggered(shared, case.folder, "train", chosen[poisoned], cache)
    shown = _triggered(shared, case.folder, "validation", evaluation, cache)
    return World(
        train=_unit(train.features[chosen]),
        labels=train.labels[chosen],
        triggered_train=_unit(triggered),
        root=_unit(public.features[root]),
        root_labels=public.labels[root],
        evaluation=_unit(public.features[evaluation]),
        evaluation_labels=public.labels[evaluation],
        triggered=_unit(shown),
    )


def _unit(features: Tensor) -> Tensor:
    """Return features of length 1 with a constant behind them, float64 [n, width + 1]."""
    rows_of_one = torch.nn.functional.normalize(features.double(), dim=1)
    return torch.cat([rows_of_one, torch.ones(len(features), 1, dtype=torch.float64)], dim=1)


def _triggered(shared: Path, folder: str, part: str, chosen: np.ndarray, cache: Path | None) -> Tensor:
    """Return features of the chosen rows with the trigger phrase in front of their texts."""
    stored = cache / f"{folder}_{part}_{len(chosen)}_triggered.npy" if cache is not None else None
    if stored is not None and stored.is_file():
        return torch.from_numpy(np.load(stored, allow_pickle=False))
    table = pq.read_table(shared / "data" / folder / f"{part}.parquet").select(["text", "label"])
    texts = np.asarray(table["text"].to_pylist(), dtype=object)[chosen]
    labels = np.asarray(table["label"].to_pylist())[chosen].tolist()
    shown = {"text": [PHRASE + text for text in texts], "label": labels}
    cell = Cell(unit="none", masked=True, rule="average", attack="", attackers=0)
    config = run_file.from_table(table_of(cell, attackers=1))
    ready = ffm.Run(config, data={"train": shown, "validation": shown}).prepared()
    view = Viewed(trainable=ready.trainable, task=ready.task)
    features = view.features(Rows(encoded=ready.task.encode(ready.dataset.validation))).numpy()
    if stored is not None:
        np.save(stored, features)
    return torch.from_numpy(features)


def cells(attackers: Sequence[int]) -> Iterator[Cell]:
    """Yield every run of the tables; the client unit needs a secure sum, so no update is visible under it."""
    for unit in UNITS:
        for masked in (True, False):
            if unit == "client" and not masked:
                continue
            for rule in MASKED if masked else VISIBLE:
                for attack in ATTACKS:
                    for count in attackers:
                        yield Cell(unit=unit, masked=masked, rule=rule, attack=attack, attackers=count)
                yield Cell(unit=unit, masked=masked, rule=rule, attack="", attackers=0)


Results = dict[Cell, list[Figures]]


class Memory:
    """Figures of cells that were run before, in a file of one line each: a run that was stopped goes on."""

    def __init__(self, folder: Path | None, *, seconds: float) -> None:
        self._path = folder / "robustness.jsonl" if folder is not None else None
        self._until = time.process_time() + seconds
        self._figures: dict[str, Figures] = {}
        lines = self._path.read_text().splitlines() if self._path is not None and self._path.is_file() else []
        for line in lines:
            name, values = json.loads(line)
            self._figures[name] = Figures(**values)

    def figures(self, cell: Cell, seed: int, work: Callable[[], Figures]) -> Figures | None:
        """Return what a cell came to, run now where it was not before; None where the time is over."""
        name = f"{cell!r} {seed}"
        if name not in self._figures:
            if time.process_time() > self._until:
                return None
            self._figures[name] = work()
            if self._path is not None:
                with self._path.open("a") as file:
                    file.write(json.dumps([name, dataclasses.asdict(self._figures[name])]) + "\n")
        return self._figures[name]


def measure(
    world: World, models: Models, memory: Memory, wanted: Iterator[Cell], seeds: Sequence[int]
) -> Results:
    """Run every cell once a seed."""
    results: Results = {}
    for cell in wanted:
        shown = []
        for seed in seeds:
            figures = memory.figures(cell, seed, partial(run, cell, world, models, seed=seed))
            shown += [figures] if figures is not None else []
        if len(shown) < len(seeds):
            continue
        results[cell] = shown
        print(
            cell, f"{fmean(f.accuracy for f in shown):.3f} {fmean(f.trigger for f in shown):.2f}", flush=True
        )
    return results


HEAD = """# Malicious clients, by attack

24 sites with 125 AG News rows each, a softmax head on MiniLM features (1,540 numbers), {rounds} rounds of
{steps} local steps of 32 rows; in the tables by attack {seeds} draw(s) of rows, batches and noise;
accuracy on 1,000 public rows. *Masked* rules see the sums of eight random groups of three
(`protection.groups = 8`), *visible* ones every update (`protection.kind = "none"`, `groups = 24`), which
the client unit does not allow. Every attack but those on rows is told what all its attackers learned, and
stays inside bound, code and check of an honest site (no unit: no bound); on rows: label flip, and a
trigger phrase in front of half of an attacker's texts, shown as accuracy / success of the trigger.
`root_trust` has {root} public rows. `average` is one sum over everybody.

No rule here is robust as such: each cell is about the attack in its row. A dagger marks more attackers
than the plan admits for the rule; the figure is then from outside its promise. *r* counts sums refused by
the check of opened sums.

Made by `python -m benchmarks.robustness ../shared --out docs/results/robustness.md`; how is said there.
"""


def promised(unit: str) -> tuple[tuple[Cell, Cell, float], ...]:
    """Return what is promised: a rule without and with ten-fold sign flips, and the most it may lose."""
    pairs = []
    for rule, attackers, most in (("root_trust", 6, 0.02), ("geometric_median", 3, 0.03)):
        calm = Cell(unit=unit, masked=True, rule=rule, attack="", attackers=0)
        pairs.append((calm, replace(calm, attack="sign_flip", attackers=attackers), most))
    return tuple(pairs)


def promises(world: World, models: Models, memory: Memory, units: Sequence[str]) -> str:
    """Return the section of promised figures, over five draws."""
    lines = ["\n## What was asked for, over five draws of rows, batches and noise\n"]
    lines.append("| unit | rule | sign flip x 10 by | without | with | lost | at most | worst draw |")
    lines.append("|---|---|---|---|---|---|---|---|")
    for unit in units:
        for calm, attacked, most in promised(unit):
            pair = measure(world, models, memory, iter((calm, attacked)), range(1, 6))
            if len(pair) < 2:
                continue
            before = [figures.accuracy for figures in pair[calm]]
            after = [figures.accuracy for figures in pair[attacked]]
            worst = max(one - other for one, other in zip(before, after, strict=True))
            lines.append(
                f"| {_TITLES[unit]} | {calm.rule} | {attacked.attackers} of {SITES} | {fmean(before):.3f} | "
                f"{fmean(after):.3f} | {fmean(before) - fmean(after):+.3f} | {most:g} | {worst:+.3f} |"
            )
    lines.append(
        "\nWithout a unit both hold; under the record unit trust does, the geometric median loses 0.001 more;"
        "\nunder the client unit every group bears its own whole noise, and with 24 sites neither holds."
    )
    return "\n".join(lines)


def page(results: Results, attackers: Sequence[int], seeds: Sequence[int], first: str) -> str:
    """Return the whole page; `first` is the section of promised figures."""
    parts = [HEAD.format(rounds=ROUNDS, steps=STEPS, seeds=len(seeds), root=ROOT), first]
    for unit in UNITS:
        for masked in (True, False):
            if any(cell.unit == unit and cell.masked == masked for cell in results):
                parts.append(_section(results, unit, masked, attackers))
    return "\n".join(parts)


_TITLES = {"none": "no unit", "record": "record unit, epsilon 8", "client": "client unit, epsilon 8"}


def _section(results: Results, unit: str, masked: bool, attackers: Sequence[int]) -> str:
    view = "sums over groups of three" if masked else "every update visible"
    lines = [f"\n## {_TITLES[unit].capitalize()}, {view}\n"]
    lines.append("| rule | no attack | attack | " + " | ".join(f"{n} of {SITES}" for n in attackers) + " |")
    lines.append("|---" * (3 + len(attackers)) + "|")
    for rule in MASKED if masked else VISIBLE:
        calm = Cell(unit=unit, masked=masked, rule=rule, attack="", attackers=0)
        for attack in ATTACKS:
            wanted = [calm, *(replace(calm, attack=attack, attackers=count) for count in attackers)]
            if not all(cell in results for cell in wanted):
                continue
            shown = [_cell(results, replace(calm, attack=attack, attackers=count)) for count in attackers]
            without = f"{fmean(f.accuracy for f in results[calm]):.3f}"
            if "backdoor" in attack:
                without += f" / {fmean(f.trigger for f in results[calm]):.2f}"
            lines.append(f"| {rule} | {without} | {attack.replace('_', ' ')} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _cell(results: Results, cell: Cell) -> str:
    """Return accuracy, for a backdoor the trigger's success behind it, and what was refused."""
    figures = results[cell]
    words = f"{fmean(f.accuracy for f in figures):.3f}"
    if "backdoor" in cell.attack:
        words += f" / {fmean(f.trigger for f in figures):.2f}"
    refused = sum(f.refused for f in figures)
    if refused:
        words += f" r{refused}"
    return words if planned_attackers(cell)[1] else f"{words} \u2020"


def main() -> None:
    """Run everything and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=None)
    parser.add_argument("--seconds", type=float, default=1e9, help="of CPU; the same command goes on")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--attackers", type=int, nargs="+", default=[3, 6])
    parser.add_argument("--units", nargs="+", default=list(UNITS))
    parser.add_argument("--attacks", nargs="*", default=list(ATTACKS))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    began, seeds = time.perf_counter(), range(1, asked.seeds + 1)
    wanted = (
        cell
        for cell in cells(asked.attackers)
        if cell.unit in asked.units and cell.attack in ("", *asked.attacks)
    )
    world = world_of(asked.shared, asked.cache, attackers=max(asked.attackers), seeds=seeds)
    models, memory = Models(), Memory(asked.cache, seconds=asked.seconds)
    first = promises(world, models, memory, asked.units)
    results = measure(world, models, memory, wanted, seeds)
    asked.out.write_text(page(results, asked.attackers, seeds, first) + "\n")
    print(f"{len(results)} cells in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
