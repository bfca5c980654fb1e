"""The drawn data sets: seeded, apart by owner, neither trivial nor impossible."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from ffm_secure.data.builtin_sets import load_builtin
from ffm_secure.data.dataset import load
from ffm_secure.data.generated import payments, road_scenes, typed_messages
from ffm_secure.errors import DataError

SETS = {
    "payments": ("builtin:payments?size=600&validation=200", "text_classification"),
    "road_scenes": ("builtin:road_scenes?size=600&validation=200", "image_classification"),
    "typed_messages": ("builtin:typed_messages?devices=8&messages=20&validation=60", "causal_lm"),
}


def same(left: object, right: object) -> bool:
    return bool(np.array_equal(np.asarray(left), np.asarray(right)))


@pytest.mark.parametrize("name", sorted(SETS))
def test_the_same_options_give_the_same_rows_and_another_seed_others(name: str) -> None:
    source, _ = SETS[name]
    first, _, licence = load_builtin(source)
    again, _, _ = load_builtin(source)
    other, _, _ = load_builtin(f"{source}&seed=1")
    column = "image" if "image" in first.columns else "text"
    assert same(first.columns[column], again.columns[column])
    assert not same(first.columns[column], other.columns[column])
    assert "invented" in licence


@pytest.mark.parametrize("name", sorted(SETS))
def test_a_task_reads_them(name: str) -> None:
    source, kind = SETS[name]
    data = load(source, kind=kind, base=Path("."), seed=0)
    assert len(data.train) > 100
    assert len(data.validation) >= 60


@pytest.mark.parametrize("name", sorted(SETS))
def test_wrong_options_are_named_all_at_once(name: str) -> None:
    with pytest.raises(DataError) as refusal:
        load_builtin(f"builtin:{name}?wheels=3&validation=0")
    assert "no option 'wheels'" in str(refusal.value)
    assert "validation = 0" in str(refusal.value)


def test_no_owner_person_is_in_both_parts() -> None:
    train, validation, _ = payments.payments({"size": 600, "validation": 200})
    assert not set(np.asarray(train["customer"])) & set(np.asarray(validation["customer"]))
    typed, others = typed_messages.typed_messages({"devices": 8, "messages": 10, "validation": 35})
    assert not set(np.asarray(typed["device"])) & set(np.asarray(others["device"]))
    assert len(np.asarray(others["text"])) == 35


def test_frauds_are_learned_from_words_but_not_perfectly() -> None:
    train, validation, names = payments.payments({"size": 3000, "validation": 1000})
    vectorizer = TfidfVectorizer()
    model = LogisticRegression(max_iter=300).fit(vectorizer.fit_transform(train["text"]), train["label"])
    accuracy = model.score(vectorizer.transform(validation["text"]), validation["label"])
    majority = max(np.bincount(np.asarray(validation["label"]))) / 1000
    assert names == ("genuine", "fraud")
    assert majority + 0.15 < accuracy < 0.99


def test_road_users_are_told_apart_by_their_pixels_better_than_chance() -> None:
    train, validation, names = road_scenes.road_scenes({"size": 1200, "validation": 300})
    pixels, labels = np.asarray(train["image"]), np.asarray(train["label"])
    assert pixels.shape == (1200, 32, 32, 3)
    assert pixels.dtype == np.uint8
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
    model.fit(pixels[:, ::2, ::2].reshape(1200, -1) / 255, labels)
    others = np.asarray(validation["image"])[:, ::2, ::2].reshape(300, -1) / 255
    accuracy = model.score(others, np.asarray(validation["label"]))
    assert 1.5 / len(names) < accuracy < 0.99


def test_devices_have_habits_of_their_own() -> None:
    train, _ = typed_messages.typed_messages({"devices": 6, "messages": 200, "validation": 10})
    texts, devices = np.asarray(train["text"]), np.asarray(train["device"])
    commonest = set()
    for device in np.unique(devices):
        words, counts = np.unique([text.split()[0] for text in texts[devices == device]], return_counts=True)
        commonest.add(words[np.argmax(counts)])
    assert len(commonest) > 1
