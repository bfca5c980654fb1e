"""Partitions: nothing lost, nothing shared, and every kind follows the law it claims, checked both ways."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ffm_secure.config.run_file import Split
from ffm_secure.data.dataset import Examples
from ffm_secure.data.partition import apply_shift, client_examples, feature_shifts, partition
from ffm_secure.errors import DataError


def labelled(labels, **columns) -> Examples:
    return Examples(columns={"label": np.asarray(labels, dtype=np.int64), **columns}, label_column="label")


def balanced(classes: int, per_class: int) -> Examples:
    return labelled(np.repeat(np.arange(classes), per_class))


def deal(examples, clients, seed, **split):
    return partition(examples, clients=clients, split=split, seed=seed)


SPLITS = st.one_of(
    st.just({"kind": "iid"}),
    st.builds(
        lambda a, m: {"kind": "dirichlet", "alpha": a, "min_size": m}, st.floats(1e-6, 1e4), st.integers(0, 2)
    ),
    st.builds(lambda a: {"kind": "quantity", "alpha": a}, st.floats(1e-6, 1e4)),
    st.builds(lambda s: {"kind": "quantity", "distribution": "lognormal", "sigma": s}, st.floats(0, 10)),
    st.builds(lambda n: {"kind": "shards", "shards_per_client": n}, st.integers(1, 3)),
    st.just({"kind": "feature_shift"}),
)


@settings(max_examples=150, deadline=None)
@given(
    labels=st.lists(st.integers(0, 5), min_size=1, max_size=80),
    clients=st.integers(1, 25),
    seed=st.integers(0, 2**31),
    split=SPLITS,
)
def test_every_row_goes_to_exactly_one_client_and_the_seed_decides(labels, clients, seed, split):
    examples = labelled(labels)
    needed = clients * max(split.get("min_size", 1), split.get("shards_per_client", 1), 1)
    if needed > len(labels):
        with pytest.raises(DataError):
            deal(examples, clients if clients > len(labels) else len(labels) + 1, seed, **split)
        return
    parts = deal(examples, clients, seed, **split)
    assert len(parts) == clients
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    assert all((np.diff(part) > 0).all() for part in parts)
    assert min(map(len, parts)) >= split.get("min_size", 1)
    assert sorted(np.concatenate([examples.take(part).labels for part in parts]).tolist()) == sorted(labels)
    again = deal(examples, clients, seed, **split)
    assert all((one == two).all() for one, two in zip(parts, again, strict=True))


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "quantity", "shards"])
def test_another_seed_deals_differently(kind):
    examples = balanced(5, 40)
    parts, others = deal(examples, 4, 1, kind=kind), deal(examples, 4, 2, kind=kind)
    assert any(len(one) != len(two) or (one != two).any() for one, two in zip(parts, others, strict=True))


def first_client_shares(alpha: float, *, draws: int, classes: int = 10, clients: int = 5, rows: int = 2000):
    examples = balanced(classes, rows)
    shares = []
    for seed in range(draws):
        mine = deal(examples, clients, seed, kind="dirichlet", alpha=alpha, min_size=0)[0]
        shares.extend(np.bincount(examples.labels[mine], minlength=classes) / rows)
    return np.array(shares)


@pytest.mark.parametrize("alpha", [1.0, 5.0])
def test_dirichlet_shares_have_the_claimed_law_and_no_other(alpha):
    # One coordinate of Dirichlet(alpha, ..., alpha) over N clients is Beta(alpha, (N - 1) alpha).
    shares = first_client_shares(alpha, draws=200)
    assert stats.kstest(shares, stats.beta(alpha, 4 * alpha).cdf).pvalue > 1e-3
    for wrong in (alpha / 1.6, alpha * 1.6):
        assert stats.kstest(shares, stats.beta(wrong, 4 * wrong).cdf).pvalue < 1e-4


@pytest.mark.parametrize("alpha", [0.1, 0.3, 1.0, 10.0])
def test_dirichlet_shares_have_the_claimed_mean_and_variance(alpha):
    shares = first_client_shares(alpha, draws=200, rows=1000)
    variance = (1 / 5) * (4 / 5) / (5 * alpha + 1)
    spread = np.std((shares - shares.mean()) ** 2) / np.sqrt(len(shares))
    assert abs(shares.mean() - 0.2) < 4 * np.sqrt(variance / len(shares))
    assert abs(shares.var() - variance) < 4 * spread
    wrong = (1 / 5) * (4 / 5) / (5 * 1.5 * alpha + 1)
    assert abs(shares.var() - wrong) > 4 * spread


def label_table(examples, parts):
    return np.array([np.bincount(examples.labels[part], minlength=10) for part in parts])


def test_iid_labels_are_independent_of_clients_and_skewed_ones_are_not():
    examples = balanced(10, 200)
    honest = [
        stats.chi2_contingency(label_table(examples, deal(examples, 8, s, kind="iid")))[1] for s in range(200)
    ]
    assert stats.kstest(honest, "uniform").pvalue > 1e-3
    skewed = [
        stats.chi2_contingency(label_table(examples, deal(examples, 8, s, kind="dirichlet", alpha=5.0)))[1]
        for s in range(20)
    ]
    assert max(skewed) < 1e-3


def test_iid_sizes_differ_by_at_most_one():
    assert sorted(map(len, deal(balanced(1, 103), 10, 0, kind="iid"))) == [10] * 7 + [11] * 3


def test_quantity_sizes_have_the_claimed_law_and_labels_stay_iid():
    examples = balanced(10, 2000)
    runs = [deal(examples, 5, seed, kind="quantity", alpha=2.0) for seed in range(500)]
    sizes = np.array([len(parts[0]) for parts in runs]) / len(examples)
    assert stats.kstest(sizes, stats.beta(2, 8).cdf).pvalue > 1e-3
    assert stats.kstest(sizes, stats.beta(4, 16).cdf).pvalue < 1e-4
    p_values = [stats.chi2_contingency(label_table(examples, parts))[1] for parts in runs]
    assert stats.kstest(p_values, "uniform").pvalue > 1e-3


def test_lognormal_sizes_have_the_claimed_spread():
    examples = balanced(1, 20_000)
    runs = [deal(examples, 4, s, kind="quantity", distribution="lognormal", sigma=0.5) for s in range(400)]
    ratios = np.array([np.log(len(parts[0]) / len(parts[1])) for parts in runs])
    assert stats.kstest(ratios, stats.norm(0, 0.5 * np.sqrt(2)).cdf).pvalue > 1e-3
    assert stats.kstest(ratios, stats.norm(0, 0.8 * np.sqrt(2)).cdf).pvalue < 1e-4


def test_shards_bound_the_labels_of_a_client_and_iid_does_not():
    examples = balanced(10, 100)
    parts = deal(examples, 20, 3, kind="shards", shards_per_client=2)
    assert {len(part) for part in parts} == {50}
    assert max(len(np.unique(examples.labels[part])) for part in parts) <= 2
    assert min(len(np.unique(examples.labels[part])) for part in deal(examples, 20, 3, kind="iid")) > 2


def test_shards_are_drawn_without_preference():
    # With two labels and two shards each, a client holds one label only with probability 2 * (2/4 * 1/3) =
    # 1/3.
    examples = balanced(2, 20)
    pure = sum(
        len(np.unique(examples.labels[deal(examples, 2, s, kind="shards", shards_per_client=2)[0]])) == 1
        for s in range(600)
    )
    assert stats.binomtest(pure, 600, 1 / 3).pvalue > 1e-3
    assert stats.binomtest(pure, 600, 1 / 2).pvalue < 1e-4


HOSPITALS = labelled(
    np.arange(100) % 3, hospital=["a"] * 40 + ["b"] * 30 + ["c"] * 15 + ["d"] * 10 + ["e"] * 5
)


def test_natural_clients_are_the_groups_in_order_of_their_names():
    parts = deal(HOSPITALS, 5, 0, kind="natural", column="hospital")
    for name, part in zip("abcde", parts, strict=True):
        assert HOSPITALS.take(part).column("hospital") == [name] * len(part)
    assert sum(map(len, parts)) == 100


@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(st.integers(0, 9), min_size=1, max_size=60),
    seed=st.integers(0, 2**31),
    mode=st.sampled_from(["merge", "largest"]),
    data=st.data(),
)
def test_natural_never_cuts_a_group_and_keeps_the_largest(groups, seed, mode, data):
    examples = labelled(groups, owner=np.array(groups))
    names, counts = np.unique(groups, return_counts=True)
    clients = data.draw(st.integers(1, len(names)))
    parts = deal(examples, clients, seed, kind="natural", column="owner", groups=mode)
    homes = [set(np.array(groups)[part].tolist()) for part in parts]
    assert sum(map(len, homes)) == len(set().union(*homes))
    rows = sum(map(len, parts))
    assert rows == (len(groups) if mode == "merge" else np.sort(counts)[::-1][:clients].sum())


def test_merged_groups_choose_their_client_uniformly():
    homes = []
    for seed in range(400):
        parts = deal(HOSPITALS, 3, seed, kind="natural", column="hospital")
        homes.append(next(i for i, part in enumerate(parts) if 99 in part))
    counts = np.bincount(homes, minlength=3)
    assert stats.chisquare(counts).pvalue > 1e-3
    assert stats.chisquare(counts, 400 * np.array([0.5, 0.3, 0.2])).pvalue < 1e-4


def grey(rows: int = 40) -> Examples:
    return labelled(np.arange(rows) % 2, image=np.full((rows, 16, 16, 3), 128, dtype=np.uint8))


def test_feature_shift_grows_in_equal_steps_and_leaves_labels_alone():
    split = {"kind": "feature_shift", "transform": "noise", "strength": 30.0}
    assert [shift.strength for shift in feature_shifts(clients=4, split=split)] == [0.0, 10.0, 20.0, 30.0]
    parts = client_examples(grey(), clients=4, split=split, seed=5)
    dealt = partition(grey(), clients=4, split=split, seed=5)
    for step, (part, rows) in enumerate(zip(parts, dealt, strict=True)):
        assert (part.labels == grey().labels[rows]).all()
        noise = part.column("image").astype(float) - 128
        assert abs(noise.std() - 10.0 * step) < 0.4 + 1e-9
    again = client_examples(grey(), clients=4, split=split, seed=5)
    assert all((a.column("image") == b.column("image")).all() for a, b in zip(parts, again, strict=True))


def test_rotation_by_a_right_angle_is_the_exact_rotation():
    pixels = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (3, 9, 9, 3)).astype(np.uint8)
    shift = feature_shifts(
        clients=1, split={"kind": "feature_shift", "transform": "rotation", "strength": 90.0}
    )[0]
    turned = apply_shift(labelled([0, 1, 2], image=pixels), shift, seed=0).column("image")
    assert (turned == np.rot90(pixels, axes=(1, 2))).all() or (
        turned == np.rot90(pixels, -1, axes=(1, 2))
    ).all()
    assert not (turned == pixels).all()


def test_brightness_scales_and_clips():
    shift = feature_shifts(
        clients=1, split={"kind": "feature_shift", "transform": "brightness", "strength": 1.5}
    )[0]
    assert (apply_shift(grey(2), shift, seed=0).column("image") == 192).all()


def test_token_dropout_loses_the_claimed_share_of_words():
    texts = [" ".join(["word"] * 100)] * 100
    examples = Examples(columns={"text": texts, "note": ["two words"] * 100}, text_columns=("text",))
    shift = feature_shifts(
        clients=1, split={"kind": "feature_shift", "transform": "token_dropout", "strength": 0.3}
    )[0]
    dropped = apply_shift(examples, shift, seed=1)
    kept = sum(len(text.split()) for text in dropped.column("text"))
    assert stats.binomtest(kept, 10_000, 0.7).pvalue > 1e-3
    assert stats.binomtest(kept, 10_000, 0.75).pvalue < 1e-4
    assert dropped.column("note") == ["two words"] * 100


@pytest.mark.parametrize(
    ("clients", "split", "message"),
    [
        (101, {"kind": "iid"}, "clients = 101: must lie between 1 and the 100 rows"),
        (0, {"kind": "iid"}, "clients = 0"),
        (5, {"kind": "iidd"}, "split.kind = 'iidd': must be one of iid"),
        (5, {}, "split.kind = None"),
        (5, {"kind": "dirichlet", "alpa": 1}, "split.alpa: unknown option; did you mean 'alpha'"),
        (5, {"kind": "dirichlet", "alpha": 0}, "split.alpha = 0"),
        (5, {"kind": "dirichlet", "alpha": float("nan")}, "split.alpha = nan"),
        (5, {"kind": "dirichlet", "alpha": True}, "split.alpha = True"),
        (5, {"kind": "dirichlet", "min_size": 21}, "5 clients would need 105 rows"),
        (5, {"kind": "shards", "shards_per_client": 21}, "5 clients need 105 shards"),
        (5, {"kind": "shards", "shards_per_client": 1.5}, "must be a whole number"),
        (6, {"kind": "natural", "column": "hospital"}, "has only 5 groups"),
        (5, {"kind": "natural", "column": "hospital", "min_size": 6}, "group 'e' has 5 rows"),
        (2, {"kind": "natural"}, "split.column: missing"),
        (2, {"kind": "natural", "column": "ward"}, "no column 'ward'; there are 'label', 'hospital'"),
        (2, {"kind": "natural", "column": "hospital", "groups": "split"}, "must be one of merge, largest"),
        (2, {"kind": "feature_shift", "transform": "token_dropout", "strength": 2.0}, "lies between 0 and 1"),
    ],
)
def test_impossible_requests_name_the_bound(clients, split, message):
    with pytest.raises(DataError, match=message.replace("(", r"\(")):
        partition(HOSPITALS, clients=clients, split=split, seed=0)


def test_a_split_without_its_column_says_so():
    bare = Examples(columns={"text": ["a", "b"]})
    with pytest.raises(DataError, match="has no labels"):
        partition(bare, clients=2, split={"kind": "dirichlet"}, seed=0)
    with pytest.raises(DataError, match="no picture column"):
        client_examples(bare, clients=2, split={"kind": "feature_shift"}, seed=0)
    mixed = Examples(columns={"owner": ["a", None]})
    with pytest.raises(DataError, match="row 1 of column 'owner' holds nothing"):
        partition(mixed, clients=1, split={"kind": "natural", "column": "owner"}, seed=0)


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "quantity", "shards", "natural", "feature_shift"])
def test_the_run_file_s_split_means_the_same_as_a_mapping(kind):
    split = Split(kind=kind, column="hospital")
    from_file = partition(HOSPITALS, clients=5, split=split, seed=4)
    by_hand = {"kind": kind, **({"column": "hospital"} if kind == "natural" else {})}
    mapped = partition(HOSPITALS, clients=5, split=by_hand, seed=4)
    assert all((one == two).all() for one, two in zip(from_file, mapped, strict=True))


def test_ten_thousand_clients_are_dealt_in_reasonable_time():
    parts = deal(balanced(10, 5000), 10_000, 0, kind="dirichlet", alpha=0.05)
    assert min(map(len, parts)) == 1
    assert sum(map(len, parts)) == 50_000
