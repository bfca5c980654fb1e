"""`builtin:clinic_notes`: short clinical-style notes of several hospitals, with planted fictitious personal
facts.

Everything is drawn from a seed and nothing from real records. Names are made of words for pretence,
telephone numbers lie in ranges set aside for fiction, birth years end in 1899, record numbers begin with ZX,
streets and towns do not exist.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ffm_secure.data.clinic_notes.conditions_of_limbs import (
    DERMATOLOGY,
    NEUROLOGY,
    ORTHOPAEDICS,
    PSYCHIATRY,
    RHEUMATOLOGY,
)
from ffm_secure.data.clinic_notes.conditions_of_organs import (
    CARDIOLOGY,
    ENDOCRINOLOGY,
    GASTROENTEROLOGY,
    NEPHROLOGY,
    PULMONOLOGY,
    Condition,
)
from ffm_secure.data.clinic_notes.hospitals import (
    BACKGROUND,
    GENERAL_FINDINGS,
    GENERAL_IMPRESSIONS,
    GENERAL_PLANS,
    ROUTINE,
    SHARED_COMPLAINTS,
    SOCIAL,
    SOCIAL_OLDER,
    SOCIAL_YOUNGER,
    House,
    make_house,
    writer,
)
from ffm_secure.data.generated.options import SEED, Bounds, checked_options
from ffm_secure.errors import DataError

SPECIALTIES: Mapping[str, tuple[Condition, ...]] = {
    "cardiology": CARDIOLOGY,
    "dermatology": DERMATOLOGY,
    "endocrinology": ENDOCRINOLOGY,
    "gastroenterology": GASTROENTEROLOGY,
    "nephrology": NEPHROLOGY,
    "neurology": NEUROLOGY,
    "orthopaedics": ORTHOPAEDICS,
    "psychiatry": PSYCHIATRY,
    "pulmonology": PULMONOLOGY,
    "rheumatology": RHEUMATOLOGY,
}

OPTIONS: Mapping[str, Bounds] = {
    "hospitals": (8, 1, 64),
    "size": (24_000, 10, 500_000),
    "validation": (2_400, 1, 100_000),
    "facts": (15, 0, 100),  # notes with planted facts, percent
    "seed": SEED,
}

# How clear a note is: share, own and shared complaints, own findings, own drugs, named impression, own plan,
# diseases of other clinics.
_CLARITY = (
    (0.58, 1.6, 0.25, 1.2, 1.2, 0.6, 1.0, 0.4),
    (0.24, 0.7, 0.9, 0.35, 0.5, 0.1, 0.4, 0.7),
    (0.18, 0.9, 0.4, 0.5, 0.5, 0.15, 0.4, 1.8),
)


def _listed(words: str) -> tuple[str, ...]:
    return tuple(words.split())


_FIRST = _listed(
    "Ada Alwin Amity Basil Bettina Bram Cedric Clio Conrad Cora Delphine Dorian Edda Elspeth Emeric Enid "
    "Fabian Fenella Florian Gideon Greta Hester Hollis Ida Imogen Ivo Jasper Junia Kester Lavinia Leopold "
    "Linnea Lucian Mabel Magnus Marius Merrin Nerys Nico Octavia Odell Orla Percival Petra Quentin Quilla "
    "Ramona Rufus Selwyn Sabine Tamsin Thaddeus Una Ursel Verity Victor "
    "Wilhelmina Winifred Xanthe Yorick Zelda"
)
_SURNAME = (
    _listed(
        "Mock Sample Tester Dummer Ficti Feign Sham Guise Fable Mythe Legen Pretend Fancy "
        "Noname Makebe Phan Figmen Pseudo"
    ),
    _listed("ridge worth by ley ham combe ton wick stead well croft more"),
)
_STREETS = _listed(
    "Nowhere Imaginary Unlisted Fiction Placeholder Make-Believe Pretence Phantom Hypothetical Invented"
)
_WAYS = _listed("Lane Street Road Close Avenue Terrace Way Court")
_TOWNS = _listed("Exampleton Sampleford Testbury Mockhaven Nullthorpe Fableham Dummyville Placeholm")

_HEADS = (
    "{name}, {record}",
    "Re: {name}, DOB {birth}",
    "{record} {name}",
    "{name} of {address}",
    "{name}",
    "{record}",
)
_TAILS = (
    "Ring {name} on {phone}",
    "Results to {phone}",
    "Next of kin {relative}, {phone}",
    "Transport from {address}",
    "cc {name}, {address}",
    "Record {record}",
)

Item = TypeVar("Item")
Unit = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Fact:
    """One planted personal fact: `text[span[0]:span[1]] == value`."""

    kind: str  # name, record, birth, phone, address or relative
    value: str
    span: tuple[int, int]


def planted_facts(example: Mapping[str, Any] | str) -> tuple[Fact, ...]:
    """Read the facts planted in one note, from its row or from its `facts` column.

    >>> planted_facts('[["phone", "07700 900123", 10, 22]]')
    (Fact(kind='phone', value='07700 900123', span=(10, 22)),)
    """
    if isinstance(example, str):
        stored = example
    else:
        stored = example["facts"]
    return tuple(Fact(kind, value, (start, end)) for kind, value, start, end in json.loads(stored))


def clinic_notes(options: Mapping[str, int]) -> tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]:
    """Write the train and the validation notes: columns text, label, hospital, patient, facts; and the label
    names.

    Guarantee: all notes of both parts are distinct, no patient is in both parts, and the same options give
    the same notes. Hospitals differ in size, in their mix of specialties, and in how they write.
    """
    chosen = checked_options("clinic_notes", options, OPTIONS)
    seed = chosen["seed"]
    rng = np.random.Generator(np.random.PCG64([seed, 0xC11C]))
    houses = []
    for index in range(chosen["hospitals"]):
        houses.append(_Desk(make_house(index, rng.random)))
    sizes = 1.0 / np.arange(2, len(houses) + 2) ** 0.7
    mixes = 0.85 * rng.dirichlet(np.full(len(SPECIALTIES), 1.2), size=len(houses)) + 0.15 / len(SPECIALTIES)
    written: set[str] = set()
    parts = []
    for rows, prefix in ((chosen["size"], "p"), (chosen["validation"], "v")):
        homes = rng.choice(len(houses), size=rows, p=sizes / sizes.sum())
        labels = np.zeros(rows, dtype=np.int64)
        for home, mix in enumerate(mixes):
            here = homes == home
            labels[here] = rng.choice(len(SPECIALTIES), size=int(here.sum()), p=mix)
        parts.append(_write_part(houses, homes, labels, prefix=prefix, chosen=chosen, written=written))
    return parts[0], parts[1], tuple(SPECIALTIES)


def _pick(items: Sequence[Item], unit: Unit) -> Item:
    return items[int(unit() * len(items))]


def _some(items: Sequence[Item], mean: float, unit: Unit) -> list[Item]:
    """Draw different items, in number the whole number below or above `mean`, so that the mean is right."""
    count = min(int(mean + unit()), len(items))
    chosen: dict[Item, None] = {}
    while len(chosen) < count:
        chosen[_pick(items, unit)] = None
    return list(chosen)


_ONE = re.compile(r"\b1 (week|wk|day|month|year|hour|attack|fit)s\b")
_RANGE = re.compile(r"\{(\d+)-(\d+)(?::(\d+))?(?:/(\d+))?\}")


def _filled(text: str, unit: Unit) -> str:
    """Draw the numbers of a text."""

    def number(match: re.Match[str]) -> str:
        low, high, step, divisor = match.groups()
        width = int(step or 1)
        value = int(low) + width * int(unit() * ((int(high) - int(low)) // width + 1))
        if divisor is None:
            return str(value)
        return f"{value / int(divisor):g}"

    return _ONE.sub(r"1 \1", _RANGE.sub(number, text))


@dataclass(frozen=True, slots=True)
class _Case:
    """One disease in a hospital's wording."""

    ages: tuple[int, int]
    names: Sequence[str]
    complaints: Sequence[str]
    findings: Sequence[str]
    drugs: Sequence[str]
    plans: Sequence[str]


