"""Loss on the answer alone: of a prompt with its answer,
and of a chat in the words of the model's own template.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ffm_secure.data.chat import pack
from ffm_secure.data.dataset import Examples
from ffm_secure.errors import ModelError
from ffm_secure.models.backbone import load_backbone
from ffm_secure.tasks import TaskData
from ffm_secure.tasks.chat import NO_TEMPLATE, render_all
from ffm_secure.tasks.encoded import IGNORED
from ffm_secure.tasks.text import CausalLM

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TURNS = [("user", "rate the soup"), ("assistant", "it was good"), ("user", "and tea"), ("assistant", "bad")]


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("builtin:tiny-gpt2", kind="causal_lm", labels=None, base=Path("."), seed=0)


@pytest.fixture
def templated(backbone):
    backbone.tokenizer.chat_template = TEMPLATE
    yield backbone
    backbone.tokenizer.chat_template = None


def task(backbone, **data) -> CausalLM:
    return CausalLM(backbone, TaskData(**data), max_length=48)


def prompts(answers_only: bool, backbone) -> tuple[CausalLM, Examples]:
    rows = Examples(
        columns={
            "q": ["is it good", "tea"],
            "a": ["yes it is", "no"],
            "q+a": ["is it good\nyes it is", "tea\nno"],
        }
    )
    return task(backbone, text_columns=("q+a",), answered=("q", "a"), answers_only=answers_only), rows


def test_only_the_answer_of_a_prompt_is_learned(backbone):
    made, rows = prompts(True, backbone)
    batch = made.batch(made.encode(rows), [0, 1], device="cpu")
    for row, answer in enumerate(rows.column("a")):
        asked = batch["targets"][row] != IGNORED
        assert backbone.tokenizer.decode(batch["input_ids"][row][asked]).strip() == answer
        assert (batch["targets"][row][asked] == batch["input_ids"][row][asked]).all()


def test_the_loss_is_the_slow_mean_over_the_answers_tokens(backbone):
    made, rows = prompts(True, backbone)
    batch = made.batch(made.encode(rows), [0, 1], device="cpu")
    losses = made.losses(backbone.model, batch)
    scores = backbone.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    for row in range(2):
        nats = [
            -torch.log_softmax(scores[row, place - 1], dim=-1)[batch["input_ids"][row, place]]
            for place in range(1, batch["input_ids"].shape[1])
            if batch["targets"][row, place] != IGNORED
        ]
        assert losses[row].item() == pytest.approx(torch.stack(nats).mean().item(), abs=1e-5)


def test_without_the_choice_every_token_is_learned(backbone):
    made, rows = prompts(False, backbone)
    assert "targets" not in made.batch(made.encode(rows), [0, 1], device="cpu")


def test_choosing_rows_keeps_what_is_asked_beside_its_token(backbone):
    made, rows = prompts(True, backbone)
    encoded = made.encode(rows)
    alone = made.batch(encoded.take([1]), [0], device="cpu")
    whole = made.batch(encoded, [1], device="cpu")
    assert (alone["targets"] == whole["targets"]).all()


def test_an_answer_that_is_cut_off_has_no_loss_and_no_gradient(backbone):
    rows = Examples(columns={"q": ["soup " * 60], "a": ["yes"], "q+a": ["soup " * 60 + "\nyes"]})
    made = task(backbone, text_columns=("q+a",), answered=("q", "a"))
    assert made.losses(backbone.model, made.batch(made.encode(rows), [0], device="cpu")).tolist() == [0.0]


def test_the_share_of_answers_that_are_cut_off_is_counted(backbone):
    texts = ["soup " * 60 + "\nyes", "tea\nno", "tea\nyes", "bread " * 60 + "\nno"]
    answers = [text.split("\n")[1] for text in texts]
    rows = Examples(columns={"q": [text.split("\n")[0] for text in texts], "a": answers, "q+a": texts})
    assert task(backbone, text_columns=("q+a",), answered=("q", "a")).unanswered(rows) == 0.5
    whole = task(backbone, text_columns=("q+a",), answered=("q", "a"), answers_only=False)
    assert whole.unanswered(rows) is None


def test_a_chat_is_written_by_the_template_and_its_answers_end_with_their_mark(templated):
    made = task(templated, text_columns=("messages",), is_chat=True)
    rendered = render_all(templated.tokenizer, [pack(TURNS)])[0]
    assert rendered.text.startswith("<|user|>\nrate the soup<|end|>\n<|assistant|>\nit was good<|end|>\n")
    assert [rendered.text[start:end] for start, end in rendered.answers] == [
        "it was good<|end|>\n",
        "bad<|end|>\n",
    ]
    assert made.notes == ()
    batch = made.batch(made.encode(Examples(columns={"messages": [pack(TURNS)]})), [0], device="cpu")
    asked = batch["targets"][0] != IGNORED
    assert 0 < int(asked.sum()) < len(asked)


def test_a_template_that_rewrites_earlier_turns_still_shows_where_the_answers_are(templated):
    templated.tokenizer.chat_template = "{{ messages | length }}: " + TEMPLATE
    rendered = render_all(templated.tokenizer, [pack(TURNS)])[0]
    assert [rendered.text[start:end] for start, end in rendered.answers] == ["it was good", "bad"]


def test_a_model_without_template_gets_plain_lines_and_says_so(backbone):
    made = task(backbone, text_columns=("messages",), is_chat=True)
    rendered = render_all(backbone.tokenizer, [pack(TURNS)])[0]
    assert rendered.text == "user: rate the soup\nassistant: it was good\nuser: and tea\nassistant: bad\n"
    assert [rendered.text[start:end] for start, end in rendered.answers] == ["it was good\n", "bad\n"]
    assert made.notes == (NO_TEMPLATE,)


def test_chats_that_a_template_refuses_are_counted_and_not_shown(templated):
    templated.tokenizer.chat_template = (
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('must begin with the user') }}{% endif %}"
        + TEMPLATE
    )
    with pytest.raises(ModelError, match=r"refuses 2 of 3 chats \(must begin with the user\)") as caught:
        render_all(templated.tokenizer, [pack(TURNS), pack(TURNS[1:]), pack(TURNS[3:])])
    assert "soup" not in str(caught.value)
