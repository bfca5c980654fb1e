"""Deal examples to clients the way the literature does; `docs/data.md` states the law each kind follows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ffm_secure.config.owners import numbered_names
from ffm_secure.config.run_file import Split
from ffm_secure.config.schema import did_you_mean
from ffm_secure.data.dataset import Examples
from ffm_secure.data.labels import as_list, is_blank
from ffm_secure.data.table import count_more
from ffm_secure.errors import DataError
from ffm_secure.foreign import JsonValue

Indices = NDArray[np.int64]
Shares = NDArray[np.float64]

TRANSFORMS = ("noise", "rotation", "brightness", "token_dropout")


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureShift:
    """Describe the public transformation of one client's features; `strength` is in the unit of its kind.

    noise: standard deviation in grey levels of 255 · rotation: degrees · brightness: factor ·
    token_dropout: probability that a word is left out.
    """

    transform: Literal["noise", "rotation", "brightness", "token_dropout"]
    strength: float


def partition(
    examples: Examples, *, clients: int, split: Split | Mapping[str, Any], seed: int
) -> tuple[Indices, ...]:
    """Deal the rows of `examples` to `clients`; entry i holds client i's rows in ascending order.

    `split` is a mapping such as {"kind": "dirichlet", "alpha": 0.3}, or a dataclass with the same fields, of
    which the kind reads only its own.

    Guarantee: no row has two clients; every row has one, except under natural with groups = "largest"
    (smaller groups are left out); the same seed and numpy release give the same answer; every client gets at
    least `min_size` rows.

    Raises:
      DataError: the request cannot be met, with the bound that it breaks.

    >>> rows = Examples(columns={"text": ["a", "b", "c", "d"]})
    >>> sorted(len(part) for part in partition(rows, clients=2, split={"kind": "iid"}, seed=0))
    [2, 2]
    """
    kind, options = _options(split)
    if not 1 <= clients <= len(examples):
        raise DataError(
            f"clients = {clients}: must lie between 1 and the {len(examples)} rows of {examples.origin}"
        )
    if clients * options.get("min_size", 0) > len(examples):
        raise DataError(
            f"min_size = {options['min_size']}: {clients} clients would need "
            f"{clients * options['min_size']} rows, {examples.origin} has {len(examples)}"
        )
    rng = np.random.Generator(np.random.PCG64([seed, 0xDEA1]))
    parts = SPLITS[kind].deal(examples, clients, options, rng)
    return tuple(np.sort(np.asarray(part, dtype=np.int64)) for part in parts)


def client_examples(
    examples: Examples, *, clients: int, split: Split | Mapping[str, Any], seed: int
) -> tuple[Examples, ...]:
    """Deal the examples and apply each client's feature shift where the split has one."""
    parts = partition(examples, clients=clients, split=split, seed=seed)
    return tuple(client_rows(examples, parts, index, split=split, seed=seed) for index in range(clients))


def client_rows(
    examples: Examples, parts: Sequence[Indices], index: int, *, split: Split | Mapping[str, Any], seed: int
) -> Examples:
    """Return one client's rows as it has them: dealt out by `parts`, and shifted where the split shifts
    features.
    """
    rows = examples.take(parts[index])
    shifts = feature_shifts(clients=len(parts), split=split)
    if shifts:
        return apply_shift(rows, shifts[index], seed=[seed, index])
    return rows


