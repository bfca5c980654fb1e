"""Match the tensor names of an update with the parameter names of a model: a pure function of names and
shapes.

Training libraries wrap a model before they train it, and every wrapper leaves its mark in the names:
`_module.` (Opacus), `module.` (data parallel), `_orig_mod.` (compiled), `base_model.model.` and an adapter's
name (PEFT). Some frameworks send no names at all, but a list in the order of the model's tensors, and some
store matrices transposed.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

SHOWN = 5  # reasons of one kind that a message spells out
_WRAPPERS = ("_module", "module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_INNER = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer")
_ADAPTED = ("base_model", "model")
# Modules of an adapter library that keep one entry for each adapter; files leave the adapter's name out.
_KEYED = (
    "lora_A",
    "lora_B",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    "lora_E",
    "ia3_l",
    "hada_w1_a",
    "hada_w1_b",
    "hada_w2_a",
    "hada_w2_b",
    "lokr_w1",
    "lokr_w2",
    "oft_R",
    "oft_r",
    "boft_R",
    "boft_s",
    "vera_lambda_b",
    "vera_lambda_d",
    "adapter_down",
    "adapter_up",
)
_REPLACED = "modules_to_save"
_PROMPT = "prompt_embeddings"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelNames:
    """Hold the shapes of a model's parameters and buffers in their order, and which of them are trained.

    `tied` maps the other names of a shared parameter to the one in `parameters`.
    """

    parameters: Shapes
    buffers: Shapes = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    stored: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()

    @property
    def shapes(self) -> dict[str, Shape]:
        """Return the shape of everything that has a name, second names of shared parameters included."""
        own = {**self.parameters, **self.buffers}
        return {**own, **{other: own[name] for other, name in self.tied.items()}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Say which tensor of the model an observed one is;
    `transposed` when it is stored the other way round.
    """

    name: str
    transposed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Matching:
    """Hold the place of every observed tensor, and in words what had to be done to the names."""

    places: Mapping[str, Place]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """Hold every reason why the names cannot be matched."""

    reasons: tuple[str, ...]


def match_names(observed: Shapes, model: ModelNames) -> Matching | Mismatch:
    """Match every observed tensor with one of the model's by name and shape.

    Guarantee: a matching is complete, no two observed tensors share a place unless the model ties them, and
    every shape is the model's or its reverse. What two ways of reading would match differently is refused.
    """
    if numbers := _numbered(observed):
        return _match_list(observed, numbers, model)
    renamed, note = _rename(observed, model)
    if isinstance(renamed, Mismatch):
        return renamed
    return _with_shapes(observed, renamed, model, (note,) if note else ())


# ---------------------------------------------------------------------------------------- lists without names


def _numbered(observed: Shapes) -> tuple[str, ...]:
    """Return the names in their order when they are but numbers from 0, such as "0", "parameter_0" or
    "arr_0".
    """
    numbers = {}
    for name in observed:
        digits = name[len(name.rstrip("0123456789")) :]
        if not digits or "." in name:
            return ()
        numbers[name] = int(digits)
    stems = set()
    for name in observed:
        stems.add(name.rstrip("0123456789"))
    ordered = sorted(observed, key=numbers.__getitem__)
    complete = [numbers[name] for name in ordered] == list(range(len(ordered)))
    if len(stems) == 1 and complete:
        return tuple(ordered)
    return ()


def _match_list(observed: Shapes, ordered: Sequence[str], model: ModelNames) -> Matching | Mismatch:
    shapes = model.shapes
    reasons = []
    fitting: dict[tuple[str, ...], list[str]] = {}
    for label, names in _orders(model).items():
        wrong = _list_problem(observed, ordered, [(name, shapes[name]) for name in names])
        if wrong:
            reasons.append(f"as {label}: {wrong}")
        else:
            fitting.setdefault(tuple(model.tied.get(name, name) for name in names), []).append(label)
    if len(fitting) == 1:
        names, labels = next(iter(fitting.items()))
        note = f"a list of {len(ordered)} tensors without names: taken in the order of {labels[0]}"
        return _with_shapes(observed, dict(zip(ordered, names, strict=True)), model, (note,))
    if fitting:
        labels = []
        for entry in fitting.values():
            for label in entry:
                labels.append(label)
        return Mismatch(reasons=(f"a list without names fits more than one order ({', '.join(labels)})",))
    head = (
        f"the observation is a list of {len(ordered)} tensors without names, and no order of the model's fits"
    )
    return Mismatch(reasons=(head, *reasons))