@dataclass(frozen=True, slots=True)
class _Words:
    """A hospital's wording of everything, long or abbreviated."""

    cases: Mapping[str, Sequence[_Case]]
    shared: Mapping[str, Sequence[str]]
    background: Sequence[tuple[str, int, Sequence[str]]]
    routine: Sequence[str]
    social: Mapping[bool, Sequence[str]]  # by age over 65
    findings: Sequence[str]
    impressions: Sequence[str]
    plans: Sequence[str]


def _cases(condition: Condition, write: Callable[[str], Sequence[str]]) -> list[_Case]:
    """Part a condition into the diseases it names, where some of its items belong to one name only."""
    names = write(condition.names)
    lists = []
    for items in (condition.complaints, condition.findings, condition.drugs, condition.plans):
        lists.append(write(items))
    if not any("# " in item for items in lists for item in items):
        return [_Case(condition.ages, names, *lists)]
    cases: list[_Case] = []
    for number, name in enumerate(names, start=1):
        cases.append(
            _Case(
                condition.ages,
                [name],
                *([_untagged(item) for item in items if _belongs(item, number)] for items in lists),
            )
        )
    return cases


def _belongs(item: str, number: int) -> bool:
    tag, mark, _ = item.partition("# ")
    return not mark or str(number) in tag