def _even(count: int, clients: int) -> Indices:
    """Part `count` rows into sizes that differ by at most one."""
    sizes = np.full(clients, count // clients, dtype=np.int64)
    sizes[: count % clients] += 1
    return sizes


def _cut(rows: Indices, sizes: Indices) -> list[Indices]:
    return np.split(rows, np.cumsum(sizes)[:-1])


def _rounded(shares: Shares, count: int) -> Indices:
    """Round shares of `count` to whole rows: never more than one row from the exact value, and the sum is
    `count`.
    """
    edges = np.rint(np.cumsum(shares) * count).astype(np.int64)
    edges[-1] = count
    return np.diff(edges, prepend=0)


def _iid(
    examples: Examples, clients: int, options: Mapping[str, Any], rng: np.random.Generator
) -> list[Indices]:
    return _cut(rng.permutation(len(examples)), _even(len(examples), clients))


def _dirichlet(
    examples: Examples, clients: int, options: Mapping[str, Any], rng: np.random.Generator
) -> list[Indices]:
    """Draw each label's shares over the clients from Dirichlet(alpha, ..., alpha) (Li et al. 2022, section
    4.1).
    """
    labels = examples.labels
    hands: list[list[Indices]] = []
    for _ in range(clients):
        hands.append([])
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        shares = _dirichlet_shares(options["alpha"], clients, rng)
        for hand, piece in zip(hands, _cut(rows, _rounded(shares, len(rows))), strict=True):
            hand.append(piece)
    return _topped_up([np.concatenate(hand) for hand in hands], options["min_size"], rng)


def _dirichlet_shares(alpha: float, clients: int, rng: np.random.Generator) -> Shares:
    """Draw shares that sum to one; for tiny alpha, where every gamma draw underflows,
    one client takes all.
    """
    shares: Shares = rng.dirichlet(np.full(clients, alpha))
    if not np.isfinite(shares).all() or not math.isclose(shares.sum(), 1.0, rel_tol=1e-6):
        shares = np.zeros(clients)
        shares[rng.integers(clients)] = 1.0
    return shares


def _topped_up(parts: list[Indices], least: int, rng: np.random.Generator) -> list[Indices]:
    """Move random rows from the currently largest client to those below `least`, so that small alphas stay
    possible.
    """
    sizes = np.array([len(part) for part in parts])
    for short in np.flatnonzero(sizes < least):
        while sizes[short] < least:
            rich = int(np.argmax(sizes))
            at = int(rng.integers(sizes[rich]))
            parts[short] = np.append(parts[short], parts[rich][at])
            parts[rich] = np.delete(parts[rich], at)
            sizes[short] += 1
            sizes[rich] -= 1
    return parts


def _quantity(
    examples: Examples, clients: int, options: Mapping[str, Any], rng: np.random.Generator
) -> list[Indices]:
    """Draw the clients' sizes from Dirichlet(alpha), or in proportion to log-normals(sigma); rows are IID."""
    if options["distribution"] == "dirichlet":
        shares = _dirichlet_shares(options["alpha"], clients, rng)
    else:
        weights = np.exp(options["sigma"] * rng.standard_normal(clients))
        shares = weights / weights.sum()
    rows = rng.permutation(len(examples))
    return _topped_up(_cut(rows, _rounded(shares, len(rows))), options["min_size"], rng)


def _shards(
    examples: Examples, clients: int, options: Mapping[str, Any], rng: np.random.Generator
) -> list[Indices]:
    """Sort by label, cut into equal shards, deal `shards_per_client` to each (McMahan et al. 2017, section
    3).
    """
    each = options["shards_per_client"]
    if clients * each > len(examples):
        raise DataError(
            f"shards_per_client = {each}: {clients} clients need {clients * each} shards, "
            f"{examples.origin} has only {len(examples)} rows"
        )
    shuffled = rng.permutation(len(examples))
    by_label = shuffled[np.argsort(examples.labels[shuffled], kind="stable")]
    shards = _cut(by_label, _even(len(by_label), clients * each))
    dealt = rng.permutation(len(shards)).reshape(clients, each)
    return [np.concatenate([shards[shard] for shard in hand]) for hand in dealt]


def _natural(
    examples: Examples, clients: int, options: Mapping[str, Any], rng: np.random.Generator
) -> list[Indices]:
    """Give every value of a column its own client; too many values are merged, or the smaller ones left out.

    The `clients` largest groups (ties by name) each found a client. With groups = "merge" every further group
    joins a client drawn uniformly; with "largest" it is left out. A group is never cut in two: it stands for
    one data owner. Clients are ordered by the name of the group that founded them.
    """
    groups = _groups(examples, options["column"])
    hands = _natural_hands(groups, examples.origin, clients, options, rng)
    return [np.concatenate([groups[name] for name in hands[founder]]) for founder in sorted(hands)]


def _natural_hands(
    groups: Mapping[Any, Indices],
    origin: str,
    clients: int,
    options: Mapping[str, Any],
    rng: np.random.Generator,
) -> dict[Any, list[Any]]:
    """Return which groups each client holds, by the group that founded it and that comes first."""
    if clients > len(groups):
        raise DataError(
            f"clients = {clients}: column {options['column']!r} of {origin} has only {len(groups)} groups, "
            "and a group is never cut in two"
        )
    ranked = sorted(groups, key=lambda name: (-len(groups[name]), name))
    founders = sorted(ranked[:clients])
    hands = {name: [name] for name in founders}
    for name in ranked[clients:] if options["groups"] == "merge" else ():
        hands[founders[rng.integers(clients)]].append(name)
    sizes = {}
    for founder, held in hands.items():
        sizes[founder] = sum(len(groups[name]) for name in held)
    small = [name for name in founders if sizes[name] < options["min_size"]]
    if small:
        raise DataError(
            f"min_size = {options['min_size']}: group {small[0]!r} has {sizes[small[0]]} rows; choose "
            "fewer clients or a smaller min_size"
        )
    return hands


def owner_names(
    examples: Examples, *, clients: int, split: Split | Mapping[str, Any], seed: int
) -> tuple[str, ...]:
    """Name the owner of every part that `partition` deals: by the column of a natural split, else by number.

    Guarantee: names are different, printable and at most 80 letters long, whatever stands in the column.

    >>> rows = Examples(columns={"text": ["a", "b", "c"], "site": ["Mercy", "North", "Mercy"]})
    >>> owner_names(rows, clients=2, split={"kind": "natural", "column": "site"}, seed=0)
    ('Mercy', 'North')
    """
    kind, options = _options(split)
    if kind != "natural":
        return numbered_names(clients)
    rng = np.random.Generator(np.random.PCG64([seed, 0xDEA1]))
    hands = _natural_hands(_groups(examples, options["column"]), examples.origin, clients, options, rng)
    names: list[str] = []
    for founder in sorted(hands):
        more = len(hands[founder]) - 1
        written = _printable(str(founder)) + (f" and {more} more" if more else "")
        alike = sum(name == written or name.startswith(f"{written} (") for name in names)
        names.append(f"{written} ({alike + 1})" if alike else written)
    return tuple(names)


def _printable(name: str) -> str:
    words = " ".join(name.split())
    written = ""
    for letter in words[:60]:
        written += letter if letter.isprintable() else "?"
    # a ledger keeps "*" for everybody
    if any(map(str.isalnum, written)):
        return written
    return f"owner {written!r}"


def _groups(examples: Examples, column: str) -> dict[Any, Indices]:
    if not column:
        raise DataError("split.column: missing; a natural split needs the column that names the data owners")
    rows: dict[str | int, list[int]] = {}
    blank: list[int] = []
    for row, value in enumerate(as_list(examples.column(column))):
        if is_blank(value):
            blank.append(row)
            continue
        # a data frame's gap made it so
        name = int(value) if isinstance(value, float) and value.is_integer() else value
        if isinstance(name, bool) or not isinstance(name, (str, int)):
            raise DataError(
                f"{examples.origin}: row {row} of column {column!r} holds "
                f"{type(value).__name__}, not text or a whole number"
            )
        rows.setdefault(name, []).append(row)
    if blank:
        named = count_more(f"row {blank[0]} of column {column!r} holds nothing", len(blank), "rows")
        raise DataError(
            f"{examples.origin}: {named}, so it has no owner; fill it, or leave such rows out with "
            "task.clean = ['blank_rows']"
        )
    if len({type(name) for name in rows}) > 1:
        raise DataError(
            f"{examples.origin}: column {column!r} mixes text and numbers; make it one or the other"
        )
    return {name: np.array(members, dtype=np.int64) for name, members in rows.items()}


def feature_shifts(*, clients: int, split: Split | Mapping[str, Any]) -> tuple[FeatureShift, ...]:
    """Describe each client's public transformation: from none at client 0 in equal steps to `strength` at the
    last.
    """
    kind, options = _options(split)
    if kind != "feature_shift":
        return ()
    neutral = 0.0
    if options["transform"] == "brightness":
        neutral = 1.0
    if clients > 1:
        steps = np.linspace(neutral, options["strength"], clients).tolist()
    else:
        steps = [options["strength"]]
    return tuple(FeatureShift(transform=options["transform"], strength=float(step)) for step in steps)


def apply_shift(examples: Examples, shift: FeatureShift, *, seed: int | Sequence[int]) -> Examples:
    """Transform the texts or pictures of `examples`; labels and all other columns stay as they are."""
    rng = np.random.Generator(np.random.PCG64(seed))
    columns = dict(examples.columns)
    if shift.transform == "token_dropout":
        changed = list(examples.text_columns)
        for name in changed:
            columns[name] = [_drop_words(text, shift.strength, rng) for text in columns[name]]
    else:
        changed = []
        for name, values in columns.items():
            if getattr(values, "shape", ())[3:] == (3,):
                changed.append(name)
        for name in changed:
            columns[name] = _shift_pixels(np.asarray(columns[name]), shift, rng)
    if not changed:
        needed = "picture"
        if shift.transform == "token_dropout":
            needed = "text"
        raise DataError(f"transform = {shift.transform!r}: {examples.origin} has no {needed} column")
    return replace(examples, columns=columns)


def _drop_words(text: str, probability: float, rng: np.random.Generator) -> str:
    words = text.split(" ")
    remaining = []
    for word, draw in zip(words, rng.random(len(words)), strict=True):
        if draw >= probability:
            remaining.append(word)
    return " ".join(remaining) or words[0]


def _shift_pixels(
    pixels: NDArray[np.uint8], shift: FeatureShift, rng: np.random.Generator
) -> NDArray[np.uint8]:
    if shift.transform == "rotation":
        return _rotated(pixels, shift.strength)
    if shift.transform == "noise":
        changed = np.add(pixels, shift.strength * rng.standard_normal(pixels.shape))
    else:
        changed = np.multiply(pixels, shift.strength)
    return np.clip(np.rint(changed), 0, 255).astype(np.uint8)


def _rotated(pixels: NDArray[np.uint8], degrees: float) -> NDArray[np.uint8]:
    """Rotate about the centre, counter-clockwise as seen, nearest neighbour; corners repeat the border."""
    _, height, width, _ = pixels.shape
    rows, columns = np.indices((height, width), dtype=np.float64)
    down, right = rows - (height - 1) / 2, columns - (width - 1) / 2
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    source_rows = np.rint(cosine * down + sine * right + (height - 1) / 2).astype(np.int64)
    source_columns = np.rint(cosine * right - sine * down + (width - 1) / 2).astype(np.int64)
    rotated: NDArray[np.uint8] = pixels[:, source_rows.clip(0, height - 1), source_columns.clip(0, width - 1)]
    return rotated


@dataclass(frozen=True, slots=True, kw_only=True)
class _Split:
    """One way to deal, with its options and their defaults."""

    deal: Callable[[Examples, int, Mapping[str, Any], np.random.Generator], list[Indices]]
    defaults: Mapping[str, Any]


SPLITS: Mapping[str, _Split] = {
    "iid": _Split(deal=_iid, defaults={}),
    "dirichlet": _Split(deal=_dirichlet, defaults={"alpha": 0.5, "min_size": 1}),
    "quantity": _Split(
        deal=_quantity, defaults={"distribution": "dirichlet", "alpha": 0.5, "sigma": 1.0, "min_size": 1}
    ),
    "shards": _Split(deal=_shards, defaults={"shards_per_client": 2}),
    "natural": _Split(deal=_natural, defaults={"column": "", "groups": "merge", "min_size": 1}),
    "feature_shift": _Split(deal=_iid, defaults={"transform": "noise", "strength": 32.0}),
}

_CHOICES = {
    "distribution": ("dirichlet", "lognormal"),
    "groups": ("merge", "largest"),
    "transform": TRANSFORMS,
}
_BOUNDS = {
    "alpha": (0.0, 1e6),
    "sigma": (0.0, 10.0),
    "min_size": (0, 10**9),
    "shards_per_client": (1, 10**6),
    "strength": (0.0, 360.0),
}


def _options(split: Split | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Read a split with its defaults; a mapping may hold only what its kind knows, a dataclass has every
    field.
    """
    if is_dataclass(split):
        settings = {}
        for f in fields(split):
            settings[f.name] = getattr(split, f.name)
    else:
        settings = dict(split)
    kind = settings.pop("kind", None)
    if kind not in SPLITS:
        raise DataError(f"split.kind = {kind!r}: must be one of {', '.join(SPLITS)}")
    defaults = SPLITS[kind].defaults
    if not is_dataclass(split):
        unknown = sorted(settings.keys() - defaults.keys())
    else:
        unknown = []
    if unknown:
        hint = did_you_mean(unknown[0], defaults) or f"; {kind} knows {', '.join(defaults) or 'no options'}"
        raise DataError(f"split.{unknown[0]}: unknown option{hint}")
    options = {**defaults, **{name: value for name, value in settings.items() if name in defaults}}
    for name, value in options.items():
        _check_option(name, value, whole=isinstance(defaults[name], int))
    if options.get("transform") == "token_dropout" and options["strength"] > 1.0:
        raise DataError(
            f"split.strength = {options['strength']}: the probability of token_dropout lies between 0 and 1"
        )
    return kind, options


def _check_option(name: str, value: JsonValue, *, whole: bool) -> None:
    if name in _CHOICES and value not in _CHOICES[name]:
        raise DataError(f"split.{name} = {value!r}: must be one of {', '.join(_CHOICES[name])}")
    if name in _BOUNDS:
        low, high = _BOUNDS[name]
        number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not number or not low <= value <= high or (name == "alpha" and value == 0):
            raise DataError(
                f"split.{name} = {value!r}: must be a {'whole ' if whole else ''}number from {low} to {high}"
            )
