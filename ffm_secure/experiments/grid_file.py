"""The file of a grid: what may stand in it, and every problem of it at once, before anything is run."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ffm_secure.config import compatibility, run_file
from ffm_secure.config.run_file import RunConfig
from ffm_secure.config.schema import Problems, did_you_mean, option, parse_toml, read_table, set_value
from ffm_secure.errors import ConfigError, PlanRefused

_LABEL = r"[^=,]{1,60}"
_GIVEN = {
    "format": "it is 1",
    "name": "a cell is named after its labels and its seed",
    "seed": "give it in seeds",
}
_LONGEST_WORD, _LONGEST_NAME = 20, 80  # of a label in the name of a cell, and of the whole name

Labels = tuple[tuple[str, str], ...]  # (axis, label)


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """One value of an axis: a label for the table, and what it changes in the run file."""

    label: str = option(pattern=_LABEL, help="1 to 60 characters, no comma, no equals sign")
    set: tuple[str, ...] = option((), help="section.key=value, as with --set")
    quick: tuple[str, ...] = option((), help="what --quick sets for this label alone, after [quick].set")


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One thing that is varied."""

    name: str = option(pattern=_LABEL, help="1 to 60 characters, no comma, no equals sign")
    values: tuple[Value, ...] = option(help="at least one [[axes.values]] with a label")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quick:
    """What `--quick` runs instead of the whole: fewer cells, fewer seeds, other settings."""

    seeds: tuple[int, ...] = option((1,), minimum=0)
    set: tuple[str, ...] = option(())
    only: tuple[str, ...] = option((), help="axis=label; of an axis named here only these labels are run")


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """A grid: all combinations of the axes, each with every seed."""

    format: int = option(choices=(1,))
    name: str = option(
        pattern=r"[A-Za-z0-9][A-Za-z0-9._-]{0,40}", help="letters, digits, dot, dash, underscore"
    )
    about: str = option("", help="the question the grid answers")
    seeds: tuple[int, ...] = option(minimum=0, help="one run of every cell for each")
    run: dict = option(help="a whole run file; name and seed are set by the grid")  # type: ignore[type-arg]
    axes: tuple[Axis, ...] = option(help="at least one [[axes]]")
    compare: str = option("", help="the axis whose labels are compared in pairs")
    references: tuple[str, ...] = option((), help="labels of that axis that the others are compared with")
    skip: tuple[str, ...] = option((), help="axis=label,axis=label: combinations left out")
    quick: Quick = option(Quick())


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run of a grid."""

    labels: Labels
    seed: int
    config: RunConfig


Combinations = tuple[tuple[tuple[str, Value], ...], ...]  # of every cell, the value chosen of each axis


@dataclass(frozen=True, slots=True, kw_only=True)
class _Form:
    """The whole grid or its quick form: the chosen values of every combination, and the seeds."""

    where: str  # before a problem that only this form has
    combinations: Combinations
    seeds: tuple[int, ...]
    overrides: tuple[str, ...] = ()  # [quick].set
    quick: bool = False

    def cells(self) -> Iterator[tuple[Labels, int]]:
        """Yield labels and seed of every cell."""
        for chosen in self.combinations:
            for seed in self.seeds:
                yield _labels(chosen), seed

    def sets(self, chosen: Sequence[tuple[str, Value]]) -> tuple[str, ...]:
        """Return what one combination changes in the run file, in order."""
        own = tuple(override for _, value in chosen for override in value.set)
        if self.quick:
            late = tuple(override for _, value in chosen for override in value.quick)
        else:
            late = ()
        return (*own, *self.overrides, *late)


def load(path: Path, *, quick: bool = False) -> tuple[Experiment, tuple[Cell, ...]]:
    """Read a grid and check every one of its run files, those of the quick form too, before the first is run.

    Raises:
      ConfigError: with every problem of the grid and of its cells at once.
    """
    problems = Problems()
    table = parse_toml(path)
    experiment, sound = _read(table, problems)
    _check_words(experiment, table, problems)
    _check_given(experiment, problems)
    forms = [_whole(experiment), *([_quick(experiment)] if quick or "quick" in table else [])]
    _check_overlaps(forms, problems)
    for form in forms:
        _check_names(form, problems)
    cells: dict[bool, list[Cell]] = {}
    refused: dict[
        str, list[str]
    ] = {}  # a mistake in the shared part is one mistake, however many cells have it
    for form in forms if sound else ():
        cells[form.quick] = _configured(experiment, form, refused)
        if form.quick == quick and not form.combinations and not problems:
            problems.append(f"{form.where}axes: no cell is left")
    for problem, where in refused.items():
        problems.append(f"{_and_more(where)}: {problem}")
    for form in forms if sound else ():
        _check_equal(form, cells[form.quick], problems)
    if problems:
        raise ConfigError(str(path), list(dict.fromkeys(problems)))
    if quick:
        experiment = replace(experiment, name=f"{experiment.name}-quick", seeds=experiment.quick.seeds)
    return experiment, tuple(cells[quick])


# --- reading ------------------------------------------------------------------------------------------------


def _read(table: dict[str, Any], problems: Problems) -> tuple[Experiment, bool]:
    """Read a grid; what cannot be read gets a placeholder, so that the rest is checked in the same go.

    Returns also whether enough could be read to try its run files.
    """
    whole = read_table(Experiment, table, "", problems)
    if whole is not None:
        return whole, True
    document: dict[str, Any] = {"format": 1, "name": "grid", "seeds": [1], "run": {}, "axes": []}
    rough = {**table, "axes": _sound_axes(table.get("axes")), "quick": _sound_keys(Quick, table.get("quick"))}
    document |= {key: rough[key] for key in _sound_keys(Experiment, rough, document) if key in table}
    partial = read_table(Experiment, document, "", Problems())
    assert partial is not None, "every key was read alone before"
    written = table.get("axes")
    sound = bool(document["run"]) and isinstance(written, list) and 0 < len(written) == len(partial.axes)
    return partial, sound


def _sound_keys(kind: type, table: object, others: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Keep the keys that can be read where the others are right."""
    if not isinstance(table, dict):
        return {}
    sound = {}
    for field in fields(kind):
        if field.name in table:
            alone = {**(others or {}), field.name: table[field.name]}
            if read_table(kind, alone, "", Problems()) is not None:
                sound[field.name] = table[field.name]
    return sound