def _orders(model: ModelNames) -> dict[str, tuple[str, ...]]:
    """Return the orders in which a client may list a model's tensors."""
    kinds = {
        "the state dict": model.stored,
        "the parameters": tuple(model.parameters),
        "the trained parameters": model.trained,
        "the parameters of the state dict": tuple(name for name in model.stored if name not in model.buffers),
    }
    orders: dict[str, tuple[str, ...]] = {}
    for label, names in kinds.items():
        if names:
            orders[label] = names
    return orders


def _list_problem(observed: Shapes, ordered: Sequence[str], wanted: Sequence[tuple[str, Shape]]) -> str:
    if len(ordered) != len(wanted):
        return f"the model has {len(wanted)}"
    for number, (name, (own, shape)) in enumerate(zip(ordered, wanted, strict=True)):
        if not _fits(observed[name], shape):
            return f"entry {number} is {observed[name]}, there the model has {own} of {shape}"
    return ""


# ------------------------------------------------------------------------------------------------------ names


def bare(name: str) -> str:
    """Return a name without what wrappers, compilers and adapter libraries put into it.

    >>> bare("_module.base_model.model.encoder.query.lora_A.default.weight")
    'encoder.query.lora_A.weight'
    """
    parts = _unwrapped(name.split("."))
    parts_of_name: list[str] = []
    skip = False
    for place, part in enumerate(parts):
        last = place == len(parts) - 1
        if skip and not (last and part in ("weight", "bias")):
            skip = False
            continue
        skip = part in _KEYED or part == _REPLACED
        if part != _REPLACED and (part not in _INNER or last):
            parts_of_name.append(part)
    whole = ".".join(parts_of_name)
    if whole.startswith("prompt_encoder.") and whole.endswith(".embedding.weight"):
        return _PROMPT
    if parts_of_name[-2:-1] == ["lora_magnitude_vector"]:
        return whole.removesuffix(".weight")
    return whole


def _rename(observed: Shapes, model: ModelNames) -> tuple[dict[str, str] | Mismatch, str]:
    """Return the model's name of every observed tensor, and what was done to the names to find it."""
    own = model.shapes
    if all(name in own for name in observed):
        return _injective({name: name for name in observed}, model), ""
    table, doubtful = _by_bare_name(own)
    direct = _looked_up({name: bare(name) for name in observed}, table, own)
    if None not in direct.values():
        return _injective(direct, model), _renamed_note(observed)
    for lookup, note in _with_prefixes(observed, table):
        return lookup if isinstance(lookup, Mismatch) else _injective(lookup, model), note
    return Mismatch(reasons=_unmatched(observed, direct, own, doubtful)), ""


def _by_bare_name(own: Shapes) -> tuple[dict[str, str], frozenset[str]]:
    """Return the model's names by their bare form, and the bare forms that stand for more than one."""
    counts = Counter(bare(name) for name in own)
    doubtful = frozenset(name for name, count in counts.items() if count > 1)
    return {bare(name): name for name in own if bare(name) not in doubtful}, doubtful


def _looked_up(stripped: Mapping[str, str], table: Mapping[str, str], own: Shapes) -> dict[str, str | None]:
    return {name: name if name in own else table.get(short) for name, short in stripped.items()}


