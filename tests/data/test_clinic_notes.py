"""The clinic notes: distinct, seeded, uneven, neither trivial nor impossible,
with facts exactly where they are said to be.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from ffm_secure.data.clinic_notes.hospitals import (
    BACKGROUND,
    LABS,
    LAYOUTS,
    SECTIONS,
    SHARED_COMPLAINTS,
    make_house,
    writer,
)
from ffm_secure.data.clinic_notes.notes import OPTIONS, SPECIALTIES, clinic_notes, planted_facts
from ffm_secure.data.dataset import Dataset, load

KINDS = {
    "name": r"[A-Z][a-z]+ [A-Z][a-z]+",
    "relative": r"[A-Z][a-z]+ [A-Z][a-z]+",
    "record": r"ZX[A-Z]{2}-[PV]\d{8}",
    "birth": r"\d\d/\d\d/18[6-9]\d",
    "phone": r"07700 900\d{3}|\(\d{3}\) 555-01\d\d",
    "address": r"\d{1,3} [\w-]+ \w+, \w+",
}


@pytest.fixture(scope="module")
def notes() -> Dataset:
    return load("builtin:clinic_notes", kind="text_classification", base=Path("."), seed=0)


def small(**options: int):
    return clinic_notes({"size": 1500, "validation": 150, **options})


def test_twenty_thousand_notes_and_more_all_distinct(notes):
    texts = [*notes.train.column("text"), *notes.validation.column("text")]
    assert (len(notes.train), len(notes.validation)) == (24_000, 2_400)
    assert len(set(texts)) == 26_400
    # Distinct beyond numbers, names and case.
    assert len({re.sub(r"[\d./]+", "#", text.lower()) for text in texts}) > 26_000
    assert max(map(len, texts)) < 700


def test_generation_is_quick():
    started = time.process_time()
    clinic_notes({})
    assert (
        time.process_time() - started < 3.0 * 2
    )  # seconds of processor time; doubled for slow shared machines


def test_the_seed_decides_and_the_run_s_seed_does_not():
    assert small()[0]["text"] == small()[0]["text"]
    assert len(set(small()[0]["text"]) & set(small(seed=1)[0]["text"])) < 15
    one, two = (
        load("builtin:clinic_notes?size=200&validation=20", kind="causal_lm", base=Path("."), seed=seed)
        for seed in (1, 2)
    )
    assert one.train.column("text") == two.train.column("text")


def test_hospitals_differ_in_size_labels_and_wording(notes):
    hospitals = np.array(notes.train.column("hospital"))
    names, sizes = np.unique(hospitals, return_counts=True)
    assert len(names) == 8
    assert sizes.max() > 2 * sizes.min()
    table = np.array([np.bincount(notes.train.labels[hospitals == name], minlength=10) for name in names])
    assert stats.chi2_contingency(table).pvalue < 1e-12
    assert table.min() > 0
    assert len(SPECIALTIES) == len(notes.label_names) == 10
    texts = np.array(notes.train.column("text"), dtype=object)
    model = bag_of_words(texts[:4000], hospitals[:4000])
    assert model(texts[4000:5000], hospitals[4000:5000]) > 0.8  # majority: about 0.22


def bag_of_words(texts, labels):
    words = TfidfVectorizer(min_df=2, sublinear_tf=True)
    model = LogisticRegression(C=10, max_iter=300).fit(words.fit_transform(texts), labels)
    return lambda others, truth: float((model.predict(words.transform(others)) == truth).mean())


def test_words_alone_help_but_do_not_settle_the_specialty(notes):
    train, rest = notes.train.take(range(3000)), notes.validation
    score = bag_of_words(train.column("text"), train.labels)(rest.column("text"), rest.labels)
    assert 0.75 < score < 0.97
    assert np.bincount(rest.labels).max() / len(rest) < 0.2


def test_planted_facts_are_where_they_are_said_to_be(notes):
    train = notes.train
    planted = 0
    kinds = set()
    for text, stored in zip(train.column("text"), train.column("facts"), strict=True):
        facts = planted_facts({"text": text, "facts": stored})
        planted += bool(facts)
        for fact in facts:
            assert text[slice(*fact.span)] == fact.value
            assert re.fullmatch(KINDS[fact.kind], fact.value), fact
            kinds.add(fact.kind)
    assert kinds == set(KINDS)
    assert stats.binomtest(planted, len(train), 0.15).pvalue > 1e-3
    assert stats.binomtest(planted, len(train), 0.16).pvalue < 0.05


def test_notes_without_facts_hold_none(notes):
    marks = re.compile(rf"{KINDS['record']}|{KINDS['birth']}|{KINDS['phone']}|Exampleton|Testbury|Mockhaven")
    for text, stored in zip(notes.train.column("text"), notes.train.column("facts"), strict=True):
        assert (stored == "[]") == (not planted_facts(stored))
        if stored == "[]":
            assert not marks.search(text)


def test_the_share_of_notes_with_facts_is_an_option():
    assert set(small(facts=0)[0]["facts"]) == {"[]"}
    assert "[]" not in small(facts=100)[0]["facts"]


def test_a_patient_stays_in_one_hospital_and_one_part_and_keeps_the_same_facts(notes):
    homes: dict[str, set[str]] = {}
    values: dict[tuple[str, str], set[str]] = {}
    for part in (notes.train, notes.validation):
        for patient, hospital, stored in zip(
            *map(part.column, ("patient", "hospital", "facts")), strict=True
        ):
            homes.setdefault(patient, set()).add(hospital)
            for fact in planted_facts(stored):
                values.setdefault((patient, fact.kind), set()).add(fact.value)
    assert all(len(hospitals) == 1 for hospitals in homes.values())
    assert all(len(known) == 1 for known in values.values())
    assert not set(notes.train.column("patient")) & set(notes.validation.column("patient"))
    records = [value for (_, kind), found in values.items() if kind == "record" for value in found]
    assert len(set(records)) == len(records)
    assert 1.8 < len(notes.train) / len(set(notes.train.column("patient"))) < 2.8


def test_more_hospitals_can_be_asked_for():
    train, _, _ = small(hospitals=20)
    assert len(set(train["hospital"])) == 20
    assert OPTIONS["hospitals"][0] == 8


def test_no_markup_of_the_vocabulary_reaches_a_note(notes):
    for text in (*notes.train.column("text"), *notes.validation.column("text")):
        assert not re.search(r"[{}|]|\d+# |<[a-z_]+>", text), text


@pytest.mark.parametrize("label", SPECIALTIES)
@pytest.mark.parametrize("index", range(8))
def test_every_disease_has_something_to_say_in_every_hospital(label, index):
    from ffm_secure.data.clinic_notes.notes import _cases

    house = make_house(index, np.random.Generator(np.random.PCG64(index)).random)
    for short in (False, True):
        for condition in SPECIALTIES[label]:
            for case in _cases(condition, writer(house, short=short)):
                for field in ("complaints", "findings", "drugs", "plans"):
                    items = getattr(case, field)
                    assert len(items) >= 2, (case.names, field, items)
                    assert all(item == item.strip() and item for item in items)


def test_the_shared_phrases_name_real_specialties_and_layouts_every_section():
    for _, where in SHARED_COMPLAINTS:
        assert set(where.split()) <= set(SPECIALTIES)
    assert all(len(units.split(" | ")) == 2 for units in LABS.values())
    assert all(sorted(layout.order) == sorted(SECTIONS) for layout in LAYOUTS)
    assert len({disease for disease, _, _ in BACKGROUND}) == len(BACKGROUND)