def _sound_axes(written: object) -> list[dict[str, Any]]:
    """Keep the axes that can be read, each with those of its values that can."""
    sound_axes = []
    for axis in written if isinstance(written, list) else ():
        values = None
        if isinstance(axis, dict):
            values = axis.get("values")
        if isinstance(values, list):
            sound = []
            for item in values:
                if read_table(Value, item, "", Problems()):
                    sound.append(item)
        else:
            sound = []
        checked: Axis | None = None
        if sound:
            checked = read_table(Axis, {"name": axis.get("name"), "values": sound}, "", Problems())
        if checked is not None:
            sound_axes.append({"name": axis["name"], "values": sound})
    return sound_axes


def _known(table: Mapping[str, Any]) -> dict[str, tuple[str, ...]] | None:
    """Return the labels of every axis as they are written; None where they cannot be told."""
    known_keys: dict[str, tuple[str, ...]] = {}
    written = table.get("axes")
    for axis in written if isinstance(written, list) else (None,):
        if isinstance(axis, dict):
            name, values = (axis.get("name"), axis.get("values"))
        else:
            name, values = (None, None)
        if isinstance(values, list):
            items = values
        else:
            items = [None]
        labels = []
        for item in items:
            labels.append(item.get("label") if isinstance(item, dict) else None)
        if not isinstance(name, str) or not all(isinstance(label, str) for label in labels):
            return None
        known_keys[name] = (*known_keys.get(name, ()), *(str(label) for label in labels))
    return known_keys


def _pairs(text: str) -> list[tuple[str, str]]:
    parts = []
    for part in text.split(","):
        parts.append(part.partition("="))
    pairs: list[tuple[str, str]] = []
    for axis, _, label in parts:
        pairs.append((axis.strip(), label.strip()))
    return pairs


def _labels(chosen: Sequence[tuple[str, Value]]) -> Labels:
    return tuple((axis, value.label) for axis, value in chosen)


def _whole(experiment: Experiment) -> _Form:
    return _Form(where="", combinations=_combinations(experiment, only=()), seeds=experiment.seeds)


def _quick(experiment: Experiment) -> _Form:
    quick = experiment.quick
    only = []
    for text in quick.only:
        for pair in _pairs(text):
            only.append(pair)
    combinations = _combinations(experiment, only=only)
    return _Form(
        where="quick: ", combinations=combinations, seeds=quick.seeds, overrides=quick.set, quick=True
    )


