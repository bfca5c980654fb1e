"""Models that learned chats or prompts are asked as they were taught, and answer with the answer alone."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ffm_secure.cli import predict
from ffm_secure.data.chat import pack
from ffm_secure.errors import ConfigError, ModelError
from ffm_secure.models.backbone import load_backbone
from ffm_secure.tasks import TaskData, build_task
from ffm_secure.tasks.chat import end_of_answer, render_all, render_question
from ffm_secure.tasks.encoded import encode_answered
from ffm_secure.trainable.predictor import Predictor
from tests.tasks.test_marks import FORGED, byte_level


class Parrot(torch.nn.Module):
    """Says a fixed row of tokens behind whatever it is given, and notes what that was."""

    def __init__(self, words: list[int], size: int) -> None:
        super().__init__()
        self.words, self.size, self.given = words, size, list[list[int]]()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        if not self.given:
            self.given.append(input_ids[0].tolist())
        place = input_ids.shape[1] - len(self.given[0])
        logits = torch.zeros(1, input_ids.shape[1], self.size)
        logits[0, -1, self.words[place]] = 1.0
        return SimpleNamespace(logits=logits)


def predictor(tokenizer: Any, layout: str, answer: list[int], places: int | None = None) -> Predictor:
    model = Parrot([*answer, *[0] * 64], len(tokenizer))
    trained: Any = SimpleNamespace(
        model=model, backbone=SimpleNamespace(tokenizer=tokenizer, max_positions=places)
    )
    export: Any = SimpleNamespace(task="causal_lm", layout=layout, max_length=64, text_columns=("messages",))
    return Predictor(trainable=trained, task=None, export=export)  # type: ignore[arg-type]


def learned(tokenizer: Any, turns: list[tuple[str, str]]) -> list[int]:
    """Return the tokens of a chat of training up to its answer, as the task encodes them."""
    (chat,) = render_all(tokenizer, [pack(turns)])
    encoded = encode_answered(
        tokenizer, [chat.text], [chat.answers], max_length=400, special=False, quoted=[chat.quoted]
    )
    assert encoded.asked is not None
    first: int = int(np.flatnonzero(encoded.asked)[0])
    return list(map(int, encoded.tokens[:first]))


@pytest.mark.parametrize("words", ["hello there", FORGED, "a \ue000 b \uf8f0"])
def test_a_question_is_what_training_put_before_an_answer(words: str) -> None:
    tokenizer = byte_level()
    mark = tokenizer.convert_tokens_to_ids("<|im_end|>")
    asked = predictor(tokenizer, "template", [*tokenizer("fine")["input_ids"], mark, 7, 7])
    (answer,) = asked.chats([[("system", "be kind"), ("user", words)]])
    assert answer.answer == "fine", "up to the mark behind an answer, without the question"
    turns = [("system", "be kind"), ("user", words), ("assistant", "fine")]
    assert asked.trainable.model.given == [learned(tokenizer, turns)]


def test_an_answer_that_is_there_already_is_not_shown_to_the_model() -> None:
    tokenizer = byte_level()
    asked = predictor(tokenizer, "template", [tokenizer.eos_token_id])
    asked.chats([[("user", "a"), ("assistant", "b")]])
    assert asked.trainable.model.given == [learned(tokenizer, [("user", "a"), ("assistant", "b")])]
    with pytest.raises(ModelError, match="asks nothing"):
        asked.chats([[("assistant", "b")]])


def test_turns_without_a_template_are_lines_as_in_training() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = None
    asked = predictor(tokenizer, "lines", tokenizer(" fine\nuser: and")["input_ids"])
    assert asked.chats([[("user", "a</s>")]])[0].answer.startswith("fine")
    (given,) = asked.trainable.model.given
    assert tokenizer.decode(given) == "user: a</s>\nassistant: "
    assert tokenizer.eos_token_id not in given
    assert "and" not in asked.chats([[("user", "a</s>")]])[0].answer


def test_a_chat_without_room_for_an_answer_is_refused() -> None:
    asked = predictor(byte_level(), "template", [0], places=20)
    with pytest.raises(ModelError, match="no room for an answer within the 20 places"):
        asked.chats([[("user", "a" * 30)]])


def test_a_template_that_refuses_a_chat_is_one_sentence() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ModelError, match=r"refuses this chat \(roles must alternate"):
        render_question(tokenizer, [("user", "a")])
    tokenizer.chat_template = "nothing"
    with pytest.raises(ModelError, match="no word of an answer"):
        render_question(tokenizer, [("user", "a")])


def test_the_mark_behind_an_answer_is_the_templates() -> None:
    tokenizer = byte_level()
    question = render_question(tokenizer, [("user", "a")])
    assert question.behind == "<|im_end|>\n"
    assert end_of_answer(tokenizer, question.behind) == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    assert end_of_answer(tokenizer, "\n") == ()


def test_a_prompt_is_asked_with_the_line_break_of_training() -> None:
    backbone = load_backbone("builtin:tiny-gpt2", kind="causal_lm", labels=None, base=Path(), seed=0)
    data = TaskData(text_columns=("prompt+completion",), answered=("prompt", "completion"))
    assert build_task("causal_lm", backbone=backbone, dataset=data).layout == "answered"
    tokenizer = byte_level()
    tokenizer.chat_template = None
    asked = predictor(tokenizer, "answered", [*tokenizer("yes")["input_ids"], tokenizer.eos_token_id])
    assert asked.texts([["is it?"]])[0].answer == "yes"
    assert tokenizer.decode(asked.trainable.model.given[0]) == "is it?\n"


def test_texts_and_tables_are_read_as_chats(tmp_path: Path) -> None:
    tokenizer = byte_level()
    asked = predictor(tokenizer, "template", [tokenizer.eos_token_id])
    assert predict._turns("hello") == [("user", "hello")]
    chat = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert predict._turns(json.dumps(chat)) == [("user", "a"), ("assistant", "b")]
    with pytest.raises(ConfigError, match="without a role"):
        predict._turns('[{"content": "a"}]')
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": chat}) + "\n")
    assert predict._chats(asked, predict._table(file, ""), file) == [[("user", "a"), ("assistant", "b")]]
    file.write_text(json.dumps({"messages": "a question"}) + "\n")
    assert predict._chats(asked, predict._table(file, ""), file) == [[("user", "a question")]]
    file.write_text('{"text": "a"}\n')
    with pytest.raises(ConfigError, match="has no column 'messages', which the model reads; it has text"):
        predict._chats(asked, predict._table(file, ""), file)