def _with_prefixes(
    observed: Shapes, table: Mapping[str, str]
) -> Iterable[tuple[dict[str, str] | Mismatch, str]]:
    """Yield the matching under which a prefix of all observed names is taken off, or one of the model's is
    put before them.
    """
    names = {}
    for name in observed:
        names[name] = bare(name)
    for prefix in _leading(names.values(), everywhere=True):
        lookup = {}
        for name, short in names.items():
            lookup[name] = table.get(short.removeprefix(prefix))
        if None not in lookup.values():
            yield _complete(lookup), f"the prefix {prefix!r} of every name was taken off"
            return
    added = {}
    for prefix in _leading(table, everywhere=False):
        lookup = {}
        for name, short in names.items():
            lookup[name] = table.get(prefix + short)
        if None not in lookup.values():
            added[prefix] = _complete(lookup)
    if len(added) > 1:
        reason = f"the names fit the model behind more than one prefix: {', '.join(map(repr, sorted(added)))}"
        yield Mismatch(reasons=(reason,)), ""
    for prefix, complete in added.items():
        yield complete, f"the prefix {prefix!r} of the model was put before every name"


def _complete(lookup: Mapping[str, str | None]) -> dict[str, str]:
    return {name: place for name, place in lookup.items() if place is not None}


def _leading(names: Iterable[str], *, everywhere: bool) -> list[str]:
    """Return the dotted prefixes of the names, shortest first; `everywhere` asks for those that all names
    share.
    """
    listed = list(names)
    counts: Counter[str] = Counter()
    for name in listed:
        parts = name.split(".")
        counts.update(".".join(parts[:depth]) + "." for depth in range(1, len(parts)))
    prefixes = []
    for prefix, count in counts.items():
        if not everywhere or count == len(listed):
            prefixes.append(prefix)
    return sorted(prefixes, key=len)


def _renamed_note(observed: Shapes) -> str:
    wrappers = set()
    for name in observed:
        wrappers.add(_wrapper(name))
    if len(wrappers) == 1 and "" not in wrappers:
        return f"the prefix {min(wrappers)!r} of every name belongs to a wrapper and was read past"
    return "marks of wrappers and adapter libraries in the names were read past"


def _wrapper(name: str) -> str:
    """Return the part in front of a name that a wrapper put there."""
    parts = name.split(".")
    unwrapped = _unwrapped(parts)
    if len(unwrapped) < len(parts):
        return ".".join(parts[: len(parts) - len(unwrapped)]) + "."
    return ""


def _unwrapped(parts: list[str]) -> list[str]:
    while parts[:-1] and (parts[0] in _WRAPPERS or tuple(parts[:2]) == _ADAPTED):
        if parts[0] in _WRAPPERS:
            parts = parts[1:]
        else:
            parts = parts[2:]
    return parts


def common_prefix(names: Iterable[str]) -> str:
    """Return the longest dotted prefix that all names share, its last dot included, or an empty text."""
    shared = _leading(names, everywhere=True)
    if shared:
        return shared[-1]
    return ""


def _injective(lookup: Mapping[str, str | None], model: ModelNames) -> dict[str, str] | Mismatch:
    """Refuse two observed tensors for one of the model's, unless the model itself gives it two names."""
    places: dict[str, list[str]] = {}
    for name, place in lookup.items():
        if place is not None:
            places.setdefault(place, []).append(name)
    twice = []
    for place, names in places.items():
        if len(names) > 1:
            twice.append(f"{' and '.join(names)} both name {place}")
    if twice:
        return Mismatch(reasons=tuple(_shortened(twice)))
    return {name: model.tied.get(place, place) for name, place in lookup.items() if place is not None}


def _unmatched(
    observed: Shapes, direct: Mapping[str, str | None], own: Shapes, doubtful: frozenset[str]
) -> tuple[str, ...]:
    lost = []
    for name, place in direct.items():
        if place is None:
            lost.append(name)
    head = f"{len(lost)} of {len(observed)} names of the observation are not the model's"
    prefix = common_prefix(lost)
    if prefix:
        head += f"; all of these begin with {prefix!r}"
    other = common_prefix(own)
    if other:
        head += f"; the model's begin with {other!r}"
    parts = set()
    for name in lost:
        for part in name.split("."):
            parts.add(part)
    adapted = bool(parts & {*_KEYED, _PROMPT})
    remedy = [
        "the observation holds tensors of an adapter the model does not have: name its folder (--adapter)"
    ]
    reasons = _shortened([_closest(name, own, doubtful) for name in lost])
    return (head, *(remedy if adapted else []), *reasons)