def _combinations(experiment: Experiment, *, only: Sequence[tuple[str, str]]) -> Combinations:
    """List the cells of a grid, without seeds, each as the value chosen of every axis."""
    combinations = []
    for axis in experiment.axes:
        named = set()
        for name, label in only:
            if name == axis.name:
                named.add(label)
        combinations.append(
            [(axis.name, value) for value in axis.values if not named or value.label in named]
        )
    skipped = []
    for text in experiment.skip:
        skipped.append(set(_pairs(text)))
    return tuple(
        chosen
        for chosen in itertools.product(*combinations)
        if chosen and not any(pairs <= set(_labels(chosen)) for pairs in skipped)
    )


# --- the words of the grid ----------------------------------------------------------------------------------


def _check_words(experiment: Experiment, table: Mapping[str, Any], problems: Problems) -> None:
    known = _known(table)
    for name, values in (
        ("seeds", experiment.seeds),
        ("quick.seeds", experiment.quick.seeds),
        *((axis, labels) for axis, labels in (known or {}).items()),
    ):
        if not values:
            problems.add(name, values, "must not be empty")
    if known is None:
        return
    if not known:
        problems.add("axes", [], "must not be empty")
    for axis in _twice(axis.name for axis in experiment.axes):
        problems.add("axes", axis, "stands twice; names of axes must differ")
    for axis, labels in known.items():
        for label in _twice(labels):
            problems.add(f"axes {axis!r}", label, "stands twice; labels of an axis must differ")
    if experiment.compare and experiment.compare not in known:
        advice = f"must be the name of an axis: {', '.join(known)}"
        problems.add("compare", experiment.compare, advice + did_you_mean(experiment.compare, known))
    elif not table.get("compare") and experiment.references:
        problems.add(
            "references", list(experiment.references), "need compare, the axis whose labels they are"
        )
    for label in experiment.references if experiment.compare in known else ():
        if label not in known[experiment.compare]:
            advice = f"must be a label of the axis {experiment.compare!r}"
            problems.add("references", label, advice + did_you_mean(label, known[experiment.compare]))
    for name, texts in (("skip", experiment.skip), ("quick.only", experiment.quick.only)):
        for text in texts:
            for axis, label in _pairs(text):
                if label not in known.get(axis, ()):
                    if axis in known:
                        words = did_you_mean(label, known[axis])
                    else:
                        words = did_you_mean(axis, known)
                    problems.add(name, text, f"names no axis with such a label{words}")


def _twice(words: Iterable[str]) -> list[str]:
    earlier: list[str] = list(words)
    return [word for word in dict.fromkeys(earlier) if earlier.count(word) > 1]


# --- settings without an effect -----------------------------------------------------------------------------


def _check_given(experiment: Experiment, problems: Problems) -> None:
    """Refuse what the grid itself decides for every cell: it would be read and then overwritten."""
    for key, advice in _GIVEN.items():
        if key in experiment.run:
            problems.add(f"run.{key}", experiment.run[key], f"is set by the grid: {advice}")
    places = [("quick.set", experiment.quick.set)]
    for axis in experiment.axes:
        for value in axis.values:
            places += [(f"axes {axis.name!r} {value.label!r}", (*value.set, *value.quick))]
    for name, overrides in places:
        for override in overrides:
            key = _keys(override)[0]
            if key in _GIVEN:
                problems.add(name, override, f"is set by the grid: {_GIVEN[key]}")


def _keys(override: str) -> tuple[str, ...]:
    return tuple(key.strip() for key in override.partition("=")[0].split("."))


def _check_overlaps(forms: Sequence[_Form], problems: Problems) -> None:
    """Refuse a cell in which one override undoes another:
    the first would be in the label and not in the run.
    """
    overlaps: dict[str, list[str]] = {}
    for form in forms:
        for chosen in form.combinations:
            for undone, (axis, value, override) in _undone(chosen, quick=form.quick):
                where, label, lost = undone
                words = f"axes {where!r} {label!r} sets {'.'.join(_keys(lost))}, and "
                words += f"{axis!r} {value!r} sets {'.'.join(_keys(override))} after it"
                overlaps.setdefault(words, []).append(
                    _name(_labels(chosen), form.seeds[0] if form.seeds else 1)
                )
    for words, names in overlaps.items():
        problems.append(f"{words}: one undoes the other in {_and_more(names)}; let one of them set both")


_Place = tuple[str, str, str]  # axis, label, override


def _undone(chosen: Sequence[tuple[str, Value]], *, quick: bool) -> Iterator[tuple[_Place, _Place]]:
    """Yield pairs of overrides of which the second takes the first away; between axes also where it only
    refines it.
    """
    places = []
    for axis, value in chosen:
        for override in value.quick if quick else value.set:
            places.append((axis, value.label, override))
    for first, second in itertools.combinations(places, 2):
        one, two = _keys(first[2]), _keys(second[2])
        covers = one[: len(two)] == two
        refines = two[: len(one)] == one and first[0] != second[0]
        if covers or refines:
            yield first, second


