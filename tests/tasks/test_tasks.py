"""Tasks: per-sample losses beside slow definitions, evaluation, masks, encoding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import cross_entropy, log_softmax

from ffm_secure.errors import ModelError
from ffm_secure.lifecycle.finetune import TOKENS_OF_A_PASS, cheapest_ends, similar_lengths
from ffm_secure.models.backbone import load_backbone
from ffm_secure.tasks import TASKS, Encoded, EncodedText, MaskedLM, Task, build_task

GRID = [
    ("tiny-bert", "text_classification"),
    ("tiny-gpt2", "text_classification"),
    ("tiny-llama", "text_classification"),
    ("tiny-bert", "masked_lm"),
    ("tiny-gpt2", "causal_lm"),
    ("tiny-llama", "causal_lm"),
    ("tiny-vit", "image_classification"),
]
TEXTS = [
    "A good movie.",
    "bad",
    "the plot is long and the story is not good at all, but the end was great!",
    "",
    "I love it",
]
LABELS = np.array([1, 0, 2, 1, 0])


class Table:
    """Examples by column."""

    def __init__(self, **columns: Any) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def column(self, name: str) -> Any:
        return self.columns[name]


def table(kind: str) -> Table:
    if kind == "image_classification":
        pictures = np.random.default_rng(3).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
        return Table(picture=pictures, label=LABELS)
    return Table(text=TEXTS, other=TEXTS[::-1], label=LABELS)


def prepare(
    name: str, kind: str, *, text: Sequence[str] = ("text",), **options: Any
) -> tuple[Task, Any, Encoded]:
    dtype = options.pop("dtype", "float32")
    backbone = load_backbone(f"builtin:{name}", kind=kind, labels=3, base=Path(), seed=5, dtype=dtype)
    pictures = kind == "image_classification"
    columns = SimpleNamespace(
        text_columns=() if pictures else tuple(text),
        label_column="label",
        image_column="picture" if pictures else None,
    )
    task = build_task(kind, backbone=backbone, dataset=columns, **options)
    with torch.no_grad():  # spread the random weights, so that losses of different samples differ clearly
        for parameter in backbone.model.parameters():
            parameter.mul_(3.0)
    return task, backbone.model, task.encode(table(kind))


def losses(task: Task, model: Any, encoded: Encoded, rows: Sequence[int]) -> torch.Tensor:
    with torch.inference_mode():
        return task.losses(model, task.batch(encoded, rows, device="cpu"))


@pytest.mark.parametrize("name, kind", GRID)
def test_a_sample_has_the_same_loss_alone_and_in_any_company(name: str, kind: str) -> None:
    task, model, encoded = prepare(name, kind)
    together = losses(task, model, encoded, range(5))
    assert together.shape == (5,)
    assert together.dtype == torch.float32
    assert together.std() > 1e-3
    for rows in ([0], [3], [2, 4], [4, 2, 1], [1, 1, 0]):
        torch.testing.assert_close(losses(task, model, encoded, rows), together[rows], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name, kind", GRID)
def test_evaluation_does_not_depend_on_batch_size_or_order(name: str, kind: str) -> None:
    task, model, encoded = prepare(name, kind)
    whole = task.evaluate(model, encoded, batch_size=5)
    single = task.evaluate(model, encoded, batch_size=1)
    assert single.loss == pytest.approx(whole.loss, rel=1e-5)
    assert single.metric == pytest.approx(whole.metric, rel=1e-4)
    if kind != "masked_lm":  # there the masks belong to the rows
        turned = task.evaluate(model, encoded.take([4, 3, 2, 1, 0]), batch_size=2)
        assert turned.loss == pytest.approx(whole.loss, rel=1e-5)


@pytest.mark.parametrize("name, kind", GRID)
def test_evaluation_leaves_training_mode_as_it_was(name: str, kind: str) -> None:
    task, model, encoded = prepare(name, kind)
    task.evaluate(model.train(), encoded)
    assert model.training


@pytest.mark.parametrize("name, kind", [pair for pair in GRID if pair[1].endswith("classification")])
def test_classification_by_definition(name: str, kind: str) -> None:
    task, model, encoded = prepare(name, kind)
    right, total = 0, 0.0
    for row in range(5):
        batch = task.batch(encoded, [row], device="cpu")
        label = int(batch.pop("labels"))
        with torch.inference_mode():
            scores = model(**batch).logits[0]
        total -= float(log_softmax(scores, dim=0)[label])
        right += int(scores.argmax()) == label
    result = task.evaluate(model, encoded)
    assert result.loss == pytest.approx(total / 5, rel=1e-5)
    assert result.metric == right / 5
    assert float(losses(task, model, encoded, range(5)).mean()) == pytest.approx(total / 5, rel=1e-5)


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_causal_loss_and_perplexity_by_definition(name: str) -> None:
    task, model, encoded = prepare(name, "causal_lm")
    assert isinstance(encoded, EncodedText)
    means, nats, count = [], 0.0, 0
    for row in range(5):
        tokens = torch.from_numpy(
            encoded.tokens[encoded.offsets[row] : encoded.offsets[row + 1]].astype(np.int64)
        )
        with torch.inference_mode():
            scores = model(input_ids=tokens.unsqueeze(0)).logits[0]
        parts = [-float(log_softmax(scores[i], dim=0)[tokens[i + 1]]) for i in range(len(tokens) - 1)]
        means.append(sum(parts) / len(parts))
        nats, count = nats + sum(parts), count + len(parts)
    torch.testing.assert_close(
        losses(task, model, encoded, range(5)), torch.tensor(means), atol=1e-4, rtol=1e-5
    )
    result = task.evaluate(model, encoded, batch_size=2)
    assert result.loss == pytest.approx(nats / count, rel=1e-5)
    assert result.metric == pytest.approx(math.exp(nats / count), rel=1e-4)


def test_a_sequence_with_nothing_to_predict_costs_nothing() -> None:
    task, model, _ = prepare("tiny-llama", "causal_lm")
    short = EncodedText(tokens=np.array([7, 2, 9, 9], dtype=np.int32), offsets=np.array([0, 1, 4]))
    values = losses(task, model, short, [0, 1])
    assert values[0] == 0.0
    assert values[1] > 0.0


def test_masked_loss_by_definition() -> None:
    task, model, encoded = prepare("tiny-bert", "masked_lm")
    batch = task.batch(encoded, range(5), device="cpu", generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        scores = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        values = task.losses(model, batch)
    for row in range(5):
        asked = [i for i in range(scores.shape[1]) if batch["targets"][row, i] != -100]
        parts = [float(cross_entropy(scores[row, i], batch["targets"][row, i])) for i in asked]
        wanted = sum(parts) / len(parts) if parts else 0.0
        assert float(values[row]) == pytest.approx(wanted, rel=1e-4)


def masked_table(rows: int, seed: int = 0) -> tuple[MaskedLM, EncodedText]:
    task, _, _ = prepare("tiny-bert", "masked_lm", max_length=128)
    stream = np.random.default_rng(seed)
    words = ["the", "patient", "was", "good", "pain", "home", "day", "story"]
    encoded = task.encode(Table(text=[" ".join(stream.choice(words, 60)) for _ in range(rows)]))
    assert isinstance(task, MaskedLM)
    assert isinstance(encoded, EncodedText)
    return task, encoded


def test_masks_follow_the_published_shares() -> None:
    """Devlin et al. 2019: 15 % of the tokens;
    of these 80 % masked, 10 % replaced, 10 % kept. 12,000 draws, 5 sigma.
    """
    task, encoded = masked_table(200)
    original = task.batch(encoded, range(200), device="cpu", generator=torch.Generator().manual_seed(1))
    hidden = original["targets"] != -100
    plain = torch.where(hidden, original["targets"], original["input_ids"])
    assert not task.special[plain[hidden].numpy()].any()
    count = int(hidden.sum())
    assert abs(count / 12_000 - 0.15) < 5 * math.sqrt(0.15 * 0.85 / 12_000)
    shown = original["input_ids"][hidden]
    shares = {
        0.8: float((shown == task.tokenizer.mask_token_id).float().mean()),
        0.1: float((shown == plain[hidden]).float().mean()),
    }
    for wanted, seen in shares.items():
        assert abs(seen - wanted) < 5 * math.sqrt(wanted * (1 - wanted) / count)
    assert torch.equal(original["input_ids"][~hidden], plain[~hidden])


def test_every_text_hides_at_least_one_token_and_texts_without_words_none() -> None:
    task, _, encoded = prepare("tiny-bert", "masked_lm")
    for seed in range(20):
        batch = task.batch(encoded, range(5), device="cpu", generator=torch.Generator().manual_seed(seed))
        hidden = (batch["targets"] != -100).sum(dim=1)
        assert hidden[[0, 1, 2, 4]].min() >= 1
        assert hidden[3] == 0  # the empty text


def test_training_masks_change_and_evaluation_masks_stay() -> None:
    task, encoded = masked_table(3)
    stream = torch.Generator().manual_seed(1)
    one, two = (task.batch(encoded, [0, 1], device="cpu", generator=stream)["targets"] for _ in range(2))
    again = task.batch(encoded, [0, 1], device="cpu", generator=torch.Generator().manual_seed(1))["targets"]
    assert not torch.equal(one, two)
    assert torch.equal(one, again)
    fixed = [task.batch(encoded, rows, device="cpu")["targets"] for rows in ([0, 1], [1])]
    assert torch.equal(fixed[0][1], fixed[1][0])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 64), max_size=40), st.integers(1, 9))
def test_parts_hold_every_sample_once_and_alike_in_length(lengths: list[int], most: int) -> None:
    encoded = EncodedText(tokens=np.zeros(sum(lengths), dtype=np.int32), offsets=np.cumsum([0, *lengths]))
    parts = list(similar_lengths(encoded, np.arange(len(lengths)), most))
    assert sorted(np.concatenate([[], *parts])) == list(range(len(lengths)))
    held = [[lengths[int(row)] for row in part] for part in parts]
    assert all(len(part) <= most for part in held)
    assert all(max(shorter) <= min(longer) for shorter, longer in pairwise(held))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=9), st.integers(1, 5))
def test_no_other_cuts_cost_less(lengths: list[int], most: int) -> None:
    rising, cheapest = np.sort(lengths), math.inf
    for ways in range(2 ** (len(lengths) - 1)):
        inner = [place + 1 for place in range(len(lengths) - 1) if ways >> place & 1]
        cuts = [0, *inner, len(lengths)]
        if all(end - start <= most for start, end in pairwise(cuts)):
            cheapest = min(cheapest, cost_of(rising, cuts))
    assert cost_of(rising, [0, *cheapest_ends(rising, most)]) == cheapest


def cost_of(rising: np.ndarray, cuts: Sequence[int]) -> int:
    return sum(TOKENS_OF_A_PASS + (end - start) * int(rising[end - 1]) for start, end in pairwise(cuts))


def test_short_texts_are_not_padded_to_one_long_one() -> None:
    lengths = [5] * 30 + [64] * 2
    encoded = EncodedText(tokens=np.zeros(sum(lengths), dtype=np.int32), offsets=np.cumsum([0, *lengths]))
    assert [len(part) for part in similar_lengths(encoded, np.arange(32), 64)] == [30, 2]
    padded = similar_lengths(encoded, np.arange(32), 64, length=64)  # all cost the same: nothing to win
    assert [len(part) for part in padded] == [32]
    elsewhere = similar_lengths(encoded, np.arange(32), 64, device="cuda")  # there a pass costs much more
    assert [len(part) for part in elsewhere] == [32]


def test_parts_do_not_change_the_gradient() -> None:
    task, model, encoded = prepare("tiny-bert", "text_classification")
    model.classifier.weight.requires_grad_(True)
    whole = torch.autograd.grad(
        task.losses(model, task.batch(encoded, range(5), device="cpu")).sum(), model.classifier.weight
    )[0]
    parts = list(similar_lengths(encoded, np.arange(5), 4))
    assert len(parts) > 1
    split = [
        torch.autograd.grad(
            task.losses(model, task.batch(encoded, p, device="cpu")).sum(), model.classifier.weight
        )[0]
        for p in parts
    ]
    torch.testing.assert_close(torch.stack(split).sum(0), whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rows", [[0], [4, 0, 0], [], [1, 2, 3]])
def test_taking_rows_keeps_tokens_and_labels(rows: list[int]) -> None:
    _, _, encoded = prepare("tiny-bert", "text_classification")
    assert isinstance(encoded, EncodedText)
    part = encoded.take(rows)
    assert len(part) == len(rows)
    for place, row in enumerate(rows):
        wanted = encoded.tokens[encoded.offsets[row] : encoded.offsets[row + 1]]
        assert np.array_equal(part.tokens[part.offsets[place] : part.offsets[place + 1]], wanted)
    assert part.labels is not None
    assert part.labels.tolist() == LABELS[rows].tolist()


def test_texts_are_cut_padded_and_kept_compact() -> None:
    task, _, encoded = prepare("tiny-bert", "text_classification", max_length=8)
    assert isinstance(encoded, EncodedText)
    assert encoded.tokens.dtype == np.int32
    assert encoded.lengths().max() == 8
    assert encoded.lengths().min() >= 1  # an empty text still is a sequence
    batch = task.batch(encoded, [1], device="cpu")
    assert batch["input_ids"].shape[1] == encoded.lengths()[1] < 8
    fixed, _, same = prepare("tiny-bert", "text_classification", max_length=8, fixed_length=True)
    padded = fixed.batch(same, [1], device="cpu")
    assert padded["input_ids"].shape == (1, 8)
    assert padded["attention_mask"].sum() == encoded.lengths()[1]


@pytest.mark.parametrize("name", ["tiny-bert", "tiny-llama"])
def test_below_float32_the_length_of_one_text_does_not_round_another(name: str) -> None:
    """Padded to the longest of the batch,
    a sample's loss in bfloat16 moved with the length of its company.
    """
    task, model, encoded = prepare(name, "text_classification", max_length=24, dtype="bfloat16")
    batches = [task.batch(encoded, rows, device="cpu") for rows in ([1], [1, 0])]
    assert {batch["input_ids"].shape[1] for batch in batches} == {24}
    shortest = int(np.argmin(encoded.lengths()))
    longest = int(np.argmax(encoded.lengths()))
    company = [losses(task, model, encoded, [shortest, other])[0] for other in (shortest, longest)]
    assert company[0] == company[1]


def test_pairs_of_texts_carry_segments() -> None:
    task, model, _ = prepare("tiny-bert", "text_classification", text=("text", "other"))
    encoded = task.encode(
        Table(text=["a good day", "bad"], other=["not bad", "the end was great"], label=[0, 1])
    )
    assert isinstance(encoded, EncodedText)
    batch = task.batch(encoded, [0, 1], device="cpu")
    single = task.backbone.tokenizer("bad", "the end was great")
    assert batch["token_type_ids"][1].tolist() == single["token_type_ids"]
    assert batch["token_type_ids"].max() == 1
    decoder, _, _ = prepare("tiny-gpt2", "text_classification", text=("text", "other"))
    assert "token_type_ids" not in decoder.batch(
        decoder.encode(table("text_classification")), [0], device="cpu"
    )
    together = losses(task, model, encoded, [0, 1])
    torch.testing.assert_close(losses(task, model, encoded, [0]), together[:1], atol=2e-5, rtol=2e-5)


def test_pictures_of_the_right_size_pass_unchanged_and_are_normalised_in_the_batch() -> None:
    task, _, encoded = prepare("tiny-vit", "image_classification")
    raw = table("image_classification").column("picture")
    batch = task.batch(encoded, [2], device="cpu")
    wanted = (torch.from_numpy(raw[2]).permute(2, 0, 1).float() / 255 - 0.5) / 0.5
    torch.testing.assert_close(batch["pixel_values"][0], wanted)


def test_resizing_agrees_with_pillow() -> None:
    task, _, _ = prepare("tiny-vit", "image_classification")
    smooth = np.zeros((1, 48, 40, 3), dtype=np.uint8)
    smooth[0] = (
        np.add.outer(np.arange(48) * 2, np.arange(40) * 3)[..., None] + np.array([0, 20, 40])
    ).astype(np.uint8)
    encoded = task.encode(Table(picture=smooth, label=[0]))
    wanted = np.asarray(Image.fromarray(smooth[0]).resize((32, 32), Image.Resampling.BILINEAR), dtype=float)
    assert np.abs(encoded.pixels[0].permute(1, 2, 0).numpy() - wanted).max() <= 1.0


def test_grey_pictures_fill_all_channels() -> None:
    task, _, _ = prepare("tiny-vit", "image_classification")
    encoded = task.encode(Table(picture=np.full((2, 8, 8), 77, dtype=np.uint8), label=[0, 1]))
    assert encoded.pixels.shape == (2, 3, 32, 32)
    assert (encoded.pixels == 77).all()


def test_majority_answers_with_the_commonest_training_label() -> None:
    task, _, _ = prepare("tiny-bert", "text_classification")
    train, validation = (
        Table(text=["x"] * 4, label=[2, 2, 0, 1]),
        Table(text=["x"] * 5, label=[2, 2, 2, 0, 1]),
    )
    assert task.majority(train, validation) == 0.6
    language, _, _ = prepare("tiny-llama", "causal_lm")
    assert language.majority(train, validation) is None


def test_nothing_to_evaluate_is_not_a_number() -> None:
    task, model, encoded = prepare("tiny-bert", "text_classification")
    empty = task.evaluate(model, encoded.take([]))
    assert math.isnan(empty.loss)
    assert math.isnan(empty.metric)


def test_labels_outside_the_model_are_refused() -> None:
    task, _, _ = prepare("tiny-bert", "text_classification")
    with pytest.raises(ModelError, match="classes 0 to 2"):
        task.encode(Table(text=["x"], label=[3]))


@pytest.mark.parametrize("length", [1, 257])
def test_a_length_the_model_cannot_hold_is_refused(length: int) -> None:
    with pytest.raises(ModelError, match=f"max_length = {length}"):
        prepare("tiny-bert", "text_classification", max_length=length)


def test_unfitting_models_and_columns_are_refused() -> None:
    backbone = load_backbone("builtin:tiny-gpt2", kind="causal_lm", labels=None, base=Path(), seed=1)
    with pytest.raises(ModelError, match=r"task\.text_column"):
        build_task("causal_lm", backbone=backbone, dataset=SimpleNamespace(text_columns=("a", "b")))
    with pytest.raises(ModelError, match="must be one of"):
        build_task("sorting", backbone=backbone, dataset=SimpleNamespace())
    with pytest.raises(ModelError, match="takes no pictures"):
        build_task("image_classification", backbone=backbone, dataset=SimpleNamespace(image_column="x"))
    unlabelled = build_task(
        "text_classification", backbone=backbone, dataset=SimpleNamespace(text_columns=("text",))
    )
    with pytest.raises(ModelError, match=r"task\.label_column"):
        unlabelled.encode(table("text_classification"))
    backbone.tokenizer.mask_token = None
    with pytest.raises(ModelError, match="no mask token"):
        build_task("masked_lm", backbone=backbone, dataset=SimpleNamespace(text_columns=("text",)))


def test_every_kind_states_its_metric() -> None:
    tasks = {kind: TASKS.load(kind) for kind in TASKS}
    assert {kind: (c.metric_name, c.higher_is_better) for kind, c in tasks.items()} == {
        "text_classification": ("accuracy", True),
        "causal_lm": ("perplexity", False),
        "masked_lm": ("masked-token accuracy", True),
        "image_classification": ("accuracy", True),
        "sequence_to_sequence": ("perplexity", False),
        "image_text_classification": ("accuracy", True),
        "image_text_contrastive_classification": ("accuracy", True),
    }
    assert all(kind == c.kind for kind, c in tasks.items())


def test_a_tiny_model_learns_a_rule_it_was_not_built_with() -> None:
    """60 plain steps on 'good' against 'bad'; unseen sentences."""
    backbone = load_backbone("builtin:tiny-bert", kind="text_classification", labels=2, base=Path(), seed=5)
    task = build_task(
        "text_classification",
        backbone=backbone,
        dataset=SimpleNamespace(text_columns=("text",), label_column="label"),
    )
    nouns = ["movie", "story", "film", "day", "plan", "home", "work", "end"]
    rows = [(f"the {noun} was {word}", label) for noun in nouns for label, word in enumerate(("bad", "good"))]
    train = task.encode(Table(text=[r[0] for r in rows[:12]], label=[r[1] for r in rows[:12]]))
    unseen = task.encode(Table(text=[r[0] for r in rows[12:]], label=[r[1] for r in rows[12:]]))
    backbone.model.requires_grad_(True)
    optimizer = torch.optim.Adam(backbone.model.parameters(), lr=2e-3)
    for _ in range(60):
        optimizer.zero_grad()
        task.losses(backbone.model, task.batch(train, range(12), device="cpu")).mean().backward()
        optimizer.step()
    assert task.evaluate(backbone.model, unseen).metric == 1.0