def _closest(name: str, own: Shapes, doubtful: frozenset[str]) -> str:
    if bare(name) in doubtful:
        return f"{name} could be {' or '.join(sorted(other for other in own if bare(other) == bare(name)))}"
    if len(own) <= 2_000:
        near = difflib.get_close_matches(bare(name), own, n=1, cutoff=0.8)
    else:
        near = []
    return f"{name} is unknown" + (f", the nearest is {near[0]}" if near else "")


def _shortened(reasons: Sequence[str]) -> list[str]:
    more = len(reasons) - SHOWN
    return [*reasons[:SHOWN], *([f"and {more} more"] if more > 0 else [])]


# ----------------------------------------------------------------------------------------------------- shapes


def _fits(observed: Shape, own: Shape) -> bool:
    return observed == own or (len(own) == 2 and observed == own[::-1])


def _with_shapes(
    observed: Shapes, names: Mapping[str, str], model: ModelNames, notes: tuple[str, ...]
) -> Matching | Mismatch:
    """Return the matching, with the tensors that are stored the other way round,
    or what has another shape.
    """
    own = model.shapes
    wrong = []
    for listed, name in names.items():
        if not _fits(observed[listed], own[name]):
            wrong.append(
                f"{listed} is {observed[listed]}, the model holds {name} as "
                f"{own[name]}: {_why(observed[listed], own[name])}"
            )
    if wrong:
        return Mismatch(reasons=tuple(_shortened(wrong)))
    turned = {}
    for listed, name in names.items():
        turned[name] = observed[listed] != own[name]
    squares = []
    for name in turned:
        if len(own[name]) == 2 and len(set(own[name])) == 1:
            squares.append(name)
    if any(turned.values()):
        evidence = {}
        for name, way in turned.items():
            if len(set(own[name])) == 2:
                evidence[name] = way
        ways = {}
        for name in squares:
            ways[name] = _relatives(name, evidence)
        if doubtful := [name for name, way in ways.items() if len(way) != 1]:
            reasons = []
            for name in doubtful:
                reasons.append(f"{name} is square: whether it is transposed cannot be told")
            return Mismatch(reasons=tuple(_shortened(reasons)))
        turned |= {name: way == {True} for name, way in ways.items()}
    places = {}
    for listed, name in names.items():
        places[listed] = Place(name=name, transposed=turned[name])
    count = sum(place.transposed for place in places.values())
    if count:
        notes = (*notes, f"{count} matrices are stored transposed and were turned")
    return Matching(places=places, notes=tuple(notes))


def _why(observed: Shape, own: Shape) -> str:
    """Say how a tensor most likely got a shape that is not the model's."""
    if observed[1:] == own:
        return "it has one axis more, as gradients of single samples do; record their mean"
    if len(observed) == 1 and observed[0] == math.prod(own):
        return "it was laid flat; record it in its own shape"
    if len(observed) == len(own) == 2 and observed[1] == own[1]:
        return "it has another number of rows, as a vocabulary that grew: another model was trained"
    return "another model was trained"


def _relatives(name: str, evidence: Mapping[str, bool]) -> set[bool]:
    """Return how the matrices most like a square one are stored: those of the same leaf, else of the nearest
    modules.
    """
    leaf = name.split(".")[-2:]
    same = set()
    for other, turned in evidence.items():
        if other.split(".")[-2:] == leaf:
            same.add(turned)
    if len(same) == 1:
        return same
    depth = {}
    for other in evidence:
        depth[other] = _shared_parts(name, other)
    deepest = max(depth.values(), default=0)
    relatives: set[bool] = set()
    for other, turned in evidence.items():
        if depth[other] == deepest:
            relatives.add(turned)
    return relatives


def _shared_parts(name: str, other: str) -> int:
    shared = 0
    for own, theirs in zip(name.split("."), other.split("."), strict=False):
        if own != theirs:
            break
        shared += 1
    return shared