def _untagged(item: str) -> str:
    return item.partition("# ")[2] or item


def _words(house: House, *, short: bool) -> _Words:
    write = writer(house, short=short)
    return _Words(
        cases={
            label: [case for condition in conditions for case in _cases(condition, write)]
            for label, conditions in SPECIALTIES.items()
        },
        shared={
            label: [write(phrase)[0] for phrase, where in SHARED_COMPLAINTS if label in where.split()]
            for label in SPECIALTIES
        },
        background=[(write(disease)[0], age, write(drugs)) for disease, age, drugs in BACKGROUND],
        routine=write(ROUTINE),
        social={False: write(f"{SOCIAL} | {SOCIAL_YOUNGER}"), True: write(f"{SOCIAL} | {SOCIAL_OLDER}")},
        findings=write(GENERAL_FINDINGS),
        impressions=write(GENERAL_IMPRESSIONS),
        plans=write(GENERAL_PLANS),
    )


class _Desk:
    """Where one hospital's notes are written."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.words = (_words(house, short=False), _words(house, short=True))

    def note(self, label: str, patient: _Patient, unit: Unit, *, with_age: bool) -> str:
        """Write one note, without personal facts."""
        words = self.words[unit() < self.house.brevity]
        case = _pick(words.cases[label], unit)
        age = case.ages[0] + int(patient.position * (case.ages[1] - case.ages[0] + 1))
        sections = _contents(words, label, case, age, unit, social=self.house.social)
        sections["who"] = [_who(patient, age if with_age else None, unit)]
        text = _filled(self._laid_out(sections, unit), unit)
        if self.house.lower:
            return text.lower()
        return text

    def _laid_out(self, sections: Mapping[str, Sequence[str]], unit: Unit) -> str:
        layout = self.house.layout
        lines = []
        for name in layout.order:
            items = sections[name]
            if items:
                opener = ""
                if name == "history":
                    opener = _pick(layout.openers, unit)
                lines.append(layout.headings[name] + opener + layout.item.join(items))
        return layout.section.join(lines).replace(" . ", ". ")


def _contents(
    words: _Words, label: str, case: _Case, age: int, unit: Unit, *, social: float
) -> dict[str, Sequence[str]]:
    """Choose what a note says: a clear one names its disease, a sparse or busy one leaves the reader to
    guess.
    """
    draw, clarity = unit(), 0
    while draw > _CLARITY[clarity][0] and clarity < len(_CLARITY) - 1:
        draw -= _CLARITY[clarity][0]
        clarity += 1
    _, complaints, shared, findings, drugs, named, plans, others = _CLARITY[clarity]
    history = _some(case.complaints, complaints, unit) + _some(words.shared[label], shared, unit)
    older = []
    for entry in words.background:
        if entry[1] <= age:
            older.append(entry)
    elsewhere = []
    for place in _some(range(len(older)), others, unit):
        elsewhere.append(older[place])
    medication = _some(case.drugs, drugs, unit) + [
        _pick(drugs_elsewhere, unit) for _, _, drugs_elsewhere in elsewhere if unit() < 0.6
    ]
    return {
        "history": history or _some(words.routine, 1.0, unit),
        "background": [entry[0] for entry in elsewhere] + _some(words.social[age > 65], social, unit),
        "drugs": tuple(dict.fromkeys(medication)),
        "exam": _some(words.findings, 1.2, unit) + _some(case.findings, findings, unit),
        "impression": _some(case.names, named, unit) or _some(words.impressions, 0.4, unit),
        "plan": _some(case.plans, plans, unit) + _some(words.plans, 0.9, unit),
    }


def _who(patient: _Patient, age: int | None, unit: Unit) -> str:
    """Say age and sex; beside a planted birth date, which lies in the 19th century, only the sex."""
    if age is None:
        if patient.woman:
            return "Woman"
        return "Man"
    if unit() < 0.5:
        return f"{age}{'F' if patient.woman else 'M'}"
    return f"{age} year old {'woman' if patient.woman else 'man'}"


@dataclass(frozen=True, slots=True)
class _Patient:
    """A person who does not exist; the same facts are planted in all notes of a patient that carry any."""

    key: str
    woman: bool
    position: float  # where in a condition's range of ages this patient lies
    facts: Mapping[str, str]


def _make_patient(key: str, house: House, unit: Unit) -> _Patient:
    def person() -> str:
        return f"{_pick(_FIRST, unit)} {_pick(_SURNAME[0], unit)}{_pick(_SURNAME[1], unit)}"

    day, month, year = 1 + int(unit() * 28), 1 + int(unit() * 12), 1860 + int(unit() * 40)
    last = int(unit() * 100)
    birth = f"{day:02d}/{month:02d}/{year}"
    if house.american:
        birth = f"{month:02d}/{day:02d}/{year}"
    facts = {
        "name": person(),
        "relative": person(),
        "record": f"ZX{house.name[:2].upper()}-{key[0].upper()}{int(key[1:]):06d}{int(unit() * 100):02d}",
        "birth": birth,
        "phone": f"({201 + int(unit() * 780)}) 555-01{last:02d}"
        if house.american
        else f"07700 900{last + 100 * int(unit() * 10):03d}",
        "address": (
            f"{1 + int(unit() * 299)} {_pick(_STREETS, unit)} {_pick(_WAYS, unit)}, {_pick(_TOWNS, unit)}"
        ),
    }
    return _Patient(key, unit() < 0.52, unit(), facts)


def _write_part(
    desks: Sequence[_Desk],
    homes: NDArray[np.int64],
    labels: NDArray[np.int64],
    *,
    prefix: str,
    chosen: Mapping[str, int],
    written: set[str],
) -> dict[str, Any]:
    """Write one note per row; a text that was written before is written anew."""
    unit, names = random.Random(f"{prefix}{chosen['seed']}").random, tuple(SPECIALTIES)
    patients: list[list[_Patient]] = []
    for _ in desks:
        patients.append([])
    texts, keys, facts, count = [], [], [], 0
    for home, label in zip(homes.tolist(), labels.tolist()):
        known = patients[home]
        if not known or unit() < 0.45:
            patient = _make_patient(f"{prefix}{count}", desks[home].house, unit)
            known.append(patient)
            count += 1
        else:
            patient = _pick(known, unit)
        planted = unit() < chosen["facts"] / 100
        text, note_facts = _distinct(
            desks[home], names[label], patient, unit, planted=planted, written=written
        )
        texts.append(text)
        facts.append(json.dumps([[fact.kind, fact.value, *fact.span] for fact in note_facts]))
        keys.append(patient.key)
    hospitals = []
    for home in homes.tolist():
        hospitals.append(desks[home].house.name)
    return {"text": texts, "label": labels, "hospital": hospitals, "patient": keys, "facts": facts}


def _distinct(
    desk: _Desk, label: str, patient: _Patient, unit: Unit, *, planted: bool, written: set[str]
) -> tuple[str, tuple[Fact, ...]]:
    for _ in range(1000):
        note = desk.note(label, patient, unit, with_age=not planted)
        if planted:
            text, facts = _plant(note, patient, unit)
        else:
            text, facts = (note, ())
        if text not in written:
            written.add(text)
            return text, facts
    raise DataError("builtin:clinic_notes: size is too large for distinct notes; ask for fewer")


def _plant(note: str, patient: _Patient, unit: Unit) -> tuple[str, tuple[Fact, ...]]:
    """Put a line with personal facts before the note, or one after it, or both."""
    where = unit()
    if where < 0.7:
        before, head = _stated(_pick(_HEADS, unit), patient, 0)
    else:
        before, head = ("", ())
    if before:
        start = before + "\n" + note
    else:
        start = note
    if where > 0.45:
        after, tail = _stated(_pick(_TAILS, unit), patient, len(start) + 1)
    else:
        after, tail = ("", ())
    return (f"{start}\n{after}" if after else start), head + tail


@cache
def _pieces(template: str) -> tuple[tuple[str, str], ...]:
    return tuple(re.findall(r"([^{]*)\{(\w+)\}", template))


def _stated(template: str, patient: _Patient, offset: int) -> tuple[str, tuple[Fact, ...]]:
    text, facts = "", []
    for words, kind in _pieces(template):
        text += words
        value = patient.facts[kind]
        facts.append(Fact(kind, value, (offset + len(text), offset + len(text) + len(value))))
        text += value
    return text, tuple(facts)
