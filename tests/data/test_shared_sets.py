"""Every real data set beside the repository loads and deals; figures are those of their own descriptions."""

from __future__ import annotations

import numpy as np
import pytest

from ffm_secure.data.dataset import load
from ffm_secure.data.partition import partition
from ffm_secure.errors import DataError

pytestmark = pytest.mark.assets

SETS = {  # kind, train rows, validation rows, text columns, classes, a natural column
    "ag_news_subset": ("text_classification", 9991, 3800, ("text",), 4, None),
    "banking77": ("text_classification", 9990, 1539, ("text",), 77, None),
    "cifar10": ("image_classification", 10000, 2500, (), 10, None),
    "cifar100": ("image_classification", 8000, 2000, (), 100, None),
    "enron_sentences": ("masked_lm", 25408, 3176, ("text",), None, None),
    "flowers102_64px": ("image_classification", 6552, 818, (), 102, None),
    "glue_cola": ("text_classification", 8538, 521, ("sentence",), 2, "source"),
    "glue_mnli_subset": ("text_classification", 1197, 400, ("premise", "hypothesis"), 3, "genre_split"),
    "glue_mrpc": ("text_classification", 4073, 863, ("sentence1", "sentence2"), 2, None),
    "glue_qqp_subset": ("text_classification", 14845, 2500, ("question1", "question2"), 2, None),
    "glue_rte": ("text_classification", 2490, 139, ("sentence1", "sentence2"), 2, None),
    "glue_sst2": ("text_classification", 67349, 436, ("sentence",), 2, None),
    "gsm8k": ("causal_lm", 7473, 660, ("question+answer",), None, None),
    "medical_abstracts": ("text_classification", 1850, 503, ("text",), 5, None),
    "medical_transcriptions": ("text_classification", 246, 123, ("text",), 4, None),
    "medquad": ("masked_lm", 12862, 1663, ("question+answer",), None, "source"),
    "mnist": ("image_classification", 30000, 5000, (), 10, None),
    "natural_instructions_fed": ("causal_lm", 76200, 6466, ("instruction+input+output",), None, "client_id"),
    "nc_alpaca_5k": ("causal_lm", 4200, 400, ("instruction+input+output",), None, None),
    "nc_financial_phrasebank": ("text_classification", 3438, 700, ("sentence",), 3, None),
    "newsgroups20": ("text_classification", 11291, 3749, ("text",), 20, "group"),
    "shakespeare_speakers": ("causal_lm", 6358, 354, ("text",), None, "speaker"),
    "twitter_financial_topic": ("text_classification", 12989, 2000, ("text",), 20, None),
    "wikitext2_valid_test": ("causal_lm", 60, 31, ("text",), None, None),
}


@pytest.mark.parametrize("name", SETS)
def test_set_loads_with_its_columns_and_deals(shared, name):
    kind, rows, held_out, texts, classes, natural = SETS[name]
    data = load(name, kind=kind, base=shared / "data", seed=0)
    assert (len(data.train), len(data.validation)) == (rows, held_out)
    assert data.text_columns == texts
    assert data.license_note != "not stated"
    if classes is not None:
        assert len(data.label_names) == classes
        labels = np.concatenate([data.train.labels, data.validation.labels])
        assert (labels.dtype, labels.min(), len(np.unique(labels))) == (np.int64, 0, classes)
        split = {"kind": "dirichlet", "alpha": 0.3}
    else:
        assert data.label_names is None
        split = {"kind": "quantity"}
    if kind == "image_classification":
        images = data.train.column(data.image_column)
        assert images.dtype == np.uint8
        assert images.shape[3] == 3
        assert images.std() > 30
    if natural is not None:
        assert natural in data.natural_columns
        assert (
            len(partition(data.train, clients=2, split={"kind": "natural", "column": natural}, seed=0)) == 2
        )
    parts = partition(data.train, clients=20, split=split, seed=0)
    assert sum(map(len, parts)) == rows


def test_class_names_survive_the_metadata(shared):
    data = load("cifar10/validation.parquet", kind="image_classification", base=shared / "data", seed=0)
    assert data.label_names[:3] == ("airplane", "automobile", "bird")
    data = load("banking77/validation.parquet", kind="text_classification", base=shared / "data", seed=0)
    assert data.label_names[0] == "card_arrival"


def test_natural_clients_of_medquad_are_its_sources_by_column_label_too(shared):
    data = load("medquad", kind="text_classification", base=shared / "data", seed=0, label_column="source")
    assert data.label_names[0].startswith("1_") or len(data.label_names) == 9
    with pytest.raises(DataError, match="set label_column"):
        load("medquad", kind="text_classification", base=shared / "data", seed=0)