# --- the cells ----------------------------------------------------------------------------------------------


def _check_names(form: _Form, problems: Problems) -> None:
    """Refuse two cells in one folder, and say what their names have in common."""
    first: dict[str, tuple[Labels, int]] = {}
    reported: set[str] = set()
    for labels, seed in form.cells():
        name = _name(labels, seed)
        if name not in first:
            first[name] = (labels, seed)
            continue
        cause = _shared(first[name], (labels, seed), form.seeds)
        if cause and cause not in reported:
            reported.add(cause)
            both = f"{_words(*first[name])!r} and {_words(labels, seed)!r}"
            problems.append(f"{form.where}{cause}: the cells {both} would share the folder {name}")


def _shared(one: tuple[Labels, int], two: tuple[Labels, int], seeds: Sequence[int]) -> str:
    """Say why two cells have one name; nothing where a label stands twice, which is told elsewhere."""
    for (axis, label), (_, other) in zip(one[0], two[0], strict=True):
        if label != other and _word(label) == _word(other):
            return f"labels {label!r} and {other!r} of axis {axis!r} {_likeness(label, other)}"
    if one == two:
        if seeds.count(one[1]) > 1:
            return f"seed {one[1]} is given twice"
        return ""
    return f"names of cells are longer than {_LONGEST_NAME} characters and alike up to there; shorten labels"


def _likeness(label: str, other: str) -> str:
    if label.casefold() == other.casefold():
        return "differ only in case"
    if _slug(label) == _slug(other):
        return "differ only in characters that a folder name does not keep (it keeps a to z and 0 to 9)"
    return f"are alike in their first {_LONGEST_WORD} characters, which name the folder"


def _words(labels: Labels, seed: int) -> str:
    return ", ".join([*(f"{axis}={label}" for axis, label in labels), f"seed {seed}"])


def _and_more(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _slug(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", label).strip("-").lower()


def _word(label: str) -> str:
    return _slug(label)[:_LONGEST_WORD] or "x"


def _name(labels: Labels, seed: int) -> str:
    return f"{'_'.join(_word(label) for _, label in labels)}_s{seed}"[:_LONGEST_NAME]


def _configured(experiment: Experiment, form: _Form, refused: dict[str, list[str]]) -> list[Cell]:
    """Make the run file of every cell; note what is refused, unless another form has the same problem."""
    cells, known = [], set(refused)
    for chosen in form.combinations:
        labels, sets = _labels(chosen), form.sets(chosen)
        for seed in form.seeds:
            try:
                cells.append(
                    Cell(labels=labels, seed=seed, config=_configure(experiment, labels, sets, seed))
                )
            except (ConfigError, PlanRefused) as error:
                for problem in error.problems if isinstance(error, ConfigError) else error.reasons:
                    if problem not in known:
                        refused.setdefault(problem, []).append(f"{form.where}{_name(labels, seed)}")
    return cells


def _configure(experiment: Experiment, labels: Labels, sets: Sequence[str], seed: int) -> RunConfig:
    table, problems, name = copy.deepcopy(experiment.run), Problems(), _name(labels, seed)
    for override in sets:
        set_value(table, override, problems)
    table |= {"format": 1, "name": name, "seed": seed}
    config = run_file.from_table(table, where=name, problems=problems)
    compatibility.check(config)
    return config


def _check_equal(form: _Form, cells: Sequence[Cell], problems: Problems) -> None:
    """Refuse labels that change nothing: two rows of the table would be one run, made twice."""
    first: dict[RunConfig, Cell] = {}
    labels_by_config: dict[str, list[str]] = {}
    for cell in cells:
        other = first.setdefault(replace(cell.config, name="any"), cell)
        differ = []
        for one, two in zip(other.labels, cell.labels, strict=True):
            if one != two:
                differ.append((one, two))
        if differ:
            words = " and ".join(
                f"labels {one!r} and {two!r} of axis {axis!r}" for (axis, one), (_, two) in differ
            )
            labels_by_config.setdefault(words, []).append(f"{other.config.name} and {cell.config.name}")
    for words, pairs in labels_by_config.items():
        advice = "change one of them, or leave it out with skip" + (" or quick.only" if form.quick else "")
        problems.append(f"{form.where}{words} give equal settings ({_and_more(pairs)}); {advice}")
